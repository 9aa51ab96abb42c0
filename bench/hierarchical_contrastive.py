"""The nine terms of the hierarchical loss in one call against nine two-sided losses in torch."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import msacore
from bench.harness import Benchmark, Growth, Inputs, Shape, Work
from bench.peers import compiled, plain
from msacore import reference

_TIER_WEIGHTS, _TEMPERATURES, _TERMS = (0.2, 0.3, 0.5), (0.1, 0.1, 0.5), 9


def _inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    def embedding() -> Tensor:
        return torch.randn(sizes["N"], sizes["d"], device=device, requires_grad=True)

    return {
        "unimodal": [embedding() for _ in range(3)],
        "fused": embedding(),
        "high_level": [embedding() for _ in range(3)],
    }


def nine_terms(unimodal: Sequence[Tensor], fused: Tensor, high_level: Sequence[Tensor]) -> Tensor:
    """Every embedding normalised once; one matrix of scores per term, read in both directions."""
    unit = [normalize(x, dim=1) for x in unimodal]
    high = [normalize(x, dim=1) for x in high_level]
    hub = normalize(fused, dim=1)
    tiers = [list(combinations(unit, 2)), [(hub, x) for x in unit], list(combinations(high, 2))]
    target = torch.arange(len(fused), device=fused.device)
    loss = fused.new_zeros(())
    for pairs, weight, temperature in zip(tiers, _TIER_WEIGHTS, _TEMPERATURES, strict=True):
        for a, b in pairs:
            scores = a @ b.T / temperature
            loss = loss + weight / 2 * (cross_entropy(scores, target) + cross_entropy(scores.T, target))
    return loss


def _work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """Per term 2N²d forward; backward computes the scores again and both gradients. There are seven embeddings."""
    n, d = sizes["N"], sizes["d"]
    flops, bytes_ = 2.0 * _TERMS * n * n * d, 7 * 4.0 * n * d
    return Work(flops, bytes_), Work(4 * flops, 3 * bytes_)


BENCHMARKS = [
    Benchmark(
        name="hierarchical_contrastive_loss",
        shapes=(
            Shape("N=64 d=128 (one batch)", {"N": 64, "d": 128}, quick=True),
            Shape("N=8 d=16 (smallest)", {"N": 8, "d": 16}, quick=True),
            Shape("N=128 d=128", {"N": 128, "d": 128}),
            Shape("N=2048 d=128", {"N": 2048, "d": 128}, decisive=True),
        ),
        inputs=_inputs,
        providers=(
            plain("msacore", msacore.hierarchical_contrastive_loss),
            plain("reference", reference.hierarchical_contrastive.hierarchical_contrastive_loss),
            plain("torch, nine terms", nine_terms),
            compiled("torch.compile of it", nine_terms),
        ),
        work=_work,
        growth=(Growth("N", (256, 512, 1024, 2048), {"d": 128}, slope=2),),
    )
]
