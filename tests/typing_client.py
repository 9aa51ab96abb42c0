"""What a type checker says to a user of msacore: `tests/test_typing.py` runs mypy --strict and pyright on this file.

Nothing here is called. A line that must be an error carries a comment that expects it, and an expectation that is not
met is itself an error.
"""

import torch
from torch import Tensor

import msacore
from msacore.selection import Selection


def losses_are_tensors(unimodal: list[Tensor], fused: Tensor, pairs: list[Tensor], wanted: bool) -> Tensor:
    loss = msacore.info_nce(fused, labels=torch.arange(4), exclude_self=True)
    loss = msacore.hierarchical_contrastive_loss(unimodal, fused, pairs) + loss
    total, tiers = msacore.hierarchical_contrastive_loss(unimodal, fused, pairs, return_tiers=True)
    either = msacore.hierarchical_contrastive_loss(unimodal, fused, pairs, return_tiers=wanted)
    if isinstance(either, Tensor):
        loss = loss + either
    return loss + total + tiers.sum() + msacore.rank_n_contrast(fused, torch.arange(4), temperature=fused.sum())


def operators_are_typed(x: Tensor, offsets: Tensor) -> Tensor:
    rowptr, col, weight = msacore.graph.window_edges(offsets, 3, window=2)
    h = msacore.propagate(x, offsets, window=(1, -1)) + msacore.window_mean(x, offsets, window=2)
    return msacore.graph_propagate(h.flatten(0, 1), rowptr, col, weight, steps=2, alpha=0.1)


def selections_are_typed(pool: Tensor) -> Selection:
    chosen = msacore.select(pool, 4, strategy="kcenter", labeled=[0, 1])
    indices: Tensor = chosen.indices
    radius: float = chosen.radius
    return msacore.select(pool, int(indices.numel() + radius), state=chosen.state)


def modules_are_typed(features: list[Tensor]) -> Tensor:
    fusion = msacore.nn.MatrixFusion(in_features=8, rows=4)
    low_rank = msacore.nn.LowRankFusion(in_features=(8, 8), out_features=5)
    fused, pairs = fusion.forward(features)
    return low_rank.forward(features).sum() + fused.sum() + pairs.sum()


def mistakes_are_errors(x: Tensor) -> None:
    msacore.info_nse(x)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    msacore.info_nce(x, temprature=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    msacore.info_nce(x, x, 0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    msacore.propagate(x, x, window="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    msacore.propagate(x, x, send="always")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    msacore.select(x, 4, strategy="k-center")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    msacore.select(x, 4, backend="cuda")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    msacore.nn.MatrixFusion(8, 4, activation="tanh")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    msacore.nn.AlternatingPropagation(8, 4, "gru")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    msacore.nn.InfoNCE(reduction="max")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    msacore.select(x, "ten")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pair: tuple[Tensor, Tensor] = msacore.low_rank_fusion([x], [x], x, x)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(pair)
