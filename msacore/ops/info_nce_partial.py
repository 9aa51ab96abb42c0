"""InfoNCE of a part of the anchors against all candidates: what several processes merge into the loss of one batch."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from msacore.ops._check import check_device, check_dtype, check_shape, fail
from msacore.ops.info_nce import check_info_nce, loss_dtype, stat_rows

info_nce_partial = torch.ops.msacore.info_nce_partial.default
info_nce_partial_positives = torch.ops.msacore.info_nce_partial_positives.default
info_nce_partial_backward = torch.ops.msacore.info_nce_partial_backward.default


def _check_inputs(op: str, inputs: Any, diagonal: int, denominator: int, **options: Any) -> tuple[Any, Any]:
    """The checks of csrc/info_nce/info_nce_partial.h; returns N and N'."""
    n, m = check_info_nce(op, *inputs, denominator=denominator, reduction=2, is_part=True, **options)
    if not -(1 << 60) <= diagonal <= 1 << 60:
        fail(op, f"expected `diagonal` from -2^60 to 2^60, got {diagonal}")
    return n, m


def _check_rows(op: str, name: str, tensor: Tensor, like: Tensor, shape: tuple[Any, ...], meaning: str) -> None:
    check_dtype(op, name, tensor, loss_dtype(like.dtype))
    check_shape(op, name, tensor, shape, meaning)
    check_device(op, name, tensor, like)


@torch.library.register_fake("msacore::info_nce_partial")
def _(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    n, m = _check_inputs("info_nce_partial", inputs, **options)
    anchors, dtype = inputs[0], loss_dtype(inputs[0].dtype)
    columns = m if options["symmetric"] else 0
    return anchors.new_empty((4, n), dtype=dtype), anchors.new_empty((4, columns), dtype=dtype)


@torch.library.register_fake("msacore::info_nce_partial_positives")
def _(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    op = "info_nce_partial_positives"
    *inputs, row_negatives, column_negatives = arguments
    n, m = _check_inputs(op, inputs, denominator=1, **options)
    anchors, dtype = inputs[0], loss_dtype(inputs[0].dtype)
    columns = m if options["symmetric"] else 0
    _check_rows(op, "row_negatives", row_negatives, anchors, (2, n), "[2, N]")
    _check_rows(op, "column_negatives", column_negatives, anchors, (2, columns), "[2, N'] or [2, 0]")
    return anchors.new_empty((2, n), dtype=dtype), anchors.new_empty((2, columns), dtype=dtype)


@torch.library.register_fake("msacore::info_nce_partial_backward")
def _(row_scale: Tensor, column_scale: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    op = "info_nce_partial_backward"
    *inputs, row_stats, column_stats, anchors_used, candidates_used = arguments
    n, m = _check_inputs(op, inputs, **options)
    anchors, _, _, _, _, weights, negatives, *_ = inputs
    rows, columns = stat_rows(options["denominator"]), m if options["symmetric"] else 0
    for name, scale, count in (("row_scale", row_scale, n), ("column_scale", column_scale, m)):
        _check_rows(op, name, scale, anchors, (count,) if scale.dim() else (), "[] or one per row")
    _check_rows(op, "row_stats", row_stats, anchors, (rows, n), "[S, N]")
    _check_rows(op, "column_stats", column_stats, anchors, (rows, columns), "[S, N'] or [S, 0]")
    for name, count in (("anchors_used", anchors_used), ("candidates_used", candidates_used)):
        check_dtype(op, name, count, torch.int64)
        check_shape(op, name, count, (), "[]")
        check_device(op, name, count, anchors)
    d, dtype = anchors.shape[1], loss_dtype(anchors.dtype)
    return (
        anchors.new_empty((n, d)),
        anchors.new_empty((m, d), dtype=dtype),
        anchors.new_empty((), dtype=dtype),
        anchors.new_empty((0, 0) if weights is None else (n, m)),
        anchors.new_empty((0 if negatives is None else negatives.shape[0], d), dtype=dtype),
    )


def _refuse_derivatives_of(name: str) -> None:
    def refuse(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"msacore::{name}: not differentiable by itself; gradients come from info_nce_partial_backward, given the "
            "merged results of all parts"
        )

    torch.library.register_autograd(f"msacore::{name}", refuse)


for _operator in ("info_nce_partial", "info_nce_partial_positives", "info_nce_partial_backward"):
    _refuse_derivatives_of(_operator)
