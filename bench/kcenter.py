"""Greedy farthest-point selection. Every provider is exact, so the picks must be equal.

``MSACORE_BENCH_POOL=FILE.npy`` or ``=FILE.npz:ARRAY`` adds a shape with the embeddings ``[N, d]`` of that file.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.device import Canary
from bench.harness import Benchmark, Call, Growth, Inputs, Provider, Shape, Work
from bench.peers import package, plain
from msacore.selection import Selection, select

_KINDS = ("Gaussian", "clustered", "duplicated", "from a file")
_CLUSTERS, _COPIES = 100, 4


def _from_file(name: str) -> Tensor:
    path, _, array = name.partition(":")
    found = np.load(path, allow_pickle=False)
    return torch.from_numpy(found[array] if array else found).float()


def _inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    n, d, kind = sizes["N"], sizes["d"], _KINDS[sizes.get("kind", 0)]
    if kind == "from a file":
        pool = _from_file(os.environ["MSACORE_BENCH_POOL"]).to(device)
    elif kind == "duplicated":
        pool = torch.randn(n // _COPIES, d, device=device).repeat(_COPIES, 1)
    else:
        pool = torch.randn(n, d, device=device)
        if kind == "clustered":
            pool += 3 * torch.randn(_CLUSTERS, d, device=device)[torch.randint(_CLUSTERS, (n,), device=device)]
    return {"pool": pool, "budget": sizes["budget"]}


def _select(pool: Tensor, budget: int) -> Selection:
    return select(pool, budget, strategy="kcenter", labeled=torch.tensor([0]))


def lazy_batched(pool: Tensor, budget: int) -> Tensor:
    return _select(pool, budget).indices


def _reads(inputs: Inputs, canary: Canary) -> str:
    """How often the pool is read, beside the time that a loop needs to read it once per pick."""
    reads = _select(**inputs).pool_reads
    limit = inputs["budget"] * inputs["pool"].nbytes / (canary.gbytes * 1e9)
    return f"{reads} pool reads; a loop's {inputs['budget']} take {1e3 * limit:.1f} ms at {canary.gbytes:.1f} GB/s"


def matrix_vector(pool: Tensor, budget: int) -> Tensor:
    """One product of the pool with the newest centre per pick, norms computed once."""
    square = (pool * pool).sum(1)
    picks, newest = [], 0
    distance = torch.full_like(square, torch.inf)
    for _ in range(budget):
        distance = torch.minimum(distance, square + square[newest] - 2 * (pool @ pool[newest]))
        distance[newest] = -torch.inf
        newest = int(distance.argmax())
        picks.append(newest)
    return torch.tensor(picks)


def distances_per_pick(pool: Tensor, budget: int) -> Tensor:
    """`cdist` of the pool to the newest centre per pick, as coreset implementations do."""
    picks, newest = [], 0
    distance = pool.new_full((len(pool),), torch.inf)
    for _ in range(budget):
        distance = torch.minimum(distance, torch.cdist(pool, pool[newest : newest + 1])[:, 0])
        distance[newest] = -torch.inf
        newest = int(distance.argmax())
        picks.append(newest)
    return torch.tensor(picks)


def pairwise_distance_per_pick(pool: Tensor, budget: int) -> Tensor:
    """`pairwise_distance` of the pool to the newest centre per pick, as PatchCore's coreset does."""
    picks, newest = [], 0
    distance = pool.new_full((len(pool), 1), torch.inf)
    for _ in range(budget):
        to_newest = torch.nn.functional.pairwise_distance(pool, pool[newest : newest + 1])[:, None]
        distance = torch.minimum(distance, to_newest)
        distance[newest] = -torch.inf
        newest = int(distance.argmax())
        picks.append(newest)
    return torch.tensor(picks)


