"""The rows of the pool that this process holds, and what is compared with them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection import tree
from msacore.selection.source import Parts, open_source

_CHUNK_BYTES = 4 << 20  # of an array that may be larger than memory
_PAIRS = 1 << 27  # of sample and centre: about a second's work, so that an interrupt is noticed
_DENSE = 8  # rows this far apart cost as much read one by one as read together with those between
_LARGEST = 1e290  # beyond it sums over the pool may overflow in float64
_MAX_EXPONENT = 1000  # of a power of two; float64 holds the power and its inverse
_MAX_FLOAT_EXPONENT = 120  # the filter multiplies float32 and 16-bit rows in float32
_SAFE_EXPONENT = 300  # float64 holds the squares, and sums of squares, of numbers up to two to this power


def check_magnitude(name: str, magnitude: float) -> None:
    if magnitude > _LARGEST:
        raise ValueError(f"select: `{name}` reach {magnitude:g}; sums of values above {_LARGEST:g} overflow in float64")


def _silent(text: str) -> None:
    """Ignore the note."""


def unit_rows(values: Tensor) -> Tensor:
    """Rows ``[A, d]`` in float64, scaled to length 1; rows of zeros stay."""
    rows = values.double()
    largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows
    rows = torch.ldexp(rows, -torch.frexp(largest).exponent.clamp_min(-_MAX_EXPONENT))
    zeros = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    center = torch.zeros(1, rows.shape[1], dtype=torch.float64, device=rows.device)
    infinite = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
    norms = kcenter.fold(
        rows, torch.arange(len(rows), device=rows.device), zeros, center, center[0], infinite, zeros, scale=1, metric=0
    )[0][:, None]
    return rows / norms.where(norms > 0, 1)


class Pool:
    """Samples ``[n, d]`` and their exact distances to centres, which are float64 rows ``[n, d]``.

    Rows are numbered from 0 within the process; ``offset`` is the number of the first one in the whole pool, which has
    ``total`` rows. ``note`` is called with what is being done in steps that make no pick.
    """

    def __init__(self, embeddings: Any, distance: str, note: Callable[[str], Any] = _silent) -> None:
        self.note = note
        source = open_source("embeddings", embeddings)
        self._parts = source if isinstance(source, Parts) else None
        self._values = source if isinstance(source, Tensor) else None
        self.n, self.width = int(source.shape[0]), int(source.shape[1])
        self.metric = kcenter.METRICS[distance]
        self.device = torch.device("cpu") if self._values is None else self._values.device
        self.dtype = source.dtype
        self.offset, self.total, self.rows_read, self.magnitude = 0, self.n, 0, 0.0

    def scan(self, offset: int, total: int) -> dict[str, Any]:
        """One pass over these rows, which start at row ``offset`` of ``total``; returns what :meth:`learn` needs.

        Raises:
            ValueError: A value is not finite, or too large.
        """
        self.offset, self.total = offset, total
        sums: dict[tree.Span, Tensor] = {}
        checksums, magnitude = [torch.empty(0, dtype=torch.int64)], 0.0
        for (begin, end), chunk in self.nodes():
            self.note(f"checking row {begin} of {total}")
            chunk_sums, chunk_checksums, largest, bad = kcenter.scan(chunk)
            if int(bad) < len(chunk):
                raise ValueError(f"select: `embeddings` holds a NaN or infinite value, first in row {begin + int(bad)}")
            sums[begin, end] = tree.pair_sums(chunk_sums)
            checksums.append(chunk_checksums.cpu())
            magnitude = max(magnitude, float(largest))
        check_magnitude("embeddings", magnitude)
        return {
            "sums": {span: tree.join(sums, total, span) for span in tree.spans(offset, offset + self.n, total)},
            "digests": tree.digests(torch.cat(checksums), offset),
            "magnitude": magnitude,
        }

    def learn(self, messages: list[dict[str, Any]]) -> None:
        """Take in what the scans of all holders say about the whole pool."""
        head = f"{self.total} {self.width} {self.dtype}"
        self.fingerprint = tree.joined_digest(head, [message["digests"] for message in messages])
        self.mean = self._mean([message["sums"] for message in messages])
        self.widen(max(message["magnitude"] for message in messages))

    def _mean(self, sums: list[dict[tree.Span, Tensor]]) -> Tensor:
        if not self.total:
            return torch.zeros(self.width, dtype=torch.float64, device=self.device)
        parts = {span: value.to(self.device) for message in sums for span, value in message.items()}
        return tree.join(parts, self.total) / self.total

    def nodes(self) -> Iterator[tuple[tree.Span, Tensor]]:
        """All rows in order, cut into nodes of the tree over the rows of the whole pool."""
        if self._values is not None:
            self.rows_read += self.n
        step = None if self.in_memory else self._chunk_rows()
        for begin, end in tree.spans(self.offset, self.offset + self.n, self.total, step):
            low, high = begin - self.offset, end - self.offset
            yield (begin, end), self._read(low, high) if self._values is None else self._values[low:high]

    def widen(self, magnitude: float) -> None:
        """Let the float32 filter hold values up to ``magnitude``: a power of two brings them to about 1."""
        self.magnitude = max(magnitude, self.magnitude)
        exponent = math.frexp(self.magnitude)[1] if self.magnitude > 0 else 0
        largest = _MAX_EXPONENT if self.dtype == torch.float64 else _MAX_FLOAT_EXPONENT
        self.scale = 2.0 ** -max(-largest, exponent)
        # Squares of values multiplied by this neither overflow nor vanish.
        self.safe = 1.0 if abs(exponent) < _SAFE_EXPONENT else self.scale

    @property
    def in_memory(self) -> bool:
        return self._values is not None

    @property
    def at_once(self) -> int:
        """How many rows may be gathered into memory."""
        return self.n if self.in_memory else max(1, 4 * self._chunk_rows())

    @property
    def reads(self) -> int:
        """How many times the pool was read, counted in rows and rounded up."""
        return -(-self.rows_read // max(self.n, 1))

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order, in pieces of moderate size, each with its place."""
        step = self._chunk_rows()
        if self._values is not None:
            self.rows_read += self.n
        for begin in range(0, self.n, step):
            end = min(begin + step, self.n)
            yield slice(begin, end), self._read(begin, end) if self._values is None else self._values[begin:end]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows ``[A, d]`` in the dtype of the pool."""
        if self._values is None:
            return self._take(rows)
        self.rows_read += len(rows)
        return self._values.index_select(0, rows)

    def everything(self) -> Tensor:
        """All rows ``[n, d]`` of a pool in memory."""
        assert self._values is not None
        self.rows_read += self.n
        return self._values

    def _chunk_rows(self) -> int:
        """A power of two, so that chunks are nodes of the tree."""
        return 1 << max(1, _CHUNK_BYTES // max(1, self.width * self.dtype.itemsize)).bit_length() - 1

    def _read(self, begin: int, end: int, room: np.ndarray | None = None) -> Tensor:
        assert self._parts is not None
        self.rows_read += end - begin
        return self._parts.read(begin, end, room)

    def _take(self, rows: Tensor, room: np.ndarray | None = None) -> Tensor:
        assert self._parts is not None
        self.rows_read += len(rows)
        return self._parts.take(rows.numpy(), room)

    def _blocks(self, rows: Tensor, centers: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Parts of ``rows`` as (which ones, values, their rows in the values), to be compared with ``centers`` centres.

        Values from files are valid until the next part is asked for.
        """
        if self._values is not None:
            step = max(1, _PAIRS // max(1, centers))
            for begin in range(0, len(rows), step):
                part = slice(begin, min(begin + step, len(rows)))
                if len(rows) > step:
                    self.note(f"comparing sample {begin} of {len(rows)} with {centers} centres")
                self.rows_read += part.stop - begin
                yield part, self._values, rows[part]
            return
        assert self._parts is not None
        room = self._parts.room(min(self._chunk_rows(), self.n))  # each part overwrites the one before
        for part, dense in self._parts_of(rows):
            here = rows[part]
            first = int(here[0]) if dense else 0
            values = self._read(first, int(here[-1]) + 1, room) if dense else self._take(here, room)
            yield part, values, here - first if dense else torch.arange(len(here))

    def _parts_of(self, rows: Tensor) -> Iterator[tuple[slice, bool]]:
        """Parts of ``rows`` of about a chunk's size, and whether each is ascending and dense enough to read through."""
        step, begin = self._chunk_rows(), 0
        rising = bool((rows.diff() > 0).all())
        windows = torch.arange(0, self.n + step, step) if rising else torch.empty(0, dtype=torch.int64)
        cuts = torch.searchsorted(rows, windows).tolist() if rising else list(range(0, len(rows) + step, step))
        for low, high in zip(cuts, (min(cut, len(rows)) for cut in cuts[1:]), strict=False):
            dense = rising and _DENSE * (high - low) >= step
            if begin < low and (dense or high - begin > step):
                yield slice(begin, low), False
                begin = low
            if begin < high and dense:
                yield slice(begin, high), True
                begin = high
        if begin < len(rows):
            yield slice(begin, len(rows)), False

    def fold(self, rows: Tensor, start: Tensor, centers: Tensor, delta: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest centre of each of ``rows`` after ``centers[start:]`` are added: distance and the centre's index."""
        parts = [
            kcenter.fold(
                values,
                where,
                start[part],
                centers,
                self.mean,
                delta[part],
                owner[part],
                scale=self.scale,
                metric=self.metric,
            )
            for part, values, where in self._blocks(rows, len(centers))
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([delta[:0], *(d for d, _ in parts)]), torch.cat([owner[:0], *(o for _, o in parts)])

    def count(self, centers: Tensor, radius: float, rows: Tensor | None = None) -> Tensor:
        """How many of ``centers`` lie within ``radius`` of each of ``rows``, all by default."""
        rows = torch.arange(self.n, device=self.device) if rows is None else rows
        return torch.cat(
            [
                rows[:0],
                *(
                    kcenter.count(
                        values, where, centers, self.mean, radius=radius, scale=self.scale, metric=self.metric
                    )
                    for _, values, where in self._blocks(rows, len(centers))
                ),
            ]
        )

    def products(self, rows: Tensor, centers: Tensor, shift: Tensor) -> Tensor:
        """``<x - shift, c>`` of each of ``rows`` (cosine: of its unit row) with each of ``centers``, ``[A, n]``."""
        parts = []
        for part, values, where in self._blocks(rows, len(centers)):
            if self.metric == kcenter.METRICS["cosine"]:
                values, where = unit_rows(values[where]), torch.arange(part.stop - part.start, device=self.device)
            parts.append(kcenter.products(values, where, centers, shift))
        return torch.cat([centers.new_empty(0, len(centers)), *parts])

    def centers(self, rows: Tensor) -> Tensor:
        """Samples in the form of centres."""
        return self.gather(rows).double()

    def assign(self, points: Tensor, centers: Tensor) -> Tensor:
        """Nearest of ``centers`` for points ``[n, d]`` float64 that need not be in the pool."""
        here = torch.arange(len(points), device=self.device)
        none = torch.full_like(here, -1)
        delta = torch.full(here.shape, torch.inf, dtype=torch.float64, device=self.device)
        start = torch.zeros_like(here)
        return kcenter.fold(points, here, start, centers, self.mean, delta, none, scale=self.scale, metric=self.metric)[
            1
        ]

    def distances_to(self, center: Tensor, metric: int | None = None) -> Tensor:
        """Distance of every sample to one centre ``[1, d]``, ``[N]`` float64."""
        parts = []
        for _, values, where in self._blocks(torch.arange(self.n, device=self.device), 1):
            none = torch.full_like(where, -1)
            delta = torch.full(where.shape, torch.inf, dtype=torch.float64, device=self.device)
            metric = self.metric if metric is None else metric
            start = torch.zeros_like(where)
            parts.append(
                kcenter.fold(values, where, start, center, self.mean, delta, none, scale=self.scale, metric=metric)[0]
            )
        return torch.cat(parts) if parts else center.new_empty(0)

    def norms(self) -> Tensor:
        """Euclidean norm of every sample, ``[N]`` float64."""
        return self.distances_to(torch.zeros_like(self.mean)[None], kcenter.METRICS["euclidean"])
