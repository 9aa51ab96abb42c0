"""Report sections on how numbers were obtained: from which checkpoint, and what the model could see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .best import EACH, ONE
from .metrics import NAMES, mean_interval
from .report import Report

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def add_checkpoints(report: Report, metrics: Sequence[str], runs: Runs, judge: str = "the validation part") -> None:
    """Every metric from one checkpoint and from its own; the report's JSON gets both, under ``ONE`` and ``EACH``.

    Args:
        report: Report to which a section is added.
        metrics: Metrics to show.
        runs: The runs of each name, each with ``test`` and ``test_per_metric``; names without the latter are left out.
        judge: Labels that chose the checkpoints.
    """
    stored = {}
    for name, found in runs.items():
        if not found or not all(r["test_per_metric"] for r in found):
            continue
        shared = [m for m in metrics if all(m in r["test_per_metric"] for r in found)]
        stored[name] = {
            ONE: {m: mean_interval([_number(r["test"][m]) for r in found]) for m in shared},
            EACH: {m: mean_interval([_number(r["test_per_metric"][m]["test"]) for r in found]) for m in shared},
        }
    if not stored:
        return
    section = report.section("One checkpoint, and a checkpoint per metric")
    section.note(
        f"One checkpoint: all metrics of a run come from the weights with the least error on {judge}, as everywhere "
        f"else on this page. A checkpoint per metric: each metric comes from the weights that were best in it on "
        f"{judge}, as some papers report; no single model has all these values."
    )
    section.table(
        ["test scores", *(NAMES[m] for m in metrics)],
        [
            [f"{name}, {kind}", *(v.get(m) for m in metrics)]
            for name, kinds in stored.items()
            for kind, v in kinds.items()
        ],
        "Mean ± deviation over seeds and 95 % interval of the mean",
    )
    report.data["checkpoints"] = stored


def add_patterns(report: Report, metrics: Sequence[str], runs: Runs) -> None:
    """Test scores under every further pattern; the section is left out where only the data as they are were tested.

    Args:
        report: Report to which a section is added.
        metrics: Metrics to show.
        runs: The runs of each name, each with ``patterns``: scores by the pattern's name.
    """
    names = list(dict.fromkeys(p for found in runs.values() for r in found for p in r["patterns"]))
    if len(names) < 2:
        return
    stored = {
        p: {
            name: {m: mean_interval([_number(r["patterns"][p][m]) for r in found]) for m in metrics}
            for name, found in runs.items()
            if found and all(p in r["patterns"] for r in found)
        }
        for p in names
    }
    section = report.section("What the trained models may see in the test")
    section.note("Training is as above; only the test part's modalities are hidden. Seeds share every pattern.")
    section.table(
        ["seen in the test", *(NAMES[m] for m in metrics)],
        [[f"{p}: {name}", *(v[m] for m in metrics)] for p, methods in stored.items() for name, v in methods.items()],
        "Mean ± deviation over seeds and 95 % interval of the mean",
    )
    report.data["test_patterns"] = stored


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
