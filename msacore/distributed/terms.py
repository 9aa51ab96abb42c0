"""Contrastive losses over ranks as terms between embeddings: what every way of sharing the work has in common.

A way of sharing (`sweep` is one) decides which rank visits which pairs of rows; it computes the sums of a rank's rows
over all pairs, and later gradients from such sums. This module does what comes between: losses, counts over the whole
batch, factors. The gradient is exact: one rank visits each pair of rows, with the sums over the whole batch. Sums over
ranks are added in one order on every backend. Both passes are collective: every rank must call backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msacore.distributed.rows import Layout
from msacore.distributed.sharding import Sharding
from msacore.distributed.shares import sum_over_ranks, sum_to_owners
from msacore.distributed.tiles import NEGATIVES, Rows, Tile, finish, negatives


@dataclass(frozen=True)
class Term:
    """InfoNCE of one embedding against another, or against itself.

    Attributes:
        anchors: Index of the embedding whose rows are anchors.
        candidates: Index of the embedding whose rows are candidates.
        symmetric: The mean of both directions.
        exclude_self: Leave out pairs of equal row number.
        temperature: A number; not read where there is ``learned``.
        learned: Index of the learned temperature, or None.
    """

    anchors: int
    candidates: int
    symmetric: bool
    exclude_self: bool
    temperature: float
    learned: int | None


@dataclass(frozen=True)
class Plan:
    """What is computed: everything but tensors.

    Attributes:
        op: Name of the operator.
        sharding: The ranks.
        way: Module that shares the work: `sweep`, `ring` or `halves`.
        terms: The terms, each with a loss of its own.
        of_anchors: Layout of the anchors.
        of_candidates: Layout of the candidates.
        of_queue: Layout of the entries of the queue.
        dtype: Dtype that rows are converted to.
        normalize: As in `msacore.info_nce`.
        denominator: Code of the denominator, as in the operators.
        reduction: "mean", "sum" or "none" (with one term only).
    """

    op: str
    sharding: Sharding
    way: Any
    terms: tuple[Term, ...]
    of_anchors: Layout
    of_candidates: Layout
    of_queue: Layout
    dtype: torch.dtype
    normalize: bool
    denominator: int
    reduction: str

    @property
    def columns(self) -> list[int]:
        """Indices of the symmetric terms."""
        return [k for k, term in enumerate(self.terms) if term.symmetric]

    @property
    def sent(self) -> list[int]:
        """Indices of the embeddings whose rows are candidates on other ranks."""
        return sorted({term.candidates for term in self.terms})


@dataclass(frozen=True)
class Role:
    """Labels and masks of a term: of this rank's rows, and of the candidates of all ranks where they were gathered."""

    anchor_labels: Tensor | None = None
    anchor_mask: Tensor | None = None
    candidate_labels: Tensor | None = None
    candidate_mask: Tensor | None = None
    all_labels: Tensor | None = None
    all_mask: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        anchors, candidates = (self.anchor_labels, self.anchor_mask), (self.candidate_labels, self.candidate_mask)
        return *anchors, *candidates, self.all_labels, self.all_mask


def place_in(tensors: list[Tensor | None], tensor: Tensor | None) -> int:
    """Index of ``tensor`` in ``tensors``, to which it is appended if it is missing."""
    for place, other in enumerate(tensors):
        if other is tensor:
            return place
    tensors.append(tensor)
    return len(tensors) - 1


