"""Metrics of multimodal sentiment analysis, with the definitions of MMSA, and what curves and paired runs need.

MOSI and MOSEI: two-class accuracy and weighted F1 with zeros (``has0``: negative against the rest) and without
(``non0``: negative against positive), Acc-7/5/3 by rounding clipped scores half to even, unclipped MAE and correlation.
SIMS: scores and labels are clipped to [-1, 1]; zero counts as class 0 of Acc-2; Acc-3 and Acc-5 use the set's own bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import sklearn
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

SIMS_BINS = {"acc3": (-0.1, 0.1), "acc5": (-0.7, -0.1, 0.1, 0.7)}
HIGHER_IS_BETTER = {"mae": False}
# What reports show of each family, in this order.
REPORTED = {
    "mosi": ("acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "acc7", "mae", "corr"),
    "sims": ("acc2", "acc2_non0", "f1", "acc5", "acc3", "mae", "corr"),
}
REPORTED["mosei"] = REPORTED["mosi"]
# What reports call them.
NAMES = {
    "acc2_has0": "Acc-2 has0",
    "acc2_non0": "Acc-2 neg/pos",
    "acc2": "Acc-2",
    "f1_has0": "F1 has0",
    "f1_non0": "F1 neg/pos",
    "f1": "F1",
    "acc7": "Acc-7",
    "acc5": "Acc-5",
    "acc3": "Acc-3",
    "mae": "MAE",
    "corr": "Corr",
}


def limits(metric: str) -> tuple[float, float]:
    """Least and greatest value that a metric can take."""
    return {"mae": (0.0, math.inf), "corr": (-1.0, 1.0)}.get(metric, (0.0, 1.0))


def evaluate(pred: np.ndarray, y: np.ndarray, family: str) -> dict[str, float | bool | int]:
    """All metrics of one set of predictions.

    Args:
        pred: Predicted scores, ``[N]``.
        y: Labels, ``[N]``.
        family: ``"mosi"``, ``"mosei"`` or ``"sims"``.

    Returns:
        ``n``, ``mae``, ``corr``, ``corr_defined`` (False when a constant input leaves the correlation undefined,
        which is then nan), ``acc2_non0`` and ``f1_non0`` for all families; ``acc2_has0``, ``f1_has0``, ``acc7``,
        ``acc5``, ``acc3`` for MOSI and MOSEI; ``acc2``, ``f1``, ``acc5``, ``acc3`` for SIMS. The non0 pair is nan
        when every label is 0.

    Raises:
        ValueError: Shapes differ, there is nothing to score, a value is not finite, or the family is unknown.

    Example:
        >>> evaluate(np.array([1.0, -2.0, 0.5]), np.array([2.0, -1.0, 0.0]), "mosi")["acc2_non0"]
        1.0
    """
    pred, y = np.asarray(pred), np.asarray(y)
    if pred.ndim != 1 or pred.shape != y.shape:
        raise ValueError(f"evaluate: pred and y must be 1-d of equal length, got {pred.shape} and {y.shape}")
    if len(y) == 0:
        raise ValueError("evaluate: there is nothing to score (0 samples)")
    for name, values in (("pred", pred), ("y", y)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"evaluate: {int((~np.isfinite(values)).sum())} of {len(values)} values of {name} are not finite"
            )
    if family not in ("mosi", "mosei", "sims"):
        raise ValueError(f"evaluate: family must be 'mosi', 'mosei' or 'sims', got {family!r}")
    # scikit-learn's own checks, which repeat those above, took two fifths of the time.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        return _sims(pred, y) if family == "sims" else _mosi(pred, y)


def _mosi(pred: np.ndarray, y: np.ndarray) -> dict[str, float | bool | int]:
    result = _binary(pred >= 0, y >= 0, "_has0") | _non0(pred, y)
    for name, limit in (("acc7", 3), ("acc5", 2), ("acc3", 1)):
        result[name] = float(np.mean(np.round(np.clip(pred, -limit, limit)) == np.round(np.clip(y, -limit, limit))))
    return {"n": len(y), **result, **_error(pred, y)}


def _sims(pred: np.ndarray, y: np.ndarray) -> dict[str, float | bool | int]:
    pred, y = np.clip(pred, -1, 1), np.clip(y, -1, 1)
    result = _binary(pred > 0, y > 0, "") | _non0(pred, y)
    for name, edges in SIMS_BINS.items():
        # In float32, as the labels are stored: 0.1 belongs to the bin it closes whatever the precision of the caller.
        edges32 = np.asarray(edges, dtype=np.float32)
        bins = [np.digitize(v.astype(np.float32), edges32, right=True) for v in (pred, y)]
        result[name] = float(np.mean(bins[0] == bins[1]))
    return {"n": len(y), **result, **_error(pred, y)}


def _binary(pred: np.ndarray, truth: np.ndarray, suffix: str) -> dict[str, float | bool | int]:
    return {
        f"acc2{suffix}": float(accuracy_score(truth, pred)),
        f"f1{suffix}": float(f1_score(truth, pred, average="weighted", zero_division=0)),
    }


def _non0(pred: np.ndarray, y: np.ndarray) -> dict[str, float | bool | int]:
    keep = y != 0
    if not keep.any():
        return {"acc2_non0": math.nan, "f1_non0": math.nan}
    return _binary(pred[keep] > 0, y[keep] > 0, "_non0")


def _error(pred: np.ndarray, y: np.ndarray) -> dict[str, float | bool | int]:
    pred, y = pred.astype(np.float64), y.astype(np.float64)
    # ptp, not std: the deviation of a constant need not round to 0.
    defined = bool(np.ptp(pred) > 0 and np.ptp(y) > 0)
    corr = float(np.corrcoef(pred, y)[0, 1]) if defined else math.nan
    return {"mae": float(np.mean(np.abs(pred - y))), "corr": corr, "corr_defined": defined}


def area_under_curve(x: Sequence[float], y: Sequence[float], log: bool = False) -> float:
    """Trapezoid area under a metric curve divided by its span: the mean metric over ``x`` (or over ``log x``).

    Args:
        x: Label counts or missing rates, strictly rising; positive when ``log``.
        y: Metric at each point.
        log: Weigh equal ratios of ``x`` equally, as for label counts.

    Raises:
        ValueError: Fewer than two points, unequal lengths, ``x`` not rising, or not positive with ``log``.

    Example:
        >>> area_under_curve([0.0, 0.5, 1.0], [1.0, 0.5, 0.0])
        0.5
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.ndim != 1 or xs.shape != ys.shape or len(xs) < 2:
        raise ValueError(
            f"area_under_curve: needs two or more points, x and y of equal length; got {xs.shape} and {ys.shape}"
        )
    if not (np.diff(xs) > 0).all() or (log and xs[0] <= 0):
        raise ValueError(f"area_under_curve: x must rise{' and be positive' if log else ''}, got {xs.tolist()}")
    xs = np.log(xs) if log else xs
    return float(np.sum(np.diff(xs) * (ys[1:] + ys[:-1]) / 2) / (xs[-1] - xs[0]))


def mean_interval(values: Sequence[float], level: float = 0.95) -> dict[str, float | int]:
    """Mean, sample deviation and t-interval of the mean: ``n``, ``mean``, ``sd``, ``low``, ``high``.

    With one value the deviation and the interval are nan; a nan among the values makes every figure nan.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or len(v) == 0:
        raise ValueError(f"mean_interval: expected a non-empty list of numbers, got shape {v.shape}")
    mean = float(v.mean())
    if len(v) == 1:
        return {"n": 1, "mean": mean, "sd": math.nan, "low": math.nan, "high": math.nan}
    sd = float(v.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, len(v) - 1)) * sd / math.sqrt(len(v))
    return {"n": len(v), "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> dict[str, float | int | bool]:
    """t-interval of ``a - b`` over runs that share their seed; ``excludes_zero`` says whether the interval does.

    Raises:
        ValueError: The lists differ in length, so the runs are not paired.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired_difference: runs are not paired, got {a.shape} and {b.shape}")
    result = mean_interval(a - b, level)
    return {**result, "excludes_zero": bool(result["low"] > 0 or result["high"] < 0)}
