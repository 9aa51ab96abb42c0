"""A pytest plugin: tests that run CUDA code on the host (`CudaOnHost`) run its PTX instead, and fail on any finding.

`python -m pytest -p tests.ptx.plugin FILES`, in the environment of `tests.ptx.build.preloaded`. MSACORE_PTX_SOURCES
names the folders in csrc that the tests need, all by default; MSACORE_PTX_SIZES=production gives them the sizes of a
CUDA build.
"""

import os
from collections.abc import Iterator

import pytest

from tests.nvcc import SOURCES
from tests.ptx.machine import Machine

_machine: list[Machine] = []  # one entry; none if the module is only imported


def pytest_configure() -> None:
    folders = os.environ.get("MSACORE_PTX_SOURCES", "").split()
    _machine.append(Machine())
    small = os.environ.get("MSACORE_PTX_SIZES") != "production"
    _machine[0].run_instead([source for source in SOURCES if not folders or source.parent.name in folders], small)


@pytest.fixture(autouse=True)
def _nothing_is_found() -> Iterator[None]:
    _machine[0].findings()
    yield
    assert _machine[0].findings() == []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{_machine[0].launches} launches of PTX")
    terminalreporter.write_line(f"in no dtype: {' '.join(_machine[0].idle()) or 'none'}")
