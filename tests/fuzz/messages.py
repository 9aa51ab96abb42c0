"""Formulas of fusion and propagation: whole matrices, built entry by entry."""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "identity": lambda x: x,
}


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
    act = _ACTIVATIONS[activation]
    x = [f[:, None] if f.dim() == 2 else f for f in features]
    batch, length, _ = x[0].shape
    pairs = list(combinations(range(len(x)), 2))
    fused, means = [], []
    for b in range(batch):
        tokens = [t for t in range(length) if mask is None or bool(mask[b, t])]
        there = [available is None or bool(available[b, m]) for m in range(len(x))]
        relations = []
        for m, n in pairs:
            gram = row_weight.new_zeros(row_weight.shape[1], row_weight.shape[1])
            for t in tokens:
                z = [x[k][b, t] if there[k] else x[k][b, t].detach() * 0 for k in (m, n)]
                if augment:
                    z = [torch.cat([v, v.new_ones(1)]) for v in z]
                gram = gram + torch.outer(z[0], z[1])
            chi = 1.0 if augment else float(there[m] and there[n])
            relations.append(chi * act(row_weight @ gram / max(1, len(tokens)) + row_bias[:, None]))
        means.append(torch.stack([r.mean(1) for r in relations]))
        mixed = [
            act(sum((w * r for w, r in zip(weights, relations, strict=True)), torch.zeros_like(relations[0])) + bias)
            for weights, bias in zip(pair_weight, pair_bias, strict=True)
        ]
        fused.append(torch.stack([s.mean(1) for s in mixed]))
    channels, rows = len(pair_bias), len(row_bias)
    if not batch:
        return row_weight.new_zeros(0, channels, rows), row_weight.new_zeros(0, len(pairs), rows)
    return torch.stack(fused), torch.stack(means)


def low_rank_fusion(
    features: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weight: Tensor,
    bias: Tensor,
    *,
    available: Tensor | None = None,
) -> Tensor:
    rows = []
    for b in range(len(features[0])):
        total = bias * 1
        for r in range(len(rank_weight)):
            product = rank_weight[r] * torch.ones_like(bias)
            for m, (x, factor) in enumerate(zip(features, factors, strict=True)):
                there = available is None or bool(available[b, m])
                one = factor[r, -1] + (x[b] @ factor[r, :-1] if there else 0)
                product = product * one
            total = total + product
        rows.append(total)
    return torch.stack(rows) if rows else bias.new_zeros(0, len(bias))


def sides(window: Any) -> tuple[int, int]:
    return (window, window) if isinstance(window, int) else tuple(window)  # type: ignore[return-value]


def neighbours(
    offsets: Tensor, positions: Tensor | None, window: Any, include_self: bool, utterances: int
) -> list[list[int]]:
    """For each utterance i, the utterances that it hears within its modality."""
    past, future = sides(window)
    p = list(range(utterances)) if positions is None else positions.tolist()
    bounds = offsets.tolist()
    found: list[list[int]] = [[] for _ in range(utterances)]
    for begin, end in pairwise(bounds):
        for i in range(begin, end):
            for j in range(begin, end):
                step = p[j] - p[i]
                reached = (step >= 0 or past < 0 or -step <= past) and (step <= 0 or future < 0 or step <= future)
                if reached and (include_self or i != j):
                    found[i].append(j)
    return found


def _mean_matrix(sources: list[list[int]], sends: list[bool], like: Tensor) -> Tensor:
    matrix = like.new_zeros(len(sources), len(sends))
    for i, those in enumerate(sources):
        heard = [j for j in those if sends[j]]
        for j in heard:
            matrix[i, j] = 1 / len(heard)
    return matrix


def intra(h: Tensor, senders: Tensor | None, heard: list[list[int]]) -> Tensor:
    n, modalities, _ = h.shape
    sends = [True] * (n * modalities) if senders is None else senders.flatten().tolist()
    sources = [[j * modalities + m for j in heard[i]] for i in range(n) for m in range(modalities)]
    return _mean_matrix(sources, sends, h)


def inter(h: Tensor, senders: Tensor | None) -> Tensor:
    n, modalities, _ = h.shape
    sends = [True] * (n * modalities) if senders is None else senders.flatten().tolist()
    sources = [[i * modalities + k for k in range(modalities) if k != m] for i in range(n) for m in range(modalities)]
    return _mean_matrix(sources, sends, h)


def propagate(
    x: Tensor,
    offsets: Tensor,
    *,
    available: Tensor | None = None,
    positions: Tensor | None = None,
    window: Any = (2, 2),
    include_self: bool = True,
    steps: int = 4,
    alpha: float = 0.1,
    send: str = "after_fill",
) -> Tensor:
    heard = neighbours(offsets, positions, window, include_self, len(x))
    flat = x.flatten(0, 1)
    h = flat * 1
    for step in range(steps):
        gated = send == "never" or step == 0
        u = (1 - alpha) * (intra(x, available if gated else None, heard) @ h) + alpha * flat
        h = (1 - alpha) * (inter(x, available if send == "never" else None) @ u) + alpha * flat
    return h.reshape(x.shape)


def window_mean(
    h: Tensor,
    offsets: Tensor,
    *,
    senders: Tensor | None = None,
    positions: Tensor | None = None,
    window: Any = (2, 2),
    include_self: bool = True,
) -> Tensor:
    matrix = intra(h, senders, neighbours(offsets, positions, window, include_self, len(h)))
    return (matrix @ h.flatten(0, 1)).reshape(h.shape)


def modality_mean(h: Tensor, *, senders: Tensor | None = None) -> Tensor:
    return (inter(h, senders) @ h.flatten(0, 1)).reshape(h.shape)


def _step(x: Tensor, rowptr: list[int], col: list[int], weight: Tensor | None) -> Tensor:
    """A x for x `[n, H, d]` and weight `[E, H]`."""
    rows = []
    for begin, end in pairwise(rowptr):
        total = x.new_zeros(x.shape[1:])
        for e in range(begin, end):
            total = total + (x[col[e]] if weight is None else weight[e][:, None] * x[col[e]])
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, *x.shape[1:])


def graph_propagate(
    x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None = None, *, steps: int = 1, alpha: float = 0.0
) -> Tensor:
    heads = x[:, None] if x.dim() == 2 else x
    if weight is not None and weight.dim() == 1:
        weight = weight[:, None].expand(-1, heads.shape[1])
    h = heads * 1
    for _ in range(steps):
        h = (1 - alpha) * _step(h, rowptr.tolist(), col.tolist(), weight)
        if alpha:
            h = h + alpha * heads
    return h[:, 0] if x.dim() == 2 else h


def alternating_graph_propagate(
    x: Tensor,
    intra: tuple[Tensor, Tensor, Tensor],
    inter: tuple[Tensor, Tensor, Tensor],
    *,
    first_intra: tuple[Tensor, Tensor, Tensor] | None = None,
    steps: int = 4,
    alpha: float = 0.1,
) -> Tensor:
    h = x * 1
    for step in range(steps):
        for graph in (first_intra if first_intra is not None and step == 0 else intra, inter):
            h = (1 - alpha) * graph_propagate(h, *graph) + alpha * x
    return h
