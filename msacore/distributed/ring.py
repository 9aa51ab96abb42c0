"""Blocks of candidates pass from rank to rank, for batches that no rank can hold: memory linear in a rank's own rows.

What is known about the candidates of a block travels with it: their sums in the forward pass, their gradients in the
backward pass. After W steps, one per rank, a block is back at its owner. While a rank works on a block, the next one is
already on its way.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msacore.distributed.collectives import begin_pass_on, wait
from msacore.distributed.rows import hide, pack, pad_rows, unpack
from msacore.distributed.terms import Given, Gradients, Known, Plan, place_in
from msacore.distributed.tiles import POSITIVES, SUMS, Rows, Tile, merge


class _Block:
    """What is sent of this rank's candidates: rows, labels and masks, each once, and ``extra`` ``[rows, E]``."""

    def __init__(self, plan: Plan, given: Given, extra: Tensor) -> None:
        found: list[Tensor | None] = [None, extra]
        unread: dict[int, Tensor | None] = {}
        self._roles = []
        for k, term in enumerate(plan.terms):
            rows = given.candidates(plan, k)
            used = rows.takes_part()
            before = unread.get(term.candidates, used)
            unread[term.candidates] = None if used is None or before is None else before | used
            self._roles.append((place_in(found, rows.labels), place_in(found, rows.mask)))
        self._rows = {}
        for e in plan.sent:
            used = unread[e]
            self._rows[e] = len(found)
            found.append(hide(given.own[e], None if used is None else ~used))
        self._tensors = [t for t in found if t is not None]

    def bytes(self, plan: Plan) -> Tensor:
        buffer = pack(self._tensors)
        return pad_rows(buffer, max(plan.of_candidates.counts) - len(buffer))

    def read(self, buffer: Tensor) -> list[Tensor | None]:
        """The tensors of a block; ``extra`` is at place 1."""
        return [None, *unpack(buffer, self._tensors)]

    def rows(self, plan: Plan, k: int, found: Sequence[Tensor | None], begin: int) -> Rows:
        """The candidates of term k among the tensors ``found`` that were read."""
        labels, mask = self._roles[k]
        x = found[self._rows[plan.terms[k].candidates]]
        assert x is not None
        return Rows(x, found[labels], found[mask], begin)


def _travel(
    plan: Plan, given: Given, extra: Tensor, start: Tensor, visit: Callable[[int, list[Tile], Tensor, Tensor], Tensor]
) -> Tensor:
    """Every rank visits every block; returns what has travelled with this rank's own block.

    Args:
        plan: What is computed.
        given: This rank's tensors.
        extra: ``[rows, E]``, what other ranks need to know about this rank's candidates.
        start: ``[rows, A]``, what travels with the block and changes.
        visit: Called with the rank that owns the block, tiles of all terms, ``extra`` of the block, and what has
            travelled with it so far; returns what travels on.
    """
    op, group, layout = plan.op, plan.sharding.group, plan.of_candidates
    most, world = max(layout.counts), plan.sharding.world
    block = _Block(plan, given, extra)
    buffer, luggage = block.bytes(plan), pad_rows(start, most - len(start))
    begins = [sum(layout.counts[:r]) for r in range(world)]
    for step in range(world):
        source = (plan.sharding.rank + step) % world
        coming = begin_pass_on(op, buffer, group) if step + 1 < world else buffer
        count, begin = layout.counts[source], begins[source]
        own = source == plan.sharding.rank
        found = block.read(buffer[:count])
        tiles = []
        for k in range(len(plan.terms)):
            weights = None if given.weights is None else given.weights[:, begin : begin + count]
            queue = (given.queue, given.queue_mask) if own else (None, None)
            candidates = block.rows(plan, k, found, begin)
            anchors = given.anchors(plan, k)
            tiles.append(given.tile(plan, k, anchors, candidates, weights=weights, queue=queue[0], queue_mask=queue[1]))
        of_block = found[1]
        assert of_block is not None
        changed = visit(source, tiles, of_block, luggage[:count])
        luggage = wait(op, begin_pass_on(op, pad_rows(changed, most - count), group), group)
        buffer = wait(op, coming, group) if step + 1 < world else buffer
    return luggage[: layout.rows]


def _like(given: Given) -> Tensor:
    """A 0-d float64 tensor on the device of the rows, from which others are made."""
    return given.own[0].new_zeros((), dtype=torch.float64)


