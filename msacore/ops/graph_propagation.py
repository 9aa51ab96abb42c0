"""Message propagation over CSR graphs."""

from typing import Any

import torch
from torch import Tensor

from msacore.ops._autograd import refuse_second_derivative
from msacore.ops._check import check_device, check_dtype, check_floating, check_shape
from msacore.ops.propagation import check_steps

_graph_propagate = torch.ops.msacore.graph_propagate.default
_graph_propagate_backward = torch.ops.msacore.graph_propagate_backward.default


def _check_graph(op: str, x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None, prefix: str = "") -> None:
    check_floating(op, "x", x)
    check_shape(op, "x", x, (-1, -1), "[n, d]")
    check_dtype(op, f"{prefix}rowptr", rowptr, torch.int64)
    check_shape(op, f"{prefix}rowptr", rowptr, (x.shape[0] + 1,), "[n + 1]")
    check_device(op, f"{prefix}rowptr", rowptr, x)
    check_dtype(op, f"{prefix}col", col, torch.int64)
    check_shape(op, f"{prefix}col", col, (-1,), "[E]")
    check_device(op, f"{prefix}col", col, x)
    if weight is not None:
        check_dtype(op, f"{prefix}weight", weight, x.dtype)
        check_shape(op, f"{prefix}weight", weight, (col.shape[0],), "[E]")
        check_device(op, f"{prefix}weight", weight, x)


@torch.library.register_fake("msacore::graph_propagate")
def _(x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None, *, steps: int, alpha: float) -> Tensor:
    check_steps("graph_propagate", steps, alpha)
    _check_graph("graph_propagate", x, rowptr, col, weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("msacore::graph_propagate_backward")
def _(
    grad_out: Tensor, x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None, *, steps: int, alpha: float
) -> tuple[Tensor, Tensor]:
    check_steps("graph_propagate_backward", steps, alpha)
    _check_graph("graph_propagate_backward", x, rowptr, col, weight)
    return x.new_empty(x.shape), x.new_empty((0,) if weight is None else weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = _graph_propagate_backward(grad_out, *ctx.saved_tensors, **ctx.options)
    return grad_x, None, None, grad_weight if ctx.saved_tensors[3] is not None else None


torch.library.register_autograd("msacore::graph_propagate", _backward, setup_context=_setup_context)
refuse_second_derivative("graph_propagate_backward")


def graph_propagate(
    x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None = None, *, steps: int = 1, alpha: float = 0.0
) -> Tensor:
    """Propagate node features over a CSR graph, without an edge-sized buffer of features.

    ``steps`` times: ``h[i] = (1 - alpha) · Σ_{e in rowptr[i]:rowptr[i+1]} weight[e] · h[col[e]] + alpha · x[i]``

    Args:
        x: Node features, ``[n, d]``; float16, bfloat16, float32 or float64.
        rowptr: Row offsets, ``[n + 1]``, int64, non-decreasing, ``rowptr[-1] == E``.
        col: Source node of each edge, ``[E]``, int64 in ``[0, n)``.
        weight: Edge weights, ``[E]``, dtype of ``x``; ones when omitted.
        steps: Number of propagation steps, at least 0.
        alpha: Share of the initial features kept in each step, in ``[0, 1]``.

    Returns:
        ``[n, d]``, dtype and device of ``x``, contiguous. With ``alpha=0``, nodes without edges get zeros.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (values inside tensors: on CPU only).

    Note:
        Accumulates in float32 for 16-bit types. Deterministic on CPU and CUDA, forward and backward.
        Differentiable once in ``x`` and ``weight``. No host synchronisation; safe in CUDA graphs.

    Example:
        >>> x = torch.eye(3); rowptr = torch.tensor([0, 2, 2, 3]); col = torch.tensor([1, 2, 0])
        >>> graph_propagate(x, rowptr, col)
        tensor([[0., 1., 1.],
                [0., 0., 0.],
                [1., 0., 0.]])
    """
    return _graph_propagate(x, rowptr, col, weight, steps=steps, alpha=alpha)
