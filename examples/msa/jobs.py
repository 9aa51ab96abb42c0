"""Work shared among processes, and folders that only one run at a time may use, also after a run was killed."""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")
PATIENCE = 60.0


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Hold a folder for one run.

    The workers of a run that was killed may live on for a moment: this waits for them to end.

    Raises:
        ValueError: Another run is using the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("a") as run, (folder / "workers.lock").open("a") as workers:
        if not _lock(run, fcntl.LOCK_EX, 0.0):
            raise ValueError(f"{folder} is in use by another run; wait for it, or choose another --out")
        if not _lock(workers, fcntl.LOCK_EX, PATIENCE):
            raise ValueError(f"{folder} is still in use by processes of a run that ended; end them, or wait")
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


def spread(work: Callable[[A], B], items: Sequence[A], jobs: int, folder: Path) -> Iterator[B]:
    """Results of ``work`` in the order of the items, on one thread each, from this process or several.

    Args:
        work: Picklable, and the same for all workers.
        items: What to work on.
        jobs: Processes; with 1 the work is done in this one.
        folder: Folder held by :func:`sole_user`; workers share it.

    Note:
        Workers end within a moment of this process, however it ends.
    """
    if jobs == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(work, items)
        finally:
            torch.set_num_threads(before)
        return
    # A forked child inherits locks of OpenMP threads that it does not have.
    context = multiprocessing.get_context("spawn")
    # Bytes in both directions: between processes torch would move a tensor to shared memory, and an array that shared
    # its old memory, from `tensor.numpy()`, would then read freed memory.
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (pickle.dumps(work), folder))
    try:
        yield from map(pickle.loads, pool.map(_work, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _lock(file: IO[Any], kind: int, patience: float) -> bool:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        else:
            return True


_state: dict[str, Any] = {}


def _start_worker(work: bytes, folder: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    # Kept open for as long as the process lives.
    lock = (folder / "workers.lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)
    _state.update(work=pickle.loads(work), lock=lock)
    torch.set_num_threads(1)


def _end_with(sentinel: int) -> None:
    """End this worker with its parent: it waits for work on a pipe whose other end it holds itself, and would otherwise
    outlive a killed parent forever."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _work(item: Any) -> bytes:
    return pickle.dumps(_state["work"](item))
