"""Message propagation over conversations, with no edge list."""

from typing import Any, Literal

import torch
from torch import Tensor

from msacore.ops._autograd import differentiable, refuse_second_derivative
from msacore.ops._check import (
    as_choice,
    as_flag,
    as_indices,
    as_integer,
    as_number,
    as_optional_indices,
    as_optional_tensor,
    as_tensor,
    as_window,
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    fail,
)
from msacore.ops._interrupt import interruptible

_propagate = torch.ops.msacore.propagate.default
_propagate_backward = interruptible(torch.ops.msacore.propagate_backward.default)
_window_mean = torch.ops.msacore.window_mean.default
_window_mean_backward = torch.ops.msacore.window_mean_backward.default
_modality_mean = torch.ops.msacore.modality_mean.default
_modality_mean_backward = torch.ops.msacore.modality_mean_backward.default

Send = Literal["after_fill", "never"]
SEND = {"after_fill": 0, "never": 1}


def check_steps(op: str, steps: int, alpha: float) -> None:
    if steps < 0:
        fail(op, f"expected `steps` to be at least 0, got {steps}")
    if not 0 <= alpha <= 1:
        fail(op, f"expected `alpha` in [0, 1], got {alpha}")


def _check_states(op: str, name: str, h: Tensor, gate_name: str, gate: Tensor | None) -> None:
    check_floating(op, name, h)
    check_shape(op, name, h, (-1, -1, -1), "[N, M, d]")
    if gate is not None:
        check_dtype(op, gate_name, gate, torch.bool)
        check_shape(op, gate_name, gate, h.shape[:2], "[N, M]")
        check_device(op, gate_name, gate, h)


def _check_windows(op: str, offsets: Tensor, positions: Tensor | None, like: Tensor, past: int, future: int) -> None:
    if past < -1 or future < -1:
        fail(op, f"expected the entries of `window` to be at least -1, got ({past}, {future})")
    check_dtype(op, "offsets", offsets, torch.int64)
    check_shape(op, "offsets", offsets, (-1,), "[V + 1]")
    if offsets.shape[0] < 1:
        fail(op, "expected `offsets` to have shape [V + 1] with V at least 0, got [0]")
    check_device(op, "offsets", offsets, like)
    if positions is not None:
        check_dtype(op, "positions", positions, torch.int64)
        check_shape(op, "positions", positions, (like.shape[0],), "[N]")
        check_device(op, "positions", positions, like)


def _fake_propagate(op: str, name: str) -> None:
    @torch.library.register_fake(f"msacore::{op}")
    def _(
        x: Tensor,
        offsets: Tensor,
        available: Tensor | None,
        positions: Tensor | None,
        *,
        past: int,
        future: int,
        include_self: bool,
        steps: int,
        alpha: float,
        send: int,
    ) -> Tensor:
        check_steps(op, steps, alpha)
        if send not in SEND.values():
            fail(op, f"expected `send` to be 0 (after_fill) or 1 (never), got {send}")
        _check_states(op, name, x, "available", available)
        _check_windows(op, offsets, positions, x, past, future)
        return x.new_empty(x.shape)


def _fake_window_mean(op: str, name: str) -> None:
    @torch.library.register_fake(f"msacore::{op}")
    def _(
        h: Tensor,
        offsets: Tensor,
        senders: Tensor | None,
        positions: Tensor | None,
        *,
        past: int,
        future: int,
        include_self: bool,
    ) -> Tensor:
        _check_states(op, name, h, "senders", senders)
        _check_windows(op, offsets, positions, h, past, future)
        return h.new_empty(h.shape)


def _fake_modality_mean(op: str, name: str) -> None:
    @torch.library.register_fake(f"msacore::{op}")
    def _(h: Tensor, senders: Tensor | None) -> Tensor:
        _check_states(op, name, h, "senders", senders)
        return h.new_empty(h.shape)


# All three operators are linear in their first argument: the gradient needs only the others, and no activation.
def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.options = keyword_only_inputs


