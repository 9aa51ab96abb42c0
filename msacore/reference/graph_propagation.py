"""Message propagation in plain PyTorch."""

import torch
from torch import Tensor


def graph_propagate(
    x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None = None, *, steps: int = 1, alpha: float = 0.0
) -> Tensor:
    """Gather along the edges, scale, and add up per target node."""
    target = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), rowptr.diff())
    h = x
    for _ in range(steps):
        messages = h[col] if weight is None else weight[:, None] * h[col]
        h = (1 - alpha) * torch.zeros_like(h).index_add(0, target, messages) + alpha * x
    return h.clone() if steps == 0 else h
