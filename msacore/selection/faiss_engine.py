"""FAISS as an engine with the same answers: its float32 distances are checked against their error bound, and the exact
kernels decide what they leave open. This is the only module that imports faiss, and only when it is asked for."""

from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection.engine import BLOCK, SPARE, Native, exact
from msacore.selection.pool import Pool


def load() -> Any:
    """The faiss module.

    Raises:
        ImportError: It is not installed or does not load; the message says what to run.
    """
    try:
        import faiss
    except (ImportError, RuntimeError) as error:  # faiss-gpu raises RuntimeError where its CUDA libraries are missing
        raise ImportError(
            f"select: backend='faiss' needs the package faiss, which does not load ({error}). "
            "Run: pip install 'msacore[faiss]', or use backend='native' for the same picks"
        ) from error
    return faiss


class Faiss(Native):
    """Brute-force FAISS indices, on the GPU where FAISS finds one and its GPU indices support the query.

    ``name`` is "faiss-gpu" if all queries ran there.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._faiss = load()
        self._gpu = self._faiss.get_num_gpus() > 0
        self._ran = "native"

    @property
    def name(self) -> str:
        return self._ran

    def _packed(self, x: Tensor, side: int) -> Tensor:
        """Float32 rows whose squared distances are the pool's (cosine: twice the distance), up to the bound.

        Two more coordinates, one per side of a pair, give zero rows the cosine distance 1 to all rows.
        """
        if self.pool.metric == kcenter.METRICS["euclidean"]:
            return ((x.double() - self.pool.mean) * self.pool.scale).float()
        x = x.double()
        norms = x.square().sum(1, keepdim=True).sqrt()
        extra = torch.zeros(len(x), 2, dtype=torch.float64, device=x.device)
        extra[:, side] = (norms[:, 0] == 0).double()
        return torch.cat([x / norms.where(norms > 0, 1), extra], 1).float()

    def _bound(self, queries: Tensor, largest: Tensor) -> Tensor:
        """Error bound of FAISS' squared distances: rounding, with products summed in any order (csrc/kcenter)."""
        width = queries.shape[1]
        return 4 * (width + 16) * 5.97e-8 * (queries.double().square().sum(1) + largest) + 1e-30

    def _index(self, rows: Tensor, search: bool) -> tuple[Any, Tensor]:
        index = self._faiss.IndexFlatL2(rows.shape[1])
        on_gpu = search and self._gpu
        if on_gpu:
            index = self._faiss.index_cpu_to_all_gpus(index)
        self._ran = "faiss-gpu" if on_gpu and self._ran != "faiss-cpu" else "faiss-cpu"
        index.add(rows.cpu().numpy())
        return index, rows.double().square().sum(1).max()

    def _search(self, index: Any, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        squares, found = index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(squares).to(queries.device).double(), torch.from_numpy(found).to(queries.device)

    def bounds(self, centers: Tensor) -> Tensor:
        """Upper bounds on the distances to the nearest centre, ``[N]``: FAISS' own plus their error."""
        index, largest = self._index(self._packed(centers, 1), True)
        out = []
        for _, values in self.pool.parts():
            queries = self._packed(values, 0)
            squares = self._search(index, queries, 1)[0][:, 0] + self._bound(queries, largest)
            euclidean = self.pool.metric == kcenter.METRICS["euclidean"]
            out.append(squares.clamp_min(0).sqrt() / self.pool.scale if euclidean else squares / 2)
        return torch.cat(out) * (1 + 1e-6)

    def nearest(self, rows: Tensor, centers: Tensor) -> Tensor:
        index, largest = self._index(self._packed(centers, 1), True)
        owner = torch.zeros_like(rows)
        for part in torch.arange(len(rows), device=rows.device).split(BLOCK):
            queries = self._packed(self.pool.gather(rows[part]), 0)
            squares, found = self._search(index, queries, min(2, len(centers)))
            owner[part] = found[:, 0]
            if len(centers) > 1:
                unclear = part[squares[:, 1] - squares[:, 0] <= 2 * self._bound(queries, largest)]
                owner[unclear] = super().nearest(rows[unclear], centers)
        return owner

    def within(self, rows: Tensor, radius: float) -> Tensor:
        total = torch.zeros(self.pool.n, dtype=torch.int64, device=rows.device)
        euclidean = self.pool.metric == kcenter.METRICS["euclidean"]
        reach = (radius * self.pool.scale) ** 2 if euclidean else 2 * radius
        for block in self.blocks(rows):
            centers = self.pool.centers(block)
            index, largest = self._index(self._packed(centers, 1), False)
            for part, values in self.pool.parts():
                queries = self._packed(values, 0)
                bound = self._bound(queries, largest)
                # FAISS has one radius per call, and returns what is strictly below it.
                limits, squares, _ = index.range_search(queries.cpu().numpy(), reach * (1 + 1e-6) + float(bound.max()))
                counts = torch.from_numpy(limits.astype("int64")).diff().to(rows.device)
                query = torch.arange(len(queries), device=rows.device).repeat_interleave(counts)
                gaps = torch.from_numpy(squares).to(rows.device).double() - reach
                inside = torch.bincount(query[gaps <= -bound[query]], minlength=len(queries))
                unclear = query[gaps.abs() < bound[query]].unique()
                places = torch.arange(self.pool.n, device=rows.device)[part]
                if len(unclear):
                    inside[unclear] = self.pool.count(centers, radius, places[unclear])
                total[places] += inside
        return total

    def neighbour_distances(self, members: Tensor, k: int) -> Tensor:
        asked = k + 1 + SPARE
        if asked >= len(members):
            return super().neighbour_distances(members, k)
        x = self.pool.centers(members)
        packed = self._packed(x, 1)
        index, largest = self._index(packed, True)
        out = torch.empty(len(x), k, dtype=torch.float64, device=x.device)
        euclidean = self.pool.metric == kcenter.METRICS["euclidean"]
        for part in torch.arange(len(x), device=x.device).split(BLOCK):
            queries = self._packed(x[part], 0)
            squares, found = self._search(index, queries, asked)
            # The sample itself goes last and is dropped, or the last one found if more than `asked` samples equal it.
            own = found == part[:, None]
            order = own.int().argsort(stable=True, dim=1)
            others = found.gather(1, order)[:, :-1]
            values = exact(x, part, others, self.pool.metric)[:, :k]
            farthest = (values[:, -1] * self.pool.scale).square() if euclidean else 2 * values[:, -1]
            unclear = (farthest + self._bound(queries, largest) > squares[:, -1]).nonzero()[:, 0]
            out[part] = values
            if len(unclear):
                out[part[unclear]] = self.distances_among(x, part[unclear], k)
        return out
