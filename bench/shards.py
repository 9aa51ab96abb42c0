"""Ranks of a group as threads of one process: the steps of a shared selection without the cost of processes."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from msacore import selection
from msacore.selection.arguments import Given
from msacore.selection.ranks import Alone, Ranks


class Together(Ranks):
    """A rank whose messages go through a list that all threads see; everything else is as in a process group."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier
        self._stop, self._exchanges, self._group = False, 0, None
        self.sent = self.exchanges = 0

    def _gather(self, everything: list[Any], mine: Any, group: Any) -> None:
        self.exchanges += 1
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
    if isinstance(value, (list, tuple)):
        return sum(_bytes(one) for one in value)
    return len(value) if isinstance(value, (bytes, str)) else 8


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


@dataclass(frozen=True)
class Shards:
    """What the ranks did.

    Attributes:
        results: What each rank returned or raised.
        sent: Bytes of tensors, digests and numbers that each rank sent to one other, without the overhead of pickling.
        exchanges: How often the ranks exchanged messages.
    """

    results: list[Any]
    sent: list[int]
    exchanges: int


def together(arguments: list[dict[str, Any]], before: Callable[[Alone], None] = lambda ranks: None) -> Shards:
    """All ranks call `select` with their arguments."""
    size = len(arguments)
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    results: list[Any] = [None] * size
    everybody = [Together(rank, size, board, barrier) for rank in range(size)]

    def work(rank: int) -> None:
        try:
            before(everybody[rank])
            results[rank] = selection.run(Given(**(DEFAULTS | arguments[rank])), everybody[rank], False)
        except BaseException as error:  # the thread's result
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return Shards(results, [ranks.sent for ranks in everybody], everybody[0].exchanges)
