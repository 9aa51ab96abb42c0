"""An embedding against itself: one of any two ranks visits the pairs between their rows, for both.

Rank r visits its own pairs and those with the next ⌊W/2⌋ ranks, as in a tournament; where W is even, ranks that are
opposite each other share their pairs. This takes half the work and half the messages of a sweep over all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msacore.distributed.collectives import exchange
from msacore.distributed.rows import Layout, hide, pack, pad_rows, unpack
from msacore.distributed.sharding import Sharding
from msacore.distributed.terms import Given, Gradients, Known, Plan
from msacore.distributed.tiles import POSITIVES, SUMS, Rows, Tile, add, merge


def _others(sharding: Sharding) -> int:
    """The number of next ranks that a rank visits."""
    return sharding.world // 2


def _fetch(op: str, sharding: Sharding, x: Tensor) -> list[Tensor]:
    """``x`` ``[most, …]`` of the next ranks, nearest first."""
    world, rank, count = sharding.world, sharding.rank, _others(sharding)
    to = [len(x) if 1 <= (rank - other) % world <= count else 0 for other in range(world)]
    come = [len(x) if 1 <= (other - rank) % world <= count else 0 for other in range(world)]
    found = exchange(op, torch.cat([x] * count) if count else x[:0], come, to, sharding.group).split(come)
    return [found[(rank + step) % world] for step in range(1, count + 1)]


def _give_back(op: str, sharding: Sharding, parts: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Send the next ranks what was found for their rows; returns what the previous ranks found for this rank's rows."""
    world, rank, count = sharding.world, sharding.rank, _others(sharding)
    to = [len(like) if 1 <= (other - rank) % world <= count else 0 for other in range(world)]
    come = [len(like) if 1 <= (rank - other) % world <= count else 0 for other in range(world)]
    steps = [(other - rank) % world for other in range(world)]
    ordered = [parts[step - 1] for step in steps if 1 <= step <= count]
    found = exchange(op, torch.cat([like[:0], *ordered]), come, to, sharding.group).split(come)
    return [found[(rank - step) % world] for step in range(1, count + 1)]


