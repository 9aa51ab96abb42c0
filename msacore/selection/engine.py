"""The engines for nearest-neighbour queries: the kernels of this package, or FAISS followed by an exact check."""

from collections.abc import Iterator

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection.pool import Pool

BLOCK = 2048  # centres folded, or queries answered, in one go
SPARE = 8  # neighbours examined beyond those asked for, because of rounding


class Native:
    """The operators of this package."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @property
    def name(self) -> str:
        """What ran, for `Selection.backend`."""
        return "native"

    def nearest(self, rows: Tensor, centers: Tensor) -> Tensor:
        """Index of the nearest centre of each of ``rows``, the smallest among equals."""
        infinite = torch.full(rows.shape, torch.inf, dtype=torch.float64, device=rows.device)
        none = torch.full_like(rows, -1)
        return self.pool.fold(rows, torch.zeros_like(rows), centers, infinite, none)[1]

    def within(self, rows: Tensor, radius: float) -> Tensor:
        """How many of the samples ``rows`` lie within ``radius`` of each sample, ``[N]``."""
        total = torch.zeros(self.pool.n, dtype=torch.int64, device=rows.device)
        for block in self.blocks(rows):
            total += self.pool.count(self.pool.centers(block), radius)
        return total

    def blocks(self, rows: Tensor) -> Iterator[Tensor]:
        """``rows`` in pieces, each of which is compared with the whole pool."""
        for begin in range(0, len(rows), BLOCK):
            self.pool.note(f"comparing sample {begin} of {len(rows)} with all")
            yield rows[begin : begin + BLOCK]

    def bounds(self, centers: Tensor) -> Tensor | None:
        """Upper bounds on the distances to the nearest of ``centers``, ``[N]``, or None where none are cheap."""
        return None

    def neighbour_distances(self, members: Tensor, k: int) -> Tensor:
        """Distances ``[n, k]``, ascending, from each of ``members`` to its nearest others among them."""
        x = self.pool.centers(members)
        return self.distances_among(x, torch.arange(len(x), device=x.device), k)

    def distances_among(self, x: Tensor, queries: Tensor, k: int) -> Tensor:
        """Distances ``[n, k]``, ascending, from the rows ``queries`` of ``x`` to their nearest others in ``x``."""
        euclidean, found = self.pool.metric == kcenter.METRICS["euclidean"], []
        scale = self.pool.safe if euclidean else 1.0
        x = x * scale
        center = x.mean(0) if euclidean else torch.zeros_like(x[0])
        for block in queries.split(max(1, BLOCK * 64 // len(x) + 1)):
            guess = approximate(x[block] - center, x - center, self.pool.metric)
            guess[torch.arange(len(block), device=x.device), block] = torch.inf
            others = guess.topk(min(k + SPARE, len(x) - 1), largest=False).indices
            found.append(exact(x, block, others, self.pool.metric)[:, :k] / scale)
        return torch.cat(found)


def approximate(a: Tensor, b: Tensor, metric: int) -> Tensor:
    """Squared or cosine distances ``[A, B]`` by a matrix product."""
    if metric == kcenter.METRICS["cosine"]:
        return 1 - torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    return a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * a @ b.T


def exact(x: Tensor, queries: Tensor, others: Tensor, metric: int) -> Tensor:
    """Exact distances from rows ``queries`` to rows ``others`` ``[n, m]``, ascending along m."""
    q, o = x[queries][:, None], x[others]
    if metric == kcenter.METRICS["cosine"]:
        norms = q.square().sum(-1) * o.square().sum(-1)
        value = torch.where(norms == 0, 1.0, (1 - (q * o).sum(-1) / norms.sqrt()).clamp_min(0))
    else:
        value = (q - o).square().sum(-1).sqrt()
    return value.sort(1).values
