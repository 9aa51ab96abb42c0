"""Message propagation over CSR graphs."""

from typing import Any

import torch
from torch import Tensor

from msacore.ops._autograd import differentiable, refuse_second_derivative
from msacore.ops._check import (
    as_indices,
    as_integer,
    as_number,
    as_optional_tensor,
    as_tensor,
    cast_under_autocast,
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    describe,
    fail,
)
from msacore.ops._interrupt import interruptible
from msacore.ops.propagation import check_steps

_graph_propagate = torch.ops.msacore.graph_propagate.default
_graph_propagate_backward = interruptible(torch.ops.msacore.graph_propagate_backward.default)
_alternating_graph_propagate = torch.ops.msacore.alternating_graph_propagate.default
_alternating_graph_propagate_backward = interruptible(torch.ops.msacore.alternating_graph_propagate_backward.default)


def _check_graph(
    op: str,
    x: Tensor,
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor | None,
    prefix: str = "",
    *,
    heads: bool = False,
    rectangular: bool = False,
) -> None:
    """``heads``: features may be ``[n, H, d]``. ``rectangular``: the graph's targets may be other nodes."""
    check_floating(op, "x", x)
    with_heads = heads and x.dim() == 3
    if with_heads:
        check_shape(op, "x", x, (-1, -1, -1), "[n, H, d]")
    else:
        check_shape(op, "x", x, (-1, -1), "[n, d] or [n, H, d]" if heads else "[n, d]")
    check_dtype(op, f"{prefix}rowptr", rowptr, torch.int64)
    if rectangular:
        check_shape(op, f"{prefix}rowptr", rowptr, (-1,), "[m + 1]")
    else:
        check_shape(op, f"{prefix}rowptr", rowptr, (x.shape[0] + 1,), "[n + 1]")
    if rowptr.shape[0] < 1:
        fail(op, f"expected `{prefix}rowptr` to have shape [m + 1] with m at least 0, got [0]")
    check_device(op, f"{prefix}rowptr", rowptr, x)
    check_dtype(op, f"{prefix}col", col, torch.int64)
    check_shape(op, f"{prefix}col", col, (-1,), "[E]")
    check_device(op, f"{prefix}col", col, x)
    if weight is not None:
        check_dtype(op, f"{prefix}weight", weight, x.dtype)
        if with_heads and weight.dim() == 2:
            check_shape(op, f"{prefix}weight", weight, (col.shape[0], x.shape[1]), "[E, H]")
        else:
            check_shape(op, f"{prefix}weight", weight, (col.shape[0],), "[E] or [E, H]" if with_heads else "[E]")
        check_device(op, f"{prefix}weight", weight, x)


@torch.library.register_fake("msacore::graph_propagate")
def _(x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None, *, steps: int, alpha: float) -> Tensor:
    op = "graph_propagate"
    check_steps(op, steps, alpha)
    _check_graph(op, x, rowptr, col, weight, heads=True, rectangular=steps == 1 and alpha == 0)
    return x.new_empty((rowptr.shape[0] - 1, *x.shape[1:]))


