"""Sums and digests over the pool, in one order however its rows are distributed.

Sums follow a binary tree over row numbers: a node holds the rows ``[i · 2^l, (i + 1) · 2^l)`` of the pool, cut off at
its end, and its sum is that of its left half plus that of its right half. A holder of some of the rows sums the
largest nodes among them, its spans; the nodes above are the same for all holders. Digests are taken of blocks of rows.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int]  # first row, and one past the last
DIGEST_ROWS = 65_536


def spans(begin: int, end: int, total: int, largest: int | None = None) -> list[Span]:
    """The largest nodes of the tree over ``total`` rows in ``[begin, end)``, each of at most ``largest`` rows."""
    found = []
    while begin < end:
        size = 1
        while begin % (2 * size) == 0 and min(begin + 2 * size, total) <= end and begin + size < end:
            if largest is not None and 2 * size > largest:
                break
            size *= 2
        found.append((begin, min(begin + size, total)))
        begin += size
    return found


def pair_sums(values: Tensor) -> Tensor:
    """Sum of rows ``[n, …]``, n >= 1, along the tree whose leaves they are."""
    while len(values) > 1:
        values = _level_above(values)
    return values[0]


def _level_above(values: Tensor) -> Tensor:
    paired = values[: len(values) // 2 * 2]
    sums = paired[0::2] + paired[1::2]
    return sums if len(paired) == len(values) else torch.cat([sums, values[-1:]])


def _size(total: int) -> int:
    return 1 << max(0, total - 1).bit_length()


def join(parts: dict[Span, Any], total: int, span: Span | None = None) -> Any:
    """Sum of a node, all rows by default, from the sums of nodes that make it up."""
    begin, end = span or (0, total)
    return _node(parts, total, begin, _size(end - begin))


def _node(parts: dict[Span, Any], total: int, begin: int, size: int) -> Any:
    known = parts.get((begin, min(begin + size, total)))
    if known is not None:
        return known
    half = size // 2
    left = _node(parts, total, begin, half)
    return left if begin + half >= total else left + _node(parts, total, begin + half, half)


class Shares:
    """Numbers ``[n]`` of at least 0 for the rows from ``begin`` on, in proportion to which a row is drawn."""

    def __init__(self, values: Tensor, begin: int, total: int) -> None:
        self._levels: dict[Span, list[Tensor]] = {}
        for span in spans(begin, begin + len(values), total):
            levels = [values[span[0] - begin : span[1] - begin]]
            while len(levels[-1]) > 1:
                levels.append(_level_above(levels[-1]))
            self._levels[span] = levels

    def sums(self) -> dict[Span, float]:
        return {span: float(levels[-1][0]) for span, levels in self._levels.items()}

    def find(self, span: Span, target: float) -> int:
        """The row of ``span`` at which the running sum, the row included, first exceeds ``target``."""
        place, levels = 0, self._levels[span]
        for below in reversed(levels[:-1]):
            place *= 2
            if place + 1 < len(below):
                left, right = below[place : place + 2].tolist()
                if not _goes_left(left, right, target):
                    target -= left
                    place += 1
        return span[0] + place


def _goes_left(left: float, right: float, target: float) -> bool:
    return target < left or not right > 0


def find_span(parts: dict[Span, float], total: int, target: float) -> tuple[Span, float]:
    """The span in which ``target`` lies, and the target relative to that span."""
    begin, size = 0, _size(total)
    while (begin, min(begin + size, total)) not in parts:
        size //= 2
        middle = begin + size
        if middle < total:
            left = join(parts, total, (begin, middle))
            right = join(parts, total, (middle, min(middle + size, total)))
            if not _goes_left(left, right, target):
                begin, target = middle, target - left
    return (begin, min(begin + size, total)), target


def digests(values: Tensor, begin: int) -> dict[str, Any]:
    """Digests of 8-byte numbers ``[n]`` of the rows from ``begin`` on: one for each whole block; the rest as it is."""
    raw = values.detach().cpu().contiguous().numpy()
    whole: dict[int, bytes] = {}
    rest: list[tuple[int, bytes]] = []
    row, end = begin, begin + len(raw)
    while row < end:
        block = row // DIGEST_ROWS
        upto = min(end, (block + 1) * DIGEST_ROWS)
        piece = raw[row - begin : upto - begin].tobytes()
        if upto - row == DIGEST_ROWS:
            whole[block] = hashlib.sha256(piece).digest()
        else:
            rest.append((row, piece))
        row = upto
    return {"whole": whole, "rest": rest}


def joined_digest(head: str, messages: Iterable[dict[str, Any]]) -> str:
    """Digest of the blocks of all holders, which does not depend on how the rows are distributed."""
    messages = list(messages)
    blocks: dict[int, Any] = {}
    for row, piece in sorted(part for message in messages for part in message["rest"]):
        blocks.setdefault(row // DIGEST_ROWS, hashlib.sha256()).update(piece)
    found = {block: digest.digest() for block, digest in blocks.items()}
    for message in messages:
        found |= message["whole"]
    whole = hashlib.sha256(head.encode())
    for block in sorted(found):
        whole.update(found[block])
    return whole.hexdigest()


def digest(value: Tensor | None) -> str:
    """Checksum of a tensor that all ranks have; empty for None."""
    if value is None:
        return ""
    raw = value.detach().cpu().contiguous()
    return hashlib.sha256(f"{list(raw.shape)}".encode() + raw.numpy().tobytes()).hexdigest()


def occurrence(groups: Tensor) -> Tensor:
    """How many entries before each one are equal to it, ``[n]`` int64."""
    order = groups.argsort(stable=True)
    ordered = groups[order]
    here = torch.arange(len(groups), device=groups.device)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(begins, here, 0).cummax(0).values if len(groups) else here
    out = torch.empty_like(here)
    out[order] = here - first
    return out


def concatenated(messages: Sequence[dict[str, Any]], key: str) -> Tensor:
    """The entry ``key`` of all messages in their order; that of a single message as it is."""
    entries: list[Tensor] = [message[key] for message in messages]
    return entries[0] if len(entries) == 1 else torch.cat(entries)
