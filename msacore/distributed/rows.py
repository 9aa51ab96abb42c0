"""Gathers the rows of all ranks on every rank in one collective, with the gradient of a rank's own rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msacore.distributed.collectives import all_gather, join_blocks
from msacore.distributed.sharding import Sharding


@dataclass(frozen=True)
class Layout:
    """Which rows of the whole batch belong to which rank.

    Attributes:
        counts: Rows of every rank; all equal to the capacity where there is one.
        rank: This rank.
        rows: Rows this rank was given, without padding.
    """

    counts: tuple[int, ...]
    rank: int
    rows: int

    @property
    def begin(self) -> int:
        return sum(self.counts[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def padding(self) -> int:
        return self.counts[self.rank] - self.rows


class _Scale(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 or not x.requires_grad else _Scale.apply(x, factor)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """``x`` followed by ``rows`` rows of zeros (False)."""
    return x if rows == 0 else torch.cat([x, x.new_zeros((rows, *x.shape[1:]))])


def _bytes_of(x: Tensor) -> Tensor:
    """``[n, …]`` as ``[n, bytes of a row]``."""
    flat = x.detach().contiguous().reshape(len(x), math.prod(x.shape[1:]))
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def _from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    shape = (len(rows), *like.shape[1:])
    if rows.shape[1] == 0:
        return like.new_empty(shape)
    # A copy, because the bytes of a slice may be misaligned for a wider type.
    return rows.new_empty(rows.shape).copy_(rows).view(like.dtype).reshape(shape)


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors ``[n, …]`` side by side, ``[n, bytes of all their rows]``."""
    return torch.cat([_bytes_of(x) for x in tensors], 1) if tensors else torch.empty(0)


def unpack(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of :func:`pack`, for any number of rows; ``like`` gives dtypes and widths."""
    found, at = [], 0
    for x in like:
        width = math.prod(x.shape[1:]) * x.element_size()
        found.append(_from_bytes(buffer[:, at : at + width], x))
        at += width
    return found


def hide(x: Tensor, hidden: Tensor | None) -> Tensor:
    """``x`` ``[n, …]`` with zeros in the rows that are ``hidden`` ``[n]``, whatever they hold."""
    if hidden is None:
        return x
    return torch.where(hidden.view(-1, *[1] * (x.dim() - 1)), x.new_zeros(()), x)


def gather_rows(
    op: str,
    sharding: Sharding,
    layout: Layout,
    tensors: Sequence[Tensor | None],
    unread: Sequence[Tensor | None],
    factor: float,
) -> list[Tensor | None]:
    """Every tensor with the rows of all ranks, in the order of ranks.

    Args:
        op: Name of the operator.
        sharding: The ranks.
        layout: Layout of the rows.
        tensors: ``[rows, …]`` each, padded here; all of them travel in one buffer of bytes.
        unread: For each tensor, which of its rows ``[rows]`` are never read: they travel as zeros, whatever they hold.
        factor: Multiplies the gradients of this rank's rows.
    """
    present = [(x, hidden) for x, hidden in zip(tensors, unread, strict=True) if x is not None]
    own = [pad_rows(x, layout.padding) for x, _ in present]
    padded = [None if hidden is None else pad_rows(hidden, layout.padding) for _, hidden in present]
    buffer = pack([hide(x.detach(), hidden) for x, hidden in zip(own, padded, strict=True)])
    buffer = pad_rows(buffer, max(layout.counts, default=0) - len(buffer))
    gathered = join_blocks(all_gather(op, buffer, sharding.group), layout.counts)
    whole = []
    begin, end = layout.begin, layout.begin + layout.counts[layout.rank]
    for x, rows in zip(own, unpack(gathered, own), strict=True):
        if x.requires_grad:
            rows = torch.cat([rows[:begin], scale_gradient(x, factor), rows[end:]])
        whole.append(rows)
    found = iter(whole)
    return [None if x is None else next(found) for x in tensors]


class _OwnRows(torch.autograd.Function):
    """A rank's own rows of the losses of all anchors; backward gathers every rank's gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, op: str, sharding: Sharding, layout: Layout) -> Tensor:
        ctx.op, ctx.sharding, ctx.layout = op, sharding, layout
        return losses[layout.begin : layout.begin + layout.rows].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        layout = ctx.layout
        mine = pad_rows(grads[0], max(layout.counts, default=0) - layout.rows)
        return join_blocks(all_gather(ctx.op, mine, ctx.sharding.group), layout.counts), None, None, None


def own_rows(losses: Tensor, op: str, sharding: Sharding, layout: Layout) -> Tensor:
    return _OwnRows.apply(losses, op, sharding, layout)


class _Compare(torch.autograd.Function):
    """A loss whose upstream gradient must be equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, op: str, sharding: Sharding) -> Tensor:
        ctx.op, ctx.sharding = op, sharding
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        found = all_gather(ctx.op, grads[0].reshape(1, -1), ctx.sharding.group)
        if not torch.equal(found, found[:1].expand_as(found)):
            raise RuntimeError(
                f"msacore::{ctx.op}: expected the upstream gradient to be equal on all ranks, got "
                f"{[row.tolist() for row in found]}; scale the loss alike on every rank"
            )
        return grads[0], None, None


def compare_gradient(loss: Tensor, op: str, sharding: Sharding) -> Tensor:
    return _Compare.apply(loss, op, sharding)
