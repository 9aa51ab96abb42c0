"""Greedy farthest-point selection, exact in every provider: the picks must be equal."""

import torch
from torch import Tensor

import msacore
from bench.harness import Benchmark, Growth, Inputs, Shape, Work
from bench.peers import plain


def _inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    return {"pool": torch.randn(sizes["N"], sizes["d"], device=device), "budget": sizes["budget"]}


def lazy_batched(pool: Tensor, budget: int) -> Tensor:
    return msacore.select(pool, budget, strategy="kcenter", labeled=torch.tensor([0])).indices


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


def _work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """Every pick's distance to the whole pool, as one product; the pool is read once at least."""
    n, d, budget = sizes["N"], sizes["d"], sizes["budget"]
    forward = Work(2.0 * n * d * budget, 4.0 * n * d)
    return forward, forward


BENCHMARKS = [
    Benchmark(
        name="kcenter",
        shapes=(
            Shape("N=1284 d=128 budget=20 (MOSI)", {"N": 1284, "d": 128, "budget": 20}, quick=True),
            Shape("N=16326 d=256 budget=200 (MOSEI)", {"N": 16326, "d": 256, "budget": 200}),
            Shape("N=100000 d=256 budget=200", {"N": 100000, "d": 256, "budget": 200}),
        ),
        inputs=_inputs,
        providers=(
            plain("msacore", lazy_batched),
            plain("torch, matrix–vector per pick", matrix_vector),
            plain("torch, cdist per pick (DISTIL)", distances_per_pick),
            plain("torch, pairwise_distance per pick (anomalib)", pairwise_distance_per_pick),
        ),
        work=_work,
        growth=(Growth("N", (5000, 10000, 20000, 40000), {"d": 128, "budget": 50}, slope=1),),
        differentiable=False,
    )
]
