"""Message propagation over conversations, with no edge list."""

from typing import Any

import torch
from torch import Tensor

from msacore.ops._autograd import differentiable, refuse_second_derivative
from msacore.ops._check import check_device, check_dtype, check_floating, check_shape, fail

_propagate = torch.ops.msacore.propagate.default
_propagate_backward = torch.ops.msacore.propagate_backward.default
_window_mean = torch.ops.msacore.window_mean.default
_window_mean_backward = torch.ops.msacore.window_mean_backward.default
_modality_mean = torch.ops.msacore.modality_mean.default
_modality_mean_backward = torch.ops.msacore.modality_mean_backward.default

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


def _check_window(op: str, offsets: Tensor, like: Tensor, past: int, future: int) -> None:
    if past < -1 or future < -1:
        fail(op, f"expected the entries of `window` to be at least -1, got ({past}, {future})")
    check_dtype(op, "offsets", offsets, torch.int64)
    check_shape(op, "offsets", offsets, (-1,), "[V + 1]")
    if offsets.shape[0] < 1:
        fail(op, "expected `offsets` to have shape [V + 1] with V at least 0, got [0]")
    check_device(op, "offsets", offsets, like)


def _fake_propagate(op: str, name: str) -> None:
    @torch.library.register_fake(f"msacore::{op}")
    def _(
        x: Tensor,
        offsets: Tensor,
        available: Tensor | None,
        *,
        past: int,
        future: int,
        steps: int,
        alpha: float,
        send: int,
    ) -> Tensor:
        check_steps(op, steps, alpha)
        if send not in SEND.values():
            fail(op, f"expected `send` to be 0 (after_fill) or 1 (never), got {send}")
        _check_states(op, name, x, "available", available)
        _check_window(op, offsets, x, past, future)
        return x.new_empty(x.shape)


def _fake_window_mean(op: str, name: str) -> None:
    @torch.library.register_fake(f"msacore::{op}")
    def _(h: Tensor, offsets: Tensor, senders: Tensor | None, *, past: int, future: int) -> Tensor:
        _check_states(op, name, h, "senders", senders)
        _check_window(op, offsets, h, past, future)
        return h.new_empty(h.shape)


def _fake_modality_mean(op: str, name: str) -> None:
    @torch.library.register_fake(f"msacore::{op}")
    def _(h: Tensor, senders: Tensor | None) -> Tensor:
        _check_states(op, name, h, "senders", senders)
        return h.new_empty(h.shape)


# All three operators are linear in their first argument: the gradient needs the others only, and no activation.
def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.options = keyword_only_inputs


def _save_positional(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _propagate_gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _propagate_backward(grad_out, *ctx.saved_tensors, **ctx.options), None, None


def _window_mean_gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _window_mean_backward(grad_out, *ctx.saved_tensors, **ctx.options), None, None


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
_eager_propagate = differentiable(_propagate, _save, _propagate_gradient)
_eager_window_mean = differentiable(_window_mean, _save, _window_mean_gradient)
_eager_modality_mean = differentiable(_modality_mean, _save_positional, _modality_mean_gradient)


def _sides(op: str, window: tuple[int, int]) -> tuple[int, int]:
    if len(window) != 2:
        fail(op, f"expected `window` to be (past, future), got {window!r}")
    return window[0], window[1]


def propagate(
    x: Tensor,
    offsets: Tensor,
    *,
    available: Tensor | None = None,
    window: tuple[int, int] = (2, 2),
    steps: int = 4,
    alpha: float = 0.1,
    send: str = "after_fill",
) -> Tensor:
    """Propagate messages within modalities and between them, in turn, over conversations.

    ``steps`` times: ``u = (1 - alpha) · A_intra h + alpha · x``, then ``h = (1 - alpha) · A_inter u + alpha · x``.
    ``A_intra`` averages over the utterances ``j`` of the same conversation and modality with
    ``-past <= j - i <= future``, ``A_inter`` over the other modalities of the same utterance.

    Args:
        x: Initial states, ``[N, M, d]``; float16, bfloat16, float32 or float64. A missing node holds what stands for
            it, such as a mask token.
        offsets: Utterances of conversation ``v`` are ``offsets[v]:offsets[v + 1]``; ``[V + 1]``, int64, non-decreasing
            from 0 to ``N``.
        available: Which nodes are present, ``[N, M]``, bool; all when omitted.
        window: ``(past, future)``, how many utterances each side; -1 for the whole side.
        steps: Number of steps, at least 0 (0 gives a copy of ``x``).
        alpha: Share of ``x`` kept in each half-step, in ``[0, 1]``.
        send: Missing nodes always receive. With ``"after_fill"`` they send from the first inter half-step on, with
            ``"never"`` never. Means run over senders only; a node that receives nothing keeps ``alpha · x``.

    Returns:
        ``[N, M, d]``, dtype and device of ``x``, contiguous.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (values of ``offsets``: on CPU only).

    Note:
        Costs the same for every window, and stores nothing for the gradient, which is one pass more of the same kind.
        Accumulates in float32 for 16-bit types. Deterministic. Differentiable once in ``x``. No host synchronisation;
        safe in CUDA graphs. Sums never subtract: a non-finite ``x`` reaches only nodes within reach.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]])
        >>> propagate(x, torch.tensor([0, 2]), window=(0, 0), steps=1, alpha=0.0).squeeze(-1)
        tensor([[3., 1.],
                [7., 5.]])
    """
    past, future = _sides("propagate", window)
    if send not in SEND:
        fail("propagate", f'expected `send` to be "after_fill" or "never", got {send!r}')
    return _eager_propagate(x, offsets, available, past=past, future=future, steps=steps, alpha=alpha, send=SEND[send])


def window_mean(
    h: Tensor, offsets: Tensor, *, senders: Tensor | None = None, window: tuple[int, int] = (2, 2)
) -> Tensor:
    """Average over a window of utterances of the same conversation and modality: ``A_intra h`` of :func:`propagate`.

    Args:
        h: States, ``[N, M, d]``; float16, bfloat16, float32 or float64.
        offsets: Utterances of conversation ``v`` are ``offsets[v]:offsets[v + 1]``; ``[V + 1]``, int64, non-decreasing
            from 0 to ``N``.
        senders: Nodes that count in a mean, ``[N, M]``, bool; all when omitted. The others are unread.
        window: ``(past, future)``, how many utterances each side; -1 for the whole side.

    Returns:
        ``[N, M, d]``, dtype and device of ``h``, contiguous; zeros where no sender is in the window.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (values of ``offsets``: on CPU only).

    Note:
        ``out[i, m] = Σ_j s[j, m] h[j, m] / Σ_j s[j, m]`` at a cost that does not depend on the window. Accumulates in
        float32 for 16-bit types. Deterministic. Differentiable once in ``h``.

    Example:
        >>> h = torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1)
        >>> window_mean(h, torch.tensor([0, 3]), window=(1, 0)).flatten()
        tensor([1.0000, 2.0000, 5.5000])
    """
    past, future = _sides("window_mean", window)
    return _eager_window_mean(h, offsets, senders, past=past, future=future)


def modality_mean(h: Tensor, *, senders: Tensor | None = None) -> Tensor:
    """Average over the other modalities of the same utterance: ``A_inter h`` of :func:`propagate`.

    Args:
        h: States, ``[N, M, d]``; float16, bfloat16, float32 or float64.
        senders: Nodes that count in a mean, ``[N, M]``, bool; all when omitted. The others are unread.

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
    return _eager_modality_mean(h, senders)
