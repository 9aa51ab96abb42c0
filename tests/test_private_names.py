"""A later torch may lack names that are not public: msacore uses them in one place, and works without them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.without_private_names import PRIVATE

ROOT = Path(__file__).resolve().parent.parent


def _results_without(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.without_private_names", name], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all operators gave their results" in done.stdout


def test_all_private_names_may_be_missing() -> None:
    _results_without("all")


@pytest.mark.slow  # a process for each name
@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_any_private_name_may_be_missing(name: str) -> None:
    _results_without(name)


def test_private_names_of_torch_stand_in_one_place() -> None:
    guarded = ROOT / "msacore" / "ops" / "_torch.py"
    assert set(re.findall(r'"(_[a-zA-Z]\w+)"', guarded.read_text())) - {"_C"} == PRIVATE
    private = re.compile(r"\btorch(?:\.\w+)*\._(?!_)\w+|from torch[\w.]* import _(?!_)\w+|\._schema\b")
    # The report for bug reports lists kernels by names that torch's own tests use; it is not part of a computation. The
    # functional collectives are found in one place of their own, which tries their public module first.
    others = ROOT / "msacore" / "__main__.py", ROOT / "msacore" / "distributed" / "collectives.py"
    for source in sorted((ROOT / "msacore").rglob("*.py")):
        if source not in (guarded, *others):
            found = private.findall(source.read_text())
            assert not found, f"{source.relative_to(ROOT)} uses {found}: find them in ops/_torch.py, with a fallback"