def sums(plan: Plan, given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """Merged sums ``[4, rows]`` of this rank's anchors, and of its candidates in the symmetric terms."""
    rows, like = plan.of_candidates.rows, _like(given)
    of_rows: list[Tensor | None] = [None] * len(plan.terms)
    taus = [given.tau(plan, k) for k in range(len(plan.terms))]
    nothing = torch.cat([like.new_full((rows, 1), float("-inf")), like.new_zeros(rows, SUMS - 1)], 1)

    def visit(source: int, tiles: list[Tile], extra: Tensor, before: Tensor) -> Tensor:
        found = [before[:, :0]]
        for k, tile in enumerate(tiles):
            row, column = tile.sums()
            known = of_rows[k]
            of_rows[k] = merge([row] if known is None else [known, row], taus[k])
            if plan.terms[k].symmetric:
                at = SUMS * plan.columns.index(k)
                found.append(merge([before[:, at : at + SUMS].T, column], taus[k]).T)
        return torch.cat(found, 1)

    start = nothing.repeat(1, len(plan.columns))
    columns = _travel(plan, given, like.new_zeros(rows, 0), start, visit)
    of_columns = [columns[:, SUMS * t : SUMS * (t + 1)].T for t in range(len(plan.columns))]
    return [row for row in of_rows if row is not None], of_columns


def positives(
    plan: Plan, given: Given, of_rows: Sequence[Tensor], of_columns: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Merged sums ``[2, rows]`` of the positives against the negatives, for the same rows."""
    rows, like, width = plan.of_candidates.rows, _like(given), POSITIVES
    result: list[Tensor | None] = [None] * len(plan.terms)

    def visit(source: int, tiles: list[Tile], extra: Tensor, before: Tensor) -> Tensor:
        found = [before[:, :0]]
        for k, tile in enumerate(tiles):
            at = width * plan.columns.index(k) if k in plan.columns else 0
            known = extra[:, at : at + width].T if k in plan.columns else of_rows[k][:, :0]
            row, column = tile.positives(of_rows[k], known)
            sofar = result[k]
            result[k] = row.double() if sofar is None else sofar + row
            if k in plan.columns:
                found.append(before[:, at : at + width] + column.T)
        return torch.cat(found, 1)

    extra = torch.cat([like.new_zeros(rows, 0), *(c.T for c in of_columns)], 1)
    columns = _travel(plan, given, extra, like.new_zeros(rows, width * len(plan.columns)), visit)
    of_candidates = [columns[:, width * t : width * (t + 1)].T for t in range(len(plan.columns))]
    return [row for row in result if row is not None], of_candidates


def gradients(plan: Plan, given: Given, known: Known) -> Gradients:
    result, of_rows, of_columns = Gradients(given), known.of_rows, known.of_columns
    per_row = plan.reduction == "none"
    sent, at = [of_rows[0].new_zeros(plan.of_candidates.rows, 0)], {}
    for t, k in enumerate(plan.columns):
        at[k] = sum(x.shape[1] for x in sent)
        sent.append(of_columns[t].T)
        if per_row:
            sent.append(known.scales[k][1].unsqueeze(1).to(of_columns[t].dtype))
    weights: dict[int, Tensor] = {}
    widths = {e: given.own[e].shape[1] for e in plan.sent}

    def visit(source: int, tiles: list[Tile], extra: Tensor, before: Tensor) -> Tensor:
        parts = dict(zip(plan.sent, before.split(list(widths.values()), 1), strict=True))
        for k, tile in enumerate(tiles):
            term, (row_scale, column_scale) = plan.terms[k], known.scales[k]
            columns = of_rows[k][:, :0]
            if k in at:
                end = at[k] + len(of_rows[k])
                columns = extra[:, at[k] : end].T
                column_scale = extra[:, end] if per_row else column_scale
            elif per_row:
                column_scale = row_scale.new_zeros(())
            found = tile.gradients((row_scale, column_scale), (of_rows[k], columns), known.used[k])
            result.add_own(term.anchors, found[0])
            parts[term.candidates] = parts[term.candidates] + found[1]
            result.add_learned(term.learned, found[2])
            if given.weights is not None:
                weights[source] = found[3]
            if tile.queue is not None:
                result.queue = found[4]
        return torch.cat([parts[e] for e in plan.sent], 1)

    start = of_rows[0].new_zeros(plan.of_candidates.rows, sum(widths.values()))
    home = _travel(plan, given, torch.cat(sent, 1), start, visit)
    for e, gradient in zip(plan.sent, home.split(list(widths.values()), 1), strict=True):
        result.add_own(e, gradient)
    if weights:
        result.weights = torch.cat([weights[r] for r in sorted(weights)], 1)
    return result
