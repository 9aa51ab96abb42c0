"""Sharded losses: a rank evaluates its share of the pairs of rows.

The gradient is exact; see `terms` for how the shares add up to the whole. Both passes are collective: every rank
must call backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from msacore.distributed import halves, replicated, ring, rows, sweep, terms
from msacore.distributed.rows import Layout
from msacore.distributed.sharding import Sharding
from msacore.distributed.shares import gather, total
from msacore.distributed.terms import Given, Plan, Role, Term
from msacore.distributed.tiles import ALL, DECOUPLED, NEGATIVES
from msacore.ops._check import as_flag, as_number_or_tensor, as_optional_indices

_Members = tuple[int, ...]  # the modalities that must be available
_Edges = list[tuple[int, int, int, _Members]]  # per term: its tier, its two embeddings, the modalities they need

_DENOMINATORS = {"all": ALL, "negatives": NEGATIVES, "decoupled": DECOUPLED}


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the losses compute in: float32 for 16-bit rows under autocast."""
    cast = torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if cast else x.dtype


def _temperatures(op: str, values: Sequence[tuple[str, Any]]) -> tuple[list[float], list[int | None], list[Tensor]]:
    """The temperatures as numbers; the place of each among the learned ones, or None; the learned ones."""
    numbers: list[float] = []
    which: list[int | None] = []
    learned: list[Tensor] = []
    for name, value in values:
        number, tensor = as_number_or_tensor(op, name, value)
        numbers.append(number)
        which.append(None if tensor is None else len(learned))
        learned += [] if tensor is None else [tensor]
    return numbers, which, learned


def info_nce(
    local: Callable[..., Tensor],
    sharding: Sharding,
    c: replicated.Contrast,
    *,
    way: Any,
    temperature: float | Tensor,
    reduction: str,
    denominator: str,
    normalize: bool,
    symmetric: bool,
    exclude_self: bool,
) -> Tensor:
    """`msacore.info_nce` of the rows of all ranks; ``local`` is the operator of one process."""
    op = "info_nce"
    queue, queue_mask = c.negatives, c.negative_mask
    if queue is not None:
        sent = [queue.detach(), queue_mask]
        queue, queue_mask = c.gather(sharding, c.of_negatives, sent, replicated.hidden(queue_mask), 1)
    second = c.anchors if c.candidates is None else c.candidates
    labels = c.anchor_labels if c.candidate_labels is None else c.candidate_labels
    whole = all_labels = all_mask = None
    if way is sweep and c.one_role:
        way, symmetric = halves, False  # both directions are the same
        sent, gone = [c.anchors, labels, c.anchor_mask], replicated.hidden(c.anchor_mask, labels)
        whole, all_labels, all_mask = halves.gather(op, sharding, c.of_anchors, sent, [gone, None, None])
    elif way is sweep:
        sent = [None if c.started else second.detach(), labels, c.candidate_mask]
        gone = replicated.hidden(c.candidate_mask, labels)
        whole, all_labels, all_mask = c.gather(sharding, c.of_candidates, sent, gone, 1)
        if c.started is not None:
            whole = c.started.whole(1).detach()
    (number,), (which,), learned = _temperatures(op, [("temperature", temperature)])
    code = _DENOMINATORS[denominator]
    if code == NEGATIVES and c.anchor_labels is None and c.weights is None:
        code = ALL  # with one positive per row the two are the same, and this takes one sweep
    own = c.candidates is None
    plan = Plan(
        op=op,
        sharding=sharding,
        way=way,
        terms=(
            Term(
                0,
                0 if own else 1,
                as_flag(op, "symmetric", symmetric),
                as_flag(op, "exclude_self", exclude_self),
                number,
                which,
            ),
        ),
        of_anchors=c.of_anchors,
        of_candidates=c.of_candidates,
        of_queue=c.of_negatives,
        dtype=_compute_dtype(c.anchors),
        normalize=as_flag(op, "normalize", normalize),
        denominator=code,
        reduction=reduction,
    )
    given = Given(
        own=[c.anchors] if own else [c.anchors, second],
        learned=learned,
        weights=c.weights,
        own_queue=c.negatives,
        queue=queue,
        queue_mask=queue_mask,
        whole=[whole] if own else [None, whole],
        roles=[Role(c.anchor_labels, c.anchor_mask, labels, c.candidate_mask, all_labels, all_mask)],
    )
    losses = terms.losses(plan, given)
    if reduction == "none":
        return losses
    return rows.compare_gradient(losses[0], op, sharding) if sharding.check else losses[0]


