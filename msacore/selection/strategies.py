"""Strategies that rank samples, or weigh them by their distance to what is selected; each fills a :class:`Job`."""

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection.greedy import Cover, pick
from msacore.selection.job import Job

_EPSILON = 1e-3


def scaled(values: Tensor) -> Tensor:
    """Min-max scaled to [1e-3, 1]; all ones where the values are all equal."""
    if not len(values):
        return values
    low, high = values.min(), values.max()
    return torch.where(high > low, _EPSILON + (1 - _EPSILON) * (values - low) / (high - low), torch.ones_like(values))


def random(job: Job) -> None:
    """Uniform without replacement; scores are 0."""
    order = torch.randperm(job.pool.n, generator=torch.Generator().manual_seed(job.seed)).to(job.pool.device)
    rest = order[job.open_rows[order]][: job.left]
    job.add(rest, torch.zeros(len(rest), device=job.pool.device))


def topk(job: Job) -> None:
    """Uncertainty sampling: Lewis and Gale, 1994. Highest first; scores are the uncertainties."""
    score = job.needed_uncertainty().where(job.open_rows, -torch.inf)
    best = kcenter.rank(score, count=job.left)
    job.add(best, score[best])


def _start(job: Job, first_score: Tensor | None) -> Cover:
    """The distances so far; without any centre the sample of highest ``first_score`` is picked."""
    if job.left and not job.made and not len(job.centers):
        job.add_first(job.pool.norms() if first_score is None else first_score)
    return Cover(job.engine, job.all_centers(), job.left, job.memory)


def _weighted(job: Job, weight: Tensor, first_score: Tensor, allowed: Tensor) -> Cover:
    """Greedy k-centre with weighted distances among the ``allowed`` samples."""
    cover = _start(job, first_score.where(allowed, -torch.inf))
    allowed = allowed & job.open_rows

    def made(picks: Tensor, scores: Tensor) -> None:
        allowed[picks] = False
        job.add(picks, scores)

    if job.left:
        pick(cover, weight, allowed, job.left, made)
    return cover


def _far_from_mean(job: Job) -> Tensor:
    """Distance of every sample to the pool's mean."""
    if job.made or len(job.centers) or not job.left:
        return torch.zeros(job.pool.n, dtype=torch.float64, device=job.pool.device)
    return job.pool.distances_to(job.pool.mean[None])


def farthest(job: Job) -> Cover:
    """Farthest-point traversal: Gonzalez, 1985; Sener and Savarese, 2018. Scores are distances."""
    weight = torch.ones(job.pool.n, dtype=torch.float64, device=job.pool.device)
    return _weighted(job, weight, _far_from_mean(job), job.open_rows)


def uncertain_and_far(job: Job) -> Cover:
    """``argmax u^γ · distance`` with u scaled to [1e-3, 1]: weighted farthest points as of Dyer and Frieze, 1985.

    Scores are these products.
    """
    uncertainty = job.needed_uncertainty()
    return _weighted(job, scaled(uncertainty) ** job.identity["gamma"], uncertainty, job.open_rows)


def prefilter(job: Job) -> Cover:
    """k-centre among the ``factor · budget`` most uncertain samples: Zhdanov, 2019, with k-centre for its k-means.

    Scores are distances.
    """
    uncertainty = job.needed_uncertainty()
    if "shortlist" not in job.memory:
        left = int(job.open_rows.sum())
        size = min(left, max(job.budget, round(job.options["factor"] * job.budget)))
        job.memory["shortlist"] = kcenter.rank(uncertainty.where(job.open_rows, -torch.inf), count=size)
    allowed = torch.zeros_like(job.open_rows)
    allowed[job.memory["shortlist"]] = True
    return _weighted(job, torch.ones_like(uncertainty), uncertainty, allowed)


def kmeans_plus_plus(job: Job) -> Cover:
    """D² sampling: Arthur and Vassilvitskii, 2007; on gradient embeddings BADGE: Ash et al., 2020. Scores are D²."""
    cover = _start(job, None)
    everything = torch.arange(job.pool.n, device=job.pool.device)
    # One draw per sample of the pool: the draw of pick number i does not depend on the budget.
    draws = torch.rand(job.pool.n, generator=torch.Generator().manual_seed(job.seed), dtype=torch.float64)
    draws = draws.to(job.pool.device)
    while job.left:
        cover.refresh(everything)
        squares = cover.delta.square().where(job.open_rows, 0)
        if not bool((squares > 0).any()):
            squares = squares.where(~job.open_rows, 1)
        share = squares.cumsum(0)
        drawn = torch.searchsorted(share, (draws[job.made] * share[-1])[None], right=True)
        last = squares.nonzero()[-1]
        drawn = torch.minimum(drawn, last)
        score = cover.delta[drawn].square()
        cover.add(job.pool.centers(drawn))
        job.add(drawn, score)
    return cover


