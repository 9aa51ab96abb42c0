"""One direction of a contrastive loss whose anchors are a rank's rows and whose candidates are those of all ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from msacore.distributed import rows
from msacore.distributed.collectives import all_gather, all_to_all, sum_in_order
from msacore.distributed.rows import Layout, pad_rows
from msacore.distributed.sharding import Sharding


class _Gather(torch.autograd.Function):
    """A rank's rows, and those of all others; backward sums over the ranks what each says of a rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor, op: str, sharding: Sharding, layout: Layout) -> Tensor:
        ctx.op, ctx.sharding, ctx.layout, ctx.dtype = op, sharding, layout, x.dtype
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        most = max(layout.counts, default=0)
        # Sums of 16-bit gradients travel and are added in float32.
        grad = grads[0].float() if grads[0].dtype.itemsize == 2 else grads[0]
        blocks = [pad_rows(block, most - len(block)) for block in grad.split(list(layout.counts))]
        mine = sum_in_order(ctx.op, torch.cat(blocks), ctx.sharding.group)[: layout.rows]
        return mine.to(ctx.dtype), None, None, None, None


def gather(op: str, sharding: Sharding, layout: Layout, x: Tensor, whole: Tensor) -> Tensor:
    """``whole``, the rows of all ranks, as a function of this rank's rows ``x``."""
    return _Gather.apply(x, whole, op, sharding, layout) if torch.is_grad_enabled() else whole


