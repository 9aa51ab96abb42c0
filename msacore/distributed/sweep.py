"""A rank visits its anchors against the candidates of all ranks, which it holds: one sweep serves both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from msacore.distributed.shares import from_owners, sum_to_owners, to_owners
from msacore.distributed.terms import Given, Gradients, Known, Plan
from msacore.distributed.tiles import POSITIVES, SUMS, Rows, Tile, add, merge


def _tile(plan: Plan, given: Given, k: int) -> Tile:
    role, whole = given.roles[k], given.whole[plan.terms[k].candidates]
    assert whole is not None
    everything = Rows(whole, role.all_labels, role.all_mask, 0)
    queue = dict(weights=given.weights, queue=given.queue, queue_mask=given.queue_mask)
    return given.tile(plan, k, given.anchors(plan, k), everything, **queue)


def _of_owners(plan: Plan, columns: Sequence[Tensor], numbers: int) -> list[list[Tensor]]:
    """For every symmetric term, what each rank has found for this rank's candidates, ``[numbers, rows]``."""
    if not plan.columns:
        return []
    packed = torch.cat([columns[k] for k in plan.columns])
    came = to_owners(plan.op, plan.sharding, plan.of_candidates, packed)
    return [[part[numbers * t : numbers * (t + 1)] for part in came] for t in range(len(plan.columns))]


def _everywhere(plan: Plan, columns: Sequence[Tensor]) -> dict[int, Tensor]:
    """For every symmetric term, what every rank knows about its candidates, ``[R, N']``."""
    if not plan.columns:
        return {}
    numbers = len(columns[0])
    packed = from_owners(plan.op, plan.sharding, plan.of_candidates, torch.cat(list(columns)))
    return {k: packed[numbers * t : numbers * (t + 1)] for t, k in enumerate(plan.columns)}


def sums(plan: Plan, given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """Merged sums ``[4, rows]`` of this rank's anchors, and of its candidates in the symmetric terms."""
    found = [_tile(plan, given, k).sums() for k in range(len(plan.terms))]
    of_rows = [merge([row], given.tau(plan, k)) for k, (row, _) in enumerate(found)]
    parts = _of_owners(plan, [column for _, column in found], SUMS)
    return of_rows, [merge(part, given.tau(plan, k)) for k, part in zip(plan.columns, parts, strict=True)]


def positives(
    plan: Plan, given: Given, of_rows: Sequence[Tensor], of_columns: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Merged sums ``[2, rows]`` of the positives against the negatives, for the same rows."""
    everywhere = _everywhere(plan, of_columns)
    found = []
    for k in range(len(plan.terms)):
        columns = everywhere[k] if k in everywhere else of_rows[k][:, :0]
        found.append(_tile(plan, given, k).positives(of_rows[k], columns))
    parts = _of_owners(plan, [column for _, column in found], POSITIVES)
    return [row.double() for row, _ in found], [add(part) for part in parts]


def gradients(plan: Plan, given: Given, known: Known) -> Gradients:
    result, of_rows, of_columns = Gradients(given), known.of_rows, known.of_columns
    if plan.columns and plan.reduction == "none":  # every candidate has a scale of its own, which its owner knows
        of_columns = [
            torch.cat([stats, known.scales[k][1].unsqueeze(0)])
            for k, stats in zip(plan.columns, of_columns, strict=True)
        ]
    everywhere = _everywhere(plan, of_columns)
    of_others: dict[int, Tensor] = {}
    for k, term in enumerate(plan.terms):
        row_scale, column_scale = known.scales[k]
        columns = everywhere[k] if k in everywhere else of_rows[k][:, :0]
        if plan.reduction == "none":
            column_scale = columns[-1] if k in everywhere else row_scale.new_zeros(())
            columns = columns[:-1] if k in everywhere else columns
        rows, others, slope, weights, queue = _tile(plan, given, k).gradients(
            (row_scale, column_scale), (of_rows[k], columns), known.used[k]
        )
        result.add_own(term.anchors, rows)
        before = of_others.get(term.candidates)
        of_others[term.candidates] = others if before is None else before + others
        result.add_learned(term.learned, slope)
        result.weights = None if given.weights is None else weights
        result.queue = None if given.queue is None else queue
    packed = torch.cat([of_others[e] for e in plan.sent], 1)
    mine = sum_to_owners(plan.op, plan.sharding, plan.of_candidates, packed)
    widths = [of_others[e].shape[1] for e in plan.sent]
    for e, gradient in zip(plan.sent, mine.split(widths, 1), strict=True):
        result.add_own(e, gradient)
    return result
