"""Greedy centre selection in plain PyTorch: the definition that the lazy-batched method must reproduce."""

import torch
from torch import Tensor

__all__ = ["count", "distances", "fold", "greedy", "kcenter", "rank", "tree_sum"]


def distances(x: Tensor, centers: Tensor, metric: str = "euclidean") -> Tensor:
    """Distances ``[A, n]`` in float64 between rows ``x`` ``[A, d]`` and ``centers`` ``[n, d]``."""
    x, centers = x.double(), centers.double()
    if metric == "euclidean":
        return torch.stack([((x - c) ** 2).sum(-1).sqrt() for c in centers], -1) if len(centers) else x[:, :0]
    norms = x.square().sum(-1)[:, None] * centers.square().sum(-1)[None, :]
    cosine = (x @ centers.T) / norms.sqrt()
    return torch.where(norms == 0, 1.0, (1 - cosine).clamp_min(0))


def fold(x: Tensor, centers: Tensor, delta: Tensor, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """Distance to the nearest centre so far, ``min(delta, D(x, centers))``, and its index (-1: an earlier one)."""
    nearest, owner = distances(x, centers, metric).min(1)
    return torch.minimum(delta, nearest), owner.where(nearest < delta, -1)


def count(x: Tensor, centers: Tensor, radius: float, metric: str = "euclidean") -> Tensor:
    """How many centres lie within ``radius`` of each row of ``x``."""
    return (distances(x, centers, metric) <= radius).sum(1)


def rank(score: Tensor, count: int) -> Tensor:
    """The first ``count`` indices by descending score, ties by index."""
    return score.sort(descending=True, stable=True).indices[:count]


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the rows of ``x`` ``[N, …]`` in float64, along the binary tree over row numbers."""
    x = x.double()
    while len(x) > 1:
        paired = x[: len(x) // 2 * 2]
        x = torch.cat([paired[0::2] + paired[1::2], x[len(paired) :]])
    return x.sum(0)


def greedy(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    steps: int,
    metric: str = "euclidean",
    group: Tensor | None = None,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``steps`` times: pick ``argmax weight · delta`` (smallest index among equals), fold it into ``delta``.

    A sample with ``delta`` of -inf is never picked, nor is one of a ``group`` ``[N]`` that already has its ``room``
    ``[G]`` of picks; it ends early when no other sample is left. Returns picks and their scores.
    """
    delta = delta.clone()
    picks: list[int] = []
    scores: list[float] = []
    for _ in range(steps):
        if group is not None and room is not None:
            taken = torch.bincount(group[torch.tensor(picks, dtype=torch.int64)], minlength=len(room))
            delta[(taken >= room)[group]] = -torch.inf
            if bool((delta == -torch.inf).all()):
                break
        score = torch.where(delta == -torch.inf, -torch.inf, weight * delta)
        pick = int(score.argmax())
        picks.append(pick)
        scores.append(float(score[pick]))
        delta = torch.minimum(delta, distances(x, x[pick : pick + 1], metric)[:, 0])
        delta[pick] = -torch.inf
    return torch.tensor(picks, dtype=torch.int64), torch.tensor(scores, dtype=torch.float64)


def kcenter(
    x: Tensor,
    budget: int,
    weight: Tensor | None = None,
    centers: Tensor | None = None,
    first: int | None = None,
    excluded: Tensor | None = None,
    metric: str = "euclidean",
) -> tuple[Tensor, Tensor]:
    """Plain greedy k-centre: one pass over ``x`` ``[N, d]`` per pick.

    Args:
        x: Pool, ``[N, d]``.
        budget: Number of picks, at most the number of samples that are not excluded.
        weight: Factor of each sample's distance, ``[N]`` float64; ones when omitted.
        centers: Centres that exist already, ``[n, d]``.
        first: First pick where there is no centre; the sample farthest from the mean when omitted.
        excluded: Samples never picked, ``[N]`` bool.
        metric: "euclidean" or "cosine".

    Returns:
        Picks ``[budget]`` int64 in order, and their scores, float64 (inf for a first pick without centre).
    """
    weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight
    delta = torch.full((len(x),), torch.inf, dtype=torch.float64)
    if excluded is not None:
        delta[excluded] = -torch.inf
    if centers is not None and len(centers):
        delta = torch.minimum(delta, distances(x, centers, metric).amin(1))
        return greedy(x, weight, delta, budget, metric)
    if budget == 0:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    if first is None:
        away = distances(x, x.double().mean(0, keepdim=True), metric)[:, 0]
        first = int(torch.where(delta == -torch.inf, -torch.inf, away).argmax())
    delta = torch.minimum(delta, distances(x, x[first : first + 1], metric)[:, 0])
    delta[first] = -torch.inf
    picks, scores = greedy(x, weight, delta, budget - 1, metric)
    return torch.cat([torch.tensor([first]), picks]), torch.cat([torch.tensor([torch.inf]).double(), scores])
