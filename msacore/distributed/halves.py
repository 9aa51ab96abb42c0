"""An embedding against itself: of two ranks one visits the pairs between their rows, for both.

Rank r visits its own pairs and those with the next ⌊W/2⌋ ranks, as in a tournament; where W is even, ranks that are
opposite each other share their pairs. That is half the work and half the messages of a sweep over all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msacore.distributed.collectives import exchange
from msacore.distributed.replicated import Contrast, hidden
from msacore.distributed.rows import Layout, hide, pack, pad_rows, unpack
from msacore.distributed.sharding import Sharding
from msacore.distributed.terms import Given, Gradients, Pairs, Plan
from msacore.distributed.tiles import SUMS, Rows, Tile, add, merge


def _others(sharding: Sharding) -> int:
    """How many of the next ranks a rank visits."""
    return sharding.world // 2


def _fetch(op: str, sharding: Sharding, x: Tensor) -> list[Tensor]:
    """``x`` ``[most, …]`` of the next ranks, nearest first."""
    world, rank, count = sharding.world, sharding.rank, _others(sharding)
    to = [len(x) if 1 <= (rank - other) % world <= count else 0 for other in range(world)]
    come = [len(x) if 1 <= (other - rank) % world <= count else 0 for other in range(world)]
    found = exchange(op, torch.cat([x] * count) if count else x[:0], come, to, sharding.group).split(come)
    return [found[(rank + step) % world] for step in range(1, count + 1)]


def _give_back(op: str, sharding: Sharding, parts: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """What this rank has found of the next ranks' rows goes to them; what the ranks before say of this rank's rows."""
    world, rank, count = sharding.world, sharding.rank, _others(sharding)
    to = [len(like) if 1 <= (other - rank) % world <= count else 0 for other in range(world)]
    come = [len(like) if 1 <= (rank - other) % world <= count else 0 for other in range(world)]
    ordered = [parts[step - 1] for other in range(world) if 1 <= (step := (other - rank) % world) <= count]
    found = exchange(op, torch.cat([like[:0], *ordered]), come, to, sharding.group).split(come)
    return [found[(rank - step) % world] for step in range(1, count + 1)]


def gather(sharding: Sharding, c: Contrast) -> list[Tensor | None]:
    """Rows, labels and masks of the next ranks, one rank after the other."""
    own = [t for t in (c.anchors, c.anchor_labels, c.anchor_mask) if t is not None]
    sent = [hide(own[0].detach(), hidden(c.anchor_mask, c.anchor_labels)), *own[1:]]
    layout = c.of_anchors
    buffer = pack(sent)
    blocks = _fetch("info_nce", sharding, pad_rows(buffer, max(layout.counts) - len(buffer)))
    cut = [block[: layout.counts[rank]] for block, rank in zip(blocks, _next(layout), strict=True)]
    found = iter(unpack(torch.cat([buffer[:0], *cut]), sent))
    return [None if t is None else next(found) for t in (c.anchors, c.anchor_labels, c.anchor_mask)]


def _next(layout: Layout) -> list[int]:
    """The ranks that this one visits, nearest first."""
    world = len(layout.counts)
    return [(layout.rank + step) % world for step in range(1, world // 2 + 1)]


@dataclass(frozen=True)
class _Visit:
    """Some of this rank's rows against some of those that were fetched.

    Attributes:
        tile: The pairs.
        rows: Where its anchors begin and end among this rank's rows.
        columns: Where its candidates begin and end among the fetched rows.
    """

    tile: Tile
    rows: tuple[int, int]
    columns: tuple[int, int]


def _visits(plan: Plan, given: Given) -> tuple[Tile, list[_Visit]]:
    """The pairs of this rank's own rows, and those with others."""
    layout, own, (whole,) = plan.of_anchors, given.anchors(plan, 0), given.whole
    assert whole is not None
    role, n, ranks = given.roles[0], layout.rows, _next(layout)
    # The fetched rows have no number that one of this rank's rows has.
    fetched = Rows(whole, role.all_labels, role.all_mask, own.begin + 2 * layout.total + 1)
    ends = [0]
    for rank in ranks:
        ends.append(ends[-1] + layout.counts[rank])

    def visit(rows: tuple[int, int], columns: tuple[int, int]) -> _Visit:
        tile = given.tile(plan, 0, own.part(*rows), fetched.part(*columns), symmetric=True)
        return _Visit(tile, rows, columns)

    shared = len(layout.counts) % 2 == 0
    visits = [visit((0, n), (0, ends[len(ranks) - shared]))] if len(ranks) > shared else []
    if shared:  # of the opposite rank's rows the first half, or the second half of this rank's
        begin, end = ends[-2], ends[-1]
        if layout.rank < ranks[-1]:
            visits.append(visit((0, n), (begin, begin + (end - begin) // 2)))
        else:
            visits.append(visit((min(layout.counts[layout.rank] // 2, n), n), (begin, end)))
    return given.tile(plan, 0, own, own, symmetric=False), visits


def _widen(part: Tensor, at: tuple[int, int], size: int, nothing: Tensor) -> Tensor:
    """``part`` ``[R, end - begin]`` at its place among ``size`` columns; the others are ``nothing`` ``[R]``."""
    before, after = (nothing.unsqueeze(1).expand(-1, count) for count in (at[0], size - at[1]))
    return torch.cat([before, part, after], 1)


def _deliver(plan: Plan, columns: Tensor) -> list[Tensor]:
    """``[R, fetched]`` to the ranks whose rows they are; what others have found of this rank's, ``[R, rows]`` each."""
    layout = plan.of_anchors
    most = max(layout.counts)
    blocks = columns.T.split([layout.counts[rank] for rank in _next(layout)]) if _next(layout) else []
    blocks = [pad_rows(block, most - len(block)) for block in blocks]
    like = columns.new_empty(most, len(columns))
    return [part[: layout.rows].T for part in _give_back(plan.op, plan.sharding, blocks, like)]


def _of_fetched(plan: Plan, own: Tensor) -> Tensor:
    """``[R, rows]`` of this rank's rows, as ``[R, fetched]`` of the fetched ones."""
    layout = plan.of_anchors
    blocks = _fetch(plan.op, plan.sharding, pad_rows(own.T, max(layout.counts) - layout.rows))
    cut = [block[: layout.counts[rank]] for block, rank in zip(blocks, _next(layout), strict=True)]
    return torch.cat([own.T[:0], *cut]).T


def _size(given: Given) -> int:
    (whole,) = given.whole
    assert whole is not None
    return len(whole)


def sums(plan: Plan, given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """Merged sums ``[4, rows]`` of this rank's anchors."""
    alone, visits = _visits(plan, given)
    tau, rows, size = given.tau(plan, 0), plan.of_anchors.rows, _size(given)
    found = [alone.sums()[0].double()]
    nothing = torch.cat([found[0].new_full((1,), float("-inf")), found[0].new_zeros(SUMS - 1)])
    others = [nothing.unsqueeze(1).expand(-1, size)]
    for visit in visits:
        row, column = visit.tile.sums()
        found.append(_widen(row.double(), visit.rows, rows, nothing))
        others.append(_widen(column.double(), visit.columns, size, nothing))
    came = _deliver(plan, merge(others, tau).to(alone.dtype))
    return [merge([*found, *came], tau)], []


def positives(
    plan: Plan, given: Given, of_rows: Sequence[Tensor], of_columns: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same of the positives against the negatives, ``[2, rows]``."""
    alone, visits = _visits(plan, given)
    (known,), rows, size = of_rows, plan.of_anchors.rows, _size(given)
    known_others = _of_fetched(plan, known)
    nothing = known.new_zeros(2)
    found = [alone.positives(known, known[:, :0])[0].double()]
    others = [nothing.unsqueeze(1).expand(-1, size)]
    for visit in visits:
        here, there = slice(*visit.rows), slice(*visit.columns)
        row, column = visit.tile.positives(known[:, here].contiguous(), known_others[:, there].contiguous())
        found.append(_widen(row.double(), visit.rows, rows, nothing))
        others.append(_widen(column.double(), visit.columns, size, nothing))
    return [add([*found, *_deliver(plan, add(others))])], []


def gradients(
    plan: Plan,
    given: Given,
    scales: Sequence[tuple[Tensor, Tensor]],
    stats: Pairs,
    used: Sequence[tuple[Tensor, Tensor]],
) -> Gradients:
    result = Gradients(given)
    alone, visits = _visits(plan, given)
    ((scale, _),), ((known,), _), learned = scales, stats, plan.terms[0].learned
    per_row = plan.reduction == "none"
    sent = torch.cat([known, scale.unsqueeze(0).to(known.dtype)]) if per_row else known
    known_others = _of_fetched(plan, sent)
    nothing = scale.new_zeros(())
    found = alone.gradients((scale, nothing), (known, known[:, :0]), used[0])
    result.add_own(0, found[0])
    result.add_own(0, found[1])
    result.add_learned(learned, found[2])
    rows, size, width = plan.of_anchors.rows, _size(given), given.own[0].shape[1]
    mine, others = known.new_zeros(rows, width), known.new_zeros(size, width)
    for visit in visits:
        here, there = slice(*visit.rows), slice(*visit.columns)
        of_others = known_others[: len(known), there]
        of_scales = (scale[here], known_others[-1, there]) if per_row else (scale, scale)
        found = visit.tile.gradients(of_scales, (known[:, here], of_others), used[0])
        mine[here] += found[0]
        others[there] += found[1]
        result.add_learned(learned, found[2])
    result.add_own(0, mine)
    for part in _deliver(plan, others.T):
        result.add_own(0, part.T)
    return result
