"""The graphs of :func:`msacore.propagate` in CSR form, and edge lists of PyTorch Geometric converted to it."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from msacore.ops._check import as_flag, as_indices, as_integer, as_tensor, as_window, describe

__all__ = ["from_edge_index", "modality_edges", "window_edges"]

Csr = tuple[Tensor, Tensor, Tensor]


def _refuse(function: str, message: str) -> NoReturn:
    raise ValueError(f"{function}: {message}")


def _count(function: str, name: str, value: Any) -> int:
    if (count := int(as_integer(function, name, value))) < 0:
        _refuse(function, f"expected `{name}` to be at least 0, got {count}")
    return count


def from_edge_index(
    edge_index: Tensor, num_nodes: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Turn PyTorch Geometric's edges into the CSR form of :func:`msacore.graph_propagate`: rows are targets.

    Args:
        edge_index: ``(source, target)`` of every edge, ``[2, E]``, integers in ``[0, num_nodes)``. Duplicate
            edges are kept.
        num_nodes: Number of nodes n.
        weight: Edge weights, ``[E]`` or ``[E, H]``; differentiable.

    Returns:
        ``(rowptr [n + 1], col [E], weight, order [E])``: ``order`` is the index of the edge behind each entry,
        so that other values of edges are reordered as ``values[order]``. The edges of a target keep their order.
        ``weight`` is None if it was omitted.

    Raises:
        ValueError: A shape, dtype or index is not of the form above.

    Note:
        Reads the indices on the host, once per graph; the result serves any number of calls.

    Example:
        >>> rowptr, col, _, order = from_edge_index(torch.tensor([[0, 2, 1], [1, 0, 1]]), 3)
        >>> rowptr.tolist(), col.tolist(), order.tolist()
        ([0, 1, 3, 3], [2, 0, 1], [1, 0, 2])
    """
    function = "from_edge_index"
    edges, n = as_indices(function, "edge_index", edge_index), _count(function, "num_nodes", num_nodes)
    if edges.dim() != 2 or edges.shape[0] != 2:
        _refuse(function, f"expected `edge_index` to have shape [2, E], got {list(edges.shape)}")
    if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= n):
        wrong = int(edges.min()) if int(edges.min()) < 0 else int(edges.max())
        _refuse(function, f"expected the nodes of `edge_index` in [0, num_nodes = {n}), got {wrong}")
    if weight is not None:
        weight = as_tensor(function, "weight", weight)
        if weight.dim() not in (1, 2) or weight.shape[0] != edges.shape[1]:
            _refuse(
                function,
                f"expected `weight` to have shape [E] or [E, H] with E = {edges.shape[1]}, got {list(weight.shape)}",
            )
        if weight.device != edges.device:
            _refuse(function, f"expected `weight` on {edges.device}, got {weight.device}")
    source, target = edges
    order = torch.argsort(target, stable=True)
    count = torch.bincount(target, minlength=n)
    rowptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return rowptr, source[order], None if weight is None else weight[order], order


def _check_senders(function: str, senders: Tensor | None, utterances: int, modalities: int) -> None:
    if senders is None:
        return
    if as_tensor(function, "senders", senders).dtype != torch.bool or senders.shape != (utterances, modalities):
        _refuse(
            function,
            f"expected `senders` to be bool of shape [N, M] = [{utterances}, {modalities}], got {describe(senders)}",
        )


