"""Processes that run functions together, each as one rank; started once for all tests of a session."""

import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 30.0  # for one collective, so that nothing hangs
STARTING = 400.0  # for processes to start on a busy machine


def _serve(rank: int, world: int, folder: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    # A busy machine may start the processes minutes apart.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=STARTING))
    groups = {
        size: dist.new_group(list(range(size)), timeout=timedelta(seconds=SECONDS)) for size in range(1, world + 1)
    }
    results.put((rank, None, ""))
    while (task := tasks.get()) is not None:
        function, size, arguments = task
        try:
            result = function(groups[size], rank, *arguments) if rank < size else None
            results.put((rank, result, ""))
        except BaseException as error:
            results.put((rank, None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class Workers:
    """``world`` processes of one gloo group."""

    def __init__(self, world: int = 4) -> None:
        self.world = world
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.tasks = [context.SimpleQueue() for _ in range(self.world)]
        self.results = context.Queue()
        folder, world = self.folder.name, self.world
        self.processes = [
            context.Process(target=_serve, args=(rank, world, folder, self.tasks[rank], self.results), daemon=True)
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()
        self._collect(STARTING)

    def run(self, function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
        """``function(group, rank, *arguments)`` on the first ``size`` ranks; its results by rank.

        Raises:
            AssertionError: A rank raised, died or took longer than `SECONDS`.
        """
        for tasks in self.tasks:
            tasks.put((function, size, arguments))
        try:
            found = self._collect(2 * SECONDS)
        except AssertionError:  # ranks may wait for one another: the next function gets new ones
            self.close(wait=0)
            self._start()
            raise
        return [found[rank] for rank in range(size)]

    def _collect(self, seconds: float) -> dict[int, Any]:
        """An answer from every live process within ``seconds``; a rank may notice late what another raised."""
        found: dict[int, Any] = {}
        errors = []
        end = time.monotonic() + seconds
        while len(found) < self.world and time.monotonic() < end:
            living = {rank for rank, process in enumerate(self.processes) if process.is_alive()}
            try:
                rank, result, error = self.results.get(timeout=1.0)
            except queue.Empty:
                if living <= found.keys():  # an answer of a process that was alive a second ago would be here
                    break
                continue
            found[rank] = result
            if error:
                errors.append(f"rank {rank}: {error}")
        if len(found) < self.world:
            errors.append(f"only ranks {sorted(found)} of {self.world} answered")
        assert not errors, "\n".join(errors)
        return found

    def close(self, wait: float = 10) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(wait)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def split(rows: Any, sizes: Sequence[int], rank: int) -> Any:
    """A rank's rows of a tensor, or of every tensor of a sequence."""
    begin = sum(sizes[:rank])
    if isinstance(rows, (list, tuple)):
        return [split(item, sizes, rank) for item in rows]
    return None if rows is None else rows[begin : begin + sizes[rank]]


def checkout() -> Path:
    return Path(__file__).resolve().parent.parent
