"""All arms with all seeds, and the numbers a report needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.msa.checkpoint import seed_everything
from examples.msa.corpus import Corpus
from examples.msa.files import remove_temporaries
from examples.msa.jobs import sole_user, spread
from examples.msa.metrics import HIGHER_IS_BETTER, NAMES, REPORTED, area_under_curve, mean_interval, paired_difference
from examples.msa.patterns import TestPattern

from .active import Arm, Ridges, Run, Starts, State
from .arms import MARGIN, RANDOM, REFERENCE
from .data import Data


@dataclass(frozen=True)
class Training:
    """One finished training of a run."""

    arm: Arm
    seed: int
    record: dict[str, Any]


def file_name(arm: Arm) -> str:
    """The arm's name as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", arm.name.lower().replace("λ", "lambda"))


class Experiment:
    """Arms × seeds on one corpus.

    Args:
        arms: The reference first.
        seeds: Runs with equal seeds are paired.
        corpus: Standardised corpus.
        data: The same as tensors.
        folder: Checkpoints go below it.
        resume: Continue from existing checkpoints.
        patterns: Missing patterns under which the last model of each run is tested.
        jobs: Processes that share the seeds; results do not depend on them.
    """

    def __init__(
        self,
        arms: list[Arm],
        seeds: list[int],
        corpus: Corpus,
        data: Data,
        folder: Path,
        resume: bool,
        patterns: Sequence[TestPattern] = (),
        jobs: int = 1,
    ) -> None:
        self.arms, self.seeds, self.corpus, self.data = arms, seeds, corpus, data
        self.folder, self.resume, self.patterns, self.jobs = folder, resume, patterns, jobs
        self.states: dict[str, list[State]] = {arm.name: [] for arm in arms}

    @property
    def total(self) -> int:
        """Trainings in all."""
        return len(self.seeds) * sum(arm.selection.rounds + 1 for arm in self.arms)

    def rounds(self) -> Iterator[Training]:
        """Run everything, seed by seed so that early results are whole comparisons; one item per training.

        With several processes, the items of a seed come together when the seed is finished.
        """
        checkpoints = self.folder / "checkpoints"
        with sole_user(checkpoints):
            for folder in (self.folder, checkpoints, self.folder / "predictions"):
                remove_temporaries(folder)
            if self.jobs == 1:
                for seed in self.seeds:
                    yield from self._trainings(seed)
                return
            for seed, states in zip(self.seeds, spread(self.finish, self.seeds, self.jobs, checkpoints), strict=True):
                for arm, state in zip(self.arms, states, strict=True):
                    self.states[arm.name].append(state)
                    yield from [Training(arm, seed, record) for record in state.records]

    def finish(self, seed: int) -> list[State]:
        """Run all arms with one seed to the end."""
        seed_everything(seed)
        for _ in self._trainings(seed):
            pass
        return [self.states[arm.name].pop() for arm in self.arms]

    def _trainings(self, seed: int) -> Iterator[Training]:
        reference: State | None = None
        starts: Starts = {}
        ridges: Ridges = {}
        for arm in self.arms:
            name = f"{file_name(arm)}-seed{seed}"
            path, export = self.folder / "checkpoints" / f"{name}.pt", self.folder / "predictions" / f"{name}.csv"
            replayed = reference if arm.replay else None
            run = Run(
                arm, self.corpus, self.data, seed, path, self.resume, replayed, starts, ridges, self.patterns, export
            )
            yield from [Training(arm, seed, record) for record in run.state.records]
            yield from (Training(arm, seed, state.records[-1]) for state in run.rounds())
            self.states[arm.name].append(run.state)
            reference = reference or run.state

    def describe(self, training: Training) -> str:
        """A line for a log."""
        record, main = training.record, self.metrics[0]
        return (
            f"{training.arm.name}, seed {training.seed}, round {record['round']}, {record['labels']} labels: "
            f"{NAMES[main]} {record['test'][main]:.3f}, {NAMES['mae']} {record['test']['mae']:.3f}"
        )

    def write_curves(self, writer: Callable[[str], Any]) -> None:
        """Test metrics over the number of labels, for TensorBoard, a run for each arm and seed."""
        for arm in self.arms:
            for seed, state in zip(self.seeds, self.states[arm.name], strict=True):
                with writer(f"{file_name(arm)}-seed{seed}") as curves:
                    for record in state.records:
                        for metric in self.metrics:
                            curves.add_scalar(f"test/{metric}", record["test"][metric], record["labels"])

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the corpus's family, in the order reports show them."""
        return REPORTED[self.corpus.family]

    def curves(self, metric: str) -> dict[str, np.ndarray]:
        """``[seeds, rounds + 1]`` per arm that buys labels."""
        return {
            a.name: np.array([s.curve(metric) for s in self.states[a.name]]) for a in self.arms if a.selection.rounds
        }

    def areas(self, metric: str) -> dict[str, list[float]]:
        """Mean of the metric over the label counts, per seed, for each arm that buys labels."""
        return {
            arm.name: [area_under_curve(s.counts, s.curve(metric)) for s in self.states[arm.name]]
            for arm in self.arms
            if arm.selection.rounds
        }

    def summary(self) -> dict[str, Any]:
        """Everything a report shows, as plain values.

        Per arm: areas and last points per metric with intervals over seeds, and paired differences to the reference;
        a difference is signed so that positive means better than the reference, also for errors.
        """
        result: dict[str, Any] = {}
        for arm in self.arms:
            states = self.states[arm.name]
            entry: dict[str, Any] = {
                "replays_reference": arm.replay,
                "labels": states[0].counts,
                "last": {m: mean_interval([s.curve(m)[-1] for s in states]) for m in self.metrics},
                "seconds": {k: float(np.mean([s.seconds[k] for s in states])) for k in states[0].seconds},
            }
            if arm.selection.rounds:
                entry["area"] = {m: mean_interval(self.areas(m)[arm.name]) for m in self.metrics}
                if arm.name != REFERENCE:
                    entry["area_minus_reference"] = {m: self.difference(m, arm.name) for m in self.metrics}
            result[arm.name] = entry
        return result

    def baseline_areas(self, metric: str, bought_by: str) -> dict[str, list[float]]:
        """Area under the curve of each ridge regression on the labels that an arm bought, per seed."""
        states = self.states[bought_by]
        return {
            name: [area_under_curve(s.counts, [r["baselines"][name][metric] for r in s.records]) for s in states]
            for name in states[0].records[0]["baselines"]
        }

    def baselines(self) -> dict[str, Any]:
        """Per buyer, baseline and metric its area, and the reference's area minus it, signed so that positive means
        that the reference is better."""
        result: dict[str, Any] = {}
        for buyer in (REFERENCE, RANDOM, MARGIN):
            if buyer not in self.states:
                continue
            for metric in self.metrics:
                ours, sign = self.areas(metric)[REFERENCE], 1 if HIGHER_IS_BETTER.get(metric, True) else -1
                for name, theirs in self.baseline_areas(metric, buyer).items():
                    result.setdefault(buyer, {}).setdefault(name, {})[metric] = {
                        "area": mean_interval(theirs),
                        "reference_minus": paired_difference(sign * np.array(ours), sign * np.array(theirs)),
                    }
        return result

    def difference(self, metric: str, name: str, reference: str = REFERENCE) -> dict[str, Any]:
        """Paired difference of areas ``name - reference``, positive where ``name`` is better."""
        areas, sign = self.areas(metric), 1 if HIGHER_IS_BETTER.get(metric, True) else -1
        return paired_difference(sign * np.array(areas[name]), sign * np.array(areas[reference]))

    def runs(self) -> dict[str, list[dict[str, Any]]]:
        """Every record of every run, for the JSON file."""
        return {
            name: [
                {"seed": seed, "rounds": s.records, "seconds": s.seconds}
                for seed, s in zip(self.seeds, states, strict=True)
            ]
            for name, states in self.states.items()
        }
