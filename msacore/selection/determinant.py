"""The strategy "maxdet": pivoted Cholesky in feature space, in O(k (N + d)) memory, brought up to date on demand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter as steps
from msacore.selection import tree
from msacore.selection.greedy import picked
from msacore.selection.job import Job
from msacore.selection.pool import Pool, unit_rows

_NOTHING_LEFT = 1e-12  # of the largest squared norm: residuals below this are rounding errors
_CANDIDATES = 512  # over all holders together
_ROUND = 64  # picks per round at most, so that an interrupt is noticed and the bar moves
_UNITS = 64  # units in the last place by which rows that differ only by rounding may miss their mean


def _center(job: Job) -> Tensor:
    """Mean of all rows, unit rows for cosine, ``[d]``."""
    pool = job.pool
    if pool.metric == steps.METRICS["euclidean"] or not pool.total:
        return pool.mean

    def sums() -> dict[tree.Span, Tensor]:
        found = {}
        for span, values in pool.nodes():
            found[span] = tree.pair_sums(steps.scan(unit_rows(values))[0])
        mine = tree.spans(pool.offset, pool.offset + pool.n, pool.total)
        return {span: tree.join(found, pool.total, span) for span in mine}

    parts: dict[tree.Span, Tensor] = {}
    for message in job.share(sums):
        parts |= message
    return tree.join(parts, pool.total) / pool.total


def _more(values: Tensor, products: Tensor, skipped: Tensor) -> Tensor:
    """``values`` ``[A]`` plus the squares of ``products`` ``[A, q]``, except the first ``skipped``.

    They are added one by one, so that the sum does not depend on how many directions came at once.
    """
    for j, column in enumerate(products.T):
        values = torch.where(skipped <= j, values + column.square(), values)
    return values


class Directions:
    """Orthogonal directions of the centres and picks so far, ``[q, d]``.

    Each reduces the variance of x by ``<x, direction>²``. All sums have the fixed order of `kcenter_products`, so that
    they depend neither on threads nor on what is computed along with them.
    """

    def __init__(self, all_directions: Tensor, noise: float) -> None:
        self.all, self.noise = all_directions, noise

    def copy(self) -> "Directions":
        return Directions(self.all, self.noise)

    def add(self, x: Tensor) -> Tensor:
        """Condition on one more sample ``[1, d]``; returns its direction ``[1, d]``."""
        here, origin = torch.zeros(1, dtype=torch.int64, device=x.device), torch.zeros_like(x)
        products = steps.products(x, here, self.all, origin[0])
        taken = _more(x.new_zeros(1), products, here)
        left = (squared_distances(x, origin) - taken).clamp_min(0)
        columns, every = self.all.T.contiguous(), torch.arange(x.shape[1], device=x.device)
        known = steps.products(columns, every, products, torch.zeros_like(products[0])).T
        direction = (x - known) / (left + self.noise).sqrt()
        self.all = torch.cat([self.all, direction])
        return direction


class Residuals:
    """Squared residual of every row held here given the directions, brought up to date on demand.

    Residuals only decrease, so a stale one is an upper bound.
    """

    def __init__(self, pool: Pool, center: Tensor, directions: Directions) -> None:
        self.pool, self.center, self.directions = pool, center, directions
        norms = [squared_distances(_values(pool, part), center[None], factor(pool)) for _, part in pool.parts()]
        self.norms = torch.cat([center.new_empty(0), *norms])
        self.taken = torch.zeros_like(self.norms)
        self.folded = torch.zeros(pool.n, dtype=torch.int64, device=pool.device)

    def value(self) -> Tensor:
        """Upper bounds on the squared residuals, ``[n]``."""
        return (self.norms - self.taken).clamp_min(0)

    def refresh(self, rows: Tensor) -> None:
        count = len(self.directions.all)
        rows = rows[self.folded[rows] < count]
        if not len(rows):
            return
        first = int(self.folded[rows].min())
        products = self.pool.products(rows, self.directions.all[first:], self.center) * factor(self.pool)
        self.taken[rows] = _more(self.taken[rows], products, self.folded[rows] - first)
        self.folded[rows] = count

    def propose(self, job: Job, size: int) -> dict[str, Any]:
        """The best open rows, up to date, and "bound": value and index of the best row left out."""
        rows = job.open_rows.nonzero()[:, 0]
        while True:
            order = rows[steps.rank(self.value()[rows], count=size + 1)]
            chosen, outside = order[:size].sort().values, order[size:]
            bound = (-1.0, self.pool.total)
            if len(outside):
                bound = (float(self.value()[outside]), int(outside) + self.pool.offset)
            self.refresh(chosen)
            best = chosen[steps.rank(self.value()[chosen], count=1)]
            if not len(outside) or (float(self.value()[best]), -int(best) - self.pool.offset) > (bound[0], -bound[1]):
                break
            size *= 4
        return {
            "index": chosen + self.pool.offset,
            "norm": self.norms[chosen],
            "taken": self.taken[chosen],
            "rows": centred(self.pool, self.pool.gather(chosen), self.center),
            "group": job.groups_of(chosen),
            "bound": bound,
        }


def factor(pool: Pool) -> float:
    """What centred rows are multiplied by, a power of two: 1 except for values whose squares float64 cannot hold."""
    return pool.safe if pool.metric == steps.METRICS["euclidean"] else 1.0


def _values(pool: Pool, values: Tensor) -> Tensor:
    return unit_rows(values) if pool.metric == steps.METRICS["cosine"] else values


def centred(pool: Pool, values: Tensor, center: Tensor) -> Tensor:
    """Rows ``[A, d]``, unit rows for cosine, minus the mean."""
    return (_values(pool, values).double() - center) * factor(pool)


def squared_distances(values: Tensor, center: Tensor, scale: float = 1.0) -> Tensor:
    """Squares of ``scale`` times the distances from rows ``[A, d]`` to ``center`` ``[1, d]``."""
    rows = torch.arange(len(values), device=values.device)
    infinite = torch.full(rows.shape, torch.inf, dtype=torch.float64, device=rows.device)
    found = steps.fold(values, rows, rows * 0, center, center[0], infinite, rows * 0, scale=1.0, metric=0)
    return (found[0] * scale).square()


def _decide(
    proposals: Sequence[dict[str, Any]], directions: Directions, threshold: float, limit: int, room: Tensor | None
) -> dict[str, Any]:
    """Greedy picks among all candidates while the best one precedes the bound; "ended" where no residual is left."""
    index, norm, taken, rows, group = (
        tree.concatenated(proposals, key) for key in ("index", "norm", "taken", "rows", "group")
    )
    by_index = index.argsort()
    left = None if room is None else room.clone()
    bound = max((one["bound"] for one in proposals), key=lambda b: (b[0], -b[1]))
    origin, every = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device), torch.arange(len(rows))
    every = every.to(rows.device)
    is_open, directions = torch.ones_like(index, dtype=torch.bool), directions.copy()
    picks: list[int] = []
    scores: list[float] = []
    ended = False
    while len(picks) < limit and bool(is_open.any()):
        value = (norm - taken).clamp_min(0).where(is_open, -torch.inf)
        place = int(by_index[steps.rank(value[by_index], count=1)])
        best = float(value[place])
        if (best, -int(index[place])) < (bound[0], -bound[1]):
            break
        ended = best <= threshold
        if ended:
            break
        products = steps.products(rows, every, directions.add(rows[place : place + 1]), origin)
        taken = _more(taken, products, every * 0)
        is_open[place] = False
        if left is not None:
            left[group[place]] -= 1
            is_open &= (left > 0)[group]
        picks.append(place)
        scores.append(best)
    return {
        "place": torch.tensor(picks, dtype=torch.int64, device=rows.device),
        "score": torch.tensor(scores, dtype=torch.float64, device=rows.device),
        "ended": ended,
    }


def maxdet(job: Job) -> None:
    """Greedy maximum of det(X_S X_Sᵀ + noise · I), X the rows minus their mean: plain pivoted Cholesky.

    Chen, Zhang and Zhou, 2018; with a Gaussian model it is BatchBALD. Scores are conditional variances. Once every
    residual is rounding error, the remaining picks go by index, with score 0.
    """
    if not job.left:
        return
    pool, center = job.pool, _center(job)
    squared = factor(pool) ** 2
    like = torch.empty(0, pool.width, dtype=torch.float64, device=pool.device)
    directions = Directions(like, job.options["noise"] * squared)
    for row in centred(pool, job.all_centers(), center).split(1):
        if len(row):
            directions.add(row)
    residuals: list[Residuals] = []

    def largest() -> float:
        residuals.append(Residuals(pool, center, directions))
        return float(residuals[0].norms.max()) if pool.n else 0.0

    most = max(job.ranks.share(largest))
    magnitude = pool.magnitude * factor(pool) if pool.metric == steps.METRICS["euclidean"] else 1.0
    threshold = max(_NOTHING_LEFT * most, pool.width * (_UNITS * 2.0**-53 * magnitude) ** 2)
    if not len(directions.all):
        first = job.add_first(lambda: residuals[0].norms)
        directions.add(centred(pool, first["rows"], center))
    groups = job.groups
    while job.left:
        size = max(1, _CANDIDATES // job.ranks.size)
        proposals = job.share(lambda: residuals[0].propose(job, size))  # noqa: B023  # called at once
        room = None if groups is None else groups.room
        decision = job.from_first(
            lambda: _decide(proposals, directions, threshold, min(job.left, _ROUND), room)  # noqa: B023  # called at once
        )
        picks = picked(proposals, decision["place"])
        for row in picks["rows"].split(1):
            if len(row):
                directions.add(row)
        if len(picks["index"]):
            score = decision["score"] / squared + job.options["noise"]
            job.add(picks["index"], score, picks["group"] if groups is not None else None)
        if decision["ended"]:
            job.add_in_order(lambda: torch.zeros_like(residuals[0].norms), 0.0)
