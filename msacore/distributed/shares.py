"""What ranks exchange: sums over ranks, and rows or columns of a table that go to the ranks that own them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msacore.distributed.collectives import all_gather, all_to_all, sum_in_order
from msacore.distributed.rows import Layout, pad_rows
from msacore.distributed.sharding import Sharding


def sum_over_ranks(op: str, sharding: Sharding, share: Tensor) -> Tensor:
    """The sum of the shares of all ranks, in float64 and in rank order, so that every rank has the same bits."""
    shares = all_gather(op, share.double().unsqueeze(0), sharding.group)
    result = shares[0].clone()
    for other in shares[1:]:
        result += other
    return result


def sum_to_owners(op: str, sharding: Sharding, layout: Layout, x: Tensor) -> Tensor:
    """The sum over ranks of ``x`` ``[N, …]``; each rank gets its own rows ``[rows, …]``."""
    most = max(layout.counts, default=0)
    blocks = [pad_rows(block, most - len(block)) for block in x.split(list(layout.counts))]
    return sum_in_order(op, torch.cat(blocks), sharding.group)[: layout.rows]


def to_owners(op: str, sharding: Sharding, layout: Layout, columns: Tensor) -> Sequence[Tensor]:
    """Send columns ``[R, N]`` to the ranks that own them; returns this rank's from every rank, ``[R, rows]`` each."""
    most = max(layout.counts, default=0)
    blocks = [pad_rows(block.T, most - block.shape[1]) for block in columns.split(list(layout.counts), 1)]
    came = all_to_all(op, torch.cat(blocks), sharding.group).unflatten(0, (sharding.world, most))
    return [part[: layout.rows].T for part in came]


def from_owners(op: str, sharding: Sharding, layout: Layout, columns: Tensor) -> Tensor:
    """The columns ``[R, rows]`` of every rank as one table ``[R, N]``; zeros where rows are padding."""
    most = max(layout.counts, default=0)
    came = all_gather(op, pad_rows(columns.T, most - layout.rows), sharding.group).unflatten(0, (sharding.world, most))
    return torch.cat([part[:count] for part, count in zip(came, layout.counts, strict=True)]).T


class _Gather(torch.autograd.Function):
    """The rows of all ranks; backward sums, over the ranks, the gradients that each has for a rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor, op: str, sharding: Sharding, layout: Layout) -> Tensor:
        ctx.op, ctx.sharding, ctx.layout, ctx.dtype = op, sharding, layout, x.dtype
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # 16-bit gradients are sent and added in float32.
        grad = grads[0].float() if grads[0].dtype.itemsize == 2 else grads[0]
        return sum_to_owners(ctx.op, ctx.sharding, ctx.layout, grad).to(ctx.dtype), None, None, None, None


def gather(op: str, sharding: Sharding, layout: Layout, x: Tensor, whole: Tensor) -> Tensor:
    """``whole``, the rows of all ranks, as a differentiable function of this rank's rows ``x``."""
    if not torch.is_grad_enabled():
        return whole
    # Padding counts as rows here, because torch.compile knows that number.
    padded = Layout(layout.counts, layout.rank, layout.counts[layout.rank])
    return _Gather.apply(pad_rows(x, layout.padding), whole, op, sharding, padded)


class _Total(torch.autograd.Function):
    """The sum over ranks of their shares of a loss, in the order of ranks.

    Every rank's loss is the total: with equal upstream gradients g on W ranks a share gets W g, so that what
    DistributedDataParallel averages is the gradient of one process.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, op: str, sharding: Sharding) -> Tensor:
        ctx.world = sharding.world
        return sum_over_ranks(op, sharding, share.detach()).to(share.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.world, None, None


def total(op: str, sharding: Sharding, share: Tensor) -> Tensor:
    return _Total.apply(share, op, sharding)