@dataclass(frozen=True)
class Given:
    """Tensors of this rank, and what was gathered.

    Attributes:
        own: Embeddings ``[rows, d]``.
        learned: Temperatures, 0-d.
        weights: ``[n, N']``, or None.
        own_queue: This rank's entries of the queue, or None.
        queue: ``[Q, d]``, the queue of all ranks, or None.
        queue_mask: ``[Q]``, or None.
        whole: For every embedding ``[N, d]``, its rows on all ranks, or None where it was not gathered.
        roles: One per term.
    """

    own: Sequence[Tensor]
    learned: Sequence[Tensor]
    weights: Tensor | None
    own_queue: Tensor | None
    queue: Tensor | None
    queue_mask: Tensor | None
    whole: Sequence[Tensor | None]
    roles: Sequence[Role]

    def flat(self) -> tuple[list[Tensor | None], tuple[int, ...]]:
        """All tensors, each tensor of the roles once, and the places of the roles' tensors among the latter."""
        first: list[Tensor | None] = [*self.own, *self.learned, self.weights, self.own_queue]
        first += [self.queue, self.queue_mask, *self.whole]
        tensors: list[Tensor | None] = []
        places = [place_in(tensors, tensor) for role in self.roles for tensor in role.tensors()]
        return [*first, *tensors], tuple(places)

    @staticmethod
    def of(plan: Plan, embeddings: int, places: Sequence[int], tensors: Sequence[Any]) -> "Given":
        """The reverse of :meth:`flat`, with rows in the dtype of the plan."""

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(plan.dtype)

        fields, terms = len(Role().tensors()), len(plan.terms)
        learned = len(tensors) - 2 * embeddings - 4 - (max(places) + 1)
        own, rest = tensors[:embeddings], tensors[embeddings:]
        temperatures, (weights, own_queue, queue, queue_mask) = rest[:learned], rest[learned : learned + 4]
        whole, different = rest[learned + 4 : learned + 4 + embeddings], rest[learned + 4 + embeddings :]
        roles = [different[place] for place in places]
        return Given(
            own=[rows(t) for t in own],  # type: ignore[misc]
            learned=temperatures,
            weights=rows(weights),
            own_queue=rows(own_queue),
            queue=rows(queue),
            queue_mask=queue_mask,
            whole=[rows(t) for t in whole],
            roles=[Role(*roles[fields * k : fields * (k + 1)]) for k in range(terms)],
        )

    def anchors(self, plan: Plan, k: int) -> Rows:
        """The anchors of a term on this rank."""
        role = self.roles[k]
        return Rows(self.own[plan.terms[k].anchors], role.anchor_labels, role.anchor_mask, plan.of_anchors.begin)

    def candidates(self, plan: Plan, k: int) -> Rows:
        """The candidates of a term on this rank."""
        role, layout = self.roles[k], plan.of_candidates
        return Rows(self.own[plan.terms[k].candidates], role.candidate_labels, role.candidate_mask, layout.begin)

    def tile(self, plan: Plan, k: int, anchors: Rows, candidates: Rows, **options: Any) -> Tile:
        """A tile of term k; without weights and queue unless ``options`` hold them."""
        term = plan.terms[k]
        learned = None if term.learned is None else self.learned[term.learned]
        options = {"symmetric": term.symmetric, "exclude_self": term.exclude_self, **options}
        common = (plan.normalize, plan.denominator, term.temperature, learned)
        return Tile(anchors, candidates, options.pop("symmetric"), options.pop("exclude_self"), *common, **options)

    def tau(self, plan: Plan, k: int) -> float | Tensor:
        term = plan.terms[k]
        return term.temperature if term.learned is None else self.learned[term.learned].detach().double()


@dataclass(frozen=True)
class Known:
    """What is known over the whole batch when gradients are computed, by term.

    Attributes:
        scales: Gradient of the losses of anchors, and of candidates as anchors; 0-d or one per row.
        of_rows: What :func:`finish` keeps of anchors.
        of_columns: The same for the candidates of the symmetric terms.
        used: How many anchors and candidates take part.
    """

    scales: Sequence[tuple[Tensor, Tensor]]
    of_rows: Sequence[Tensor]
    of_columns: Sequence[Tensor]
    used: Sequence[tuple[Tensor, Tensor]]


class Gradients:
    """Sums of gradients of this rank's tensors, in the dtype the operators add them in."""

    def __init__(self, given: Given) -> None:
        self.own: list[Tensor | None] = [None] * len(given.own)
        self.learned: list[Tensor | None] = [None] * len(given.learned)
        self.weights: Tensor | None = None
        self.queue: Tensor | None = None  # [Q, d], this rank's share

    def add_own(self, k: int, gradient: Tensor) -> None:
        before = self.own[k]
        gradient = gradient.float() if gradient.dtype.itemsize == 2 else gradient
        self.own[k] = gradient if before is None else before + gradient

    def add_learned(self, k: int | None, gradient: Tensor) -> None:
        if k is not None:
            before = self.learned[k]
            self.learned[k] = gradient if before is None else before + gradient


