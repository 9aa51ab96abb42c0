"""Runs that are killed at any moment go on and end with the same report; their processes do not outlive them."""

import json
import multiprocessing
import os
import random
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.al_hcl.__main__ import main as al_hcl
from examples.msa.files import TEMPORARY, remove_temporaries, write_atomic
from examples.msa.jobs import sole_user, spread
from examples.sslmm.__main__ import main as sslmm

COMMANDS = {
    "al_hcl": "run --size 60 --seeds 0 1 --rounds 2 --budget 4 --steps 6 --pretrain-steps 3 --width 8 --view first",
    "sslmm": "run --size 60 --seeds 0 1 --width 8 --steps 2 --pretrain-epochs 10 --finetune-epochs 11 --patience 12"
    " --methods SSLMM 'mean-filled MLP'",
}
MAIN = {"al_hcl": al_hcl, "sslmm": sslmm}
CONTEXT = multiprocessing.get_context("forkserver")
LIMIT = 300


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    """Processes fork from one that has imported everything: a kill hits work, not the import of torch."""
    lazy = ["matplotlib.backends.backend_agg", "scipy.stats", "sklearn.metrics", "torch._inductor"]
    CONTEXT.set_forkserver_preload(["examples.al_hcl.__main__", "examples.sslmm.__main__", *lazy])


def start(system: str, out: Path, jobs: int) -> Any:
    arguments = [*shlex.split(COMMANDS[system]), "--out", str(out), "--jobs", str(jobs), "--no-progress", "--resume"]
    process = CONTEXT.Process(target=MAIN[system], args=(arguments,))
    process.start()
    return process


def finish(process: Any) -> None:
    process.join(LIMIT)
    assert process.exitcode == 0, f"exit status {process.exitcode} (None: not done after {LIMIT} s)"


def numbers(out: Path) -> Any:
    """The report and the predictions, without times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    report = timeless(json.loads((out / "report.json").read_text())["data"])
    return report, {f.name: f.read_text() for f in sorted((out / "predictions").iterdir())}


def leftovers(out: Path) -> list[str]:
    return [str(f) for f in out.rglob(f".*{TEMPORARY}")] + [str(f) for f in (out / "cells").glob("*.pt")]


@pytest.mark.slow  # starts some fifty processes
@pytest.mark.parametrize("system", sorted(COMMANDS))
def test_killed_runs_end_with_the_same_report(system: str, tmp_path: Path) -> None:
    moments = random.Random(system)
    finish(start(system, tmp_path / "whole", 1))
    expected = numbers(tmp_path / "whole")
    for jobs, kills in ((1, 11), (2, 4)):
        begun = time.monotonic()
        finish(start(system, tmp_path / f"{jobs}-jobs", jobs))
        duration = time.monotonic() - begun
        assert numbers(tmp_path / f"{jobs}-jobs") == expected
        killed = trial = 0
        while killed < kills:
            # A trial that reaches its end is compared, and the next one starts afresh.
            out = tmp_path / f"{jobs}-{trial}"
            process = start(system, out, jobs)
            process.join(moments.uniform(0.0, 0.8 * duration))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join(LIMIT)
                killed += process.exitcode == -signal.SIGKILL
            if process.exitcode == 0 or killed == kills:
                finish(start(system, out, jobs))
                assert numbers(out) == expected and leftovers(out) == [], f"{jobs} jobs, trial {trial}"
                trial += 1


@dataclass(frozen=True)
class Doubled:
    """Work that holds a tensor and an array that share memory, and returns such a pair."""

    tensor: torch.Tensor
    array: np.ndarray

    def __call__(self, factor: int) -> tuple[torch.Tensor, np.ndarray]:
        assert np.array_equal(self.array, self.tensor.numpy())
        found = factor * self.tensor
        return found, found.numpy()


@pytest.mark.slow  # starts processes
def test_work_and_results_are_copies_whose_arrays_hold_what_their_tensors_hold(tmp_path: Path) -> None:
    tensor = torch.arange(300_000.0)
    work = Doubled(tensor, tensor.numpy())
    with sole_user(tmp_path):
        results = list(spread(work, [1, 2, 3], 2, tmp_path))
    assert not tensor.is_shared() and np.shares_memory(tensor.numpy(), work.array)
    for factor, (found, array) in zip((1, 2, 3), results, strict=True):
        assert not found.is_shared()
        assert torch.equal(found, factor * tensor) and np.array_equal(array, found.numpy())


def slow_work(path: Path) -> int:
    """Records the id of its process, then works for a long time."""
    (path / f"{os.getpid()}.pid").touch()
    time.sleep(LIMIT)
    return 0


def run_slow_work(folder: Path) -> None:
    with sole_user(folder):
        list(spread(slow_work, [folder, folder], 2, folder))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what: Any) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow  # three processes import torch
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=run_slow_work, args=(tmp_path,))
    process.start()
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    workers = [int(f.stem) for f in tmp_path.glob("*.pid")]
    with pytest.raises(ValueError, match="in use by another run"), sole_user(tmp_path):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join(LIMIT)
    # The folder is free as soon as the last worker is gone, and not before.
    with sole_user(tmp_path):
        assert not any(alive(pid) for pid in workers)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "report.json", "{}")
    (tmp_path / f".report.json.x7{TEMPORARY}").write_text("half")
    (tmp_path / ".hidden").write_text("kept")
    remove_temporaries(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [".hidden", "report.json"]
