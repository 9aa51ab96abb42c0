"""Exact greedy k-centre that reads the pool a few times, not once a pick.

A pick can only lower distances, so a stale score is an upper bound. A round brings the ``B`` samples with the highest
stale scores up to date, takes the best ``m`` of them as candidates, and picks greedily among those for as long as the
best one precedes everything outside, by (score, then smaller index). Samples that stay low are hardly ever read again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msacore._selection.engine import Native
from msacore.ops import kcenter

_CANDIDATES = 4096
_STAGE = 16  # centres that many samples take in at once: most then stay low and need no more
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
        """Bring ``rows`` up to date, with the first ``upto`` centres or with all."""
        upto = self.count if upto is None else upto
        folded = self.folded[rows]
        stale = folded < upto
        if not bool(stale.any()):
            return
        rows, folded = rows[stale], folded[stale]
        if int(folded.max() - folded.min()) > _STAGE:
            # Rows that lack the same centres come together, in the order of the pool.
            order = (folded * self.pool.n + rows).argsort()
            rows, folded = rows[order], folded[order]
        delta, owner = self.pool.fold(rows, folded, self.centers[:upto], self.delta[rows], self.owner[rows])
        # In this order an interrupt between two lines costs no more than folding the same centres again.
        self.owner[rows] = owner
        self.delta[rows] = delta
        self.folded[rows] = upto

    def prime(self, rows: Tensor) -> None:
        """Give every one of ``rows`` a finite bound from the first few centres; most need no more."""
        self.refresh(rows[self.delta[rows].isinf()], min(self.count, _PRIMING))

    def radius(self, rows: Tensor) -> float:
        """Largest distance among ``rows``, with as few of them brought up to date as that takes."""
        if not len(rows):
            return 0.0
        if self.count == 0:
            return float("inf")
        self.prime(rows)
        size = _CANDIDATES
        while size < len(rows):
            bound = self.delta[rows]
            order = kcenter.rank(bound, count=size + 1)
            self.refresh(rows[order[:size]])
            best = self.delta[rows[order[:size]]].max()
            if bool(best >= bound[order[size]]):
                return float(best)
            size *= 4
        self.refresh(rows)
        return float(self.delta[rows].max())


def pick(cover: Cover, weight: Tensor, open_rows: Tensor, limit: int, made: Callable[[Tensor, Tensor], None]) -> None:
    """Greedy k-centre: ``limit`` picks of highest ``weight · distance`` among the samples ``open_rows`` marks.

    ``made`` is told the picks and scores of every round, and takes them out of ``open_rows`` ``[N]`` bool. There must
    be a centre, and ``limit`` samples left.
    """
    pool, size = cover.pool, 8 * _CANDIDATES
    nothing = torch.tensor([-torch.inf], dtype=torch.float64, device=pool.device)
    nobody = torch.tensor([pool.n], device=pool.device)
    cover.prime(open_rows.nonzero()[:, 0])
    score = (weight * cover.delta).where(open_rows, -torch.inf)
    left = int(open_rows.sum())
    while limit > 0:
        if 2 * size >= left:
            rows, outside, outside_index = open_rows.nonzero()[:, 0], nothing, nobody
        else:
            order = kcenter.rank(score, count=size + 1)
            rows, outside_index = order[:size].sort().values, order[size:]
            outside = score[outside_index]
        reached = int(cover.folded[rows].min()) + _STAGE
        if len(rows) > 2 * _CANDIDATES and reached + _STAGE // 4 < cover.count:
            cover.refresh(rows, reached)
            score[rows] = weight[rows] * cover.delta[rows]
            size = max(_CANDIDATES, len(rows) // 4)
            continue
        cover.refresh(rows)
        fresh = weight[rows] * cover.delta[rows]
        score[rows] = fresh
        order = kcenter.rank(fresh, count=_CANDIDATES + 1)
        candidates, bound, bound_index = rows[order[:_CANDIDATES]], outside, outside_index
        inside_limited = False
        if len(order) > _CANDIDATES:
            next_row = rows[order[_CANDIDATES:]]
            inside = score[next_row]
            inside_limited = bool((inside > outside) | ((inside == outside) & (next_row < outside_index)))
            if inside_limited:
                bound, bound_index = inside, next_row
        positions, scores = pool.greedy(
            candidates, weight[candidates], cover.delta[candidates], bound, bound_index, min(limit, len(candidates))
        )
        count = int((positions >= 0).sum())
        if count:
            picks = candidates[positions[:count]]
            centers = pool.centers(picks)
            made(picks, scores[:count])
            cover.add(centers)
            score[picks] = -torch.inf
            limit -= count
            left -= count
        # What stopped the round says whether more samples should be brought up to date in one go.
        size = size if inside_limited else 2 * size
