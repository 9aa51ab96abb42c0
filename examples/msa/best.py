"""The best checkpoint of each metric, as in papers that pick a different epoch for every column of a table."""

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
        state: :attr:`state` of an earlier object, to continue from.
    """

    def __init__(self, family: str, truth: np.ndarray, state: dict[str, Any] | None = None) -> None:
        self.family, self.truth = family, np.asarray(truth, dtype=np.float64)
        self.state: dict[str, Any] = state or {"best": {}, "weights": {}}

    def offer(self, prediction: np.ndarray, when: int, weights: Callable[[], Any]) -> None:
        """Judge a moment of the training.

        Args:
            prediction: Predictions of the validation rows, ``[n]``.
            when: Number of the epoch or step; of equally good moments the first is kept.
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
            predict: Gives predictions of the test rows from kept weights.
            truth: Labels of the test rows.

        Returns:
            For each metric, the moment of its checkpoint (``when``), and its value from that checkpoint on the
            validation rows (``valid``) and the test rows (``test``).
        """
        tested = {
            when: evaluate(np.asarray(predict(kept), dtype=np.float64), truth, self.family)
            for when, kept in self.state["weights"].items()
        }
        return {m: {**b, "test": float(tested[b["when"]][m])} for m, b in self.state["best"].items()}
