"""Closed-form path: kernel ridge regression with leave-one-video-out predictions, which the network then corrects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoders import masked_mean
from .model import Inputs

STRENGTHS = tuple(10.0 ** (e / 2) for e in range(-4, 3))
# In units of a feature's deviation; the second is so long that the kernel is almost linear.
LENGTHS = (1.0, 3.0)
# Weights of the squared distances of the first modality, of each other one, and of the embedding learned before labels.
VIEW_WEIGHTS = {
    "first": (1.0, 0.0, 0.0),
    "first, weak others": (1.0, 0.1, 0.0),
    "all": (1.0, 1.0, 0.0),
    "learned": (0.0, 0.0, 1.0),
    "all, learned": (1.0, 1.0, 1.0),
}
VIEWS = tuple(VIEW_WEIGHTS)


@dataclass(frozen=True)
class KernelPath:
    """Predictions in units of the target.

    Attributes:
        everywhere: Prediction for every row, ``[N]``.
        left_out: Prediction for each labelled row by the fit without its video, ``[n]``: on these residuals the
            network is trained, since those of the fit itself are too small.
        view: Name of the chosen view of the features.
        length: Chosen length scale.
        strength: Chosen ridge strength.
        slope: By which the left-out predictions are stretched to fit best; it undoes the ridge's shrinkage.
        error: Mean absolute error of what has a label: labelled rows, left out, and validation rows.
        offset: Mean target of the labelled rows.
        weights: Of the labelled rows, ``[n]``: a row predicts ``offset + slope * (kernel with them) @ weights``.
    """

    everywhere: Tensor
    left_out: Tensor
    view: str
    length: float
    strength: float
    slope: float
    error: float
    offset: float
    weights: Tensor


@dataclass(frozen=True)
class LearnedScale:
    """Mean and deviation ``[k]`` of the embedding learned before labels, over the train part; float64."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, learned: Tensor, train: Tensor) -> LearnedScale:
        """From the embedding of all rows and the numbers of the train rows."""
        z = learned.double()[train]
        return cls(z.mean(0), z.std(0, correction=0).clamp_min(1e-6))

    def __call__(self, learned: Tensor) -> Tensor:
        return (learned.double() - self.mean) / self.deviation


def squared_distances(x: Tensor, others: Tensor) -> Tensor:
    """Mean over the columns of the squared difference of every row of ``x`` and of ``others``, ``[N, n]``."""
    power = x.square().sum(1)
    return (power[:, None] + others.square().sum(1) - 2 * x @ others.T).clamp_min(0) / x.shape[1]


def feature_blocks(inputs: Inputs) -> list[Tensor]:
    """Features of each modality ``[N, d_m]`` float64; sequences enter by their mean."""
    return [masked_mean(f, m).double() for f, m in zip(inputs.features, inputs.masks, strict=True)]


def view_distances(view: str, blocks: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Squared distances ``[N, n]`` in one view.

    Args:
        view: Its name.
        blocks: Features per modality, and the standardised learned embedding last, of the rows.
        others: The same of the labelled rows.
    """
    first, beside, own = VIEW_WEIGHTS[view]
    weights = [first, *[beside] * (len(blocks) - 2), own]
    parts = [w * squared_distances(x, y) for w, x, y in zip(weights, blocks, others, strict=True) if w]
    return torch.stack(parts).sum(0)


def feature_views(inputs: Inputs, learned: Tensor, train: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Squared distances ``[N, n]`` to ``rows`` in each view of the samples.

    The first modality alone, with the others as weak or equal companions, the embedding learned without labels, and
    everything; sequences enter by their mean.

    Args:
        inputs: All rows, standardised.
        learned: Embedding of all rows ``[N, k]``; its columns are standardised over ``train``.
        train: Row numbers of the train part.
        rows: Row numbers.
    """
    blocks = [*feature_blocks(inputs), LearnedScale.of(learned, train)(learned)]
    base, *beside, own = (squared_distances(b, b[rows]) for b in blocks)
    side = torch.stack(beside).sum(0)
    return dict(zip(VIEWS, (base, base + 0.1 * side, base + side, own, base + side + own), strict=True))


def fit_path(views: dict[str, Tensor], labels: Tensor, labelled: Tensor, valid: Tensor, video: Tensor) -> KernelPath:
    """Fit on the labelled rows; view, length and strength have the least error on left-out and validation rows.

    Leaving out whole videos keeps speaker traits from passing as sentiment: neighbours share both.

    Args:
        views: Squared distances of all rows to the labelled ones, ``[N, n]``, per view.
        labels: Target of all rows ``[N]``, of which only labelled and validation rows are read.
        labelled: Row numbers ``[n]``.
        valid: Row numbers.
        video: Video number of all rows ``[N]``.

    Note:
        With ``K = exp(-D / (2 length²)) = U diag(p) Uᵀ`` on the labelled rows and the mean label as offset, the fit is
        ``H y``, ``H = U diag(p/(p + s)) Uᵀ + 11ᵀ/n``; without the rows g of a video it errs there by
        ``(I - H_gg)⁻¹ (y_g - (H y)_g)``, the offset's influence approximate. All in float64.
    """
    y, y_valid = labels[labelled].double(), labels[valid].double()
    n, offset = len(y), y.mean()
    groups = [torch.nonzero(video[labelled] == v)[:, 0] for v in video[labelled].unique()]
    back = torch.cat(groups).argsort()
    best: KernelPath | None = None
    for view, distances in views.items():
        for length in LENGTHS:
            kernel = torch.exp(distances / (-2 * length**2))
            power, u = torch.linalg.eigh(kernel[labelled])
            power, along = power.clamp_min(0), u.T @ (y - offset)
            for strength in STRENGTHS:
                shrink = power / (power + strength)
                residual = y - (u @ (shrink * along) + offset)
                left_out = y - torch.cat([_without(u[g], shrink, residual[g], n) for g in groups])[back]
                slope = _slope(left_out, y)
                weights = u @ (along / (power + strength))
                held = offset + slope * (left_out - offset)
                on_valid = offset + slope * (kernel[valid] @ weights)
                error = float(torch.cat([held - y, on_valid - y_valid]).abs().mean())
                if best is None or error < best.error:
                    everywhere = offset + slope * (kernel @ weights)
                    best = KernelPath(
                        everywhere.float(), held.float(), view, length, strength, slope, error, float(offset), weights
                    )
    assert best is not None
    return best


def _slope(prediction: Tensor, y: Tensor) -> float:
    """Least-squares stretch of ``prediction`` about its mean, within [1, 3]: it only undoes shrinkage."""
    p = prediction - prediction.mean()
    return float(((p * (y - y.mean())).sum() / p.square().sum().clamp_min(1e-12)).clamp(1.0, 3.0))


def _without(u: Tensor, shrink: Tensor, residual: Tensor, n: int) -> Tensor:
    """Errors on one video's rows of the fit without them; the ridge on the diagonal serves a single labelled video."""
    rest = torch.eye(len(u), dtype=u.dtype, device=u.device) * (1 + 1e-6) - (u * shrink) @ u.T - 1 / n
    return torch.linalg.solve(rest, residual)
