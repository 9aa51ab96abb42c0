"""The graphs of :func:`msacore.propagate` as edge lists, for :func:`msacore.alternating_graph_propagate`."""

import torch
from torch import Tensor

__all__ = ["modality_edges", "window_edges"]

Csr = tuple[Tensor, Tensor, Tensor]


def _check_senders(function: str, senders: Tensor | None, utterances: int, modalities: int) -> None:
    if senders is None:
        return
    if senders.dtype != torch.bool or senders.shape != (utterances, modalities):
        raise ValueError(
            f"{function}: expected `senders` to be bool of shape [N, M] = [{utterances}, {modalities}], "
            f"got {senders.dtype} of shape {list(senders.shape)}"
        )


def _means(target: Tensor, source: Tensor, senders: Tensor | None, nodes: int, dtype: torch.dtype) -> Csr:
    """Rows sorted by target, edges of non-senders left out, weights 1/count."""
    if senders is not None:
        sends = senders.flatten()[source]
        target, source = target[sends], source[sends]
    count = torch.bincount(target, minlength=nodes)
    rowptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return rowptr, source, count[target].to(dtype).reciprocal()


def window_edges(
    offsets: Tensor,
    M: int,
    window: tuple[int, int] = (2, 2),
    senders: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Csr:
    """Build the intra-modal graph: windows of utterances of the same conversation and modality.

    Args:
        offsets: Utterances of conversation ``v`` are ``offsets[v]:offsets[v + 1]``; ``[V + 1]``, int64.
        M: Number of modalities; the node of utterance ``i`` and modality ``m`` is ``i·M + m``.
        window: ``(past, future)``, how many utterances each side, self included; -1 for the whole side.
        senders: Nodes that send, ``[N, M]``, bool; all when omitted.
        dtype: Dtype of the weights.

    Returns:
        ``(rowptr [N·M + 1], col [E], weight [E])``, weights 1/count of the target's senders.

    Raises:
        ValueError: `offsets`, `window` or `senders` is not of the form above.

    Example:
        >>> rowptr, col, weight = window_edges(torch.tensor([0, 3]), 1, window=(1, 0))
        >>> rowptr.tolist(), col.tolist(), weight.tolist()
        ([0, 1, 3, 5], [0, 0, 1, 1, 2], [1.0, 0.5, 0.5, 0.5, 0.5])
    """
    if offsets.dim() != 1 or len(offsets) == 0 or offsets.dtype != torch.int64:
        raise ValueError(
            f"window_edges: expected `offsets` to be int64 of shape [V + 1], got {offsets.dtype} of shape "
            f"{list(offsets.shape)}"
        )
    if len(window) != 2 or min(window) < -1:
        raise ValueError(f"window_edges: expected `window` to be (past, future), each at least -1, got {window!r}")
    lengths = offsets.diff()
    if int(offsets[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError("window_edges: expected `offsets` to start at 0 and be non-decreasing")
    utterances = int(offsets[-1])
    _check_senders("window_edges", senders, utterances, M)
    past, future = (side if side >= 0 else utterances for side in window)
    here = torch.arange(utterances, device=offsets.device)
    first = torch.maximum(offsets[:-1].repeat_interleave(lengths), here - past).repeat_interleave(M)
    last = torch.minimum(offsets[1:].repeat_interleave(lengths) - 1, here + future).repeat_interleave(M)
    count = last - first + 1
    target = torch.arange(utterances * M, device=offsets.device).repeat_interleave(count)
    position = torch.arange(len(target), device=offsets.device) - (count.cumsum(0) - count)[target]
    return _means(target, (first[target] + position) * M + target % max(M, 1), senders, utterances * M, dtype)


def modality_edges(N: int, M: int, senders: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Csr:
    """Build the inter-modal graph: the other modalities of the same utterance.

    Args:
        N: Number of utterances.
        M: Number of modalities; the node of utterance ``i`` and modality ``m`` is ``i·M + m``.
        senders: Nodes that send, ``[N, M]``, bool; all when omitted.
        dtype: Dtype of the weights.

    Returns:
        ``(rowptr [N·M + 1], col [E], weight [E])`` on the device of `senders`, else the CPU; weights 1/count of the
        target's senders.

    Raises:
        ValueError: `senders` is not of the form above.

    Example:
        >>> rowptr, col, weight = modality_edges(1, 3)
        >>> rowptr.tolist(), col.tolist(), weight.tolist()
        ([0, 2, 4, 6], [1, 2, 0, 2, 0, 1], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    """
    _check_senders("modality_edges", senders, N, M)
    device = None if senders is None else senders.device
    target, other = (~torch.eye(M, dtype=torch.bool, device=device)).nonzero(as_tuple=True)
    start = torch.arange(N, device=device)[:, None] * M
    return _means((start + target).flatten(), (start + other).flatten(), senders, N * M, dtype)
