"""Rank-N-Contrast in plain PyTorch."""

import torch
from torch import Tensor


def _gap(targets: Tensor, i: int) -> Tensor:
    """|y_j - y_i|; for several labels their sum in the accumulation type, rounded to the dtype of the targets."""
    gap = (targets - targets[i]).abs()
    if gap.dim() == 1:
        return gap
    if gap.shape[1] == 0:
        return gap.new_zeros(gap.shape[0])
    columns = (gap.float() if gap.dtype.itemsize == 2 else gap).unbind(1)
    total = columns[0]
    for column in columns[1:]:
        total = total + column
    return total.to(gap.dtype)


def rank_n_contrast(
    embeddings: Tensor, targets: Tensor, *, temperature: float | Tensor = 2.0, mask: Tensor | None = None
) -> Tensor:
    """One anchor after another; a pair's denominator runs over the others whose labels are at least as far away."""
    if not targets.is_floating_point():
        targets = targets.long()
    if mask is not None:
        embeddings, targets = embeddings[mask], targets[mask]
    if embeddings.dtype.itemsize == 2:
        embeddings = embeddings.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(()).to(embeddings.dtype)
    n = embeddings.shape[0]
    loss = embeddings[:0].sum() + 0 * torch.as_tensor(temperature, dtype=embeddings.dtype, device=embeddings.device)
    if n < 2:
        return loss
    for i in range(n):
        others = torch.arange(n, device=embeddings.device) != i
        similarity = -torch.linalg.vector_norm(embeddings[others] - embeddings[i], dim=1) / temperature
        gap = _gap(targets, i)[others]
        as_far = gap[None, :] >= gap[:, None]
        denominator = torch.where(as_far, similarity[None, :], -torch.inf).logsumexp(1)
        loss = loss + (denominator - similarity).sum()
    return loss / (n * (n - 1))
