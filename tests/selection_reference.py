"""Every strategy in its plainest form: full distance matrices, one pick at a time, NumPy."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def distances(a: np.ndarray, b: np.ndarray, metric: str) -> np.ndarray:
    if metric == "euclidean":
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    norms = np.sqrt((a**2).sum(-1)[:, None] * (b**2).sum(-1)[None])
    product = (a[:, None] * b[None]).sum(-1)
    return np.where(norms == 0, 1.0, np.maximum(1 - product / np.where(norms == 0, 1, norms), 0))


def scaled(u: np.ndarray) -> np.ndarray:
    low, high = u.min(), u.max()
    return np.ones_like(u) if low == high else 1e-3 + (1 - 1e-3) * (u - low) / (high - low)


class Plain:
    """A pool with its labelled samples; one method per strategy gives the list of picks."""

    def __init__(self, x: Any, budget: int, uncertainty: Any, labeled: Any, metric: str, seed: int = 0) -> None:
        self.x = torch.as_tensor(x).double().numpy()
        self.budget, self.metric, self.seed = budget, metric, seed
        self.u = None if uncertainty is None else torch.as_tensor(uncertainty).double().numpy()
        self.open = np.ones(len(self.x), bool)
        self.centers = np.empty((0, self.x.shape[1]))
        if labeled is not None:
            given = torch.as_tensor(labeled)
            if given.dim() == 1:
                self.open[given.numpy()] = False
                given = torch.from_numpy(self.x)[given.unique()]
            self.centers = given.double().numpy()
        self.rest = self.open.copy()
        self.groups: np.ndarray | None = None
        self.room: dict[int, int] = {}
        self.first: int | None = None
        self.stop: float | None = None
        self.all = distances(self.x, self.x, metric)
        self.nearest = np.full(len(self.x), np.inf)
        self.owner = np.full(len(self.x), -1)
        self.count = 0
        for center in self.centers:
            self.fold(distances(self.x, center[None], metric)[:, 0])
        self.picks: list[int] = []

    def limit(
        self,
        candidates: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        max_per_group: int = 0,
        first: int | None = None,
        radius: float | None = None,
    ) -> "Plain":
        """Lets only some rows be picked (``candidates`` ``[N]`` bool), and at most ``max_per_group`` of each group."""
        if candidates is not None:
            self.open &= candidates
        if groups is not None:
            self.groups = groups
            self.room = {int(g): max_per_group - int((~self.rest & (groups == g)).sum()) for g in np.unique(groups)}
            self.close()
        self.first, self.stop = first, radius
        return self

    def close(self) -> None:
        for group, room in self.room.items():
            if room <= 0:
                self.open[self.groups == group] = False

    def left(self) -> int:
        if self.groups is None:
            return int(self.open.sum())
        return sum(min(int((self.open & (self.groups == g)).sum()), max(0, room)) for g, room in self.room.items())

    def fold(self, distance: np.ndarray) -> None:
        closer = distance < self.nearest
        self.nearest[closer], self.owner[closer] = distance[closer], self.count
        self.count += 1

    def argmax(self, score: np.ndarray) -> int:
        return int(np.where(self.open, score, -np.inf).argmax())

    def take(self, index: int) -> None:
        self.picks.append(index)
        self.open[index] = self.rest[index] = False
        if self.groups is not None:
            self.room[int(self.groups[index])] -= 1
            self.close()
        self.fold(self.all[:, index])

    def greedy(self, first: np.ndarray, score: Any) -> list[int]:
        while len(self.picks) < self.budget and self.open.any():
            best = self.argmax(first if self.count == 0 else score())
            if self.count == 0 and self.first is not None:
                best = self.first
            if self.count and self.stop is not None and self.nearest[best] <= self.stop:
                break
            self.take(best)
        return self.picks

    def norms(self) -> np.ndarray:
        return np.sqrt((self.x**2).sum(1))

    def far_from_mean(self) -> np.ndarray:
        return distances(self.x, self.x.mean(0)[None], self.metric)[:, 0]

    def topk(self) -> list[int]:
        while len(self.picks) < self.budget:
            self.take(self.argmax(self.u))
        return self.picks

    def kcenter(self) -> list[int]:
        return self.greedy(self.far_from_mean(), lambda: self.nearest)

    def uncertainty_kcenter(self, gamma: float = 1.0) -> list[int]:
        weight = scaled(self.u) ** gamma
        return self.greedy(self.u, lambda: weight * self.nearest)

    def prefilter(self, factor: float = 5) -> list[int]:
        order = sorted(np.flatnonzero(self.open), key=lambda i: (-self.u[i], i))
        keep = np.zeros_like(self.open)
        size, room = 0, dict(self.room)
        allowed = 0
        for size, row in enumerate(order, 1):
            group = None if self.groups is None else int(self.groups[row])
            if group is None or room[group] > 0:
                allowed += 1
            if group is not None:
                room[group] -= 1
            if size >= round(factor * self.budget) and allowed >= self.budget:
                break
        keep[order[:size]] = True
        if self.first is not None and self.budget:
            keep[self.first] = True
        self.open &= keep
        return self.greedy(self.u, lambda: self.nearest)

    def kmeans_plus_plus(self) -> list[int]:
        draws = torch.rand(len(self.x), generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

        def draw() -> np.ndarray:
            square = np.where(self.open, self.nearest**2, 0)
            if not square.any():
                square = self.open.astype(float)
            share = np.cumsum(square)
            place = int(np.searchsorted(share, draws[len(self.picks)].item() * share[-1], side="right"))
            return np.arange(len(self.x)) == place

        return self.greedy(self.norms(), draw)

    def lcmd(self) -> list[int]:
        def farthest_of_largest() -> np.ndarray:
            size = {c: math.fsum(self.nearest[self.open & (self.owner == c)] ** 2) for c in set(self.owner[self.open])}
            largest = min(size, key=lambda c: (-size[c], c))
            return np.where(self.owner == largest, self.nearest, -np.inf)

        return self.greedy(self.norms(), farthest_of_largest)

    def mmr(self, share: float = 0.5) -> list[int]:
        def score() -> np.ndarray:
            novelty = np.zeros(len(self.x))
            novelty[self.open] = scaled(self.nearest[self.open])
            return share * scaled(self.u) + (1 - share) * novelty

        return self.greedy(self.u, score)

    def maxdet(self, noise: float = 1e-6) -> list[int]:
        """Pivoted Cholesky of the kernel of the rows minus their mean, one column for each pick."""
        rows = np.concatenate([self.centers, self.x])
        if self.metric == "cosine":
            norms = np.sqrt((rows**2).sum(1, keepdims=True))
            rows = rows / np.where(norms == 0, 1, norms)
        known = len(self.centers)
        rows = rows - rows[known:].mean(0)
        norms = (rows**2).sum(1)
        residual, columns = norms.copy(), np.empty((0, len(rows)))

        def condition(pivot: int) -> None:
            nonlocal residual, columns
            column = rows @ rows[pivot] - columns.T @ columns[:, pivot]
            column /= np.sqrt(residual[pivot] + noise)
            columns = np.concatenate([columns, column[None]])
            residual = np.maximum(residual - column**2, 0)

        for center in range(known):
            condition(center)
        while len(self.picks) < self.budget:
            best = self.argmax(residual[known:])
            if not known and not self.picks and self.first is not None:
                best = self.first
            elif (known or self.picks) and residual[known + best] <= 1e-12 * norms[known:].max():
                best = self.argmax(np.zeros(len(self.x)))
            condition(known + best)
            self.take(best)
        return self.picks

    def probcover(self, delta: float) -> list[int]:
        inside = self.all <= delta
        uncovered = np.ones(len(self.x), bool)
        for center in self.centers:
            uncovered &= distances(self.x, center[None], self.metric)[:, 0] > delta
        while len(self.picks) < self.budget:
            best = self.argmax(inside[:, uncovered].sum(1))
            if self.count == 0 and self.first is not None:
                best = self.first
            uncovered &= ~inside[best]
            self.take(best)
        return self.picks

    def typiclust(self, cluster: Sequence[int], of_labeled: Sequence[int], neighbours: int = 20) -> list[int]:
        """Picks for given clusters of the pool and of the labelled centres."""
        cluster = np.asarray(cluster)
        typicality = np.zeros(len(self.x))
        for i in range(len(self.x)):
            others = np.sort(np.delete(self.all[i], i)[np.delete(cluster, i) == cluster[i]])[:neighbours]
            typicality[i] = 1 / others.mean() if len(others) else 0
        labels = np.bincount(np.asarray(of_labeled, dtype=int), minlength=cluster.max() + 1)
        while len(self.picks) < self.budget:
            ready = sorted(set(cluster[self.open]), key=lambda c: (labels[c], -(cluster == c).sum(), c))
            best = self.argmax(np.where(cluster == ready[0], typicality, -np.inf))
            labels[ready[0]] += 1
            self.take(best)
        return self.picks

    def radius(self, picks: Sequence[int]) -> float:
        centers = np.concatenate([self.centers, self.x[list(picks)]])
        rest = self.rest.copy()
        rest[list(picks)] = False
        if not rest.any():
            return 0.0
        return float(distances(self.x[rest], centers, self.metric).min(1).max()) if len(centers) else np.inf