def _sklearn_per_pick(inputs: Inputs) -> Call:
    """`euclidean_distances` of the pool to the newest centre per pick, as samplers on NumPy arrays do."""
    metrics = package("sklearn.metrics.pairwise", "scikit-learn")
    pool = inputs["pool"].cpu().numpy()

    def pick() -> Tensor:
        picks, newest = [], 0
        distance = np.full(len(pool), np.inf)
        for _ in range(inputs["budget"]):
            distance = np.minimum(distance, metrics.euclidean_distances(pool, pool[newest : newest + 1])[:, 0])
            distance[newest] = -np.inf
            newest = int(distance.argmax())
            picks.append(newest)
        return torch.tensor(picks)

    return pick


def _fpsample(inputs: Inputs) -> Call:
    """The plain scan of fpsample, a compiled library for point clouds: one pass over the pool per pick."""
    module = package("fpsample", "fpsample")
    pool = inputs["pool"].cpu().numpy()

    def pick() -> Tensor:
        picks = module.fps_sampling(pool, inputs["budget"] + 1, start_idx=0)
        return torch.from_numpy(picks.astype(np.int64))[1:]

    return pick


def _quickfps(inputs: Inputs) -> Call:
    """torch_quickfps, for point clouds: a pick reads only the buckets of points that it can change."""
    module = package("torch_quickfps", "torch_quickfps")
    pool, budget = inputs["pool"], inputs["budget"]
    return lambda: module.sample_idx(pool[None], budget + 1, start_idx=0)[0, 1:]


def _work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """The distances of every pick to the whole pool, as one product; the pool is read at least once."""
    n, d, budget = sizes["N"], sizes["d"], sizes["budget"]
    forward = Work(2.0 * n * d * budget, 4.0 * n * d)
    return forward, forward


def shapes() -> tuple[Shape, ...]:
    shapes = [
        Shape("N=1284 d=128 budget=20 (MOSI)", {"N": 1284, "d": 128, "budget": 20}, quick=True),
        Shape("N=1284 d=384 budget=20", {"N": 1284, "d": 384, "budget": 20}),
        Shape("N=2000 d=64 budget=100", {"N": 2000, "d": 64, "budget": 100}),
        Shape("N=50000 d=3 budget=500 (points)", {"N": 50000, "d": 3, "budget": 500}),
        Shape("N=20000 d=8 budget=300", {"N": 20000, "d": 8, "budget": 300}),
        Shape("N=16326 d=256 budget=200 (MOSEI)", {"N": 16326, "d": 256, "budget": 200}),
    ]
    shapes.append(Shape("N=1000000 d=256 budget=10000", {"N": 1000000, "d": 256, "budget": 10000}, large=True))
    for kind, name in enumerate(_KINDS[:3]):
        shapes.append(Shape(f"N=100000 d=256 budget=200 {name}", {"N": 100000, "d": 256, "budget": 200, "kind": kind}))
    if file := os.environ.get("MSACORE_BENCH_POOL"):
        n, d = _from_file(file).shape
        budget = min(200, n - 1)
        sizes = {"N": n, "d": d, "budget": budget, "kind": _KINDS.index("from a file")}
        shapes.append(Shape(f"N={n} d={d} budget={budget} {Path(file).name}", sizes))
    return tuple(shapes)


BENCHMARKS = [
    Benchmark(
        name="kcenter",
        shapes=shapes(),
        inputs=_inputs,
        providers=(
            plain("msacore", lazy_batched),
            plain("torch, matrix–vector per pick", matrix_vector),
            plain("torch, cdist per pick (DISTIL)", distances_per_pick),
            plain("torch, pairwise_distance per pick (anomalib)", pairwise_distance_per_pick),
            Provider("scikit-learn, euclidean_distances per pick", _sklearn_per_pick),
            Provider("fpsample, plain scan", _fpsample),
            Provider("torch_quickfps, buckets", _quickfps),
        ),
        work=_work,
        growth=(Growth("N", (5000, 10000, 20000, 40000), {"d": 128, "budget": 50}, slope=1),),
        differentiable=False,
        remark=_reads,
    )
]
