"""InfoNCE in plain PyTorch: the whole similarity matrix, and masks over it."""

import torch
from torch import Tensor


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their norm; a zero row stays zero, with a zero gradient."""
    zero = (x == 0).all(-1, keepdim=True)
    return x / torch.where(zero, 1, x).norm(dim=-1, keepdim=True)


def _direction(logits: Tensor, allowed: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Losses per anchor of one direction (zero where dropped), and how many anchors count."""
    positives = torch.where(allowed, positives, 0)
    total = positives.sum(-1)
    kept = total != 0
    log_sum_exp = torch.where(allowed, logits, -torch.inf)[kept].logsumexp(-1)
    attraction = (positives * torch.where(allowed, logits, 0))[kept].sum(-1) / total[kept]
    losses = logits.new_zeros(len(logits)).masked_scatter(kept, log_sum_exp - attraction)
    return losses, kept.sum()


def info_nce(
    anchors: Tensor,
    candidates: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    labels: tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    anchor_mask: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    symmetric: bool = False,
    exclude_self: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Log-sum-exp over the allowed candidates minus the (weighted) mean over the positives, per anchor."""
    candidates = anchors if candidates is None else candidates
    wide = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    if anchors.dtype in (torch.float16, torch.bfloat16):
        anchors, candidates = anchors.to(wide), candidates.to(wide)
        weights = None if weights is None else weights.to(wide)
    n, m = len(anchors), len(candidates)
    rows = torch.ones(n, dtype=torch.bool, device=anchors.device) if anchor_mask is None else anchor_mask
    columns = torch.ones(m, dtype=torch.bool, device=anchors.device) if candidate_mask is None else candidate_mask
    if labels is not None:
        rows, columns = rows & (labels[0] >= 0), columns & (labels[1] >= 0)
        positives = (labels[0][:, None] == labels[1][None, :]).to(wide)
    elif weights is not None:
        positives = weights
    else:
        positives = torch.eye(n, dtype=wide, device=anchors.device)
    allowed = rows[:, None] & columns[None, :]
    if exclude_self:
        allowed = allowed & ~torch.eye(n, m, dtype=torch.bool, device=anchors.device)
    # Selection before any arithmetic: hidden rows may hold NaN.
    a = unit_rows(torch.where(rows[:, None], anchors, 0))
    c = unit_rows(torch.where(columns[:, None], candidates, 0))
    similarity = a @ c.T
    logits = similarity / (temperature.to(wide) if isinstance(temperature, Tensor) else temperature)
    forward, count = _direction(logits, allowed, positives)
    results = [(forward, count)]
    if symmetric:
        results.append(_direction(logits.T, allowed.T, positives.T))
    if reduction == "none":
        return torch.stack([loss for loss, _ in results]).mean(0)
    scale = [count.clamp(min=1) if reduction == "mean" else 1 for _, count in results]
    return torch.stack([loss.sum() / s for (loss, _), s in zip(results, scale, strict=True)]).mean()
