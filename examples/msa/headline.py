"""The sentence at the top of a report: how far a system is ahead of the best of its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import HIGHER_IS_BETTER, NAMES, paired_difference


def against_best(metric: str, ours: Sequence[float], baselines: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    """The system minus the baseline with the best mean, paired by seed.

    The best is chosen by the scores that are compared, which favours the baseline.

    Args:
        metric: What the scores are.
        ours: Scores of the system, one per seed.
        baselines: Scores of the baselines in the same order, by name; baselines with another number of scores or with
            undefined scores are ignored.

    Returns:
        The fields of ``paired_difference``, positive where the system is better, and ``metric``, ``baseline`` (the name
        of the best) and ``among`` (the number of baselines); None where nothing can be compared.
    """
    sign = 1 if HIGHER_IS_BETTER.get(metric, True) else -1
    own = sign * np.asarray(ours, dtype=np.float64)
    found = {name: sign * np.asarray(scores, dtype=np.float64) for name, scores in baselines.items()}
    found = {name: scores for name, scores in found.items() if scores.shape == own.shape and np.isfinite(scores).all()}
    if not found or not len(own) or not np.isfinite(own).all():
        return None
    best = max(found, key=lambda name: float(found[name].mean()))
    return {**paired_difference(own, found[best]), "metric": metric, "baseline": best, "among": len(found)}


def headline(system: str, what: str, found: Sequence[dict[str, Any] | None]) -> str:
    """One sentence on the differences that were found; empty where there is none.

    Args:
        system: Name of the system.
        what: What is compared and under which conditions.
        found: Results of :func:`against_best`, one per metric.

    Example:
        >>> scores = {"a": [0.5, 0.6], "b": [0.4, 0.4]}
        >>> headline("X", "accuracy on the test part", [against_best("acc2", [0.7, 0.8], scores)])
        'X minus the best of 2 baselines, accuracy on the test part, 2 seeds, positive where X is better: \
Acc-2 +0.200 [+0.200, +0.200], which excludes zero (best: a).'
    """
    differences = [d for d in found if d is not None]
    if not differences:
        return ""
    seeds, among = differences[0]["n"], differences[0]["among"]
    paired = f"{seeds} seeds" if seeds > 1 else "1 seed and therefore no interval"
    return (
        f"{system} minus the best of {among} baselines, {what}, {paired}, positive where {system} is better: "
        + "; ".join(_difference(d) for d in differences)
        + "."
    )


def _difference(d: Mapping[str, Any]) -> str:
    text = f"{NAMES[d['metric']]} {d['mean']:+.3f}"
    if d["n"] > 1:
        verdict = "excludes" if d["excludes_zero"] else "does not exclude"
        text += f" [{d['low']:+.3f}, {d['high']:+.3f}], which {verdict} zero"
    return f"{text} (best: {d['baseline']})"
