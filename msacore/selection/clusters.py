"""Strategies for a cold start: typical samples of clusters, and samples that cover the pool with balls."""

from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.ops.graph_propagation import graph_propagate
from msacore.selection import tree
from msacore.selection.job import Job

_MAX_CLUSTERS = 500
_ITERATIONS = 50


def k_means(job: Job, k: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on all samples from k-means++ seeds: cluster of every sample ``[N]``, centroids ``[k, d]``.

    Exact assignments and sums in a fixed order, on the GPU too: the clusters do not depend on the engine. No sample is
    left out.
    """
    pool, device = job.pool, job.pool.device
    everything = torch.arange(pool.n, device=device)
    draws = torch.rand(k, generator=torch.Generator().manual_seed(job.seed), dtype=torch.float64)
    chosen = (draws[:1] * pool.n).long().clamp_max(pool.n - 1).to(device)
    centroids = pool.centers(chosen)
    nearest = torch.full((pool.n,), torch.inf, dtype=torch.float64, device=device)
    for i in range(1, k):
        pool.note(f"seed {i} of {k} clusters")
        nearest = torch.minimum(nearest, pool.distances_to(centroids[-1:]))
        shares = tree.Shares((nearest * pool.safe).square(), 0, pool.n)
        parts = shares.sums()
        total = tree.join(parts, pool.n)
        if not total > 0:
            break
        drawn = shares.find(*tree.find_span(parts, pool.n, float(draws[i]) * total))
        centroids = torch.cat([centroids, pool.centers(everything[drawn : drawn + 1])])
    previous = torch.full_like(everything, -1)
    for i in range(_ITERATIONS):
        pool.note(f"pass {i} over {len(centroids)} clusters")
        cluster = job.engine.nearest(everything, centroids)
        if torch.equal(cluster, previous):
            break
        previous = cluster
        sums, counts = torch.zeros_like(centroids), torch.bincount(cluster, minlength=len(centroids))
        for part, values in pool.parts():
            sums = _added(sums, cluster[part], values.double())
        # A cluster that lost all its samples keeps its centroid.
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centroids)
    return previous, centroids


def _added(sums: Tensor, cluster: Tensor, rows: Tensor) -> Tensor:
    """Sums ``[k, d]`` plus the rows of every cluster, added in row order: ``index_add_`` has no fixed order on CUDA."""
    member_of = torch.cat([torch.arange(len(sums), device=cluster.device), cluster])
    rowptr = torch.cat([cluster.new_zeros(1), torch.bincount(member_of).cumsum(0)])
    return graph_propagate(torch.cat([sums, rows]), rowptr, member_of.argsort(stable=True))


def _typicality(job: Job, cluster: Tensor) -> Tensor:
    """One over the mean distance to the nearest neighbours within the sample's cluster."""
    out = torch.zeros(job.pool.n, dtype=torch.float64, device=job.pool.device)
    for number in range(int(cluster.max()) + 1):
        job.pool.note(f"neighbours in cluster {number}")
        members = (cluster == number).nonzero()[:, 0]
        k = min(job.options["neighbours"], len(members) - 1)
        if k > 0:
            out[members] = 1 / job.engine.neighbour_distances(members, k).mean(1)
    return out


def typiclust(job: Job) -> None:
    """TypiClust: from the cluster with the fewest labels (then the largest) the most typical sample.

    Hacohen, Dekel and Weinshall, 2022. ``min(labelled + budget, 500)`` clusters. Scores are typicalities.
    """
    if not job.left:
        return
    pool, labeled = job.pool, len(job.centers)
    cluster, centroids = k_means(job, min(labeled + job.budget, _MAX_CLUSTERS, pool.n))
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=pool.device)
    if labeled:
        counts = torch.bincount(pool.assign(job.centers, centroids), minlength=len(centroids))
    typicality = _typicality(job, cluster)
    counts = counts + torch.bincount(cluster[job.picked()], minlength=len(counts))
    size = torch.bincount(cluster, minlength=len(counts))
    while job.left:
        open_count = torch.bincount(cluster[job.open_rows], minlength=len(counts))
        # Fewest labels, then largest, then smallest number.
        order = counts * (pool.n + 1) + (pool.n - size)
        number = kcenter.rank(-order.double().where(open_count > 0, torch.inf), count=1)
        best = job.best(lambda: typicality.where(cluster == number, -torch.inf))  # noqa: B023  # called at once
        counts[number] += 1
        job.take(best)


def probcover(job: Job) -> None:
    """ProbCover: the sample within ``delta`` of the most samples not yet covered. Yehuda et al., 2022.

    No graph is stored: O(N) memory. Scores are the numbers of newly covered samples.
    """
    pool, radius = job.pool, float(job.options["delta"])
    if not job.left:
        return
    uncovered = torch.ones(pool.n, dtype=torch.bool, device=pool.device)
    for center in job.all_centers():
        uncovered &= pool.distances_to(center[None]) > radius
    degree = job.engine.within(uncovered.nonzero()[:, 0], radius)
    while job.left:
        best = job.best(lambda: degree.double())  # noqa: B023  # called at once
        job.take(best)
        if not job.left:
            return
        near = pool.distances_to(best["rows"]) <= radius
        degree = degree - job.engine.within((near & uncovered).nonzero()[:, 0], radius)
        uncovered &= ~near


def check_options(strategy: str, options: dict[str, Any]) -> None:
    """Check that "probcover" has its `delta`; the ranges of options are checked elsewhere.

    Raises:
        ValueError: "probcover" lacks its `delta`.
    """
    if strategy == "probcover" and options["delta"] is None:
        raise ValueError("select: the strategy `probcover` needs options={'delta': radius of the balls}")
