"""The pool of embeddings: a tensor, an array read in chunks, or factors whose products are never formed."""

import hashlib
import math
import mmap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msacore.ops import kcenter

_CHUNK_BYTES = 4 << 20  # of an array that may be larger than memory
_PAIRS = 1 << 27  # of sample and centre: about a second's work, so that an interrupt is heard
_DENSE = 8  # rows so many apart cost as much one by one as together with those between
_SCATTERED_ROWS = 64  # each may map a huge page around it
_LARGEST = 1e150  # beyond it squares overflow in float64
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_array(name: str, value: Any) -> Tensor | np.ndarray:
    """A tensor or array in a dtype the operators take; integers become float64. Memory-mapped arrays stay mapped."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.is_complex() or value.layout != torch.strided:
            raise ValueError(f"select: expected `{name}` to be a dense real tensor, got {value.dtype}, {value.layout}")
        return value if value.dtype in _FLOATING else value.double()
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise ValueError(f"select: expected `{name}` to hold real numbers, got dtype {array.dtype}")
    return array


def _tensor(chunk: np.ndarray) -> Tensor:
    """A chunk as a tensor; shares memory where dtype and layout allow it, and is never written."""
    dtype = chunk.dtype.newbyteorder("=") if chunk.dtype.kind == "f" else np.dtype(np.float64)
    native = np.ascontiguousarray(chunk, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(native)


def _check_magnitude(name: str, magnitude: float) -> None:
    if magnitude > _LARGEST:
        raise ValueError(f"select: `{name}` reach {magnitude:g}; squares above {_LARGEST:g} overflow in float64")


def _silent(text: str) -> None:
    """Nobody watches."""


class Pool:
    """Samples ``[N, d]`` and their exact distances to centres, which are float64 rows ``[n, d]``.

    ``note`` is told what goes on during steps that make no pick.
    """

    def __init__(self, embeddings: Any, distance: str, note: Callable[[str], Any] = _silent) -> None:
        self.note = note
        values = as_array("embeddings", embeddings)
        if values.ndim != 2:
            raise ValueError(f"select: expected `embeddings` to have shape [N, d], got {list(values.shape)}")
        self._file: mmap.mmap | None = None
        self._array: np.ndarray | None = None
        self._values: Tensor | None = None
        if isinstance(values, np.memmap):
            base: Any = values
            while isinstance(base, np.ndarray):
                base = base.base
            self._file = base if isinstance(base, mmap.mmap) else None
            self._array = values
        elif isinstance(values, np.ndarray):
            self._values = _tensor(values)
        else:
            self._values = values.contiguous()
        self.n, self.width = int(values.shape[0]), int(values.shape[1])
        self.metric = kcenter.METRICS[distance]
        self.device = torch.device("cpu") if self._values is None else self._values.device
        self.dtype = _tensor(np.empty((0, 1), values.dtype)).dtype if isinstance(values, np.ndarray) else values.dtype
        self.rows_read = 0
        self._scan()

    def _scan(self) -> None:
        """One pass: finite or not, checksums, magnitude, mean."""
        sums = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        checksums, magnitude = hashlib.sha256(f"{self.n} {self.width} {self.dtype}".encode()), 0.0
        for begin, chunk in self.chunks():
            self.note(f"checking row {begin} of {self.n}")
            chunk_sums, chunk_checksums, largest, bad = kcenter.scan(chunk)
            if int(bad) < len(chunk):
                raise ValueError(f"select: `embeddings` holds a NaN or infinite value, first in row {begin + int(bad)}")
            sums += chunk_sums.sum(0)
            checksums.update(chunk_checksums.cpu().numpy().data)
            magnitude = max(magnitude, float(largest))
        _check_magnitude("embeddings", magnitude)
        self.fingerprint = checksums.hexdigest()
        self.mean = sums / max(self.n, 1)
        self.widen(magnitude)

    def widen(self, magnitude: float) -> None:
        """Let the float32 filter hold values up to ``magnitude``: a power of two brings them to about 1."""
        self._magnitude = max(magnitude, getattr(self, "_magnitude", 0.0))
        self.scale = 2.0 ** -math.frexp(self._magnitude)[1] if self._magnitude > 0 else 1.0

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

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows in order, with the number of the first one of each chunk."""
        if self._values is not None:
            self.rows_read += self.n
            yield 0, self._values
            return
        step = self._chunk_rows()
        for begin in range(0, self.n, step):
            yield begin, self._read(slice(begin, begin + step))

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows in order and in pieces of moderate size, with their place in the pool."""
        step = self._chunk_rows()
        for _, values in self.chunks() if self._values is not None else ():
            for begin in range(0, self.n, step):
                yield slice(begin, begin + step), values[begin : begin + step]
        if self._values is None:
            for begin, values in self.chunks():
                yield slice(begin, begin + len(values)), values

    def gather(self, rows: Tensor) -> Tensor:
        """Rows ``[A, d]`` in the dtype of the pool."""
        if self._values is None:
            return self._read(rows.numpy())
        self.rows_read += len(rows)
        return self._values.index_select(0, rows)

    def _chunk_rows(self) -> int:
        return max(1, _CHUNK_BYTES // max(1, self.width * self.dtype.itemsize))

    def _read(self, rows: Any) -> Tensor:
        assert self._array is not None
        if isinstance(rows, slice):
            chunk = np.array(self._array[rows])
            self._release()
        else:
            chunk = np.empty((len(rows), self.width), self._array.dtype)
            for begin in range(0, len(rows), _SCATTERED_ROWS):
                part = slice(begin, begin + _SCATTERED_ROWS)
                chunk[part] = self._array[rows[part]]
                self._release()
        self.rows_read += len(chunk)
        return _tensor(chunk)

    def _release(self) -> None:
        """Give back the mapped pages, which count as ours until then."""
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)

    def _blocks(self, rows: Tensor, centers: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Parts of ``rows`` as (which ones, values, their rows in the values), to be compared with so many centres."""
        if self._values is not None:
            step = max(1, _PAIRS // max(1, centers))
            for begin in range(0, len(rows), step):
                part = slice(begin, min(begin + step, len(rows)))
                if len(rows) > step:
                    self.note(f"comparing sample {begin} of {len(rows)} with {centers} centres")
                self.rows_read += part.stop - begin
                yield part, self._values, rows[part]
            return
        for part, dense in self._parts_of(rows):
            here = rows[part]
            first = int(here[0]) if dense else 0
            values = self._read(slice(first, int(here[-1]) + 1) if dense else here.numpy())
            yield part, values, here - first if dense else torch.arange(len(here))

    def _parts_of(self, rows: Tensor) -> Iterator[tuple[slice, bool]]:
        """Parts of ``rows`` of about a chunk's size, and which of them rise and lie densely enough to read through."""
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
        """Nearest centre of each of ``rows`` after ``centers[start:]`` came in: distance and the centre's number."""
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
                kcenter.count(values, where, centers, self.mean, radius=radius, scale=self.scale, metric=self.metric)
                for _, values, where in self._blocks(rows, len(centers))
            ]
        )

    def greedy(
        self, rows: Tensor, weight: Tensor, delta: Tensor, bound: Tensor, bound_index: Tensor, limit: int
    ) -> tuple[Tensor, Tensor]:
        """Greedy picks among ``rows`` while the best precedes the bound: positions in ``rows`` (then -1), scores."""
        none = rows[:0]
        return kcenter.greedy(
            self.gather(rows), weight, delta, rows, none, none, bound, bound_index, limit=limit, metric=self.metric
        )

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

    def outside_centers(self, labeled: Tensor) -> Tensor:
        """Centres that are no samples of the pool, ``[n, d]``, checked."""
        if labeled.dim() != 2 or labeled.shape[1] != self.width:
            raise ValueError(
                "select: expected `labeled` to be indices [n] or centres [n, d] of the pool's width "
                f"{self.width}, got shape {list(labeled.shape)}"
            )
        centers = labeled.to(self.device).double()
        bad = ~centers.isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(f"select: `labeled` holds a NaN or infinite value, first in row {int(bad.int().argmax())}")
        magnitude = float(centers.abs().max()) if centers.numel() else 0.0
        _check_magnitude("labeled", magnitude)
        self.widen(magnitude)
        return centers

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
