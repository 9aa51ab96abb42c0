"""Formulas of the losses: one anchor at a time, with lists of indices in place of masks."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor


def _unit(row: Tensor) -> Tensor:
    """A row divided by its norm, in the row's dtype; a zero row stays zero and has no gradient."""
    largest = float(row.detach().abs().max()) if len(row) else 0.0
    if largest == 0:
        return row.detach() * 0
    scaled = row / largest
    return scaled / scaled.pow(2).sum().sqrt()


def _flags(mask: Tensor | None, size: int) -> list[bool]:
    return [True] * size if mask is None else mask.tolist()


def _per_anchor(
    a: list[Tensor],
    c: list[Tensor],
    queue: list[Tensor],
    takes_part: Any,
    weights: Tensor,
    temperature: Any,
    denominator: str,
) -> list[Tensor | None]:
    """Loss of every anchor, None where it drops out. `takes_part(i, j)` says which pairs are seen."""
    losses: list[Tensor | None] = []
    numbers = weights.tolist()
    for i, anchor in enumerate(a):
        seen = [j for j in range(len(c)) if takes_part(i, j)]
        positive = [j for j in seen if numbers[i][j] > 0]
        negative = [j for j in seen if numbers[i][j] == 0]
        if not positive or (denominator == "decoupled" and not negative and not queue):
            losses.append(None)
            continue
        s = {j: (anchor * c[j]).sum() / temperature for j in seen}
        beside = [(anchor * row).sum() / temperature for row in queue]
        total = torch.stack([weights[i, j] for j in seen]).sum()
        if denominator == "negatives":
            among = [s[j] for j in negative] + beside
            terms = [
                weights[i, p]
                / torch.stack([weights[i, j] for j in positive]).sum()
                * (torch.stack([s[p], *among]).logsumexp(0) - s[p])
                for p in positive
            ]
            losses.append(torch.stack(terms).sum())
            continue
        over = [s[j] for j in (seen if denominator == "all" else negative)] + beside
        mean = torch.stack([weights[i, j] * s[j] for j in seen]).sum() / total
        losses.append(torch.stack(over).logsumexp(0) - mean)
    return losses


