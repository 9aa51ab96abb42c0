"""A pytest plugin: tests that run CUDA code on the host (`CudaOnHost`) run its PTX, and fail by what was found.

`python -m pytest -p tests.ptx.plugin FILES`, in the environment of `tests.ptx.build.preloaded`. MSACORE_PTX_SOURCES
names the folders in csrc that the tests need, all by default.
"""

import os
from collections.abc import Iterator

import pytest

from tests.nvcc import SOURCES
from tests.ptx.machine import Machine

_folders = os.environ.get("MSACORE_PTX_SOURCES", "").split()
_machine = Machine()
_machine.run_instead([source for source in SOURCES if not _folders or source.parent.name in _folders])


@pytest.fixture(autouse=True)
def _nothing_is_found() -> Iterator[None]:
    _machine.findings()
    yield
    assert _machine.findings() == []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"{_machine.launches} launches of PTX")
