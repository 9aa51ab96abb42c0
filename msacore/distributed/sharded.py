"""Sharded losses: a rank evaluates its share of the anchors against the rows of all ranks.

The gradient is exact: in each direction one rank visits a pair of rows, with the counts of the whole batch. Rows of
other ranks get theirs by a sum over ranks, added in the order of ranks on every backend. Both passes are collective:
every rank must call backward.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from msacore.distributed import replicated, rows
from msacore.distributed.directions import (
    Direction,
    Side,
    gather,
    own_of,
    spread,
    sum_over_ranks,
    total,
    transpose,
)
from msacore.distributed.overlap import Started
from msacore.distributed.rows import Layout
from msacore.distributed.sharding import Sharding


def info_nce(
    local: Callable[..., Tensor],
    sharding: Sharding,
    c: replicated.Contrast,
    *,
    temperature: float | Tensor,
    reduction: str,
    **arguments: Any,
) -> Tensor:
    """`msacore.info_nce` of the rows of all ranks; ``local`` is the operator of one process."""
    op = "info_nce"
    negatives, negative_mask = c.negatives, c.negative_mask
    if negatives is not None:
        queue = [negatives.detach(), negative_mask]
        gathered, negative_mask = c.gather(sharding, c.of_negatives, queue, replicated.hidden(negative_mask), 1)
        assert gathered is not None
        negatives = gather(op, sharding, c.of_negatives, negatives, gathered)
    options = {k: arguments[k] for k in ("denominator", "normalize")}
    options.update(temperature=temperature, negatives=negatives, negative_mask=negative_mask)
    exclude_self = arguments["exclude_self"]
    second = c.anchors if c.candidates is None else c.candidates
    labels = c.anchor_labels if c.candidate_labels is None else c.candidate_labels
    mine = Side(c.anchors, c.anchor_labels, c.anchor_mask), Side(second, labels, c.candidate_mask)
    layouts = c.of_anchors, c.of_candidates
    whole = _whole(c, sharding, mine[1], layouts[1], c.started)
    there = spread(op, sharding, layouts[1], mine[1], whole)
    directions = [Direction(mine[0], there, layouts[0].begin, c.weights, exclude_self, options).aligned()]
    if arguments["symmetric"]:
        whole = _whole(c, sharding, mine[0], layouts[0], None)
        there = spread(op, sharding, layouts[0], mine[0], whole)
        weights = None if c.weights is None else transpose(op, sharding, *layouts, c.weights).T
        options = {**options, "negatives": None, "negative_mask": None}
        directions.append(Direction(mine[1], there, layouts[1].begin, weights, exclude_self, options).aligned())
    losses = [direction.losses(local) for direction in directions]
    if reduction == "none":
        found = [losses[0], *(own_of(x, op, sharding, layouts[1], layouts[0]) for x in losses[1:])]
        return sum(found[1:], found[0]) / len(found)
    share = _share(op, sharding, directions, losses, mean=reduction == "mean")
    loss = total(op, sharding, share)
    return rows.compare_gradient(loss, op, sharding) if sharding.check else loss


def _whole(c: replicated.Contrast, sharding: Sharding, side: Side, layout: Layout, started: Started | None) -> Side:
    """The rows of all ranks, without a gradient."""
    sent = [None if started else side.x.detach(), side.labels, side.mask]
    x, labels, mask = c.gather(sharding, layout, sent, replicated.hidden(side.mask, side.labels), 1)
    if started is not None:
        x = started.whole(1).detach()
    assert x is not None
    return Side(x, labels, mask)


def _share(
    op: str, sharding: Sharding, directions: Sequence[Direction], losses: Sequence[Tensor], mean: bool
) -> Tensor:
    """This rank's part of the mean (or sum) over the anchors of all ranks; the mean of two directions."""
    sums = torch.stack([x.sum() for x in losses])
    if mean:
        counts = torch.stack([direction.kept() for direction in directions])
        sums = sums / sum_over_ranks(op, sharding, counts).clamp(min=1)
    return (sums.sum() / len(directions)).to(losses[0].dtype)


