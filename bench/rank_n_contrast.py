"""Rank-N-Contrast against the cubic form of its authors' description and a sorted form in torch."""

import torch
from torch import Tensor

import msacore
from bench.harness import Benchmark, Growth, Inputs, Shape, Work
from bench.peers import at_most, compiled, plain
from msacore import reference


def _inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    return {
        "embeddings": torch.randn(sizes["N"], sizes["d"], device=device, requires_grad=True),
        "targets": 6 * torch.rand(sizes["N"], device=device) - 3,
    }


def cubic(embeddings: Tensor, targets: Tensor) -> Tensor:
    """A mask [N, N] for every one of the N - 1 columns, all of them kept for the backward pass."""
    n = len(targets)
    others = ~torch.eye(n, dtype=torch.bool, device=targets.device)
    gap = (targets[:, None] - targets[None, :]).abs()[others].view(n, n - 1)
    s = -(embeddings[:, None] - embeddings[None, :]).norm(dim=-1) / 2
    s = (s - s.max(1, keepdim=True).values.detach())[others].view(n, n - 1)
    weight, loss = s.exp(), embeddings.new_zeros(())
    for k in range(n - 1):
        as_far = (gap >= gap[:, k : k + 1]).to(weight.dtype)
        loss = loss + ((as_far * weight).sum(1).log() - s[:, k]).sum()
    return loss / (n * (n - 1))


def sort_and_accumulate(embeddings: Tensor, targets: Tensor) -> Tensor:
    """Each row is sorted by falling gap; a cumulative log-sum-exp is read at the end of each group of ties."""
    n = len(targets)
    others = ~torch.eye(n, dtype=torch.bool, device=targets.device)
    gap = (targets[:, None] - targets[None, :]).abs()[others].view(n, n - 1)
    s = -torch.cdist(embeddings, embeddings)[others].view(n, n - 1) / 2
    rising, order = (-gap).sort(1)
    s = s.gather(1, order)
    end = torch.searchsorted(rising, rising, right=True) - 1
    return (s.logcumsumexp(1).gather(1, end) - s).sum() / (n * (n - 1))


def _work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """The products of all pairs are computed once forward and once backward, and go into the gradient twice."""
    n, d = sizes["N"], sizes["d"]
    return Work(n * n * d, 4 * n * d), Work(6 * n * n * d, 3 * 4 * n * d)


BENCHMARKS = [
    Benchmark(
        name="rank_n_contrast",
        shapes=(
            Shape("N=128 d=128 (one batch)", {"N": 128, "d": 128}, quick=True),
            Shape("N=8 d=16 (smallest)", {"N": 8, "d": 16}, quick=True),
            Shape("N=512 d=128", {"N": 512, "d": 128}, decisive=True),
            Shape("N=1284 d=128 (MOSI)", {"N": 1284, "d": 128}),
            Shape("N=4096 d=128", {"N": 4096, "d": 128}),
        ),
        inputs=_inputs,
        providers=(
            plain("msacore", msacore.rank_n_contrast),
            plain(
                "reference",
                reference.rank_n_contrast.rank_n_contrast,
                at_most(lambda i: 8 * len(i["targets"]) ** 3, 2e9),
            ),
            plain("cubic form", cubic, at_most(lambda i: 8 * len(i["targets"]) ** 3, 2e9)),
            plain("torch: sort, logcumsumexp", sort_and_accumulate),
            compiled("torch.compile of it", sort_and_accumulate),
        ),
        work=_work,
        growth=(
            Growth("N", (512, 1024, 2048, 4096), {"d": 64}, slope=2),
            Growth("d", (256, 512, 1024, 2048), {"N": 1024}, slope=1),
        ),
    )
]