def info_nce(
    anchors: Tensor,
    candidates: Tensor | None = None,
    *,
    temperature: Any = 0.1,
    labels: Any = None,
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
    others = anchors if candidates is None else candidates
    n, m = len(anchors), len(others)
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(())
    rows, columns = _flags(anchor_mask, n), _flags(candidate_mask, m)
    if labels is not None:
        first, second = (labels, labels) if isinstance(labels, Tensor) else labels
        first, second = first.tolist(), second.tolist()
        rows = [keep and label >= 0 for keep, label in zip(rows, first, strict=True)]
        columns = [keep and label >= 0 for keep, label in zip(columns, second, strict=True)]
        weights = torch.tensor([[float(x == y) for y in second] for x in first], dtype=anchors.dtype).reshape(n, m)
    elif weights is None:
        weights = torch.tensor([[float(i == j) for j in range(m)] for i in range(n)], dtype=anchors.dtype).reshape(n, m)

    def prepared(x: Tensor) -> list[Tensor]:
        return [_unit(row) if normalize else row for row in x]

    a, c = prepared(anchors), prepared(others)
    queue = [] if negatives is None else prepared(negatives)
    queue = [row for row, keep in zip(queue, _flags(negative_mask, len(queue)), strict=True) if keep]

    def takes_part(i: int, j: int) -> bool:
        return rows[i] and columns[j] and not (exclude_self and i == j)

    directions = [_per_anchor(a, c, queue, takes_part, weights, temperature, denominator)]
    if symmetric:
        directions.append(_per_anchor(c, a, [], lambda j, i: takes_part(i, j), weights.T, temperature, denominator))
    # A zero that depends on the anchors keeps a graph where no term is left.
    nothing = anchors.sum() * 0
    if reduction == "none":
        each = [[nothing if loss is None else loss for loss in losses] for losses in directions]
        together = [sum(those) / len(each) for those in zip(*each, strict=True)]
        return torch.stack(together) if together else anchors.sum(1)
    results = []
    for losses in directions:
        kept = [loss for loss in losses if loss is not None]
        total = torch.stack([nothing, *kept]).sum()
        results.append(total / max(1, len(kept)) if reduction == "mean" else total)
    return torch.stack(results).mean()


def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = None,
    labels: Tensor | None = None,
    tier_weights: Sequence[float] = (0.2, 0.3, 0.5),
    temperatures: Sequence[Any] = (0.1, 0.1, 0.5),
    tier1: str = "cross_modal",
    normalize: bool = True,
    return_tiers: bool = False,
) -> Any:
    n, modalities = len(fused), len(unimodal)
    there = torch.ones(n, modalities, dtype=torch.bool) if available is None else available
    pairs = list(combinations(range(modalities), 2))
    both = [there[:, m] & there[:, k] for m, k in pairs]
    options = [dict(temperature=t, normalize=normalize) for t in temperatures]
    zero = fused.sum() * 0
    first, second, third = [zero], [zero], [zero]
    for number, (m, k) in enumerate(pairs):
        if tier1 == "cross_modal":
            masks = dict(anchor_mask=both[number], candidate_mask=both[number])
            first.append(info_nce(unimodal[m], unimodal[k], symmetric=True, **masks, **options[0]))
    for m in range(modalities):
        masks = dict(anchor_mask=there[:, m], candidate_mask=there[:, m])
        if tier1 == "intra_modal":
            first.append(info_nce(unimodal[m], labels=labels, exclude_self=True, **masks, **options[0]))
        second.append(info_nce(fused, unimodal[m], symmetric=True, **masks, **options[1]))
    for p, r in combinations(range(len(pairs)), 2):
        masks = dict(anchor_mask=both[p] & both[r], candidate_mask=both[p] & both[r])
        third.append(info_nce(high_level[p], high_level[r], symmetric=True, **masks, **options[2]))
    tiers = torch.stack([torch.stack(terms).sum() for terms in (first, second, third)])
    loss = (tiers * torch.tensor(tier_weights, dtype=tiers.dtype)).sum()
    return (loss, tiers) if return_tiers else loss


def _gap(y: Tensor, i: int, j: int) -> float | int:
    if y.is_floating_point():  # the drawn targets of several columns are multiples of 1/8: any order is exact
        return float((y[i] - y[j]).abs().sum())
    return sum(abs(s - t) for s, t in zip(y[i].tolist(), y[j].tolist(), strict=True))


def _distance(x: Tensor, y: Tensor) -> Tensor:
    difference = x - y
    largest = float(difference.detach().abs().max()) if len(x) else 0.0
    return difference.sum() * 0 if largest == 0 else (difference / largest).pow(2).sum().sqrt() * largest


def rank_n_contrast(
    embeddings: Tensor, targets: Tensor, *, temperature: Any = 2.0, mask: Tensor | None = None
) -> Tensor:
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(())
    y = targets if targets.dim() == 2 else targets[:, None]
    used = [i for i, keep in enumerate(_flags(mask, len(embeddings))) if keep]
    terms = [embeddings.sum() * 0]
    for i in used:
        others = [j for j in used if j != i]
        if not others:
            continue
        s = -torch.stack([_distance(embeddings[i], embeddings[j]) for j in others]) / temperature
        gaps = [_gap(y, i, j) for j in others]
        for at, gap in enumerate(gaps):
            as_far = s[[k for k, other in enumerate(gaps) if other >= gap]]
            # Relative to the largest: beside similarities of 1e36 the logarithm of the number of ties would be lost.
            top = as_far.detach().max()
            terms.append((as_far - top).logsumexp(0) - (s[at] - top))
    return torch.stack(terms).sum() / max(1, len(used) * (len(used) - 1))