def _save_positional(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _propagate_gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _propagate_backward(grad_out, *ctx.saved_tensors, **ctx.options), None, None, None


def _window_mean_gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _window_mean_backward(grad_out, *ctx.saved_tensors, **ctx.options), None, None, None


def _modality_mean_gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _modality_mean_backward(grad_out, *ctx.saved_tensors), None


for _fake, _op, _name in (
    (_fake_propagate, "propagate", "x"),
    (_fake_window_mean, "window_mean", "h"),
    (_fake_modality_mean, "modality_mean", "h"),
):
    _fake(_op, _name)
    _fake(f"{_op}_backward", "grad_out")
    refuse_second_derivative(f"{_op}_backward")
_eager_propagate = interruptible(differentiable(_propagate, _save, _propagate_gradient))
_eager_window_mean = differentiable(_window_mean, _save, _window_mean_gradient)
_eager_modality_mean = differentiable(_modality_mean, _save_positional, _modality_mean_gradient)


def propagate(
    x: Tensor,
    offsets: Tensor,
    *,
    available: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | tuple[int, int] = (2, 2),
    include_self: bool = True,
    steps: int = 4,
    alpha: float = 0.1,
    send: Send = "after_fill",
) -> Tensor:
    """Propagate messages within modalities and between them, in turn, over conversations.

    ``steps`` times: ``u = (1 - alpha) · A_intra h + alpha · x``, then ``h = (1 - alpha) · A_inter u + alpha · x``.
    ``A_intra`` averages over the utterances ``j`` of the same conversation and modality with
    ``-past <= p[j] - p[i] <= future``, ``A_inter`` over the other modalities of the same utterance.

    Args:
        x: Initial states, ``[N, M, d]``; float16, bfloat16, float32 or float64. A missing node holds a placeholder,
            such as a mask token.
        offsets: Utterances of conversation ``v`` are ``offsets[v]:offsets[v + 1]``; ``[V + 1]``, integers,
            non-decreasing from 0 to ``N``.
        available: Which nodes are present, ``[N, M]``, bool; all when omitted.
        positions: The utterances' numbers ``p``, ``[N]``, integers that increase strictly within a conversation:
            missing utterances leave a gap. The row's number when omitted.
        window: ``(past, future)``, how far each side reaches; one integer for both; -1 for the whole side.
        include_self: Whether an utterance is in its own window. A window that is then empty sends nothing.
        steps: Number of steps, at least 0 (0 gives a copy of ``x``).
        alpha: Share of ``x`` kept in each half-step, in ``[0, 1]``; a number, not differentiable.
        send: Missing nodes always receive. With ``"after_fill"`` they send from the first inter half-step on, with
            ``"never"`` never. Means run over senders only; a node that receives nothing keeps ``alpha · x``.

    Returns:
        ``[N, M, d]``, dtype and device of ``x``, contiguous.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (values of ``offsets`` and ``positions`` are
            checked on the CPU only; with wrong ones, CUDA gives wrong numbers but stays in bounds).
        ValueError: ``send`` is not one of the two.
        KeyboardInterrupt: Ctrl-C during many steps on the CPU.

    Note:
        The work does not depend on the window, and nothing is stored for the gradient, which is one more pass of the
        same kind. Accumulates in float32 for 16-bit types. Deterministic. Differentiable once in ``x``. No host
        synchronisation; safe in CUDA graphs. Sums are formed without subtraction, so a non-finite ``x`` affects only
        nodes within reach. Relations are named from the receiver's point of view: ``past`` are the utterances before
        the receiving one. GCNet's code names them from the sender's, so that its "past" edges are ``future`` here.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]])
        >>> propagate(x, torch.tensor([0, 2]), window=0, steps=1, alpha=0.0).squeeze(-1)
        tensor([[3., 1.],
                [7., 5.]])
    """
    op = "propagate"
    past, future = as_window(op, window)
    return _eager_propagate(
        as_tensor(op, "x", x),
        as_indices(op, "offsets", offsets),
        as_optional_tensor(op, "available", available),
        as_optional_indices(op, "positions", positions),
        past=past,
        future=future,
        include_self=as_flag(op, "include_self", include_self),
        steps=as_integer(op, "steps", steps),
        alpha=as_number(op, "alpha", alpha),
        send=as_choice(op, "send", send, SEND),
    )


def window_mean(
    h: Tensor,
    offsets: Tensor,
    *,
    senders: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | tuple[int, int] = (2, 2),
    include_self: bool = True,
) -> Tensor:
    """Average over a window of utterances of the same conversation and modality: ``A_intra h`` of :func:`propagate`.

    Args:
        h: States, ``[N, M, d]``; float16, bfloat16, float32 or float64.
        offsets: Utterances of conversation ``v`` are ``offsets[v]:offsets[v + 1]``; ``[V + 1]``, integers,
            non-decreasing from 0 to ``N``.
        senders: Nodes that count in a mean, ``[N, M]``, bool; all when omitted. The others are not read.
        positions: The utterances' numbers, ``[N]``, integers that increase strictly within a conversation; the row's
            number when omitted.
        window: ``(past, future)``, how far each side reaches; one integer for both; -1 for the whole side.
        include_self: Whether an utterance is in its own window.

    Returns:
        ``[N, M, d]``, dtype and device of ``h``, contiguous; zeros where no sender is in the window.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (values of ``offsets`` and ``positions`` are
            checked on the CPU only).

    Note:
        ``out[i, m] = Σ_j s[j, m] h[j, m] / Σ_j s[j, m]`` with work that does not depend on the window. Accumulates in
        float32 for 16-bit types. Deterministic. Differentiable once in ``h``.

    Example:
        >>> h = torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1)
        >>> window_mean(h, torch.tensor([0, 3]), window=(1, 0)).flatten()
        tensor([1.0000, 2.0000, 5.5000])
        >>> window_mean(h, torch.tensor([0, 3]), window=1, positions=torch.tensor([0, 1, 9])).flatten()
        tensor([2., 2., 8.])
    """
    op = "window_mean"
    past, future = as_window(op, window)
    return _eager_window_mean(
        as_tensor(op, "h", h),
        as_indices(op, "offsets", offsets),
        as_optional_tensor(op, "senders", senders),
        as_optional_indices(op, "positions", positions),
        past=past,
        future=future,
        include_self=as_flag(op, "include_self", include_self),
    )


def modality_mean(h: Tensor, *, senders: Tensor | None = None) -> Tensor:
    """Average over the other modalities of the same utterance: ``A_inter h`` of :func:`propagate`.

    Args:
        h: States, ``[N, M, d]``; float16, bfloat16, float32 or float64.
        senders: Nodes that count in a mean, ``[N, M]``, bool; all when omitted. The others are not read.

    Returns:
        ``[N, M, d]``, dtype and device of ``h``, contiguous; zeros where no other modality sends.

    Raises:
        RuntimeError: A shape, dtype or device above does not hold.

    Note:
        ``out[i, m] = Σ_{n≠m} s[i, n] h[i, n] / Σ_{n≠m} s[i, n]``. Accumulates in float32 for 16-bit types.
        Deterministic. Differentiable once in ``h``.

    Example:
        >>> modality_mean(torch.tensor([[[2.0], [4.0], [8.0]]])).flatten()
        tensor([6., 5., 3.])
    """
    op = "modality_mean"
    return _eager_modality_mean(as_tensor(op, "h", h), as_optional_tensor(op, "senders", senders))
