"""Strategies for a cold start: typical samples of clusters, and samples that cover the pool with balls."""

from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection.job import Job

_MAX_CLUSTERS = 500
_ITERATIONS = 50


def k_means(job: Job, k: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on all samples from k-means++ seeds: cluster of every sample ``[N]``, centroids ``[k, d]``.

    Exact assignments and sums in a fixed order: the clusters do not depend on the engine. No sample is left out.
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
        share = nearest.square().cumsum(0)
        if not bool(share[-1] > 0):
            break
        drawn = torch.searchsorted(share, (draws[i].to(device) * share[-1])[None], right=True)
        centroids = torch.cat([centroids, pool.centers(torch.minimum(drawn, nearest.nonzero()[-1]))])
    previous = torch.full_like(everything, -1)
    for i in range(_ITERATIONS):
        pool.note(f"pass {i} over {len(centroids)} clusters")
        cluster = job.engine.nearest(everything, centroids)
        if torch.equal(cluster, previous):
            break
        previous = cluster
        sums, counts = torch.zeros_like(centroids), torch.bincount(cluster, minlength=len(centroids))
        for part, values in pool.parts():
            sums.index_add_(0, cluster[part], values.double())
        # A cluster that lost all its samples keeps its centroid.
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centroids)
    return previous, centroids


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


def typical(job: Job) -> None:
    """TypiClust: from the cluster with the fewest labels (then the largest) the most typical sample.

    Hacohen, Dekel and Weinshall, 2022. ``min(labelled + budget, 500)`` clusters. Scores are typicalities.
    """
    if not job.left:
        return
    pool = job.pool
    if "cluster" not in job.memory:
        labeled = len(job.centers)
        cluster, centroids = k_means(job, min(labeled + job.budget, _MAX_CLUSTERS, pool.n))
        counts = torch.zeros(len(centroids), dtype=torch.int64, device=pool.device)
        if labeled:
            counts = torch.bincount(pool.assign(job.centers, centroids), minlength=len(centroids))
        job.memory |= {"typicality": _typicality(job, cluster), "labeled": counts, "cluster": cluster}
    cluster, typicality, counts = (job.memory[name] for name in ("cluster", "typicality", "labeled"))
    counts = counts + torch.bincount(cluster[job.picked()], minlength=len(counts))
    size = torch.bincount(cluster, minlength=len(counts))
    open_count = torch.bincount(cluster[job.open_rows], minlength=len(counts))
    while job.left:
        # Fewest labels, then largest, then smallest number.
        order = counts * (pool.n + 1) + (pool.n - size)
        number = kcenter.rank(-order.double().where(open_count > 0, torch.inf), count=1)
        best = job.best(typicality.where(cluster == number, -torch.inf))
        counts[number] += 1
        open_count[number] -= 1
        job.add(best, typicality[best])


def cover_with_balls(job: Job) -> None:
    """ProbCover: the sample within ``delta`` of the most samples not yet covered. Yehuda et al., 2022.

    No graph is stored: O(N) memory. Scores are the numbers of newly covered samples.
    """
    pool, radius = job.pool, float(job.options["delta"])
    if not job.left:
        return
    if "degree" not in job.memory:
        uncovered = torch.ones(pool.n, dtype=torch.bool, device=pool.device)
        for center in job.centers:
            uncovered &= pool.distances_to(center[None]) > radius
        degree = job.engine.within(uncovered.nonzero()[:, 0], radius)
        job.memory = {"degree": degree, "uncovered": uncovered, "applied": 0}
    while True:
        for chosen in job.picked()[job.memory["applied"] :]:
            near = pool.distances_to(pool.centers(chosen[None])) <= radius
            fresh = near & job.memory["uncovered"]
            degree = job.memory["degree"] - job.engine.within(fresh.nonzero()[:, 0], radius)
            # One assignment, so that an interrupt leaves either the old or the new memory.
            job.memory = {
                "degree": degree,
                "uncovered": job.memory["uncovered"] & ~near,
                "applied": job.memory["applied"] + 1,
            }
        if not job.left:
            return
        best = job.best(job.memory["degree"].double())
        job.add(best, job.memory["degree"][best].double())


def check_options(strategy: str, options: dict[str, Any]) -> None:
    """Ranges of the options.

    Raises:
        ValueError: An option is out of range, or "probcover" lacks its `delta`.
    """
    if strategy == "probcover" and options["delta"] is None:
        raise ValueError("select: the strategy `probcover` needs options={'delta': radius of the balls}")
