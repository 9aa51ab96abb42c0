"""Low-rank fusion against torch with one product per modality, and against its einsum form."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

import msacore
from bench.harness import Benchmark, Growth, Inputs, Shape, Work
from bench.peers import compiled, plain
from msacore import reference

_WIDTHS = (1.0, 0.25, 0.25)  # of text, audio and vision, as shares of d


def _widths(sizes: dict[str, int]) -> list[int]:
    return [max(1, int(sizes["d"] * share)) for share in _WIDTHS]


def _inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    batch, rank, width = sizes["B"], sizes["r"], sizes["h"]
    return {
        "features": [torch.randn(batch, d, device=device, requires_grad=True) for d in _widths(sizes)],
        "factors": [(torch.randn(rank, d + 1, width, device=device) / d**0.5).requires_grad_() for d in _widths(sizes)],
        "rank_weight": torch.randn(rank, device=device, requires_grad=True),
        "bias": torch.randn(width, device=device, requires_grad=True),
    }


def batched_products(
    features: Sequence[Tensor], factors: Sequence[Tensor], rank_weight: Tensor, bias: Tensor
) -> Tensor:
    """The 1 of [x; 1] is the bias of a batched product; one product with their weights adds up the ranks."""
    mixed = [
        torch.baddbmm(f[:, -1:], x.expand(len(f), -1, -1), f[:, :-1]) for x, f in zip(features, factors, strict=True)
    ]
    return torch.einsum("r,rbh->bh", rank_weight, prod(mixed[1:], start=mixed[0])) + bias


def concatenated_ones(
    features: Sequence[Tensor], factors: Sequence[Tensor], rank_weight: Tensor, bias: Tensor
) -> Tensor:
    """As model collections write it: append the 1, multiply per modality, weight the ranks."""
    one = features[0].new_ones(len(features[0]), 1)
    mixed = [torch.matmul(torch.cat([x, one], 1), f) for x, f in zip(features, factors, strict=True)]
    product = prod(mixed[1:], start=mixed[0])
    return torch.matmul(rank_weight, product.permute(1, 0, 2)) + bias


def _work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """One product per modality forward, two backward; factors and features are read, gradients written once."""
    widths = [d + 1 for d in _widths(sizes)]
    flops = 2.0 * sizes["B"] * sizes["r"] * sizes["h"] * sum(widths)
    bytes_ = 4.0 * sum(widths) * (sizes["r"] * sizes["h"] + sizes["B"])
    return Work(flops, bytes_), Work(3 * flops, 3 * bytes_)


BENCHMARKS = [
    Benchmark(
        name="low_rank_fusion",
        shapes=(
            Shape("B=32 d=128 h=128 r=4", {"B": 32, "d": 128, "h": 128, "r": 4}, quick=True),
            Shape("B=1 d=8 h=8 r=1 (smallest)", {"B": 1, "d": 8, "h": 8, "r": 1}, quick=True),
            Shape("B=64 d=768 h=128 r=4 (text width)", {"B": 64, "d": 768, "h": 128, "r": 4}),
            Shape("B=1024 d=128 h=128 r=16", {"B": 1024, "d": 128, "h": 128, "r": 16}, decisive=True),
        ),
        inputs=_inputs,
        providers=(
            plain("msacore", msacore.low_rank_fusion),
            plain("reference", reference.low_rank_fusion.low_rank_fusion),
            plain("torch, batched products", batched_products),
            plain("torch, as model collections", concatenated_ones),
            compiled("torch.compile of batched products", batched_products),
        ),
        work=_work,
        growth=(
            Growth("B", (256, 512, 1024, 2048), {"d": 128, "h": 128, "r": 4}, slope=1),
            Growth("r", (4, 8, 16, 32), {"B": 512, "d": 128, "h": 128}, slope=1),
        ),
    )
]
