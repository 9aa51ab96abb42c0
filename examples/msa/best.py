"""The best checkpoint of each metric: what papers report that pick another epoch for every column of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .metrics import HIGHER_IS_BETTER, REPORTED, evaluate

ONE, EACH = "one checkpoint", "a checkpoint per metric"


class BestPerMetric:
    """Keeps, for each reported metric, when its validation value was best and the weights of that moment.

    Args:
        family: Metric family.
        truth: Labels of the validation rows, ``[n]``.
        state: What :attr:`state` of an earlier object was, to go on from.
    """

    def __init__(self, family: str, truth: np.ndarray, state: dict[str, Any] | None = None) -> None:
        self.family, self.truth = family, np.asarray(truth, dtype=np.float64)
        self.state: dict[str, Any] = state or {"best": {}, "weights": {}}

    def offer(self, prediction: np.ndarray, when: int, weights: Callable[[], Any]) -> None:
        """Judge a moment of the training.

        Args:
            prediction: Of the validation rows, ``[n]``.
            when: Number of the epoch or step; of equal moments the first counts.
            weights: Gives a copy of the weights; called only if some metric is better than before.
        """
        scores = evaluate(np.asarray(prediction, dtype=np.float64), self.truth, self.family)
        best, better = self.state["best"], False
        for metric in REPORTED[self.family]:
            value, sign = float(scores[metric]), 1 if HIGHER_IS_BETTER.get(metric, True) else -1
            if np.isfinite(value) and (metric not in best or sign * value > sign * best[metric]["valid"]):
                best[metric], better = {"valid": value, "when": when}, True
        if better:
            needed = {b["when"] for b in best.values()}
            kept = {k: v for k, v in self.state["weights"].items() if k in needed}
            self.state["weights"] = {**kept, when: weights()}

    def scores(self, predict: Callable[[Any], np.ndarray], truth: np.ndarray) -> dict[str, dict[str, float]]:
        """Test value of each metric from its own checkpoint.

        Args:
            predict: Predictions of the test rows, from weights that were kept.
            truth: Their labels.

        Returns:
            Per metric ``when`` its checkpoint is from, and its value there on the validation (``valid``) and the test
            rows (``test``).
        """
        tested = {
            when: evaluate(np.asarray(predict(kept), dtype=np.float64), truth, self.family)
            for when, kept in self.state["weights"].items()
        }
        return {m: {**b, "test": float(tested[b["when"]][m])} for m, b in self.state["best"].items()}
