"""Some anchors against some candidates of a contrastive loss: sums that can be merged, gradients from merged sums."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msacore.ops.info_nce_partial import (
    info_nce_partial,
    info_nce_partial_backward,
    info_nce_partial_positives,
)

ALL, NEGATIVES, DECOUPLED = 0, 1, 2  # denominators, as the operators number them
SUMS = 4  # numbers per row in `Tile.sums`
POSITIVES = 2  # and in `Tile.positives`


@dataclass(frozen=True)
class Rows:
    """Rows that are anchors or candidates.

    Attributes:
        x: ``[n, d]``.
        labels: ``[n]``, or None.
        mask: ``[n]`` bool, or None.
        begin: Row number of the first row in the whole batch.
    """

    x: Tensor
    labels: Tensor | None
    mask: Tensor | None
    begin: int

    def part(self, begin: int, end: int) -> "Rows":
        labels, mask = (None if t is None else t[begin:end] for t in (self.labels, self.mask))
        return Rows(self.x[begin:end], labels, mask, self.begin + begin)

    def takes_part(self) -> Tensor | None:
        """Which rows take part, ``[n]`` bool; None where all do."""
        if self.labels is None:
            return self.mask
        labelled = self.labels >= 0
        return labelled if self.mask is None else self.mask & labelled

    def used(self) -> Tensor:
        """How many rows take part, 0-d int64."""
        part = self.takes_part()
        return self.x.new_full((), len(self.x), dtype=torch.int64) if part is None else part.sum()


@dataclass(frozen=True)
class Tile:
    """Pairs of anchors and candidates; without labels and weights, pairs of equal row number are positive.

    Attributes:
        anchors: ``[n, d]``.
        candidates: ``[m, d]``.
        symmetric: The candidates are anchors of the anchors too.
        exclude_self: Leave out pairs of equal row number.
        normalize: As in `msacore.info_nce`.
        denominator: ``ALL``, ``NEGATIVES`` or ``DECOUPLED``.
        temperature: A number; not read where there is ``learned``.
        learned: 0-d, or None.
        weights: ``[n, m]``, or None.
        queue: ``[Q, d]`` further candidates of every anchor, positive for none; or None.
        queue_mask: ``[Q]`` bool, or None.
    """

    anchors: Rows
    candidates: Rows
    symmetric: bool
    exclude_self: bool
    normalize: bool
    denominator: int
    temperature: float
    learned: Tensor | None = None
    weights: Tensor | None = None
    queue: Tensor | None = None
    queue_mask: Tensor | None = None

    def _inputs(self) -> tuple[Tensor | None, ...]:
        a, c = self.anchors, self.candidates
        of_rows = (self.learned, a.labels, c.labels, self.weights, self.queue, self.queue_mask, a.mask, c.mask)
        return a.x, c.x, *of_rows

    def _options(self) -> dict[str, float | bool]:
        return {
            "temperature": self.temperature,
            "symmetric": self.symmetric,
            "exclude_self": self.exclude_self,
            "normalize": self.normalize,
            "diagonal": self.anchors.begin - self.candidates.begin,
        }

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums of anchors ``[4, n]`` and, where symmetric, of candidates ``[4, m]``, for :func:`merge`."""
        return info_nce_partial(*self._inputs(), **self._options(), denominator=self.denominator)

    def positives(self, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the positives against the negatives, given :func:`negatives` of the sums over all tiles."""
        dtype = self.dtype
        return info_nce_partial_positives(*self._inputs(), of_rows.to(dtype), of_columns.to(dtype), **self._options())

    def gradients(
        self, scale: tuple[Tensor, Tensor], stats: tuple[Tensor, Tensor], used: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of anchors, candidates, temperature, weights and queue.

        Args:
            scale: Gradient of the loss of every anchor, and of every candidate as an anchor; 0-d or one per row.
            stats: What :func:`finish` keeps of anchors and, where symmetric, of candidates.
            used: How many anchors and candidates take part in all tiles.
        """
        dtype = self.dtype
        rows, columns = (t.to(dtype) for t in stats)
        scales = [t.to(dtype) for t in scale]
        options = self._options()
        return info_nce_partial_backward(
            *scales, *self._inputs(), rows, columns, *used, **options, denominator=self.denominator
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of what is kept of a row."""
        return torch.float64 if self.anchors.x.dtype == torch.float64 else torch.float32

    @property
    def tau(self) -> float | Tensor:
        return self.temperature if self.learned is None else self.learned.detach().double()


def merge(parts: Sequence[Tensor], tau: float | Tensor) -> Tensor:
    """Sums ``[4, n]`` over several tiles of the same rows, in the order given; float64."""
    if len(parts) == 1:
        return parts[0].double()
    parts = [part.double() for part in parts]
    highest = torch.stack([part[0] for part in parts]).amax(0)
    base = torch.where(highest.isfinite(), highest, 0.0)
    result = torch.zeros_like(parts[0][1:])
    for part in parts:
        factor = ((part[0] - base) / tau).exp()
        result = result + torch.stack([part[1] * factor, part[2], part[3]])
    return torch.cat([highest.unsqueeze(0), result])


def add(parts: Sequence[Tensor]) -> Tensor:
    """Plain sums over several tiles, in the order given; float64."""
    result = parts[0].double()
    for part in parts[1:]:
        result = result + part
    return result


def negatives(sums: Tensor) -> Tensor:
    """What `Tile.positives` needs of merged sums: highest similarity and logarithm relative to it, ``[2, n]``."""
    base = torch.where(sums[0].isfinite(), sums[0], 0.0)
    return torch.stack([base, sums[1].log()])


def finish(
    sums: Tensor, positives: Tensor | None, denominator: int, tau: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the sums of anchors over all candidates: the losses, what backward needs, and which anchors count."""
    base, log = negatives(sums)
    weight, similarity = sums[2], sums[3]
    if denominator == DECOUPLED:
        weight = torch.where(sums[1] == 0, 0.0, weight)
    kept = weight != 0
    divisor = torch.where(kept, weight, 1.0)

    def of_kept(value: Tensor) -> Tensor:
        return torch.where(kept, value, 0.0)

    if positives is None:
        mean = of_kept(similarity / divisor)
        return of_kept((base - mean) / tau + log), torch.stack([base, log, mean, weight]), kept
    loss, rest = of_kept(positives[0] / divisor), of_kept(positives[1] / divisor)
    return loss, torch.stack([base, log, loss, weight, rest]), kept
