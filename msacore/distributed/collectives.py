"""The collectives of this package: torch's functional ones, behind names that do not change.

Torch is moving them from a private module to a public one, so both are tried. ``torch.compile`` can trace them.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _module() -> Any:
    try:
        return importlib.import_module("torch.distributed.functional_collectives")
    except ModuleNotFoundError:
        return importlib.import_module("torch.distributed._functional_collectives")


_functional = _module()
_gather = getattr(_functional, "all_gather_single", None) or _functional.all_gather_tensor


class CollectiveFailed(RuntimeError):
    """A collective failed, because a rank died or the network did; the process group is unusable from then on."""


def _failed(op: str, what: str, group: dist.ProcessGroup, error: Exception) -> CollectiveFailed:
    return CollectiveFailed(
        f"msacore::{op}: {what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)}; "
        f"the process group is unusable: {error}"
    )


def begin_gather(op: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start :func:`all_gather` without waiting for it; pass the result to :func:`wait`."""
    if torch.compiler.is_compiling():
        return _gather(x.contiguous(), 0, group)
    try:
        return _gather(x.contiguous(), 0, group)
    except RuntimeError as error:
        raise _failed(op, "gathering rows", group, error) from error


def wait(op: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The result of a collective that was started."""
    if torch.compiler.is_compiling():
        return _functional.wait_tensor(x)
    try:
        return _functional.wait_tensor(x)
    except RuntimeError as error:
        raise _failed(op, "waiting for rows", group, error) from error


def all_gather(op: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n, …]`` of every rank, concatenated in rank order: ``[W · n, …]``; n must be the same on all ranks."""
    return wait(op, begin_gather(op, x, group), group)


def all_to_all(op: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send block r of ``x`` ``[W · n, …]`` to rank r; returns the received blocks in rank order."""
    return exchange(op, x, None, None, group)


def exchange(op: str, x: Tensor, come: list[int] | None, go: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    """Send the first ``go[0]`` rows of ``x`` to rank 0, the next to rank 1, …; receive ``come[r]`` rows from rank r."""
    if torch.compiler.is_compiling():
        return _functional.wait_tensor(_functional.all_to_all_single(x.contiguous(), come, go, group))
    try:
        return _functional.wait_tensor(_functional.all_to_all_single(x.contiguous(), come, go, group))
    except RuntimeError as error:
        raise _failed(op, "exchanging blocks", group, error) from error


def begin_pass_on(op: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start sending ``x`` to the previous rank and receiving the next one's; pass the result to :func:`wait`."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    come, go = ([len(x) if other == (rank + step) % world else 0 for other in range(world)] for step in (1, -1))
    if torch.compiler.is_compiling():
        return _functional.all_to_all_single(x.contiguous(), come, go, group)
    try:
        return _functional.all_to_all_single(x.contiguous(), come, go, group)
    except RuntimeError as error:
        raise _failed(op, "passing a block round the ring", group, error) from error


def sum_in_order(op: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """On rank r, block r of the sum over ranks of ``x`` ``[W · n, …]``, added in rank order on every backend."""
    world = dist.get_world_size(group)
    parts = all_to_all(op, x, group).unflatten(0, (world, -1))
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def gather_objects(op: str, value: Any, group: dist.ProcessGroup) -> list[Any]:
    """``value`` of every rank, in rank order. It is pickled: for messages about errors, never for rows."""
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, value, group=group)
    except RuntimeError as error:
        raise _failed(op, "gathering messages", group, error) from error
    return found


def join_blocks(blocks: Tensor, counts: Sequence[int]) -> Tensor:
    """The first ``counts[r]`` rows of every block of ``blocks`` ``[W · n, …]``, in one tensor."""
    rows = len(blocks) // len(counts)
    if all(count == rows for count in counts):
        return blocks
    return torch.cat([blocks[r * rows : r * rows + count] for r, count in enumerate(counts)])
