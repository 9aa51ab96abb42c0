"""Rank-N-Contrast in plain PyTorch."""

import torch
from torch import Tensor


def rank_n_contrast(
    embeddings: Tensor, targets: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """One anchor after another; the others that are at least as far in label form the denominator of each."""
    if mask is not None:
        embeddings, targets = embeddings[mask], targets[mask]
    if embeddings.dtype.itemsize == 2:
        embeddings = embeddings.float()
    n = embeddings.shape[0]
    loss = embeddings[:0].sum()
    if n < 2:
        return loss
    for i in range(n):
        others = torch.arange(n, device=embeddings.device) != i
        similarity = -torch.linalg.vector_norm(embeddings[others] - embeddings[i], dim=1) / temperature
        gap = (targets[others] - targets[i]).abs()
        as_far = gap[None, :] >= gap[:, None]
        denominator = torch.where(as_far, similarity[None, :], -torch.inf).logsumexp(1)
        loss = loss + (denominator - similarity).sum()
    return loss / (n * (n - 1))
