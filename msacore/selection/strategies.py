"""Strategies that rank samples, or weigh them by their distance to what is selected; each fills a :class:`Job`.

What depends on rows held elsewhere goes through :meth:`Job.share` or the methods built on it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter as steps
from msacore.selection import tree
from msacore.selection.greedy import Cover, Shard, candidates, decide, picked
from msacore.selection.job import Job

_EPSILON = 1e-3
_MOST_SHARED_MMR = 10_000  # picks; each costs two messages


def _scaled(values: Tensor, low: float, high: float) -> Tensor:
    """Min-max scaled to [1e-3, 1]; all ones where the values are all equal."""
    if not high > low:
        return torch.ones_like(values)
    return _EPSILON + (1 - _EPSILON) * (values - low) / (high - low)


def _scaled_over_all(job: Job, values: Callable[[], Tensor]) -> Tensor:
    """``values`` of the rows held here, scaled by the minimum and maximum over all ranks."""
    mine = torch.empty(0)

    def extremes() -> tuple[float, float]:
        nonlocal mine
        mine = values()
        return (float(mine.min()), float(mine.max())) if len(mine) else (math.inf, -math.inf)

    found = job.ranks.share(extremes)
    return _scaled(mine, min(low for low, _ in found), max(high for _, high in found))


def random(job: Job) -> None:
    """Uniform without replacement; scores are 0."""
    if not job.left:
        return

    def order() -> Tensor:
        place = torch.empty(job.pool.total, dtype=torch.float64)
        shuffled = torch.randperm(job.pool.total, generator=torch.Generator().manual_seed(job.seed))
        place[shuffled] = torch.arange(0, -job.pool.total, -1, dtype=torch.float64)
        return place[job.pool.offset : job.pool.offset + job.pool.n].to(job.pool.device)

    job.add_in_order(order, 0.0)


def topk(job: Job) -> None:
    """Uncertainty sampling: Lewis and Gale, 1994. Highest first; scores are the uncertainties."""
    uncertainty = job.needed_uncertainty()
    if job.left:
        job.add_in_order(lambda: uncertainty)


def _start(job: Job, first_score: Callable[[], Tensor]) -> Cover:
    """The distances so far; without any centre the sample of highest ``first_score`` is picked."""
    if job.left and not job.made and not len(job.centers):
        job.add_first(first_score)
    return Cover(job.engine, job.all_centers(), job.left)


def _weighted(job: Job, weight: Tensor, first_score: Callable[[], Tensor], allowed: Tensor | None = None) -> Cover:
    """Greedy k-centre with weighted distances, only among the ``allowed`` samples if these are given."""
    if allowed is not None:
        closed = job.open_rows & ~allowed
        job.open_rows &= allowed
    cover = _start(job, first_score)
    groups = job.groups
    shard = Shard(cover, weight, job.open_rows, None if groups is None else groups.number)
    plain = job.ranks.size == 1 and groups is None and bool((weight == 1).all())
    while job.left:
        limit = job.left
        # Where every row that is left may be picked, the score of one pick beyond the limit is the radius.
        further = int(plain and shard.whole and torch.equal(job.open_rows, job.rest))
        size = candidates(limit, job.ranks.size)
        proposals = job.share(lambda: shard.propose(size))  # noqa: B023  # called at once
        room = None if groups is None else groups.room

        def decided() -> dict[str, Tensor]:
            return decide(proposals, limit + further, job.pool.metric, room, job.radius)  # noqa: B023  # called at once

        decision = job.from_first(decided)
        if not len(decision["place"]):
            break
        picks = picked(proposals, decision["place"][:limit])
        job.add(picks["index"], decision["score"][:limit], picks["group"] if groups is not None else None)
        cover.add(picks["rows"])
        if len(decision["score"]) > limit:
            cover.farthest = float(decision["score"][limit])
        shard.open_rows = job.open_rows
    if allowed is not None:
        job.open_rows |= closed
    return cover


def kcenter(job: Job) -> Cover:
    """Farthest-point traversal: Gonzalez, 1985; Sener and Savarese, 2018. Scores are distances.

    It ends early once no open row is farther than `radius` from its nearest centre.
    """
    weight = torch.ones(job.pool.n, dtype=torch.float64, device=job.pool.device)
    return _weighted(job, weight, lambda: job.pool.distances_to(job.pool.mean[None]))


def uncertainty_kcenter(job: Job) -> Cover:
    """``argmax u^γ · distance`` with u scaled to [1e-3, 1]: weighted farthest points as in Dyer and Frieze, 1985.

    Scores are these products.
    """
    uncertainty = job.needed_uncertainty()
    weight = _scaled_over_all(job, lambda: uncertainty) ** job.identity["gamma"]
    return _weighted(job, weight, lambda: uncertainty)


def _shortlist(job: Job, size: int) -> Tensor:
    """The most uncertain rows that were open at first, ``[n]`` bool.

    They are the fewest from which the budget can be picked, but at least ``size`` over all ranks.
    """
    uncertainty, before = job.needed_uncertainty(), job.open_before
    while True:

        def offer() -> dict[str, Any]:
            rows = before.nonzero()[:, 0]
            rows = rows[steps.rank(uncertainty[rows], count=size)]  # noqa: B023  # called at once
            shown = {"index": rows + job.pool.offset, "score": uncertainty[rows], "group": job.groups_of(rows)}
            return shown | {"left": int(before.sum()) - len(rows)}

        offers = job.share(offer)
        index, score, group = (tree.concatenated(offers, key) for key in ("index", "score", "group"))
        by_index = index.argsort()
        order = by_index[steps.rank(score[by_index], count=len(index))]
        last = min(size, len(order))
        if job.room_before is not None and len(order):
            # How many picks groups allow up to each row.
            allowed = (tree.occurrence(group[order]) < job.room_before[group[order]]).cumsum(0)
            last = max(last, int((allowed < job.budget).sum()) + 1)
        # Beyond the first `size` rows, the order is known only if no rank has more rows to offer.
        if last <= size or not any(one["left"] for one in offers):
            break
        size *= 4
    chosen = index[order[:last]]
    listed = torch.zeros_like(before)
    listed[chosen[job.held(chosen)] - job.pool.offset] = True
    return listed


def prefilter(job: Job) -> Cover:
    """k-centre among the ``factor · budget`` most uncertain samples: Zhdanov, 2019, with k-centre in place of k-means.

    Scores are distances.
    """
    uncertainty = job.needed_uncertainty()
    size = max(job.budget, round(job.options["factor"] * job.budget))
    return _weighted(job, torch.ones_like(uncertainty), lambda: uncertainty, _shortlist(job, size))


def kmeans_plus_plus(job: Job) -> Cover:
    """D² sampling: Arthur and Vassilvitskii, 2007; on gradient embeddings BADGE: Ash et al., 2020. Scores are D²."""
    cover = _start(job, job.pool.norms)
    pool, everything = job.pool, torch.arange(job.pool.n, device=job.pool.device)
    # One draw per sample of the pool: the draw of pick number i does not depend on the budget.
    draws = torch.rand(pool.total, generator=torch.Generator().manual_seed(job.seed), dtype=torch.float64).tolist()
    shares = tree.Shares(everything[:0].double(), pool.offset, pool.total)

    def sums(value: Callable[[], Tensor]) -> dict[tree.Span, float]:
        nonlocal shares
        shares = tree.Shares(value().where(job.open_rows, 0), pool.offset, pool.total)
        return shares.sums()

    def squares() -> Tensor:
        cover.refresh(everything)
        return (cover.delta * pool.safe).square()

    while job.left:
        parts: dict[tree.Span, float] = {}
        for value in (squares, lambda: torch.ones_like(cover.delta)):  # equal chances where no distance is left
            parts = {}
            for one in job.ranks.share(lambda: sums(value)):  # noqa: B023  # called at once
                parts |= one
            total = tree.join(parts, pool.total)
            if total > 0:
                break
        span, target = tree.find_span(parts, pool.total, draws[job.made] * total)

        def drawn() -> Tensor:
            score = torch.full_like(cover.delta, -torch.inf)
            if pool.offset <= span[0] < pool.offset + pool.n:  # noqa: B023  # called at once
                row = shares.find(span, target) - pool.offset  # noqa: B023  # called at once
                score[row] = cover.delta[row].square()
            return score

        best = job.best(drawn)
        cover.add(best["rows"])
        job.take(best)
    return cover


def lcmd(job: Job) -> Cover:
    """LCMD: the farthest sample of the cluster with the largest sum of squared distances. Holzmüller et al., 2023.

    Clusters are the samples nearest to one centre; scores are distances.
    """
    cover = _start(job, job.pool.norms)
    everything = torch.arange(job.pool.n, device=job.pool.device)

    def largest_distance() -> float:
        cover.refresh(everything)
        return float(cover.delta.where(job.open_rows, 0).max()) if job.pool.n else 0.0

    while job.left:
        exponent = math.frexp(max(job.ranks.share(largest_distance)))[1]
        sizes = sum(job.share(lambda: _cluster_sizes(job, cover, exponent)))  # noqa: B023  # called at once
        largest = _largest_cluster(sizes, job.pool.total)
        best = job.best(lambda: cover.delta.where(cover.owner == largest, -torch.inf))  # noqa: B023  # called at once
        cover.add(best["rows"])
        job.take(best)
    return cover


def _bits(total: int) -> int:
    """How many bits of a number can be added up over ``total`` rows in int64."""
    return 61 - total.bit_length()


def _cluster_sizes(job: Job, cover: Cover, exponent: int) -> Tensor:
    """Open rows of every cluster and their sum of squares in two words, ``[3, clusters]`` int64: exact in any order."""
    rows, bits = job.open_rows.nonzero()[:, 0], _bits(job.pool.total)
    scaled = cover.delta[rows] * 2.0 ** min(1000, -exponent)  # below 1
    squares = scaled.square() * 2.0**bits
    high = squares.floor()
    low = ((squares - high) * 2.0**bits).floor()
    words = torch.stack([torch.ones_like(high), high, low]).long()
    sizes = torch.zeros(3, cover.count, dtype=torch.int64, device=rows.device)
    return sizes.index_add_(1, cover.owner[rows], words)


def _largest_cluster(sizes: Tensor, total: int) -> int:
    members, high, low = sizes
    bits = _bits(total)
    high, low = high + (low >> bits), low & (1 << bits) - 1
    lead = (members > 0) & (high == high[members > 0].max())
    lead &= low == low[lead].max()
    return int(lead.nonzero()[0, 0])


def mmr(job: Job) -> Cover:
    """MMR: ``λ u + (1 - λ) δ``, u scaled over the pool, δ over the samples left. Carbonell and Goldstein, 1998."""
    uncertainty, share = job.needed_uncertainty(), job.options["mmr_weight"]
    if job.ranks.size > 1 and job.left > _MOST_SHARED_MMR:
        raise ValueError(
            f"select: `mmr` over shards exchanges messages for every pick; expected `budget` to be at most "
            f"{_MOST_SHARED_MMR}, got {job.budget}"
        )
    relevance = _scaled_over_all(job, lambda: uncertainty)
    cover = _start(job, lambda: uncertainty)
    everything = torch.arange(job.pool.n, device=job.pool.device)

    def distances() -> Tensor:
        cover.refresh(everything)
        return cover.delta[job.open_rows]

    while job.left:
        novelty = torch.zeros_like(relevance)
        novelty[job.open_rows] = _scaled_over_all(job, distances)
        best = job.best(lambda: share * relevance + (1 - share) * novelty)  # noqa: B023  # called at once
        cover.add(best["rows"])
        job.take(best)
    return cover