@torch.library.register_fake("msacore::graph_propagate_backward")
def _(
    grad_out: Tensor,
    x: Tensor,
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor | None,
    *,
    steps: int,
    alpha: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    op = "graph_propagate_backward"
    check_steps(op, steps, alpha)
    _check_graph(op, x, rowptr, col, weight, heads=True, rectangular=steps == 1 and alpha == 0)
    return x.new_empty(x.shape), _fake_weight_gradient(x, weight, weight_grad)


def _fake_weight_gradient(x: Tensor, weight: Tensor | None, wanted: bool) -> Tensor:
    return x.new_empty(weight.shape if wanted and weight is not None else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[3]
    grad_x, grad_weight = _graph_propagate_backward(grad_out, *ctx.saved_tensors, **ctx.options, weight_grad=wanted)
    return grad_x, None, None, grad_weight if wanted else None


refuse_second_derivative("graph_propagate_backward")
_eager = interruptible(differentiable(_graph_propagate, _setup_context, _backward))

# Positions of the weights among the arguments of the alternation.
_WEIGHTS = (3, 6, 9)


def _check_alternation(op: str, x: Tensor, graphs: tuple[Tensor | None, ...], steps: int, alpha: float) -> None:
    check_steps(op, steps, alpha)
    for prefix, (rowptr, col, weight) in zip(
        ("intra_", "inter_", "first_intra_"), (graphs[0:3], graphs[3:6], graphs[6:9]), strict=True
    ):
        if rowptr is not None and col is not None:
            _check_graph(op, x, rowptr, col, weight, prefix)
        elif prefix != "first_intra_" or not (rowptr is None and col is None and weight is None):
            fail(op, f"expected `{prefix}rowptr` and `{prefix}col` together or not at all, got one of them")


@torch.library.register_fake("msacore::alternating_graph_propagate")
def _(x: Tensor, *graphs: Tensor | None, steps: int, alpha: float) -> Tensor:
    _check_alternation("alternating_graph_propagate", x, graphs, steps, alpha)
    return x.new_empty(x.shape)


@torch.library.register_fake("msacore::alternating_graph_propagate_backward")
def _(
    grad_out: Tensor, x: Tensor, *graphs: Tensor | None, steps: int, alpha: float, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_alternation("alternating_graph_propagate_backward", x, graphs, steps, alpha)
    intra, inter, first = (_fake_weight_gradient(x, graphs[i - 1], weight_grad) for i in _WEIGHTS)
    return x.new_empty(x.shape), intra, inter, first


def _alternating_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[i] for i in _WEIGHTS]
    grad_x, *grad_weights = _alternating_graph_propagate_backward(
        grad_out, *ctx.saved_tensors, **ctx.options, weight_grad=any(wanted)
    )
    grads: list[Tensor | None] = [grad_x] + [None] * 9
    for i, grad, need in zip(_WEIGHTS, grad_weights, wanted, strict=True):
        grads[i] = grad if need else None
    return tuple(grads)


refuse_second_derivative("alternating_graph_propagate_backward")
_eager_alternating = interruptible(differentiable(_alternating_graph_propagate, _setup_context, _alternating_backward))

Csr = tuple[Tensor, Tensor, Tensor | None]


def graph_propagate(
    x: Tensor, rowptr: Tensor, col: Tensor, weight: Tensor | None = None, *, steps: int = 1, alpha: float = 0.0
) -> Tensor:
    """Propagate node features over a CSR graph, without an edge-sized buffer of features.

    ``steps`` times: ``h[i] = (1 - alpha) · Σ_{e in rowptr[i]:rowptr[i+1]} weight[e] · h[col[e]] + alpha · x[i]``

    Args:
        x: Node features, ``[n, d]``, or ``[n, H, d]`` with H heads; float16, bfloat16, float32 or float64.
        rowptr: Row offsets, ``[n + 1]``, integers, non-decreasing, ``rowptr[-1] == E``. With ``steps=1`` and
            ``alpha=0`` the targets may be m other nodes: ``[m + 1]``.
        col: Source node of each edge, ``[E]``, integers in ``[0, n)``.
        weight: Edge weights, ``[E]``, dtype of ``x``; ones when omitted. For ``[n, H, d]`` also ``[E, H]``, a weight
            per head (attention); ``[E]`` serves all heads.
        steps: Number of propagation steps, at least 0.
        alpha: Share of the initial features kept in each step, in ``[0, 1]``; a number, not differentiable.

    Returns:
        A tensor of the shape (with m rows for m other targets), dtype and device of ``x``, contiguous. With
        ``alpha=0``, nodes without edges get zeros.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (values inside tensors are checked on the CPU
            only).
        KeyboardInterrupt: Ctrl-C during many steps on the CPU.

    Note:
        Accumulates in float32 for 16-bit types. Inside autocast ``weight`` is cast to the dtype of ``x``.
        Deterministic on CPU and CUDA, forward and backward. Differentiable once in ``x`` and ``weight``. No host
        synchronisation; safe in CUDA graphs.

    Example:
        >>> x = torch.eye(3); rowptr = torch.tensor([0, 2, 2, 3]); col = torch.tensor([1, 2, 0])
        >>> graph_propagate(x, rowptr, col)
        tensor([[0., 1., 1.],
                [0., 0., 0.],
                [1., 0., 0.]])
    """
    op = "graph_propagate"
    (x,), (weight,) = cast_under_autocast([as_tensor(op, "x", x)], [as_optional_tensor(op, "weight", weight)])
    return _eager(
        x,
        as_indices(op, "rowptr", rowptr),
        as_indices(op, "col", col),
        weight,
        steps=as_integer(op, "steps", steps),
        alpha=as_number(op, "alpha", alpha),
    )


def alternating_graph_propagate(
    x: Tensor, intra: Csr, inter: Csr, *, first_intra: Csr | None = None, steps: int = 4, alpha: float = 0.1
) -> Tensor:
    """Propagate over two CSR graphs in turn: :func:`msacore.propagate` for arbitrary edges.

    ``steps`` times: ``u = (1 - alpha) · A_intra h + alpha · x``, then ``h = (1 - alpha) · A_inter u + alpha · x``.

    Args:
        x: Node features, ``[n, d]``; float16, bfloat16, float32 or float64.
        intra: Graph of the first half-steps, ``(rowptr [n + 1], col [E], weight [E])``: integers, integers and the
            dtype of ``x``; a weight of None stands for ones.
        inter: Graph of the second half-steps, of the same form with its own number of edges.
        first_intra: Replaces ``intra`` in the first step.
        steps: Number of steps, at least 0.
        alpha: Share of the initial features kept in each half-step, in ``[0, 1]``.

    Returns:
        ``[n, d]``, dtype and device of ``x``, contiguous.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (values inside tensors are checked on the CPU
            only).
        KeyboardInterrupt: Ctrl-C during many steps on the CPU.

    Note:
        Equals ``propagate`` on the graphs of :mod:`msacore.graph`: ``send="never"`` gates all three by ``available``,
        ``"after_fill"`` only ``first_intra``. Accumulates in float32 for 16-bit types. Inside autocast the weights
        are cast to the dtype of ``x``. Deterministic. Differentiable once in ``x`` and all weights.

    Example:
        >>> from msacore.graph import modality_edges, window_edges
        >>> x = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
        >>> intra, inter = window_edges(torch.tensor([0, 2]), 2, window=(0, 0)), modality_edges(2, 2)
        >>> alternating_graph_propagate(x, intra, inter, steps=1, alpha=0.0).flatten()
        tensor([3., 1., 7., 5.])
    """
    op = "alternating_graph_propagate"
    indices: list[Tensor | None] = []
    weights: list[Tensor | None] = []
    nothing: tuple[None, None, None] = (None, None, None)
    first: Any = nothing if first_intra is None else first_intra
    for name, graph in (("intra", intra), ("inter", inter), ("first_intra", first)):
        if not isinstance(graph, (tuple, list)) or len(graph) != 3:
            fail(op, f"expected `{name}` to be (rowptr, col, weight), got {describe(graph)}")
        rowptr, col, weight = graph
        optional = name == "first_intra"
        indices.append(None if optional and rowptr is None else as_indices(op, f"{name}_rowptr", rowptr))
        indices.append(None if optional and col is None else as_indices(op, f"{name}_col", col))
        weights.append(as_optional_tensor(op, f"{name}_weight", weight))
    (x,), weights = cast_under_autocast([as_tensor(op, "x", x)], weights)
    graphs = [t for i in range(3) for t in (*indices[2 * i : 2 * i + 2], weights[i])]
    return _eager_alternating(x, *graphs, steps=as_integer(op, "steps", steps), alpha=as_number(op, "alpha", alpha))
