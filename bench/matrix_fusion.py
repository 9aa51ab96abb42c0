"""Matrix fusion against the form that stores every k × k matrix and against its factored form in torch."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

import msacore
from bench.harness import Benchmark, Growth, Inputs, Shape, Work
from bench.peers import at_most, compiled, plain
from msacore import reference

_FLOAT = 4  # bytes


def _inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    k, q = sizes["k"], sizes["q"]

    def parameter(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).requires_grad_()

    return {
        "features": [torch.randn(sizes["B"], sizes["L"], k, device=device, requires_grad=True) for _ in range(3)],
        "row_weight": parameter(q, k + 1),
        "row_bias": parameter(q),
        "pair_weight": parameter(3, 3),
        "pair_bias": parameter(3),
        "mask": torch.arange(sizes["L"], device=device)
        < torch.randint(1, sizes["L"] + 1, (sizes["B"], 1), device=device),
        "available": torch.rand(sizes["B"], 3, device=device) < 0.8,
    }


def factored(
    features: Sequence[Tensor],
    row_weight: Tensor,
    row_bias: Tensor,
    pair_weight: Tensor,
    pair_bias: Tensor,
    mask: Tensor,
    available: Tensor,
) -> tuple[Tensor, Tensor]:
    """(W zᵀ) z instead of W (zᵀ z): the product with the row weight first, once per modality."""
    one = mask[..., None].to(row_weight.dtype)
    z = [torch.cat([x * (one * available[:, m, None, None]), one], -1) for m, x in enumerate(features)]
    scale = 1 / mask.sum(1).clamp(min=1)[:, None, None].to(row_weight.dtype)
    left = [torch.nn.functional.linear(x, row_weight).transpose(1, 2) * scale for x in z[:-1]]
    pairs = combinations(range(len(z)), 2)
    rows = [torch.relu(torch.baddbmm(row_bias[None, :, None], left[m], z[n])) for m, n in pairs]
    stacked = torch.stack(rows, 1)
    batch, count, q, width = stacked.shape
    mixed = torch.matmul(pair_weight, stacked.view(batch, count, q * width)) + pair_bias[:, None]
    return torch.relu(mixed).view(batch, -1, q, width).mean(-1), stacked.mean(-1)


def _work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """Two left factors, three products q × L × k; twice as much again backward. Reads features, writes gradients."""
    b, length, k, q = (sizes[name] for name in ("B", "L", "k", "q"))
    flops = 2.0 * b * length * (k + 1) * q * 5
    features = _FLOAT * 3.0 * b * length * k
    return Work(flops, features), Work(3 * flops, 3 * features)


def _gram_bytes(inputs: Inputs) -> float:
    batch, _, k = inputs["features"][0].shape
    return 3 * 2.0 * batch * k * k * _FLOAT


BENCHMARKS = [
    Benchmark(
        name="matrix_fusion",
        shapes=(
            Shape("B=32 L=50 k=64 q=32 (MOSI batch)", {"B": 32, "L": 50, "k": 64, "q": 32}, quick=True),
            Shape("B=64 L=1 k=128 q=64 (pooled)", {"B": 64, "L": 1, "k": 128, "q": 64}, quick=True),
            Shape("B=2 L=1 k=8 q=4 (smallest)", {"B": 2, "L": 1, "k": 8, "q": 4}, quick=True),
            Shape("B=64 L=50 k=128 q=64", {"B": 64, "L": 50, "k": 128, "q": 64}),
            Shape("B=64 L=50 k=512 q=64", {"B": 64, "L": 50, "k": 512, "q": 64}, decisive=True),
            Shape("B=64 L=50 k=768 q=64 (published width)", {"B": 64, "L": 50, "k": 768, "q": 64}),
            Shape("B=256 L=50 k=768 q=64", {"B": 256, "L": 50, "k": 768, "q": 64}, large=True),
        ),
        inputs=_inputs,
        providers=(
            plain("msacore", msacore.matrix_fusion),
            plain("reference (stores k × k)", reference.matrix_fusion.matrix_fusion, at_most(_gram_bytes)),
            plain("torch, factored", factored),
            compiled("torch.compile of it", factored),
        ),
        work=_work,
        growth=(
            Growth("k", (128, 256, 512, 1024), {"B": 16, "L": 50, "q": 64}, slope=1),
            Growth("L", (32, 64, 128, 256), {"B": 16, "k": 256, "q": 64}, slope=1),
            Growth("B", (16, 32, 64, 128), {"L": 50, "k": 128, "q": 64}, slope=1),
        ),
    )
]
