"""Ranks of a group as threads of one process: the steps of a shared selection without the cost of processes."""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch

from msacore import selection
from msacore.selection.arguments import Given
from msacore.selection.ranks import Alone, Ranks


class Together(Ranks):
    """A rank whose messages go through a list that all threads see; everything else is that of a process group."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier
        self._stop, self._exchanges, self._group = False, 0, None
        self.sent = 0
        self._gather = self._exchange

    def _exchange(self, everything: list[Any], mine: Any, group: Any) -> None:
        self._board[self.rank] = mine
        self.sent += _bytes(mine)
        self._barrier.wait(60)
        everything[:] = self._board
        self._barrier.wait(60)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(one) for one in value.values())
    return sum(_bytes(one) for one in value) if isinstance(value, (list, tuple)) else 8


DEFAULTS: dict[str, Any] = {
    "budget": None,
    "strategy": "uncertainty_kcenter",
    "uncertainty": None,
    "labeled": None,
    "candidates": None,
    "groups": None,
    "max_per_group": None,
    "radius": None,
    "first": None,
    "gamma": 1.0,
    "seed": 0,
    "distance": "euclidean",
    "backend": "auto",
    "options": None,
    "state": None,
}


def together(arguments: list[dict[str, Any]], before: Callable[[Alone], None] = lambda ranks: None) -> list[Any]:
    """What each rank returns or raises when all call `select` with their arguments."""
    size = len(arguments)
    board: list[Any] = [None] * size
    barrier, results = threading.Barrier(size), [None] * size

    def work(rank: int) -> None:
        ranks = Together(rank, size, board, barrier)
        try:
            before(ranks)
            results[rank] = selection.run(Given(**(DEFAULTS | arguments[rank])), ranks, False)  # type: ignore[call-overload]
        except BaseException as error:  # the thread's result
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def split(cuts: list[int], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments of ranks that hold the rows between ``cuts``, from those of one process."""
    ends = [0, *sorted(cuts), len(arguments["embeddings"])]
    shared = []
    for rank, (begin, end) in enumerate(itertools.pairwise(ends)):
        own = dict(arguments)
        for name in ("embeddings", "uncertainty", "groups", "candidates"):
            value = own.get(name)
            if value is not None and (name != "candidates" or value.dtype == torch.bool):
                own[name] = value[begin:end]
        # Indices and centres are a union over the ranks.
        for name in ("labeled", "candidates"):
            value = arguments.get(name)
            if value is not None and (name == "labeled" or value.dtype != torch.bool):
                parts = value.chunk(len(ends) - 1)
                own[name] = parts[rank] if rank < len(parts) else None
        shared.append(own)
    return shared
