"""Wall time per stage, peak memory, and progress that suits a terminal and a log file."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")


class StageTimer:
    """Adds up wall time by stage name.

    Args:
        seconds: Times to continue from, for a resumed run.

    Example:
        >>> timer = StageTimer()
        >>> with timer("train"):
        ...     pass
        >>> list(timer.seconds)
        ['train']
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def peak_memory_mib() -> dict[str, float]:
    """Highest resident memory of this process so far, and of each CUDA device it used, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if torch.cuda.max_memory_allocated(i):
                peak[f"cuda:{i}"] = torch.cuda.max_memory_allocated(i) / 2**20
    return peak


def add_progress_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-progress``."""
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")


def progress(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    hide: bool = False,
    describe: Callable[[T], str] | None = None,
) -> Iterator[T]:
    """Iterate with a progress bar on a terminal; in a log, one line with the time at the end; nothing when hidden.

    Args:
        items: What to iterate over.
        what: What the items are.
        total: How many there are.
        hide: Show nothing.
        describe: Gives a description of an item; a log then gets a line for each item as soon as it is done.
    """
    if hide:
        yield from items
        return
    start, count = time.perf_counter(), 0
    terminal = sys.stderr.isatty()
    for item in tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True, disable=not terminal):
        count += 1
        if describe and not terminal:
            of = f"/{total}" if total else ""
            seconds = time.perf_counter() - start
            print(f"{what} {count}{of}: {describe(item)} ({seconds:.1f} s)", file=sys.stderr, flush=True)
        yield item
    print(f"{what}: {count} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
