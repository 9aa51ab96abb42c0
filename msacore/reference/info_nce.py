"""InfoNCE in plain PyTorch: the whole similarity matrix, and masks over it."""

import torch
from torch import Tensor


def unit_rows(x: Tensor) -> Tensor:
    """Rows divided by their norm, computed from numbers near 1; a zero row stays zero, with a zero gradient."""
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(len(x), 1)
    zero = largest == 0
    # A power of two as the product of two, because the power itself may be out of range.
    half = torch.where(zero | ~largest.isfinite(), 1, largest).frexp().exponent.neg().double() / 2
    scaled = x * half.floor().exp2().to(x) * half.ceil().exp2().to(x)
    return scaled / torch.where(zero, 1, scaled).norm(dim=-1, keepdim=True)


def _direction(logits: Tensor, allowed: Tensor, positives: Tensor, denominator: str) -> tuple[Tensor, Tensor]:
    """Losses per anchor of one direction (zero where dropped), and how many anchors count."""
    n, m = logits.shape
    beside = positives.new_zeros(n, m - positives.shape[1])  # the queue: negatives only
    positives = torch.where(allowed, torch.cat([positives, beside], 1), 0)
    is_negative = allowed & (positives == 0)
    total = positives.sum(-1)
    kept = total != 0
    if denominator == "decoupled":
        kept = kept & is_negative.any(-1)
    shown = torch.where(allowed, logits, 0)[kept]
    positives, total, allowed, is_negative = positives[kept], total[kept], allowed[kept], is_negative[kept]
    if denominator == "negatives":
        some = is_negative.any(-1, keepdim=True)
        among = torch.where(some, torch.where(is_negative, shown, -torch.inf), 0).logsumexp(-1, keepdim=True)
        pairs = torch.where(is_negative | ~allowed | ~some, 0, torch.logaddexp(shown, among) - shown)
        # A weight of exactly 0 has no pair and, by contract, no gradient.
        weighted = torch.where(positives == 0, 0, positives)
        each = (weighted * pairs).sum(-1) / weighted.sum(-1)
    else:
        among = allowed if denominator == "all" else is_negative
        log_sum_exp = torch.where(among, shown, -torch.inf).logsumexp(-1)
        each = log_sum_exp - (positives * shown).sum(-1) / total
    return logits.new_zeros(n).masked_scatter(kept, each), kept.sum()


def info_nce(
    anchors: Tensor,
    candidates: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_mask: Tensor | None = None,
    denominator: str = "all",
    normalize: bool = True,
    anchor_mask: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    symmetric: bool = False,
    exclude_self: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Log-sum-exp over the denominator minus the (weighted) mean over the positives, per anchor."""
    candidates = anchors if candidates is None else candidates
    negatives = anchors.new_zeros(0, anchors.shape[1]) if negatives is None else negatives
    wide = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    anchors, candidates, negatives = anchors.to(wide), candidates.to(wide), negatives.to(wide)
    n, m, q = len(anchors), len(candidates), len(negatives)

    def used(mask: Tensor | None, size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bool, device=anchors.device) if mask is None else mask

    rows, columns, queue = used(anchor_mask, n), used(candidate_mask, m), used(negative_mask, q)
    if labels is not None:
        of_rows, of_columns = (labels, labels) if isinstance(labels, Tensor) else labels
        rows, columns = rows & (of_rows >= 0), columns & (of_columns >= 0)
        positives = (of_rows[:, None] == of_columns[None, :]).to(wide)
    elif weights is not None:
        positives = weights.to(wide)
    else:
        positives = torch.eye(n, dtype=wide, device=anchors.device)
    allowed = rows[:, None] & columns[None, :]
    if exclude_self:
        allowed = allowed & ~torch.eye(n, m, dtype=torch.bool, device=anchors.device)
    # Selection before any arithmetic: hidden rows may hold NaN.
    a, c, b = (
        torch.where(part[:, None], x, 0) for part, x in ((rows, anchors), (columns, candidates), (queue, negatives))
    )
    if normalize:
        a, c, b = unit_rows(a), unit_rows(c), unit_rows(b)
    divisor = temperature.to(wide).reshape(()) if isinstance(temperature, Tensor) else temperature
    logits, beside = a @ c.T / divisor, a @ b.T / divisor
    everything = torch.cat([allowed, rows[:, None] & queue[None, :]], 1)
    results = [_direction(torch.cat([logits, beside], 1), everything, positives, denominator)]
    if symmetric:
        results.append(_direction(logits.T, allowed.T, positives.T, denominator))
    if reduction == "none":
        return torch.stack([loss for loss, _ in results]).mean(0)
    scale = [count.clamp(min=1) if reduction == "mean" else 1 for _, count in results]
    return torch.stack([loss.sum() / s for (loss, _), s in zip(results, scale, strict=True)]).mean()
