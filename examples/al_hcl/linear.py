"""Closed-form linear path: ridge regression with leave-one-video-out predictions, which the network then corrects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .encoders import masked_mean
from .model import Inputs

STRENGTHS = tuple(10.0 ** (e / 2) for e in range(2, 9))
SIDE_SCALES = (0.0, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class LinearPath:
    """Ridge predictions in units of the target.

    Attributes:
        everywhere: Prediction for every row, ``[N]``.
        left_out: Prediction for each labelled row by the fit without its video, ``[n]``: on these residuals the
            network is trained, since those of the fit itself are too small.
        strength: Chosen ridge strength.
        side_scale: Chosen scale of the modalities beside the first.
        slope: By which the left-out predictions are stretched to fit best; it undoes the ridge's shrinkage.
        valid_mae: Mean absolute error on the validation rows.
    """

    everywhere: Tensor
    left_out: Tensor
    strength: float
    side_scale: float
    slope: float
    valid_mae: float


def fit_linear(inputs: Inputs, labels: Tensor, labelled: Tensor, valid: Tensor, video: Tensor) -> LinearPath:
    """Fit on the labelled rows; strength and side scale have the least validation error.

    Leaving out whole videos keeps speaker traits from passing as sentiment: neighbours share both.

    Args:
        inputs: All rows, standardised; sequences enter by their mean.
        labels: Target of all rows ``[N]``, of which only labelled and validation rows are read.
        labelled: Row numbers ``[n]``.
        valid: Row numbers.
        video: Video number of all rows ``[N]``.

    Note:
        With centred features ``X = U diag(r) Vᵀ`` the fit is ``H y``, ``H = U diag(r²/(r² + s)) Uᵀ + 11ᵀ/n``; without
        the rows g of a video it errs there by ``(I - H_gg)⁻¹ (y_g - (H y)_g)``. All in float64.
    """
    blocks = [masked_mean(f, m).double() for f, m in zip(inputs.features, inputs.masks, strict=True)]
    y, y_valid = labels[labelled].double(), labels[valid].double()
    n, offset = len(y), y.mean()
    groups = [torch.nonzero(video[labelled] == v)[:, 0] for v in video[labelled].unique()]
    back = torch.cat(groups).argsort()
    best: LinearPath | None = None
    for scale in SIDE_SCALES:
        x = torch.cat([blocks[0], *(scale * b for b in blocks[1:])] if scale else blocks[:1], -1)
        centred = x - x[labelled].mean(0)
        u, root, v = _thin_svd(centred[labelled])
        power, along = root.square(), u.T @ (y - offset)
        for strength in STRENGTHS:
            shrink = power / (power + strength)
            residual = y - (u @ (shrink * along) + offset)
            left_out = y - torch.cat([_without(u[g], shrink, residual[g], n) for g in groups])[back]
            slope = _slope(left_out, y)
            raw = centred @ (v @ (root / (power + strength) * along))
            everywhere = offset + slope * raw
            error = float((everywhere[valid] - y_valid).abs().mean())
            if best is None or error < best.valid_mae:
                held = offset + slope * (left_out - offset)
                best = LinearPath(everywhere.float(), held.float(), strength, scale, slope, error)
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


def _thin_svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x = U diag(root) Vᵀ`` from the smaller Gram matrix: several times cheaper than a general decomposition."""
    wide = x.shape[0] <= x.shape[1]
    power, basis = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    keep = power > 1e-10 * power[-1].clamp_min(1e-30)
    root, basis = power[keep].sqrt(), basis[:, keep]
    return (basis, root, x.T @ basis / root) if wide else (x @ basis / root, root, basis)
