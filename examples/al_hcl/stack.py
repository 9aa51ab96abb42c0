"""Weights of the path's parts, drawn (shrunk) towards one of them as far as the labels allow."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from examples.msa.closed_form import STRETCH, fold_of, stack_weights

# How many extra rows the part that weights are drawn towards counts as, strongest pull first.
PRIOR_ROWS = (300, 100, 30, 10)


def drawn_weights(predictions: np.ndarray, y: np.ndarray, groups: np.ndarray, home: int) -> tuple[np.ndarray, float]:
    """Non-negative weights of several predictors, from predictions of rows that they were not fitted on.

    With a hundred labels and many parts, some of them uninformative, weights that are merely fitted are partly due to
    chance. Each candidate is therefore a weighted mean drawn towards the part ``home``, as if that part were right on
    the extra rows of ``PRIOR_ROWS``, and then stretched to fit the labels; the last candidate is ``stack_weights``,
    which is not drawn towards any part. The candidate that is used is the most strongly drawn one whose error on
    left-out videos is within a standard error (over videos) of the least.

    Args:
        predictions: ``[n, P]``.
        y: Truth ``[n]``.
        groups: Video of each row ``[n]``.
        home: Index of the part that weights are drawn towards.

    Returns:
        Weights ``[P]`` and a constant to add: ``predictions @ weights + added``.
    """

    def fit(number: int, rows: np.ndarray) -> tuple[np.ndarray, float]:
        if number == len(PRIOR_ROWS):
            return stack_weights(predictions[rows], y[rows], groups[rows])
        return _drawn(predictions[rows], y[rows], home, PRIOR_ROWS[number])

    fold = fold_of(groups)
    errors = np.empty((len(PRIOR_ROWS) + 1, len(y)))
    for number, error in enumerate(errors):
        for k in np.unique(fold):
            held = fold == k
            weights, added = fit(number, ~held)
            error[held] = np.square(predictions[held] @ weights + added - y[held])
    video = np.unique(groups, return_inverse=True)[1]
    best = int(errors.mean(1).argmin())
    for number in range(best):
        more = np.bincount(video, errors[number] - errors[best])
        spread = np.square(more - more.mean()).sum() * len(more) / max(1, len(more) - 1)
        if more.sum() <= np.sqrt(spread):
            best = number
            break
    return fit(best, np.arange(len(y)))


def _drawn(predictions: np.ndarray, y: np.ndarray, home: int, rows: int) -> tuple[np.ndarray, float]:
    """Weights of a mean that is drawn towards one part and stretched about the labels' mean by 1 to ``STRETCH``."""
    width = predictions.shape[1]
    pull = np.sqrt(rows * np.square(predictions - y[:, None]).mean(0).min())
    # An extra row that only weights with sum 1 satisfy, heavy enough to force them to it.
    heavy = 1e4 * float(np.sqrt(np.square(predictions).sum()) + 1e-30)
    left = np.vstack([predictions, pull * np.eye(width), np.full(width, heavy)])
    weights = nnls(left, np.concatenate([y, pull * np.eye(width)[home], [heavy]]))[0]
    weights /= weights.sum()
    mean = predictions @ weights
    power = float(np.square(mean - mean.mean()).sum())
    slope = float((mean - mean.mean()) @ (y - y.mean())) / max(power, 1e-30)
    stretch = min(max(slope, 1.0), STRETCH)
    return weights * stretch, float(y.mean()) * (1 - stretch)