class _Transpose(torch.autograd.Function):
    """A rank's rows ``[n, N']`` of a matrix become its columns ``[N, n']``; backward does the reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str, sharding: Sharding, of_rows: Layout, of_columns: Layout) -> Tensor:
        ctx.rest = op, sharding, of_rows, of_columns
        return _exchange(x, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        op, sharding, of_rows, of_columns = ctx.rest
        return _exchange(grads[0].T, op, sharding, of_columns, of_rows).T, None, None, None, None


def _exchange(x: Tensor, op: str, sharding: Sharding, of_rows: Layout, of_columns: Layout) -> Tensor:
    tall, wide = max(of_rows.counts, default=0), max(of_columns.counts, default=0)
    x = pad_rows(x, tall - len(x))
    blocks = [pad_rows(block.T, wide - block.shape[1]) for block in x.split(list(of_columns.counts), 1)]
    came = all_to_all(op, torch.cat(blocks), sharding.group).unflatten(0, (sharding.world, -1))
    parts = [part[: of_columns.rows, :count].T for part, count in zip(came, of_rows.counts, strict=True)]
    return torch.cat(parts)


def transpose(op: str, sharding: Sharding, of_rows: Layout, of_columns: Layout, x: Tensor) -> Tensor:
    return _Transpose.apply(x, op, sharding, of_rows, of_columns)


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


def sum_over_ranks(op: str, sharding: Sharding, share: Tensor) -> Tensor:
    """In float64 and in the order of ranks, so that every rank has the same bits."""
    shares = all_gather(op, share.double().unsqueeze(0), sharding.group)
    result = shares[0].clone()
    for other in shares[1:]:
        result += other
    return result


def total(op: str, sharding: Sharding, share: Tensor) -> Tensor:
    return _Total.apply(share, op, sharding)


@dataclass(frozen=True)
class Side:
    """Rows that are anchors or candidates.

    Attributes:
        x: ``[n, d]``.
        labels: ``[n]``, or None.
        mask: ``[n]`` bool, or None.
    """

    x: Tensor
    labels: Tensor | None = None
    mask: Tensor | None = None

    def used(self) -> Tensor:
        mask = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device) if self.mask is None else self.mask
        return mask if self.labels is None else mask & (self.labels >= 0)

    def take(self, order: Tensor, behind: int) -> "Side":
        """The rows in another order, and unused ones behind place ``behind``, as many as ``order`` is longer."""
        extra = len(order) - len(self.x)
        if extra == 0:
            return Side(self.x[order], *(None if t is None else t[order] for t in (self.labels, self.mask)))
        mask = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device) if self.mask is None else self.mask
        labels = None if self.labels is None else pad_rows(self.labels, extra)[order]
        return Side(pad_rows(self.x, extra)[order], labels, pad_rows(mask, extra)[order])


@dataclass(frozen=True)
class Direction:
    """Anchors of this rank against candidates of all ranks.

    Attributes:
        anchors: This rank's rows.
        candidates: The rows of all ranks.
        begin: Number of the first anchor in the whole batch.
        weights: ``[n, N']``, or None.
        exclude_self: Leave out the pairs of equal number.
        options: temperature, denominator, normalize, negatives and negative_mask of the operator.
    """

    anchors: Side
    candidates: Side
    begin: int
    weights: Tensor | None
    exclude_self: bool
    options: dict[str, Any]

    def aligned(self) -> "Direction":
        """The same with candidates reordered: the one of an anchor's number stands where the anchor does."""
        n, total = len(self.anchors.x), len(self.candidates.x)
        device = self.anchors.x.device
        first = min(self.begin, total)
        there = min(n, total - first)
        order = torch.cat(
            [
                torch.arange(first, first + there, device=device),
                torch.arange(total, total + n - there, device=device),
                torch.arange(first, device=device),
                torch.arange(first + there, total, device=device),
            ]
        )
        weights = self.weights
        if weights is not None:
            weights = torch.cat([weights, weights.new_zeros(n, n - there)], 1)[:, order]
        candidates = self.candidates.take(order, there)
        anchors = self.anchors
        if anchors.labels is None and weights is None:  # the positives are the pairs of equal number
            numbers = torch.arange(len(order), device=device)
            anchors, candidates = replace(anchors, labels=numbers[:n]), replace(candidates, labels=numbers)
        return replace(self, anchors=anchors, candidates=candidates, weights=weights)

    def losses(self, local: Callable[..., Tensor]) -> Tensor:
        """``[n]``, zero for anchors that drop out. Of an :meth:`aligned` direction."""
        a, c = self.anchors, self.candidates
        return local(
            a.x,
            c.x,
            labels=None if a.labels is None else (a.labels, c.labels),
            weights=self.weights,
            anchor_mask=a.mask,
            candidate_mask=c.mask,
            exclude_self=self.exclude_self,
            symmetric=False,
            reduction="none",
            **self.options,
        )

    def kept(self) -> Tensor:
        """How many anchors count, 0-d float64. Of an :meth:`aligned` direction."""
        used, there = self.anchors.used(), self.candidates.used()
        n = len(used)
        same = torch.zeros_like(used)
        if self.weights is not None:
            positive = (self.weights > 0) & there
            if self.exclude_self:
                positive = positive & ~torch.eye(n, len(there), dtype=torch.bool, device=positive.device)
            count = positive.sum(1)
        else:
            assert self.anchors.labels is not None and self.candidates.labels is not None
            sought = self.anchors.labels.contiguous()
            known = torch.where(there, self.candidates.labels, -1).sort().values
            count = torch.searchsorted(known, sought, right=True) - torch.searchsorted(known, sought)
            same = there[:n] & (self.candidates.labels[:n] == self.anchors.labels)
            if self.exclude_self:
                count = count - same.long()
        used = used & (count > 0)
        if self.options["denominator"] == "decoupled":
            others = there.sum() - (there[:n].long() if self.exclude_self else 0) - count
            negatives, mask = self.options["negatives"], self.options["negative_mask"]
            if negatives is not None:
                others = others + (len(negatives) if mask is None else mask.sum())
            used = used & (others > 0)
        return used.sum().double()


def spread(op: str, sharding: Sharding, layout: Layout, side: Side, whole: Side) -> Side:
    """``whole`` as a function of this rank's rows."""
    return replace(whole, x=gather(op, sharding, layout, side.x, whole.x))


def own_of(values: Tensor, op: str, sharding: Sharding, given: Layout, wanted: Layout) -> Tensor:
    """Numbers that lie over the ranks as ``given``, as ``wanted`` lies: a rank gets those of its own rows."""
    if given.counts == wanted.counts:
        return values
    (whole,) = rows.gather_rows(op, sharding, given, [values.detach()], [None], 1)
    assert whole is not None
    everything = gather(op, sharding, given, values, whole)
    return everything[wanted.begin : wanted.begin + wanted.rows]
