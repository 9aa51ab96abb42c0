"""Ranks of a shared selection as threads, and the split of arguments over them."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from bench import shards
from msacore.selection.ranks import Alone


def together(arguments: list[dict[str, Any]], before: Callable[[Alone], None] = lambda ranks: None) -> list[Any]:
    """What each rank returns or raises when all call `select` with their arguments."""
    return shards.together(arguments, before).results


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