def largest_cluster(job: Job) -> Cover:
    """LCMD: the farthest sample of the cluster with the largest sum of squared distances. Holzmüller et al., 2023.

    Clusters are the samples nearest to one centre; scores are distances.
    """
    cover = _start(job, None)
    everything = torch.arange(job.pool.n, device=job.pool.device)
    while job.left:
        cover.refresh(everything)
        squares = cover.delta.square().where(job.open_rows, 0)
        size = torch.bincount(cover.owner, weights=squares, minlength=cover.count)
        members = torch.bincount(cover.owner[job.open_rows], minlength=cover.count)
        largest = kcenter.rank(size.where(members > 0, -torch.inf), count=1)
        best = job.best(cover.delta.where(cover.owner == largest, -torch.inf))
        score = cover.delta[best]
        cover.add(job.pool.centers(best))
        job.add(best, score)
    return cover


def marginal_relevance(job: Job) -> Cover:
    """MMR: ``λ u + (1 - λ) δ``, u scaled over the pool, δ over the samples left. Carbonell and Goldstein, 1998."""
    relevance, share = scaled(job.needed_uncertainty()), job.options["mmr_weight"]
    cover = _start(job, job.uncertainty)
    everything = torch.arange(job.pool.n, device=job.pool.device)
    while job.left:
        cover.refresh(everything)
        novelty = torch.zeros_like(relevance)
        novelty[job.open_rows] = scaled(cover.delta[job.open_rows])
        score = share * relevance + (1 - share) * novelty
        best = job.best(score)
        cover.add(job.pool.centers(best))
        job.add(best, score[best])
    return cover


_TOLERANCE = 1e-12  # of the largest squared norm: variances closer than this are equal, as those of equal samples are
_CANDIDATES = 512


class _Variances:
    """Variance of every sample given those picked, under a linear kernel with noise, brought up to date on demand.

    Each pick q takes ``(x · q)²`` from the variance of x, so a stale variance is an upper bound.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.noise = job, job.options["noise"]
        norms = job.pool.norms() if job.pool.metric == kcenter.METRICS["euclidean"] else None
        length = (job.pool.norms() > 0).double() if norms is None else norms
        self.value = length.square() + self.noise
        self.tolerance = _TOLERANCE * float(self.value.max())
        self.folded = torch.zeros(job.pool.n, dtype=torch.int64, device=job.pool.device)
        self.directions = job.centers[:0]

    def rows(self, rows: Tensor) -> Tensor:
        return self.unit(self.job.pool.centers(rows))

    def unit(self, x: Tensor) -> Tensor:
        if self.job.pool.metric == kcenter.METRICS["euclidean"]:
            return x
        return torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(x.dtype).tiny)

    def add(self, center: Tensor) -> Tensor:
        """Condition on one more sample ``[d]``; returns its direction."""
        rest = center - self.directions.T @ (self.directions @ center)
        direction = rest / (self.noise + (center @ rest).clamp_min(0)).sqrt()
        self.directions = torch.cat([self.directions, direction[None]])
        return direction

    def refresh(self, rows: Tensor) -> Tensor:
        """Bring ``rows`` up to date; returns their values ``[A, d]``."""
        x, first = self.rows(rows), int(self.folded[rows].min())
        taken = (x @ self.directions[first:].T).square()
        late = torch.arange(first, len(self.directions), device=rows.device)[None, :] < self.folded[rows][:, None]
        self.value[rows] -= taken.masked_fill(late, 0).sum(1)
        self.folded[rows] = len(self.directions)
        return x


def max_determinant(job: Job) -> None:
    """Greedy maximum of det(X_S X_Sᵀ + noise · I): pivoted Cholesky in feature space, O(k (N + d)) memory.

    Chen, Zhang and Zhou, 2018; with a Gaussian model it is BatchBALD. Scores are conditional variances.
    """
    if not job.left:
        return
    if not job.made and not len(job.centers):
        job.add_first(job.pool.norms())
    variances = _Variances(job)
    for center in variances.unit(job.all_centers()):
        variances.add(center)
    size = _CANDIDATES
    while job.left:
        open_rows = job.open_rows.nonzero()[:, 0]
        size = min(size, len(open_rows))
        order = kcenter.rank(variances.value[open_rows], count=size + 1)
        outside = variances.value[open_rows[order[size:]]]
        rows = open_rows[order[:size]].sort().values
        x = variances.refresh(rows)
        here, made = variances.value[rows], job.made
        while job.left:
            top = here.max()
            if len(outside) and not bool(top > outside[0] + variances.tolerance):
                break
            place = (here >= top - variances.tolerance).nonzero()[:1, 0]
            direction, score = variances.add(x[place[0]]), here[place]
            here = here - (x @ direction).square()
            here[place] = -torch.inf
            job.add(rows[place], score)
        variances.value[rows] = here
        variances.folded[rows] = len(variances.directions)
        if job.made == made:
            size *= 4