def hierarchical_contrastive_loss(
    local: Callable[..., Any],
    sharding: Sharding,
    layout: Layout,
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[float | Tensor],
    tier_weights: Sequence[float],
    tier1: str,
    normalize: bool,
    return_tiers: bool,
) -> Any:
    """`msacore.hierarchical_contrastive_loss` of the rows of all ranks, term by term."""
    from msacore.ops.info_nce import info_nce as one_process

    op = "hierarchical_contrastive_loss"
    m, embeddings = len(unimodal), [*unimodal, fused, *high_level]
    pairs = list(combinations(range(m), 2))
    unread = replicated.hidden_embeddings(available, m, len(pairs))
    detached = [x.detach() for x in embeddings]
    gathered = rows.gather_rows(op, sharding, layout, [*detached, available, labels], [*unread, None, None], 1)
    *everything, all_available, all_labels = gathered
    whole = [gather(op, sharding, layout, x, w) for x, w in zip(embeddings, everything, strict=True) if w is not None]

    def masks(*members: int) -> tuple[Tensor | None, Tensor | None]:
        def of(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[:, list(members)].all(1)

        return of(available), of(all_available)

    def term(tier: int, a: int, b: int, members: Sequence[int], supervised: bool = False) -> Tensor:
        options: dict[str, Any] = dict(temperature=temperatures[tier], normalize=normalize, denominator="all")
        options.update(negatives=None, negative_mask=None)
        here, there = masks(*members)
        own, other = (labels, all_labels) if supervised else (None, None)
        directions = [
            Direction(
                Side(embeddings[x], own, here), Side(whole[y], other, there), layout.begin, None, supervised, options
            ).aligned()
            for x, y in ([(a, b)] if supervised else [(a, b), (b, a)])
        ]
        losses = [direction.losses(one_process) for direction in directions]
        return _share(op, sharding, directions, losses, mean=True)

    first = (
        [term(0, i, i, [i], True) for i in range(m)]
        if tier1 == "intra_modal"
        else [term(0, i, j, [i, j]) for i, j in pairs]
    )
    second = [term(1, m, i, [i]) for i in range(m)]
    third = [
        term(2, m + 1 + p, m + 1 + q, sorted({*pairs[p], *pairs[q]})) for p, q in combinations(range(len(pairs)), 2)
    ]
    nothing = (fused.sum() * 0).float() if fused.dtype.itemsize == 2 else fused.sum() * 0
    share = torch.stack([sum(terms, torch.zeros_like(nothing)) for terms in (first, second, third)])
    tiers = total(op, sharding, share)
    loss = (tiers * torch.tensor(list(tier_weights), dtype=tiers.dtype, device=tiers.device)).sum()
    if sharding.check:
        loss, tiers = (rows.compare_gradient(part, op, sharding) for part in (loss, tiers))
    return (loss, tiers) if return_tiers else loss


def rank_n_contrast(
    local: Callable[..., Tensor],
    sharding: Sharding,
    layout: Layout,
    embeddings: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`msacore.rank_n_contrast` of the rows of all ranks; a rank takes an even share of the anchors, not its own rows.

    An anchor's terms need the order of all targets, which every rank sorts alike.
    """
    op = "rank_n_contrast"
    unread = replicated.hidden(mask)
    whole, targets, mask = rows.gather_rows(  # type: ignore[assignment]
        op, sharding, layout, [embeddings.detach(), targets, mask], [unread, unread, None], 1
    )
    begin, end = (layout.total * r // sharding.world for r in (sharding.rank, sharding.rank + 1))
    share = local(
        gather(op, sharding, layout, embeddings, whole),  # type: ignore[arg-type]
        targets,
        temperature=temperature,
        mask=mask,
        anchors=(begin, end - begin),
    )
    loss = total(op, sharding, share)
    return rows.compare_gradient(loss, op, sharding) if sharding.check else loss
