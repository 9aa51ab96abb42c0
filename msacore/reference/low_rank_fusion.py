"""Low-rank fusion in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def low_rank_fusion(
    features: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weight: Tensor,
    bias: Tensor,
    *,
    available: Tensor | None = None,
) -> Tensor:
    """Project every modality once per rank, multiply over modalities, add up over ranks."""
    product = torch.ones((), dtype=bias.dtype, device=bias.device)
    for m, (x, factor) in enumerate(zip(features, factors, strict=True)):
        if available is not None:
            x = torch.where(available[:, m, None], x, 0)
        with_one = torch.cat([x, x.new_ones(x.shape[0], 1)], 1)
        product = product * torch.einsum("bd,rdh->rbh", with_one, factor)
    return torch.einsum("r,rbh->bh", rank_weight, product) + bias
