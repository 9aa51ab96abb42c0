"""What ranks tell each other before rows travel: sizes, whether they agree, and whether one of them has an error."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from msacore.distributed.collectives import all_gather, gather_objects
from msacore.distributed.sharding import Sharding

VERSION = 1
_COUNTS = 5  # sizes in every header, so that headers of different operators have one length and can be compared
_ERROR = 1


def device_of(sharding: Sharding) -> torch.device:
    """Device of small messages: the CPU, or the current GPU where the group has only NCCL."""
    backends = dist.get_backend_config(sharding.group)
    return torch.device("cpu") if "cpu" in str(backends) or "gloo" in str(backends) else torch.device("cuda")


def agree(
    op: str, sharding: Sharding, counts: Sequence[int], description: dict[str, Any], check: Callable[[], None]
) -> list[list[int]]:
    """Exchange headers. Returns ``counts`` of every rank.

    Args:
        op: Name of the operator.
        sharding: The ranks.
        counts: Sizes that may differ between ranks.
        description: What must be equal on all ranks, by argument.
        check: Raises where the arguments of this rank are wrong.

    Raises:
        RuntimeError: A rank has a wrong argument, or ranks disagree; the same message on every rank.
    """
    error = None
    try:
        check()
    except (RuntimeError, ValueError, TypeError) as raised:
        error = str(raised)
    text = repr((op, sorted(description.items())))
    flag = 0 if error is None else _ERROR
    mine = torch.tensor([[VERSION, flag, zlib.crc32(text.encode()), *counts, *[0] * (_COUNTS - len(counts))]])
    headers = all_gather(op, mine.to(device_of(sharding)), sharding.group).cpu()
    if bool((headers[:, 1] == _ERROR).any()):
        errors = gather_objects(op, error, sharding.group)
        rank, text = next((r, e) for r, e in enumerate(errors) if e is not None)
        prefix = f"msacore::{op}: "
        raise RuntimeError(f"{prefix}on rank {rank}: {text.removeprefix(prefix)}")
    if bool((headers[:, :3] != headers[0, :3]).any()):
        theirs = gather_objects(op, (op, description), sharding.group)
        raise RuntimeError(_disagreement(op, theirs))
    return [[int(v) for v in row[3 : 3 + len(counts)]] for row in headers.tolist()]


def _disagreement(op: str, found: list[tuple[str, dict[str, Any]]]) -> str:
    first_op, first = found[0]
    for rank, (their_op, theirs) in enumerate(found):
        if their_op != first_op:
            return f"msacore::{op}: ranks call different operators: rank 0 {first_op}, rank {rank} {their_op}"
        for name in sorted({*first, *theirs}):
            if first.get(name) != theirs.get(name):
                return (
                    f"msacore::{op}: expected `{name}` to be alike on all ranks, got {first.get(name)} on rank 0 "
                    f"and {theirs.get(name)} on rank {rank}"
                )
    return f"msacore::{op}: ranks run different versions of msacore"
