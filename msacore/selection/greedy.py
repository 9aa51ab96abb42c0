"""Exact greedy k-centre that reads the pool a few times, not once per pick.

A pick can only lower distances, so a stale score is an upper bound. A round sets a floor that a few thousand samples
should reach, brings the samples whose bound reaches it up to date, and drops each as soon as it falls below. The rest
are the candidates: picks are made greedily among them for as long as the best one precedes everything outside, by
(score, then smaller index). Samples that stay low are hardly ever read again. Several holders of parts of a pool each
propose candidates; the picks among all of them are those of one pool.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection import tree
from msacore.selection.engine import Native

_CANDIDATES = 4096  # at least, over all holders together; up to four times this number for a large budget
_FEWEST = 1  # candidates of one holder
_PER_PICK = 32  # candidates per pick
_ROUND = 1024  # picks per round at most, so that an interrupt is noticed and the bar moves
_SAMPLE = 2048  # samples whose scores tell where the floor should be
_STAGE = 32  # centres folded in before the first samples are dropped; the number doubles with every stage
_PRIMING = 32  # centres that give a first bound
_WHOLE = 2048  # with at most this many rows in memory, all are candidates: choosing among them costs more
_WHOLE_NARROW = (131_072, 8)  # the same for rows of at most this width: the steps skip most of them


class Cover:
    """Distance of every sample to its nearest centre, brought up to date only for the samples asked for."""

    def __init__(self, engine: Native, centers: Tensor, capacity: int) -> None:
        self.pool = pool = engine.pool
        self.centers = centers.new_empty(len(centers) + capacity, centers.shape[1])
        self.centers[: len(centers)] = centers
        self.count = len(centers)
        bounds = engine.bounds(centers) if len(centers) and pool.n else None
        unknown = torch.full((pool.n,), torch.inf, dtype=torch.float64, device=pool.device)
        self.delta = unknown if bounds is None else bounds
        self.owner = torch.full((pool.n,), -1, device=pool.device)
        self.folded = torch.zeros(pool.n, dtype=torch.int64, device=pool.device)
        self.farthest: float | None = None  # largest distance of a row that is not a centre, if a step found it

    def add(self, centers: Tensor) -> None:
        self.farthest = None
        self.centers[self.count : self.count + len(centers)] = centers
        self.count += len(centers)

    def refresh(self, rows: Tensor, upto: int | None = None) -> None:
        """Bring ``rows``, each named once, up to date with the first ``upto`` centres or with all."""
        upto = self.count if upto is None else upto
        everything = len(rows) == self.pool.n
        folded = self._folded(slice(None) if everything else rows, upto)
        stale = folded < upto
        if not bool(stale.any()):
            return
        if everything:
            in_order = torch.arange(len(rows), device=rows.device)
            self._take(in_order, slice(None), folded, upto)
            return
        if not bool(stale.all()):
            rows, folded = rows[stale], folded[stale]
        if self.pool.in_memory and int(folded.max() - folded.min()) > _STAGE:
            # Rows that lack the same centres are put together, in the order of the pool.
            order = (folded * self.pool.n + rows).argsort()
            rows, folded = rows[order], folded[order]
        self._take(rows, rows, folded, upto)

    def _folded(self, rows: Tensor | slice, upto: int) -> Tensor:
        """How many of the first ``upto`` centres are folded into ``rows``; at distance 0 the others change nothing."""
        return self.folded[rows].clamp_max(upto).where(self.delta[rows] > 0, upto)

    def _take(self, rows: Tensor, where: Tensor | slice, folded: Tensor, upto: int) -> None:
        delta, owner = self.pool.fold(rows, folded, self.centers[:upto], self.delta[where], self.owner[where])
        # In this order, an interrupt between two lines only costs folding the same centres again.
        self.owner[where] = owner
        self.delta[where] = delta
        self.folded[where] = self.folded[where].clamp_min(upto)

    def prime(self, rows: Tensor) -> None:
        """Give every one of ``rows`` a finite bound from the first few centres; most need no more."""
        unknown = rows[self.delta[rows].isinf()]
        if 2 * len(unknown) > self.pool.n:  # taking all rows in order costs less
            unknown = torch.arange(self.pool.n, device=rows.device)
        self.refresh(unknown, min(self.count, _PRIMING))

    def sift(self, rows: Tensor, weight: Tensor, floor: float | Tensor) -> Tensor:
        """Those of ``rows`` with ``weight · distance >= floor``, up to date; others only until they fall below it."""
        step = _STAGE if self.pool.in_memory else self.count  # what is not in memory is read once
        upto = int(self._folded(rows, self.count).min()) + step if len(rows) else self.count
        while upto < self.count:
            self.refresh(rows, upto)
            rows = rows[weight[rows] * self.delta[rows] >= floor]
            step *= 2
            upto += step
        self.refresh(rows)
        return rows[weight[rows] * self.delta[rows] >= floor]

    def radius(self, rows: Tensor) -> float:
        """Largest distance among ``rows``, bringing up to date only the rows that this needs."""
        if not len(rows):
            return 0.0
        if self.count == 0:
            return float("inf")
        if self.farthest is not None:
            return self.farthest
        self.prime(rows)
        ones, best = torch.ones_like(self.delta), self.delta.new_zeros(())
        for size in (_STAGE, _CANDIDATES // 4, len(rows)) if len(rows) > _CANDIDATES else (len(rows),):
            likely = rows[kcenter.rank(self.delta[rows], count=size)] if size < len(rows) else rows
            reached = self.sift(likely[self.delta[likely] >= best], ones, best)
            best = self.delta[reached].amax() if len(reached) else best
        return float(best)


class Shard:
    """The rows of one holder in greedy k-centre, which picks the open row of highest ``weight · distance``.

    :meth:`propose` and :meth:`Cover.add` are all that holders of parts of a pool need: proposals are plain tensors, and
    whoever has those of all shards can find the next picks with :func:`decide`. This is exact because a row outside
    every proposal has a score no better than its shard's bound, and scores never rise.
    """

    def __init__(self, cover: Cover, weight: Tensor, open_rows: Tensor, group: Tensor | None = None) -> None:
        self.cover, self.weight, self.open_rows, self.group = cover, weight, open_rows, group
        self._sample = torch.empty(0, dtype=torch.int64, device=cover.pool.device)
        self._primed = False

    @property
    def whole(self) -> bool:
        """Whether every open row is a candidate."""
        pool = self.cover.pool
        rows = _WHOLE_NARROW[0] if pool.width <= _WHOLE_NARROW[1] else _WHOLE
        return pool.in_memory and pool.n <= rows and self.cover.count <= 2 * _PRIMING

    def propose(self, size: int) -> dict[str, Any]:
        """About ``size`` open rows of highest score, up to date, and a bound that every other row comes after.

        Keys: "index" in the whole pool, "weight", "delta", "rows" and (with groups) "group" of the candidates;
        "bound", the score and index of the best row that may have been left out.
        """
        pool, cover, weight = self.cover.pool, self.cover, self.weight
        if self.whole:
            return self._everything()
        open_rows = self.open_rows.nonzero()[:, 0]
        size = max(1, min(size, pool.at_once // 4))  # twice as many may be gathered
        if not self._primed:
            cover.prime(open_rows)
            self._primed = True
        score = (weight * cover.delta).where(self.open_rows, -torch.inf)
        left = len(open_rows)
        floor, floor_index = 0.0, pool.total
        if not left:
            floor = -math.inf
        elif 2 * size < left:
            self._sample = self._sample[self.open_rows[self._sample]]
            if 2 * len(self._sample) < _SAMPLE:
                self._sample = open_rows[:: -(-left // _SAMPLE)]
            cover.refresh(self._sample)
            score[self._sample] = weight[self._sample] * cover.delta[self._sample]
            floor = float(score[self._sample].topk(1 + size * len(self._sample) // left).values[-1])
        front = (score >= floor).nonzero()[:, 0] if left else open_rows
        rows = cover.sift(front, weight, floor)
        score[front] = weight[front] * cover.delta[front]
        # No row outside reaches the floor; if more rows reach it than are wanted, the best one left out is the bound.
        if len(rows) > 2 * size:
            order = kcenter.rank(score[rows], count=size + 1)
            floor, floor_index = float(score[rows[order[-1]]]), int(rows[order[-1]]) + pool.offset
            rows = rows[order[:-1]]
        return {
            "index": rows + pool.offset,
            "weight": weight[rows],
            "delta": cover.delta[rows],
            "rows": pool.gather(rows),
            "group": rows[:0] if self.group is None else self.group[rows],
            "bound": (floor, floor_index),
        }

    def _everything(self) -> dict[str, Any]:
        """All rows as candidates; those that are not open get the weight -inf, with which no row is picked."""
        pool = self.cover.pool
        rows = torch.arange(pool.n, device=pool.device)
        self.cover.refresh(rows)
        return {
            "index": rows + pool.offset,
            "weight": self.weight.where(self.open_rows, -torch.inf),
            "delta": self.cover.delta,
            "rows": pool.everything(),
            "group": rows[:0] if self.group is None else self.group,
            "bound": (0.0, pool.total),
        }


def decide(
    proposals: Sequence[dict[str, Any]],
    limit: int,
    metric: int,
    room: Tensor | None = None,
    radius: float | None = None,
) -> dict[str, Tensor]:
    """The next picks over all shards: greedy among their candidates while the best one precedes all other rows.

    Args:
        proposals: One per shard.
        limit: Maximum number of picks.
        metric: A value of :data:`msacore.ops.kcenter.METRICS`.
        room: How many more picks each group may get, ``[G]``.
        radius: No pick at a score of this or less.

    Returns:
        "place" among all candidates and "score" of the picks, in order; :func:`picked` gives the rest.
    """
    index, weight, delta, rows, group = (
        tree.concatenated(proposals, key) for key in ("index", "weight", "delta", "rows", "group")
    )
    bound, bound_index = max((proposal["bound"] for proposal in proposals), key=lambda b: (b[0], -b[1]))
    if radius is not None and radius >= bound:
        bound, bound_index = radius, -1
    positions, scores = kcenter.greedy(
        rows,
        weight,
        delta,
        index,
        group,
        group[:0] if room is None else room,
        torch.tensor([bound], dtype=torch.float64, device=rows.device),
        torch.tensor([bound_index], device=rows.device),
        limit=min(limit, len(index), _ROUND),
        metric=metric,
    )
    count = int((positions >= 0).sum())
    return {"place": positions[:count], "score": scores[:count]}


def picked(proposals: Sequence[dict[str, Any]], places: Tensor) -> dict[str, Tensor]:
    """ "index", "rows" (centres) and, where there are groups, "group" of the candidates at ``places`` among all."""
    index, rows, group = (tree.concatenated(proposals, key) for key in ("index", "rows", "group"))
    return {"index": index[places], "rows": rows[places].double(), "group": group[places] if len(group) else group}


def candidates(limit: int, holders: int) -> int:
    """How many candidates each of ``holders`` holders of rows should propose for ``limit`` picks."""
    return max(_FEWEST, min(max(_CANDIDATES, _PER_PICK * limit), 4 * _CANDIDATES) // holders)