class _Terms(torch.autograd.Function):
    """Losses of the terms over the whole batch, ``[terms]``; for "none" those of this rank's anchors."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, embeddings: int, places: tuple[int, ...], *tensors: Tensor | None) -> Tensor:
        given = Given.of(plan, embeddings, places, tensors)
        losses, stats, counts = _losses(plan, given)
        ctx.plan, ctx.embeddings, ctx.places, ctx.tensors = plan, embeddings, places, len(tensors)
        ctx.save_for_backward(*tensors, counts, *stats)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        plan, embeddings, saved = ctx.plan, ctx.embeddings, ctx.saved_tensors
        tensors, (counts, *stats) = saved[: ctx.tensors], saved[ctx.tensors :]
        given = Given.of(plan, embeddings, ctx.places, tensors)
        found = _gradients(plan, given, grads[0], counts, stats)
        own = [None if g is None else g.to(t.dtype) for g, t in zip(found.own, tensors, strict=False)]
        after = tensors[embeddings:]
        learned = [None if g is None else g.to(t.dtype) for g, t in zip(found.learned, after, strict=False)]
        weights = None if found.weights is None else found.weights.to(after[len(learned)].dtype)
        queue = None
        if found.queue is not None:
            queue = sum_to_owners(plan.op, plan.sharding, plan.of_queue, found.queue)
            queue = queue.to(after[len(learned) + 1].dtype)
        differentiable = (*own, *learned, weights, queue)
        return None, None, None, *differentiable, *[None] * (len(tensors) - len(differentiable))


def losses(plan: Plan, given: Given) -> Tensor:
    tensors, places = given.flat()
    return _Terms.apply(plan, len(given.own), places, *tensors)


_NUMBERS = 6  # per term: sum of losses and count of anchors, for rows and for columns; how many of each take part


def _losses(plan: Plan, given: Given) -> tuple[Tensor, list[Tensor], Tensor]:
    """The losses; what is kept of the anchors of every term, then of the candidates of symmetric terms; the counts."""
    of_rows, of_columns = plan.way.sums(plan, given)
    more_rows: Sequence[Tensor | None] = [None] * len(of_rows)
    more_columns: Sequence[Tensor | None] = [None] * len(of_columns)
    if plan.denominator == NEGATIVES:
        known = [negatives(s) for s in of_rows], [negatives(s) for s in of_columns]
        more_rows, more_columns = plan.way.positives(plan, given, *known)
    taus = [given.tau(plan, k) for k in range(len(plan.terms))]
    rows = [finish(s, p, plan.denominator, t) for s, p, t in zip(of_rows, more_rows, taus, strict=True)]
    of_symmetric = zip(plan.columns, of_columns, more_columns, strict=True)
    columns = {k: finish(s, p, plan.denominator, taus[k]) for k, s, p in of_symmetric}
    numbers = []
    for k, (loss, _, kept) in enumerate(rows):
        nothing = loss.new_zeros(())
        other, _, others = columns.get(k, (nothing, None, nothing))
        used = given.anchors(plan, k).used(), given.candidates(plan, k).used()
        numbers += [loss.sum(), kept.sum(), other.sum(), others.sum(), *used]
    counts = sum_over_ranks(plan.op, plan.sharding, torch.stack([n.double() for n in numbers]))
    counts = counts.unflatten(0, (len(rows), _NUMBERS))
    result = torch.float64 if plan.dtype == torch.float64 else torch.float32
    stats = [stat.to(result) for _, stat, _ in (*rows, *columns.values())]
    if plan.reduction == "none":
        value = rows[0][0] if not columns else (rows[0][0] + columns[0][0]) / 2
        return value.to(result), stats, counts
    found = []
    for term, (rows_sum, rows_kept, columns_sum, columns_kept, _, _) in zip(plan.terms, counts, strict=True):
        if plan.reduction == "mean":
            rows_sum, columns_sum = rows_sum / rows_kept.clamp(min=1), columns_sum / columns_kept.clamp(min=1)
        found.append((rows_sum + columns_sum) / 2 if term.symmetric else rows_sum)
    return torch.stack(found).to(result), stats, counts


def _gradients(plan: Plan, given: Given, gradient: Tensor, counts: Tensor, stats: Sequence[Tensor]) -> Gradients:
    scales, used = [], []
    for k, term in enumerate(plan.terms):
        if plan.reduction == "none":
            scale = gradient / 2 if term.symmetric else gradient
            scales.append((scale, scale))
        else:
            # Every rank's loss is the total: with equal upstream gradients g on W ranks its sum has the gradient W g.
            scale = gradient[k].double() * plan.sharding.world / (2 if term.symmetric else 1)
            kept = counts[k, 1].clamp(min=1), counts[k, 3].clamp(min=1)
            scales.append((scale / kept[0], scale / kept[1]) if plan.reduction == "mean" else (scale, scale))
        queue = given.queue
        further = 0 if queue is None else len(queue) if given.queue_mask is None else given.queue_mask.sum()
        used.append((counts[k, 4].long(), counts[k, 5].long() + further))
    terms = len(plan.terms)
    return plan.way.gradients(plan, given, Known(scales, stats[:terms], stats[terms:], used))
