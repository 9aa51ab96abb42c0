"""Message propagation over conversations in plain PyTorch."""

import torch
from torch import Tensor


def window_mean(
    h: Tensor, offsets: Tensor, *, senders: Tensor | None = None, window: tuple[int, int] = (2, 2)
) -> Tensor:
    """Add up the neighbours one relative position after the other, and divide by how many sent."""
    utterances = h.shape[0]
    conversation = torch.repeat_interleave(offsets.diff())
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    past, future = (min(side, longest) if side >= 0 else longest for side in window)
    sends = h.new_ones(h.shape[:2], dtype=torch.bool) if senders is None else senders
    sent = torch.where(sends[..., None], h, 0)
    total, count = torch.zeros_like(h), h.new_zeros(h.shape[:2])
    for position in range(-past, future + 1):
        target = torch.arange(max(0, -position), min(utterances, utterances - position), device=h.device)
        target = target[conversation[target] == conversation[target + position]]
        total = total.index_add(0, target, sent[target + position])
        count = count.index_add(0, target, sends[target + position].to(h.dtype))
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
    window: tuple[int, int] = (2, 2),
    steps: int = 4,
    alpha: float = 0.1,
    send: str = "after_fill",
) -> Tensor:
    """Alternate the two half-steps; each mixes in ``alpha · x``, which α = 0 leaves unread."""
    kept = alpha * x if alpha else torch.zeros_like(x)
    h = x.clone()
    for step in range(steps):
        intra_senders = available if send == "never" or step == 0 else None
        inter_senders = available if send == "never" else None
        u = (1 - alpha) * window_mean(h, offsets, senders=intra_senders, window=window) + kept
        h = (1 - alpha) * modality_mean(u, senders=inter_senders) + kept
    return h
