"""The hierarchical contrastive loss in plain PyTorch: its terms one by one."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from msacore.reference.info_nce import info_nce


def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = None,
    labels: Tensor | None = None,
    tier_weights: Sequence[float] = (0.2, 0.3, 0.5),
    temperatures: Sequence[float | Tensor] = (0.1, 0.1, 0.5),
    tier1: str = "cross_modal",
    normalize: bool = True,
    return_tiers: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum of InfoNCE terms over modality pairs, modalities and pairs of pairs."""
    n, modalities = len(fused), len(unimodal)
    if available is None:
        available = torch.ones(n, modalities, dtype=torch.bool, device=fused.device)
    pairs = list(combinations(range(modalities), 2))
    exists = [available[:, m] & available[:, k] for m, k in pairs]

    def symmetric(a: Tensor, c: Tensor, mask: Tensor, temperature: float | Tensor) -> Tensor:
        masks: dict[str, Any] = dict(anchor_mask=mask, candidate_mask=mask)
        return info_nce(a, c, temperature=temperature, symmetric=True, normalize=normalize, **masks)

    def supervised(x: Tensor, mask: Tensor) -> Tensor:
        assert labels is not None
        options: dict[str, Any] = dict(temperature=temperatures[0], normalize=normalize, exclude_self=True)
        return info_nce(x, labels=labels, anchor_mask=mask, candidate_mask=mask, **options)

    if tier1 == "intra_modal":
        first = [supervised(unimodal[m], available[:, m]) for m in range(modalities)]
    else:
        first = [
            symmetric(unimodal[m], unimodal[k], mask, temperatures[0])
            for (m, k), mask in zip(pairs, exists, strict=True)
        ]
    second = [symmetric(fused, unimodal[m], available[:, m], temperatures[1]) for m in range(modalities)]
    third = [
        symmetric(high_level[p], high_level[q], exists[p] & exists[q], temperatures[2])
        for p, q in combinations(range(len(pairs)), 2)
    ]
    zero = second[0].new_zeros(())
    tiers = torch.stack([torch.stack([zero, *terms]).sum() for terms in (first, second, third)])
    loss = (tiers * tiers.new_tensor(tier_weights)).sum()
    return (loss, tiers) if return_tiers else loss
