"""What a call allocates is freed when it ends, not by the garbage collector, which knows no sizes of tensors."""

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from msacore import select
from msacore.selection import STRATEGIES, SelectionInterrupted
from msacore.selection.greedy import Cover
from tests import cases
from tests.opcase import FLOAT32, run
from tests.selection_ranks import split, together
from tests.test_selection import arguments, draw

ROOT = Path(__file__).resolve().parent.parent
N = 60


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Asserts that the code inside leaves no reference cycle behind."""
    gc.collect()
    gc.freeze()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        found = sorted({getattr(one, "__qualname__", type(one).__name__) for one in gc.garbage})
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()
    assert not found


def test_a_cycle_is_found() -> None:
    with pytest.raises(AssertionError, match="list"), no_garbage():
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle


def test_operators_leave_nothing(device: torch.device) -> None:
    samples = [(case, sample.arguments) for case in cases.ALL for sample in case.samples(device, FLOAT32)]
    for case in cases.ALL:  # the first call may create what stays
        run(case, case.op, next(arguments for one, arguments in samples if one is case))
    with no_garbage():
        for case, arguments in samples:
            run(case, case.op, arguments)


def test_selections_leave_nothing_but_their_result() -> None:
    def select_all() -> None:
        for strategy in STRATEGIES:
            given = arguments(strategy) | {"embeddings": draw(N, 4), "uncertainty": torch.rand(N)}
            given |= {"groups": torch.arange(N) % 6, "max_per_group": 4, "budget": 5}
            assert len(select(**given).indices) == 5
            if strategy not in ("typiclust", "probcover"):  # these two run in one process only
                assert all(len(one.indices) == 5 for one in together(split([20], given)))

    select_all()
    with no_garbage():
        select_all()


def test_an_interrupted_selection_leaves_nothing_but_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Cover, centers: torch.Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Cover, "add", interrupt)
    for _ in range(2):
        with no_garbage():
            try:
                select(draw(N, 4), 40, strategy="lcmd")
            except SelectionInterrupted as stop:
                made = len(stop.state["indices"])
        assert made < 40


_LEAVING = """
import gc, os, sys
from msacore.selection import __main__ as command

gc.disable()
assert command.main(sys.argv[1:]) == 0
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.mark.slow  # starts processes that import torch
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are named under /proc")
def test_the_threads_of_a_process_group_end_before_the_interpreter(tmp_path: Path) -> None:
    """A thread that still releases a tensor while the interpreter ends crashes the process."""
    (tmp_path / "leaving.py").write_text(_LEAVING)
    np.save(tmp_path / "x.npy", draw(N, 4).numpy())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "leaving.py"), str(tmp_path / "x.npy"), "--strategy", "kcenter", "--budget", "12"]
    command += ["--quiet", "--out", str(tmp_path / "picks.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stdout + ran.stderr
