"""Rank-N-Contrast, the contrastive loss of continuous labels."""

from typing import Any

import torch
from torch import Tensor

from msacore.ops._autograd import differentiable, refuse_second_derivative
from msacore.ops._check import check_device, check_dtype, check_floating, check_shape, fail

_rank_n_contrast = torch.ops.msacore.rank_n_contrast.default
_rank_n_contrast_backward = torch.ops.msacore.rank_n_contrast_backward.default


def _check_inputs(op: str, embeddings: Tensor, targets: Tensor, mask: Tensor | None, temperature: float) -> None:
    check_floating(op, "embeddings", embeddings)
    check_shape(op, "embeddings", embeddings, (-1, -1), "[N, d]")
    check_floating(op, "targets", targets)
    check_shape(op, "targets", targets, embeddings.shape[:1], "[N]")
    check_device(op, "targets", targets, embeddings)
    if mask is not None:
        check_dtype(op, "mask", mask, torch.bool)
        check_shape(op, "mask", mask, embeddings.shape[:1], "[N]")
        check_device(op, "mask", mask, embeddings)
    if not temperature > 0:
        fail(op, f"expected `temperature` to be greater than 0, got {temperature}")


@torch.library.register_fake("msacore::rank_n_contrast")
def _(embeddings: Tensor, targets: Tensor, mask: Tensor | None, *, temperature: float) -> Tensor:
    _check_inputs("rank_n_contrast", embeddings, targets, mask, temperature)
    return embeddings.new_empty((), dtype=torch.float32 if embeddings.dtype.itemsize == 2 else embeddings.dtype)


@torch.library.register_fake("msacore::rank_n_contrast_backward")
def _(grad_out: Tensor, embeddings: Tensor, targets: Tensor, mask: Tensor | None, *, temperature: float) -> Tensor:
    _check_inputs("rank_n_contrast_backward", embeddings, targets, mask, temperature)
    return embeddings.new_empty(embeddings.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _rank_n_contrast_backward(grad_out, *ctx.saved_tensors, **ctx.options), None, None


refuse_second_derivative("rank_n_contrast_backward")
_eager = differentiable(_rank_n_contrast, _setup_context, _backward)


def rank_n_contrast(
    embeddings: Tensor, targets: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """Compute the Rank-N-Contrast loss: distances between embeddings should rank as the gaps between labels do.

    ``1/(n(n-1)) Σ_i Σ_{j≠i} [log Σ_{k≠i, |y_i-y_k| ≥ |y_i-y_j|} exp s_ik - s_ij]`` with
    ``s_ij = -‖e_i - e_j‖ / temperature`` over the n samples that are not masked.

    Args:
        embeddings: ``[N, d]``; float16, bfloat16, float32 or float64. Not normalised by the loss.
        targets: Continuous labels, ``[N]``, any of the same dtypes; label gaps are computed in their dtype.
        temperature: Divides the distances; greater than 0.
        mask: Samples that take part, ``[N]`` bool; all when omitted. The others are never read.

    Returns:
        Scalar, float64 for float64 embeddings, else float32. 0 for fewer than two samples.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold.

    Note:
        Exact, in ``O(N² d)`` time and ``O(N d)`` memory plus one tile: per anchor the two sides of the sorted labels
        are merged by falling gap, so that every denominator is a running sum. Samples of equal gap enter together.
        16-bit embeddings compute in float32. Two equal embeddings have zero gradient. Deterministic.
        Differentiable once in ``embeddings``; ``targets`` get no gradient. A NaN that is not masked makes the loss NaN.
        Source: Zha et al., Rank-N-Contrast, NeurIPS 2023.

    Example:
        >>> embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
        >>> rank_n_contrast(embeddings, torch.tensor([-1.0, 0.0, 2.0]))
        tensor(0.2102)
    """
    return _eager(embeddings, targets, mask, temperature=temperature)
