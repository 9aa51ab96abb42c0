"""Matrix-based fusion of modalities."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from msacore.ops._autograd import differentiable, refuse_second_derivative
from msacore.ops._check import (
    as_choice,
    as_flag,
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

_matrix_fusion = torch.ops.msacore.matrix_fusion.default
_matrix_fusion_backward = torch.ops.msacore.matrix_fusion_backward.default

Activation = Literal["relu", "gelu", "identity"]
ACTIVATIONS = {"relu": 0, "gelu": 1, "identity": 2}


def _check_inputs(
    op: str,
    features: Sequence[Tensor],
    row_weight: Tensor,
    row_bias: Tensor,
    pair_weight: Tensor,
    pair_bias: Tensor,
    mask: Tensor | None,
    available: Tensor | None,
    augment: bool,
    activation: int,
) -> None:
    if len(features) < 2:
        fail(op, f"expected `features` to hold at least 2 modalities, got {len(features)}")
    if activation not in ACTIVATIONS.values():
        fail(op, f"expected `activation` to be 0, 1 or 2, got {activation}")
    first = features[0]
    check_floating(op, "features[0]", first)
    check_shape(op, "features[0]", first, (-1, -1, -1), "[B, L, k]")
    batch, length, width = first.shape
    modalities = len(features)

    def check(name: str, tensor: Tensor, shape: Sequence[int | torch.SymInt], meaning: str, dtype: torch.dtype) -> None:
        check_dtype(op, name, tensor, dtype)
        check_shape(op, name, tensor, shape, meaning)
        check_device(op, name, tensor, first)

    for m, feature in enumerate(features):
        check(f"features[{m}]", feature, first.shape, "[B, L, k]", first.dtype)
    check("row_weight", row_weight, (-1, width + augment), "[q, k + 1]" if augment else "[q, k]", first.dtype)
    check("row_bias", row_bias, (row_weight.shape[0],), "[q]", first.dtype)
    check("pair_weight", pair_weight, (-1, modalities * (modalities - 1) // 2), "[C, P]", first.dtype)
    check("pair_bias", pair_bias, (pair_weight.shape[0],), "[C]", first.dtype)
    if mask is not None:
        check("mask", mask, (batch, length), "[B, L]", torch.bool)
    if available is not None:
        check("available", available, (batch, modalities), "[B, M]", torch.bool)


@torch.library.register_fake("msacore::matrix_fusion")
def _(
    features: list[Tensor],
    row_weight: Tensor,
    row_bias: Tensor,
    pair_weight: Tensor,
    pair_bias: Tensor,
    mask: Tensor | None,
    available: Tensor | None,
    *,
    augment: bool,
    activation: int,
) -> tuple[Tensor, Tensor]:
    inputs = (features, row_weight, row_bias, pair_weight, pair_bias, mask, available)
    _check_inputs("matrix_fusion", *inputs, augment, activation)
    batch, rows = features[0].shape[0], row_weight.shape[0]
    return (
        features[0].new_empty(batch, pair_weight.shape[0], rows),
        features[0].new_empty(batch, pair_weight.shape[1], rows),
    )


@torch.library.register_fake("msacore::matrix_fusion_backward")
def _(
    grad_fused: Tensor,
    grad_pairs: Tensor,
    features: list[Tensor],
    row_weight: Tensor,
    row_bias: Tensor,
    pair_weight: Tensor,
    pair_bias: Tensor,
    mask: Tensor | None,
    available: Tensor | None,
    *,
    augment: bool,
    activation: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    op = "matrix_fusion_backward"
    inputs = (features, row_weight, row_bias, pair_weight, pair_bias, mask, available)
    _check_inputs(op, *inputs, augment, activation)
    batch, rows, (channels, pairs) = features[0].shape[0], row_weight.shape[0], pair_weight.shape
    check_dtype(op, "grad_fused", grad_fused, features[0].dtype)
    check_shape(op, "grad_fused", grad_fused, (batch, channels, rows), "[B, C, q]")
    check_device(op, "grad_fused", grad_fused, features[0])
    check_dtype(op, "grad_pairs", grad_pairs, features[0].dtype)
    check_shape(op, "grad_pairs", grad_pairs, (batch, pairs, rows), "[B, P, q]")
    check_device(op, "grad_pairs", grad_pairs, features[0])
    parameters = (row_weight, row_bias, pair_weight, pair_bias)
    grads = [t.new_empty(t.shape) for t in parameters]
    return [t.new_empty(t.shape) for t in features], grads[0], grads[1], grads[2], grads[3]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    features, *others = inputs
    ctx.modalities = len(features)
    ctx.save_for_backward(*features, *others)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_fused: Tensor, grad_pairs: Tensor) -> tuple[Any, ...]:
    features, others = ctx.saved_tensors[: ctx.modalities], ctx.saved_tensors[ctx.modalities :]
    grads = _matrix_fusion_backward(grad_fused, grad_pairs, list(features), *others, **ctx.options)
    return *grads, None, None


refuse_second_derivative("matrix_fusion_backward")
_eager = differentiable(_matrix_fusion, _setup_context, _backward)


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
    activation: Activation = "relu",
) -> tuple[Tensor, Tensor]:
    """Fuse modalities through the Gram matrix of every pair, without storing a Gram matrix.

    With ``z = [x; 1]`` (``z = x`` without ``augment``) and ``s_b = max(1, Σ_l mask[b, l])``, for each pair
    ``p = (m, n)`` in the order (0, 1), (0, 2), …, (1, 2), …:

    ``G_p = (1 / s_b) Σ_l mask[b, l] · z_m[b, l] · z_n[b, l]ᵀ``, ``R_p = act(row_weight · G_p + row_bias · 1ᵀ)``,
    ``S_c = act(Σ_p pair_weight[c, p] · χ_p · R_p + pair_bias[c])``.

    Args:
        features: M ≥ 2 tensors of one shape: aligned sequences ``[B, L, k]``, or pooled ``[B, k]``, the same as L = 1;
            float16, bfloat16, float32 or float64.
        row_weight: Mixes the rows of every Gram matrix, ``[q, k']`` with ``k' = k + augment``, dtype of ``features``.
        row_bias: ``[q]``, dtype of ``features``.
        pair_weight: Mixes the P = M(M-1)/2 pairs into C channels, ``[C, P]``, dtype of ``features``.
        pair_bias: ``[C]``, dtype of ``features``.
        mask: Valid tokens, ``[B, L]`` (pooled: ``[B, 1]``), bool; all when omitted.
        available: Modalities present in a sample, ``[B, M]``, bool; all when omitted. A missing modality has features
            of zero and keeps its 1; without ``augment`` its pairs drop out (χ_p = 0, otherwise 1).
        augment: Append a 1 to the features, so that a pair also carries each of its members alone.
        activation: "relu", "gelu" (tanh form) or "identity".

    Returns:
        ``fused`` ``[B, C, q]``, the column means of S, and ``pairs`` ``[B, P, q]``, the column means of χ_p R_p; dtype
        and device of ``features``, contiguous.

    Raises:
        RuntimeError: A shape, dtype or device above does not hold.
        ValueError: ``activation`` is not one of the three.

    Note:
        Features that ``mask`` or ``available`` hide are never read, and their gradient is zero. Differentiable once in
        every floating argument; the backward pass recomputes what it needs. Accumulates in float32 for 16-bit types.
        Under autocast, arguments of mixed dtypes are cast to the features' dtype. Deterministic. No host
        synchronisation; safe in CUDA graphs. The matrix-based fusion of AL-HCL (docs/ops.md).

    Example:
        >>> text, audio = torch.eye(2)[None], torch.ones(1, 2, 2)
        >>> weights = torch.ones(1, 3), torch.zeros(1), torch.ones(1, 1), torch.zeros(1)
        >>> fused, pairs = matrix_fusion([text, audio], *weights)
        >>> fused
        tensor([[[2.]]])
    """
    op = "matrix_fusion"
    code = as_choice(op, "activation", activation, ACTIVATIONS)
    augment = as_flag(op, "augment", augment)
    aligned = as_tensors(op, "features", features)
    given = dict(row_weight=row_weight, row_bias=row_bias, pair_weight=pair_weight, pair_bias=pair_bias)
    parameters = [as_tensor(op, name, value) for name, value in given.items()]
    hidden = [as_optional_tensor(op, "mask", mask), as_optional_tensor(op, "available", available)]
    if aligned and all(feature.dim() == 2 for feature in aligned):
        for m, feature in enumerate(aligned):
            check_shape(op, f"features[{m}]", feature, aligned[0].shape, "[B, k]")
        aligned = [feature.unsqueeze(1) for feature in aligned]
    aligned, parameters = cast_under_autocast(aligned, parameters)
    return _eager(aligned, *parameters, *hidden, augment=augment, activation=code)