@dataclass(frozen=True)
class _Hierarchy:
    """What all terms of the hierarchical loss share.

    Attributes:
        sharding: The ranks.
        layout: Layout of the rows.
        embeddings: Those of the modalities, the fused one, those of the pairs; this rank's rows.
        modalities: Number of modalities.
        available: ``[rows, modalities]`` bool, or None.
        labels: ``[rows]``, or None.
        numbers: Temperatures of the tiers.
        which: Place of each among the learned ones, or None.
        learned: Temperatures that are tensors.
        normalize: As in `msacore.hierarchical_contrastive_loss`.
    """

    sharding: Sharding
    layout: Layout
    embeddings: Sequence[Tensor]
    modalities: int
    available: Tensor | None
    labels: Tensor | None
    numbers: Sequence[float]
    which: Sequence[int | None]
    learned: Sequence[Tensor]
    normalize: bool

    def losses(self, edges: _Edges, way: Any) -> Tensor:
        """Losses of the terms ``edges``."""
        op, layout = "hierarchical_contrastive_loss", self.layout
        plan = Plan(
            op=op,
            sharding=self.sharding,
            way=way,
            terms=tuple(Term(a, b, a != b, a == b, self.numbers[tier], self.which[tier]) for tier, a, b, _ in edges),
            of_anchors=layout,
            of_candidates=layout,
            of_queue=layout,
            dtype=_compute_dtype(self.embeddings[0]),
            normalize=self.normalize,
            denominator=ALL,
            reduction="mean",
        )
        whole: list[Tensor | None] = [None] * len(self.embeddings)
        all_available = all_labels = None
        if way is not ring:
            pairs = len(self.embeddings) - self.modalities - 1
            unread = replicated.hidden_embeddings(self.available, self.modalities, pairs)
            sent = [*(self.embeddings[e].detach() for e in plan.sent), self.available, self.labels]
            hidden = [*(unread[e] for e in plan.sent), None, None]
            if way is halves:
                gathered = halves.gather(op, self.sharding, layout, sent, hidden)
            else:
                gathered = rows.gather_rows(op, self.sharding, layout, sent, hidden, 1)
            *of_sent, all_available, all_labels = gathered
            for e, found in zip(plan.sent, of_sent, strict=True):
                whole[e] = found
        roles = []
        for _, a, b, members in edges:
            here, there = _all_of(self.available, members), _all_of(all_available, members)
            own, everywhere = (self.labels, all_labels) if a == b else (None, None)
            roles.append(Role(own, here, own, here, everywhere, there))
        given = Given(
            own=self.embeddings,
            learned=self.learned,
            weights=None,
            own_queue=None,
            queue=None,
            queue_mask=None,
            whole=whole,
            roles=roles,
        )
        return terms.losses(plan, given)


def _all_of(available: Tensor | None, members: _Members) -> Tensor | None:
    """``[rows]``: where all these modalities are available."""
    return None if available is None else available[:, list(members)].all(1)


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
    way: Any,
) -> Any:
    """`msacore.hierarchical_contrastive_loss` of the rows of all ranks.

    One embedding of every term is sent: with "cross_modal", all but the first modality and the first pair.
    """
    op = "hierarchical_contrastive_loss"
    m, embeddings = len(unimodal), [*unimodal, fused, *high_level]
    pairs = list(combinations(range(m), 2))
    named = [(f"temperatures[{k}]", value) for k, value in enumerate(temperatures)]
    numbers, which, learned = _temperatures(op, named)
    intra_modal = tier1 == "intra_modal"
    labels = as_optional_indices(op, "labels", labels) if intra_modal else None
    edges: _Edges = [(0, i, i, (i,)) for i in range(m)] if intra_modal else [(0, i, j, (i, j)) for i, j in pairs]
    edges += [(1, i, m, (i,)) for i in range(m)]
    for p, q in combinations(range(len(pairs)), 2):
        edges.append((2, m + 1 + p, m + 1 + q, tuple(sorted({*pairs[p], *pairs[q]}))))
    shared = _Hierarchy(
        sharding, layout, embeddings, m, available, labels, numbers, which, learned, as_flag(op, "normalize", normalize)
    )
    # Terms of a modality against itself are the first edges; `halves` takes half the work for them.
    itself = m if intra_modal and way is sweep else 0
    losses = shared.losses(edges[itself:], way)
    if itself:
        losses = torch.cat([shared.losses(edges[:itself], halves), losses])
    zero = losses.new_zeros(())
    of_tiers = [[x for x, edge in zip(losses, edges, strict=True) if edge[0] == tier] for tier in range(len(numbers))]
    tiers = torch.stack([sum(found, zero) for found in of_tiers])
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

    An anchor's terms need the order of all targets, which every rank sorts in the same way.
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
