"""The source distribution and the wheel: complete, and usable by themselves."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import msacore

ROOT = Path(__file__).resolve().parent.parent
# Files that the build adds, and files that only the repository needs.
ADDED = {"PKG-INFO", "setup.cfg"}
LEFT_OUT = {".github"}


def test_citation_and_changelog_are_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {msacore.__version__}\n" in citation
    assert changes.split("\n## ")[1].startswith(msacore.__version__)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, made from a copy of what git tracks, unpacked."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "copy"
    for name in _tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        # The argument `filter` is younger than some Python 3.10 and 3.11; the attribute is not read there.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder / "unpacked")
    (tree,) = (folder / "unpacked").iterdir()
    return tree


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


@pytest.mark.slow  # a build front end takes seconds
def test_the_source_distribution_holds_every_tracked_file(unpacked: Path) -> None:
    packed = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    packed = {name for name in packed if name not in ADDED and ".egg-info/" not in name}
    assert packed == {name for name in _tracked() if name.split("/")[0] not in LEFT_OUT}


@pytest.mark.slow  # as above
def test_tests_run_from_an_unpacked_source_distribution(unpacked: Path) -> None:
    for library in Path(msacore.__file__).parent.glob("*.so"):
        shutil.copy2(library, unpacked / "msacore" / library.name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_uncertainty.py"]
    done = subprocess.run(
        [*command, "tests/test_build.py", "-k", "not report"], cwd=unpacked, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow  # as above
def test_the_build_stops_where_operators_are_missing(unpacked: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(unpacked, broken)
    for source in (broken / "csrc").glob("*/*.cpp"):
        source.unlink()
    done = subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=broken, capture_output=True, text=True)
    assert done.returncode != 0 and "incomplete" in done.stderr
