"""Matrix-based fusion in plain PyTorch, with every k'×k' Gram matrix written out."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor


def matrix_fusion(
    features: Sequence[Tensor],
    row_weight: Tensor,
    row_bias: Tensor,
    pair_weight: Tensor,
    pair_bias: Tensor,
    *,
    mask: Tensor | None = None,
    available: Tensor | None = None,
    augment: bool = True,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """A Gram matrix per pair, mixed by rows, then by pairs; hidden features are replaced by zeros before any use."""
    act = {
        "relu": torch.relu,
        "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "identity": lambda x: x,
    }[activation]
    aligned = [x[:, None] if x.dim() == 2 else x for x in features]
    batch, length, _ = aligned[0].shape
    device = aligned[0].device
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    if available is None:
        available = torch.ones(batch, len(aligned), dtype=torch.bool, device=device)
    one = mask[..., None].to(aligned[0].dtype)
    z = []
    for m, x in enumerate(aligned):
        seen = torch.where((mask & available[:, m, None])[..., None], x, 0)
        z.append(torch.cat([seen, one], -1) if augment else seen)

    size = mask.sum(1).clamp(min=1).to(one.dtype)[:, None, None]
    rows = []
    for m, n in combinations(range(len(z)), 2):
        gram = z[m].transpose(1, 2) @ z[n] / size
        row = act(row_weight @ gram + row_bias[:, None])
        if not augment:
            row = torch.where((available[:, m] & available[:, n])[:, None, None], row, 0)
        rows.append(row)
    stacked = torch.stack(rows, 1)
    mixed = act(torch.einsum("cp,bpij->bcij", pair_weight, stacked) + pair_bias[:, None, None])
    return mixed.mean(-1), stacked.mean(-1)
