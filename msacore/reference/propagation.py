"""Message propagation over conversations in plain PyTorch."""

from functools import partial

import torch
from torch import Tensor


def window_mean(
    h: Tensor,
    offsets: Tensor,
    *,
    senders: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | tuple[int, int] = (2, 2),
    include_self: bool = True,
) -> Tensor:
    """Add up the neighbours, one distance after another, and divide by the number of senders."""
    utterances = h.shape[0]
    conversation = torch.repeat_interleave(offsets.diff())
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    sides = (window, window) if isinstance(window, int) else window
    # Python's integers, because two positions may be further apart than an int64 can hold.
    places = list(range(utterances)) if positions is None else positions.tolist()
    sends = h.new_ones(h.shape[:2], dtype=torch.bool) if senders is None else senders
    sent = torch.where(sends[..., None], h, 0)
    total, count = torch.zeros_like(h), h.new_zeros(h.shape[:2])
    past, future = (longest if positions is not None or side < 0 else min(side, longest) for side in sides)
    for distance in range(-past, future + 1):
        side = sides[0] if distance < 0 else sides[1]
        target = torch.arange(max(0, -distance), min(utterances, utterances - distance), device=h.device)
        if distance == 0 and not include_self:
            target = target[:0]
        target = target[conversation[target] == conversation[target + distance]]
        apart = [abs(places[i + distance] - places[i]) for i in target.tolist()]
        target = target[torch.tensor([side < 0 or a <= side for a in apart], dtype=torch.bool, device=h.device)]
        total = total.index_add(0, target, sent[target + distance])
        count = count.index_add(0, target, sends[target + distance].to(h.dtype))
    return total / count.clamp(min=1)[..., None]


def modality_mean(h: Tensor, *, senders: Tensor | None = None) -> Tensor:
    """Average, for each modality, over the others of the same utterance."""
    sends = h.new_ones(h.shape[:2], dtype=torch.bool) if senders is None else senders
    sent = torch.where(sends[..., None], h, 0)
    means = []
    for m in range(h.shape[1]):
        others = [n for n in range(h.shape[1]) if n != m]
        means.append(sent[:, others].sum(1) / sends[:, others].sum(1).clamp(min=1).to(h.dtype)[:, None])
    return torch.stack(means, 1) if means else h.clone()


def propagate(
    x: Tensor,
    offsets: Tensor,
    *,
    available: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | tuple[int, int] = (2, 2),
    include_self: bool = True,
    steps: int = 4,
    alpha: float = 0.1,
    send: str = "after_fill",
) -> Tensor:
    """Alternate the two half-steps; each mixes in ``alpha · x``, which is not read for α = 0."""
    kept = alpha * x if alpha else torch.zeros_like(x)
    intra_mean = partial(window_mean, positions=positions, window=window, include_self=include_self)
    h = x.clone()
    for step in range(steps):
        intra_senders = available if send == "never" or step == 0 else None
        inter_senders = available if send == "never" else None
        u = (1 - alpha) * intra_mean(h, offsets, senders=intra_senders) + kept
        h = (1 - alpha) * modality_mean(u, senders=inter_senders) + kept
    return h
