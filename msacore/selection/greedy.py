"""Exact greedy k-centre that reads the pool a few times, not once a pick.

A pick can only lower distances, so a stale score is an upper bound. A round sets a floor that a few thousand samples
should reach, brings the samples whose bound reaches it up to date, and drops each as soon as it falls below. The rest
are the candidates: picks are made greedily among them for as long as the best one precedes everything outside, by
(score, then smaller index). Samples that stay low are hardly ever read again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection.engine import Native

_CANDIDATES = 4096  # at least; up to four times as many for a large budget
_PER_PICK = 32  # candidates
_ROUND = 1024  # picks at most, so that an interrupt is heard and the bar moves
_SAMPLE = 2048  # samples whose scores tell where the floor should be
_STAGE = 32  # centres taken in before the first samples are dropped; each further stage takes twice as many
_PRIMING = 32  # centres


class Cover:
    """Distance of every sample to its nearest centre, brought up to date for a sample when that is asked for."""

    def __init__(self, engine: Native, centers: Tensor, capacity: int, memory: dict[str, Any]) -> None:
        self.pool = pool = engine.pool
        self.centers = centers.new_empty(len(centers) + capacity, centers.shape[1])
        self.centers[: len(centers)] = centers
        self.count = len(centers)
        if "delta" not in memory:
            bounds = engine.bounds(centers) if len(centers) else None
            unknown = torch.full((pool.n,), torch.inf, dtype=torch.float64, device=pool.device)
            memory["delta"] = unknown if bounds is None else bounds
            memory["owner"] = torch.full((pool.n,), -1, device=pool.device)
            memory["folded"] = torch.zeros(pool.n, dtype=torch.int64, device=pool.device)
        self.delta, self.owner, self.folded = (memory[name] for name in ("delta", "owner", "folded"))

    def add(self, centers: Tensor) -> None:
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
            # Rows that lack the same centres come together, in the order of the pool.
            order = (folded * self.pool.n + rows).argsort()
            rows, folded = rows[order], folded[order]
        self._take(rows, rows, folded, upto)

    def _folded(self, rows: Tensor | slice, upto: int) -> Tensor:
        """How many of the first ``upto`` centres ``rows`` know; one at distance 0 leaves nothing to know."""
        return self.folded[rows].clamp_max(upto).where(self.delta[rows] > 0, upto)

    def _take(self, rows: Tensor, where: Tensor | slice, folded: Tensor, upto: int) -> None:
        delta, owner = self.pool.fold(rows, folded, self.centers[:upto], self.delta[where], self.owner[where])
        # In this order an interrupt between two lines costs no more than folding the same centres again.
        self.owner[where] = owner
        self.delta[where] = delta
        self.folded[where] = self.folded[where].clamp_min(upto)

    def prime(self, rows: Tensor) -> None:
        """Give every one of ``rows`` a finite bound from the first few centres; most need no more."""
        unknown = rows[self.delta[rows].isinf()]
        if 2 * len(unknown) > self.pool.n:  # all of them in order cost less
            unknown = torch.arange(self.pool.n, device=rows.device)
        self.refresh(unknown, min(self.count, _PRIMING))

    def sift(self, rows: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
        """Those of ``rows`` with ``weight · distance >= floor``, up to date; the others only until they fall below."""
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
        """Largest distance among ``rows``, with as few of them brought up to date as that takes."""
        if not len(rows):
            return 0.0
        if self.count == 0:
            return float("inf")
        self.prime(rows)
        ones, best = torch.ones_like(self.delta), self.delta.new_zeros(())
        for size in (_STAGE, _CANDIDATES // 4, len(rows)) if len(rows) > _CANDIDATES else (len(rows),):
            likely = rows[kcenter.rank(self.delta[rows], count=size)] if size < len(rows) else rows
            reached = self.sift(likely[self.delta[likely] >= best], ones, best)
            best = self.delta[reached].amax() if len(reached) else best
        return float(best)


def pick(cover: Cover, weight: Tensor, open_rows: Tensor, limit: int, made: Callable[[Tensor, Tensor], None]) -> None:
    """Greedy k-centre: ``limit`` picks of highest ``weight · distance`` among the samples ``open_rows`` marks.

    ``made`` is told the picks and scores of every round, and takes them out of ``open_rows`` ``[N]`` bool. There must
    be a centre, and ``limit`` samples left.
    """
    pool, size = cover.pool, min(max(_CANDIDATES, _PER_PICK * limit), 4 * _CANDIDATES)
    size = max(1, min(size, pool.at_once // 2))
    everything = torch.tensor([0.0], dtype=torch.float64, device=pool.device)
    nobody = torch.tensor([pool.n], device=pool.device)
    cover.prime(open_rows.nonzero()[:, 0])
    score = (weight * cover.delta).where(open_rows, -torch.inf)
    sample = nobody[:0]
    left = int(open_rows.sum())
    while limit > 0:
        floor = everything
        if 2 * size < left:
            sample = sample[open_rows[sample]]
            if 2 * len(sample) < _SAMPLE:
                sample = open_rows.nonzero()[:: -(-left // _SAMPLE), 0]
            cover.refresh(sample)
            score[sample] = weight[sample] * cover.delta[sample]
            floor = score[sample].topk(1 + size * len(sample) // left).values[-1:]
        front = (score >= floor).nonzero()[:, 0]
        rows = cover.sift(front, weight, floor)
        score[front] = weight[front] * cover.delta[front]
        # Nothing outside reaches the floor; where more do than are wanted, the best one left out limits the round.
        candidates, bound, bound_index = rows, floor, nobody
        if len(rows) > 2 * size:
            order = kcenter.rank(score[rows], count=size + 1)
            candidates, bound_index = rows[order[:size]], rows[order[size:]]
            bound = score[bound_index]
        positions, scores = pool.greedy(
            candidates,
            weight[candidates],
            cover.delta[candidates],
            bound,
            bound_index,
            min(limit, len(candidates), _ROUND),
        )
        count = int((positions >= 0).sum())
        picks = candidates[positions[:count]]
        centers = pool.centers(picks)
        made(picks, scores[:count])
        cover.add(centers)
        score[picks] = -torch.inf
        limit -= count
        left -= count