def gather(
    op: str,
    sharding: Sharding,
    layout: Layout,
    tensors: Sequence[Tensor | None],
    unread: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """For every tensor, the rows of the next ranks, one rank after the other.

    Args:
        op: Name of the operator.
        sharding: The ranks.
        layout: Layout of the rows.
        tensors: ``[rows, …]`` each; all of them travel in one buffer of bytes.
        unread: For each tensor, which of its rows ``[rows]`` are never read: they travel as zeros, whatever they hold.
    """
    present = [(x.detach(), hidden) for x, hidden in zip(tensors, unread, strict=True) if x is not None]
    sent = [hide(x, hidden) for x, hidden in present]
    buffer = pack(sent)
    blocks = _fetch(op, sharding, pad_rows(buffer, max(layout.counts) - len(buffer)))
    cut = [block[: layout.counts[rank]] for block, rank in zip(blocks, _next(layout), strict=True)]
    found = iter(unpack(torch.cat([buffer[:0], *cut]), sent))
    return [None if x is None else next(found) for x in tensors]


def _next(layout: Layout) -> list[int]:
    """The ranks that this one visits, nearest first."""
    world = len(layout.counts)
    return [(layout.rank + step) % world for step in range(1, world // 2 + 1)]


@dataclass(frozen=True)
class _Visit:
    """Some of this rank's rows against some of the fetched rows.

    Attributes:
        tile: The pairs.
        rows: Where its anchors begin and end among this rank's rows.
        columns: Where its candidates begin and end among the fetched rows.
    """

    tile: Tile
    rows: tuple[int, int]
    columns: tuple[int, int]


def _visits(plan: Plan, given: Given, k: int) -> tuple[Tile, list[_Visit]]:
    """The pairs of term k among this rank's own rows, and the visits to fetched rows."""
    layout, own, whole = plan.of_anchors, given.anchors(plan, k), given.whole[plan.terms[k].anchors]
    assert whole is not None
    role, n, ranks = given.roles[k], layout.rows, _next(layout)
    # Fetched rows get row numbers that no row of this rank has.
    fetched = Rows(whole, role.all_labels, role.all_mask, own.begin + 2 * layout.total + 1)
    ends = [0]
    for rank in ranks:
        ends.append(ends[-1] + layout.counts[rank])

    def visit(rows: tuple[int, int], columns: tuple[int, int]) -> _Visit:
        tile = given.tile(plan, k, own.part(*rows), fetched.part(*columns), symmetric=True)
        return _Visit(tile, rows, columns)

    shared = len(layout.counts) % 2 == 0
    visits = [visit((0, n), (0, ends[len(ranks) - shared]))] if len(ranks) > shared else []
    if shared:  # the first half of the opposite rank's rows, or the second half of this rank's
        begin, end = ends[-2], ends[-1]
        if layout.rank < ranks[-1]:
            visits.append(visit((0, n), (begin, begin + (end - begin) // 2)))
        else:
            visits.append(visit((min(layout.counts[layout.rank] // 2, n), n), (begin, end)))
    return given.tile(plan, k, own, own, symmetric=False), visits


def _widen(part: Tensor, at: tuple[int, int], size: int, nothing: Tensor) -> Tensor:
    """``part`` ``[R, end - begin]`` at its place among ``size`` columns; the other columns are ``nothing`` ``[R]``."""
    before, after = (nothing.unsqueeze(1).expand(-1, count) for count in (at[0], size - at[1]))
    return torch.cat([before, part, after], 1)


def _deliver(plan: Plan, of_terms: Sequence[Tensor]) -> list[list[Tensor]]:
    """Send ``[R, fetched]`` of every term to the owners of the rows; returns what others found for this rank's rows.

    ``[R, rows]`` each, by term and then by rank.
    """
    layout, columns = plan.of_anchors, torch.cat(list(of_terms))
    most = max(layout.counts)
    blocks = columns.T.split([layout.counts[rank] for rank in _next(layout)]) if _next(layout) else []
    blocks = [pad_rows(block, most - len(block)) for block in blocks]
    like = columns.new_empty(most, len(columns))
    came = [part[: layout.rows].T for part in _give_back(plan.op, plan.sharding, blocks, like)]
    numbers = [len(of_term) for of_term in of_terms]
    by_rank = [part.split(numbers) for part in came]
    return [list(of_term) for of_term in zip(*by_rank, strict=True)] if by_rank else [[] for _ in of_terms]


def _of_fetched(plan: Plan, of_terms: Sequence[Tensor]) -> Sequence[Tensor]:
    """Exchange ``[R, rows]`` of this rank's rows for ``[R, fetched]`` of the fetched rows, by term."""
    layout, own = plan.of_anchors, torch.cat(list(of_terms))
    blocks = _fetch(plan.op, plan.sharding, pad_rows(own.T, max(layout.counts) - layout.rows))
    cut = [block[: layout.counts[rank]] for block, rank in zip(blocks, _next(layout), strict=True)]
    return torch.cat([own.T[:0], *cut]).T.split([len(of_term) for of_term in of_terms])


def _fetched(plan: Plan) -> int:
    """The number of fetched rows."""
    return sum(plan.of_anchors.counts[rank] for rank in _next(plan.of_anchors))


def sums(plan: Plan, given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """Merged sums ``[4, rows]`` of this rank's anchors."""
    rows, size, of_rows, of_others = plan.of_anchors.rows, _fetched(plan), [], []
    for k in range(len(plan.terms)):
        alone, visits = _visits(plan, given, k)
        found = [alone.sums()[0].double()]
        nothing = torch.cat([found[0].new_full((1,), float("-inf")), found[0].new_zeros(SUMS - 1)])
        others = [nothing.unsqueeze(1).expand(-1, size)]
        for visit in visits:
            row, column = visit.tile.sums()
            found.append(_widen(row.double(), visit.rows, rows, nothing))
            others.append(_widen(column.double(), visit.columns, size, nothing))
        of_rows.append(found)
        of_others.append(merge(others, given.tau(plan, k)).to(alone.dtype))
    merged = []
    for k, came in enumerate(_deliver(plan, of_others)):
        merged.append(merge([*of_rows[k], *came], given.tau(plan, k)))
    return merged, []


def positives(
    plan: Plan, given: Given, of_rows: Sequence[Tensor], of_columns: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Merged sums ``[2, rows]`` of the positives against the negatives."""
    rows, size, sofar, of_others = plan.of_anchors.rows, _fetched(plan), [], []
    for k, (known, known_others) in enumerate(zip(of_rows, _of_fetched(plan, of_rows), strict=True)):
        alone, visits = _visits(plan, given, k)
        nothing = known.new_zeros(POSITIVES)
        found = [alone.positives(known, known[:, :0])[0].double()]
        others = [nothing.unsqueeze(1).expand(-1, size)]
        for visit in visits:
            here, there = slice(*visit.rows), slice(*visit.columns)
            row, column = visit.tile.positives(known[:, here].contiguous(), known_others[:, there].contiguous())
            found.append(_widen(row.double(), visit.rows, rows, nothing))
            others.append(_widen(column.double(), visit.columns, size, nothing))
        sofar.append(found)
        of_others.append(add(others))
    return [add([*found, *came]) for found, came in zip(sofar, _deliver(plan, of_others), strict=True)], []


def gradients(plan: Plan, given: Given, known: Known) -> Gradients:
    result = Gradients(given)
    per_row, of_others = plan.reduction == "none", []
    sent = [
        torch.cat([stats, scale.unsqueeze(0).to(stats.dtype)]) if per_row else stats
        for stats, (scale, _) in zip(known.of_rows, known.scales, strict=True)
    ]
    for k, fetched in enumerate(_of_fetched(plan, sent)):
        (scale, _), stats, used, term = known.scales[k], known.of_rows[k], known.used[k], plan.terms[k]
        alone, visits = _visits(plan, given, k)
        found = alone.gradients((scale, scale.new_zeros(())), (stats, stats[:, :0]), used)
        result.add_own(term.anchors, found[0])
        result.add_own(term.anchors, found[1])
        result.add_learned(term.learned, found[2])
        width = given.own[term.anchors].shape[1]
        mine, others = stats.new_zeros(plan.of_anchors.rows, width), stats.new_zeros(_fetched(plan), width)
        for visit in visits:
            here, there = slice(*visit.rows), slice(*visit.columns)
            of_fetched = fetched[: len(stats), there]
            of_scales = (scale[here], fetched[-1, there]) if per_row else (scale, scale)
            found = visit.tile.gradients(of_scales, (stats[:, here], of_fetched), used)
            mine[here] += found[0]
            others[there] += found[1]
            result.add_learned(term.learned, found[2])
        result.add_own(term.anchors, mine)
        of_others.append(others.T)
    for term, came in zip(plan.terms, _deliver(plan, of_others), strict=True):
        for part in came:
            result.add_own(term.anchors, part.T)
    return result
