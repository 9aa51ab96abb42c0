"""Message propagation in plain PyTorch."""

import torch
from torch import Tensor

Csr = tuple[Tensor, Tensor, Tensor | None]


def _received(h: Tensor, graph: Csr) -> Tensor:
    """Gather along the edges, scale, and add up per target node."""
    rowptr, col, weight = graph
    target = torch.repeat_interleave(torch.arange(len(rowptr) - 1, device=h.device), rowptr.diff())
    messages = h[col]
    if weight is not None:
        messages = messages * weight.reshape(*weight.shape, *[1] * (h.dim() - weight.dim()))
    return h.new_zeros((len(rowptr) - 1, *h.shape[1:])).index_add(0, target, messages)


def _half_step(h: Tensor, graph: Csr, x: Tensor, alpha: float) -> Tensor:
    received = (1 - alpha) * _received(h, graph)
    return received + alpha * x if alpha else received


def graph_propagate(
    x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None = None, *, steps: int = 1, alpha: float = 0.0
) -> Tensor:
    """Repeat the half-step over one graph."""
    h = x.clone()
    for _ in range(steps):
        h = _half_step(h, (rowptr, col, weight), x, alpha)
    return h


def alternating_graph_propagate(
    x: Tensor, intra: Csr, inter: Csr, *, first_intra: Csr | None = None, steps: int = 4, alpha: float = 0.1
) -> Tensor:
    """Repeat the half-steps over two graphs in turn."""
    h = x.clone()
    for step in range(steps):
        h = _half_step(h, first_intra if first_intra and step == 0 else intra, x, alpha)
        h = _half_step(h, inter, x, alpha)
    return h