def _check_dtype(function: str, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        _refuse(function, f"expected `dtype` to be a floating one, got {dtype}")


def _means(target: Tensor, source: Tensor, senders: Tensor | None, nodes: int, dtype: torch.dtype) -> Csr:
    """Rows sorted by target, edges of non-senders left out, weights 1/count."""
    if senders is not None:
        sends = senders.flatten()[source]
        target, source = target[sends], source[sends]
    count = torch.bincount(target, minlength=nodes)
    rowptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return rowptr, source, count[target].to(dtype).reciprocal()


def _reach(offsets: Tensor, positions: Tensor | None, past: int, future: int) -> tuple[Tensor, Tensor]:
    """First and last row within reach of every row."""
    utterances = int(offsets[-1])
    here = torch.arange(utterances, device=offsets.device)
    lengths = offsets.diff()
    begin, end = (bounds.repeat_interleave(lengths) for bounds in (offsets[:-1], offsets[1:]))
    if positions is None:
        first = begin if past < 0 else torch.maximum(begin, here - min(past, utterances))
        last = end - 1 if future < 0 else torch.minimum(end - 1, here + min(future, utterances))
        return first, last

    # Found by bisection: among a conversation's rows before a row, those too far away come first; after it, they come
    # last. Distances are computed in two halves of 32 bits, which is exact for all positions.
    def beyond(earlier: Tensor, later: Tensor, side: int) -> Tensor:
        high = (positions[later] >> 32) - (positions[earlier] >> 32)
        low = (positions[later] & 0xFFFFFFFF) - (positions[earlier] & 0xFFFFFFFF)
        high, low = high + (low >> 32), low & 0xFFFFFFFF
        return (high > side >> 32) | ((high == side >> 32) & (low > side & 0xFFFFFFFF))

    first, last = begin.clone(), end - 1
    if past >= 0:
        low, high = begin.clone(), here.clone()
        while bool((low < high).any()):
            middle = (low + high) // 2
            far = beyond(middle, here, past) & (low < high)
            low, high = torch.where(far, middle + 1, low), torch.where(far | (low >= high), high, middle)
        first = low
    if future >= 0:
        low, high = here.clone(), end - 1
        while bool((low < high).any()):
            middle = (low + high + 1) // 2
            far = beyond(here, middle, future) & (low < high)
            low, high = torch.where(far | (low >= high), low, middle), torch.where(far, middle - 1, high)
        last = low
    return first, last


def window_edges(
    offsets: Tensor,
    M: int,
    window: int | tuple[int, int] = (2, 2),
    senders: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    positions: Tensor | None = None,
    include_self: bool = True,
) -> Csr:
    """Build the intra-modal graph: windows of utterances of the same conversation and modality.

    Args:
        offsets: Utterances of conversation ``v`` are ``offsets[v]:offsets[v + 1]``; ``[V + 1]``, integers.
        M: Number of modalities; the node of utterance ``i`` and modality ``m`` is ``i·M + m``.
        window: ``(past, future)``, how far each side reaches; one integer for both; -1 for the whole side.
        senders: Nodes that send, ``[N, M]``, bool; all when omitted.
        dtype: Dtype of the weights.
        positions: The utterances' numbers, ``[N]``, integers that increase strictly within a conversation; the row's
            number when omitted.
        include_self: Whether an utterance is in its own window.

    Returns:
        ``(rowptr [N·M + 1], col [E], weight [E])``, weights 1/count of the target's senders.

    Raises:
        RuntimeError: An argument is of the wrong kind: not a tensor, not an integer or not a flag.
        ValueError: An argument is not of the form above.

    Note:
        ``past`` are the utterances before the receiving one. GCNet's code names edges from the sender's point of view,
        so that its "past" edges are ``future`` here: they lead to the receiver from what comes after it.

    Example:
        >>> rowptr, col, weight = window_edges(torch.tensor([0, 3]), 1, window=(1, 0))
        >>> rowptr.tolist(), col.tolist(), weight.tolist()
        ([0, 1, 3, 5], [0, 0, 1, 1, 2], [1.0, 0.5, 0.5, 0.5, 0.5])
    """
    function = "window_edges"
    offsets, M = as_indices(function, "offsets", offsets), _count(function, "M", M)
    past, future = as_window(function, window)
    include_self = as_flag(function, "include_self", include_self)
    _check_dtype(function, dtype)
    if offsets.dim() != 1 or len(offsets) == 0:
        _refuse(function, f"expected `offsets` to have shape [V + 1], got {list(offsets.shape)}")
    if min(past, future) < -1:
        _refuse(function, f"expected `window` to be (past, future), each at least -1, got {(past, future)}")
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
        _refuse(function, "expected `offsets` to start at 0 and be non-decreasing")
    utterances = int(offsets[-1])
    _check_senders(function, senders, utterances, M)
    if positions is not None:
        positions = as_indices(function, "positions", positions)
        if positions.shape != (utterances,):
            _refuse(function, f"expected `positions` to have shape [N] = [{utterances}], got {list(positions.shape)}")
        starts = torch.zeros(utterances + 1, dtype=torch.bool, device=offsets.device).index_fill(0, offsets, True)
        if bool(((positions[1:] <= positions[:-1]) & ~starts[1:utterances]).any()):
            _refuse(function, "expected `positions` to increase strictly within a conversation")
    first, last = (rows.repeat_interleave(M) for rows in _reach(offsets, positions, past, future))
    count = last - first + 1
    target = torch.arange(utterances * M, device=offsets.device).repeat_interleave(count)
    place = torch.arange(len(target), device=offsets.device) - (count.cumsum(0) - count)[target]
    source = (first[target] + place) * M + target % max(M, 1)
    if not include_self:
        target, source = target[source != target], source[source != target]
    return _means(target, source, senders, utterances * M, dtype)


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
        RuntimeError: An argument is of the wrong kind: not a tensor or not an integer.
        ValueError: An argument is not of the form above.

    Example:
        >>> rowptr, col, weight = modality_edges(1, 3)
        >>> rowptr.tolist(), col.tolist(), weight.tolist()
        ([0, 2, 4, 6], [1, 2, 0, 2, 0, 1], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    """
    function = "modality_edges"
    N, M = _count(function, "N", N), _count(function, "M", M)
    _check_dtype(function, dtype)
    _check_senders(function, senders, N, M)
    device = None if senders is None else senders.device
    target, other = (~torch.eye(M, dtype=torch.bool, device=device)).nonzero(as_tuple=True)
    start = torch.arange(N, device=device)[:, None] * M
    return _means((start + target).flatten(), (start + other).flatten(), senders, N * M, dtype)
