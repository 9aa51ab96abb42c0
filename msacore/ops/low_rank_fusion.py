"""Low-rank fusion of modalities."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from msacore.ops._autograd import differentiable, refuse_second_derivative, will_differentiate
from msacore.ops._check import (
    as_optional_tensor,
    as_tensor,
    as_tensors,
    cast_under_autocast,
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    fail,
)

_low_rank_fusion = torch.ops.msacore.low_rank_fusion.default
_low_rank_fusion_backward = torch.ops.msacore.low_rank_fusion_backward.default


def _projections_shape(
    modalities: int, features: Sequence[Tensor], rank_weight: Tensor, bias: Tensor
) -> tuple[int | torch.SymInt, ...]:
    """Rows are padded to whole vectors: ``Sizes::projections`` of csrc/low_rank_fusion/low_rank_fusion.h."""
    return modalities, rank_weight.shape[0], features[0].shape[0], (bias.shape[0] + 15) // 16 * 16


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_inputs(
    op: str,
    features: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weight: Tensor,
    bias: Tensor,
    available: Tensor | None,
) -> None:
    modalities = len(features)
    if modalities < 1:
        fail(op, "expected `features` to hold at least 1 modality, got 0")
    if len(factors) != modalities:
        fail(op, f"expected `factors` to hold a tensor per modality, M = {modalities}, got {len(factors)}")
    first = features[0]
    check_floating(op, "features[0]", first)
    check_shape(op, "features[0]", first, (-1, -1), "[B, d_m]")

    def check(name: str, tensor: Tensor, shape: Sequence[int | torch.SymInt], meaning: str, dtype: torch.dtype) -> None:
        check_dtype(op, name, tensor, dtype)
        check_shape(op, name, tensor, shape, meaning)
        check_device(op, name, tensor, first)

    check("rank_weight", rank_weight, (-1,), "[r]", first.dtype)
    check("bias", bias, (-1,), "[h]", first.dtype)
    rank, width = rank_weight.shape[0], bias.shape[0]
    for m, (feature, factor) in enumerate(zip(features, factors, strict=True)):
        check(f"features[{m}]", feature, (first.shape[0], -1), "[B, d_m]", first.dtype)
        check(f"factors[{m}]", factor, (rank, feature.shape[1] + 1, width), "[r, d_m + 1, h]", first.dtype)
    if available is not None:
        check("available", available, (first.shape[0], modalities), "[B, M]", torch.bool)


@torch.library.register_fake("msacore::low_rank_fusion")
def _(
    features: list[Tensor],
    factors: list[Tensor],
    rank_weight: Tensor,
    bias: Tensor,
    available: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    _check_inputs("low_rank_fusion", features, factors, rank_weight, bias, available)
    first, dtype = features[0], _acc_dtype(features[0].dtype)
    shape = _projections_shape(len(features), features, rank_weight, bias)
    if not keep or prod(shape) * dtype.itemsize > 2**26:
        shape = (0, *shape[1:])
    return first.new_empty(first.shape[0], bias.shape[0]), first.new_empty(shape, dtype=dtype)


@torch.library.register_fake("msacore::low_rank_fusion_backward")
def _(
    grad_out: Tensor,
    projections: Tensor,
    features: list[Tensor],
    factors: list[Tensor],
    rank_weight: Tensor,
    bias: Tensor,
    available: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    op = "low_rank_fusion_backward"
    _check_inputs(op, features, factors, rank_weight, bias, available)
    first, batch, width = features[0], features[0].shape[0], bias.shape[0]
    check_dtype(op, "grad_out", grad_out, first.dtype)
    check_shape(op, "grad_out", grad_out, (batch, width), "[B, h]")
    check_device(op, "grad_out", grad_out, first)
    modalities = len(features) if projections.dim() > 0 and projections.shape[0] > 0 else 0
    check_dtype(op, "projections", projections, _acc_dtype(first.dtype))
    shape = _projections_shape(modalities, features, rank_weight, bias)
    check_shape(op, "projections", projections, shape, "[M or 0, r, B, h padded]")
    check_device(op, "projections", projections, first)
    grads = [[t.new_empty(t.shape) for t in group] for group in (features, factors, (rank_weight, bias))]
    return grads[0], grads[1], grads[2][0], grads[2][1]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    features, factors, *others = inputs
    ctx.modalities = len(features)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *features, *factors, *others)


def _backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    projections, *tensors = ctx.saved_tensors
    features, factors, others = (
        tensors[: ctx.modalities],
        tensors[ctx.modalities : 2 * ctx.modalities],
        tensors[2 * ctx.modalities :],
    )
    if grad_out is None:
        return [None] * ctx.modalities, [None] * ctx.modalities, None, None, None
    grads = _low_rank_fusion_backward(grad_out, projections, features, factors, *others)
    return *grads, None


refuse_second_derivative("low_rank_fusion_backward")
_eager = differentiable(_low_rank_fusion, _setup_context, _backward)


def low_rank_fusion(
    features: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weight: Tensor,
    bias: Tensor,
    *,
    available: Tensor | None = None,
) -> Tensor:
    """Fuse modalities by a tensor product whose weight is a sum of r rank-one tensors.

    ``out = Σ_r rank_weight[r] · Π_m ([x_m; 1] · factors_m[r]) + bias``

    Args:
        features: M tensors ``[B, d_m]``; float16, bfloat16, float32 or float64.
        factors: M tensors ``[r, d_m + 1, h]``, dtype of ``features``; the last row belongs to the 1.
        rank_weight: ``[r]``, dtype of ``features``.
        bias: ``[h]``, dtype of ``features``.
        available: Modalities present in a sample, ``[B, M]``, bool; all when omitted. A missing modality contributes
            the last row of its factors only: a learned constant.

    Returns:
        ``[B, h]``, dtype and device of ``features``, contiguous.

    Raises:
        RuntimeError: A shape, dtype or device above does not hold.

    Note:
        Features that ``available`` hides are never read, and their gradient is zero. Differentiable once in every
        floating argument; keeps the M·r projections ``[B, h]`` for the backward pass, or computes them again where
        they exceed 64 MiB. Accumulates in float32 for 16-bit types. Under autocast, arguments of mixed dtypes are
        cast to the features' dtype. Deterministic. No host synchronisation; safe in CUDA graphs. The low-rank
        multimodal fusion of Liu et al., 2018 (docs/ops.md).

    Example:
        >>> x, y = torch.tensor([[2.0]]), torch.tensor([[3.0]])
        >>> factors = [torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[1.0], [0.0]]])]
        >>> low_rank_fusion([x, y], factors, torch.ones(1), torch.zeros(1))
        tensor([[9.]])
    """
    op = "low_rank_fusion"
    inputs, weights = as_tensors(op, "features", features), as_tensors(op, "factors", factors)
    weights += [as_tensor(op, "rank_weight", rank_weight), as_tensor(op, "bias", bias)]
    hidden = as_optional_tensor(op, "available", available)
    inputs, parameters = cast_under_autocast(inputs, weights)
    keep = will_differentiate(*inputs, *parameters)
    return _eager(inputs, parameters[:-2], *parameters[-2:], hidden, keep=keep)[0]
