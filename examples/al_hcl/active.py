"""One active-learning run: train, score, buy labels, checkpoint, and repeat until the budget is spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.msa.checkpoint import derive, load_checkpoint, save_checkpoint
from examples.msa.closed_form import Linear
from examples.msa.corpus import Corpus
from examples.msa.metrics import evaluate
from examples.msa.patterns import TestPattern
from examples.msa.predictions import write_predictions
from examples.msa.saved import calibrate, calibrated
from examples.msa.timing import StageTimer
from examples.msa.tool import score_parts

from .acquire import SelectionConfig, acquire
from .config import TrainConfig
from .data import Data
from .ensemble import Ensemble, left_out, new_model
from .first import first_count, first_labels
from .model import Inputs, ModelConfig, SentimentModel
from .path import ClosedForm
from .predict import Prediction, predict
from .pretrain import pretrain
from .train import Trained, set_parameters, train


@dataclass(frozen=True)
class Arm:
    """One system under comparison.

    Args:
        name: What reports call it.
        model: Model configuration.
        training: Training configuration.
        selection: Protocol.
        replay: Train on the label sets that another arm picked, so that only the model differs.
    """

    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    replay: bool = False


@dataclass
class State:
    """What a run has found so far: rows in the order they were labelled, one record per training, seconds per stage.

    ``embedding`` and ``prediction`` belong to the train rows and the last model; ``weights`` are kept only when
    training continues from them.
    """

    labelled: list[int]
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    embedding: Tensor | None = None
    prediction: Tensor | None = None
    weights: list[list[dict[str, Tensor]]] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Number of labels at each training."""
        return [r["labels"] for r in self.records]

    def curve(self, metric: str) -> list[float]:
        """A test metric at each training."""
        return [r["test"][metric] for r in self.records]


# Model before any label and its embedding of all rows, by model, training, seed and member.
Starts = dict[tuple[ModelConfig, TrainConfig, int, int], tuple[SentimentModel, Tensor]]
# Ridge regressions by the rows they were fitted on.
Ridges = dict[tuple[int, ...], dict[str, Linear]]


class Run:
    """One arm with one seed.

    Args:
        arm: The system.
        corpus: Standardised corpus.
        data: The same as tensors.
        seed: Seed of the first labels, the models and the draws; arms with equal seeds start from equal labels.
        checkpoint: File that is rewritten after every round.
        resume: Continue from that file if it exists.
        replayed: Finished run whose labels are bought again, for arms that replay.
        starts: What was learned before any label, shared by the runs on one corpus.
        ridges: Ridge regressions on equal labels, shared by the runs on one corpus.
        patterns: Missing patterns under which the last model is tested; none when omitted.
        export: Where the last model's predictions of the test part are written; nowhere when omitted.

    Raises:
        ValueError: The protocol needs more labels than the train part has, or the checkpoint is corrupt or belongs to
            a run with other arguments or data.
    """

    def __init__(
        self,
        arm: Arm,
        corpus: Corpus,
        data: Data,
        seed: int,
        checkpoint: Path,
        resume: bool = False,
        replayed: State | None = None,
        starts: Starts | None = None,
        ridges: Ridges | None = None,
        patterns: Sequence[TestPattern] = (),
        export: Path | None = None,
    ) -> None:
        self.arm, self.corpus, self.data, self.seed, self.checkpoint = arm, corpus, data, seed, checkpoint
        self.replayed = replayed.labelled if replayed else None
        self.starts: Starts = {} if starts is None else starts
        self.ridges: Ridges = {} if ridges is None else ridges
        self.patterns, self.export = patterns, export
        first = first_count(data, arm.selection)
        wanted, there = first + arm.selection.rounds * arm.selection.budget, len(data.buyable)
        if wanted > there:
            raise ValueError(
                f"{arm.name}: {first} first labels and {arm.selection.rounds} rounds of {arm.selection.budget} "
                f"ask for {wanted} labels, but the train part has {there} utterances with one"
            )
        self.state = State([])
        if resume and checkpoint.exists():
            self.state = State(**load_checkpoint(checkpoint, self._arguments()))

    @property
    def finished(self) -> bool:
        """Whether the last round is done."""
        return len(self.state.records) > self.arm.selection.rounds

    def rounds(self) -> Iterator[State]:
        """Run the remaining rounds, one training at a time; yields after each checkpoint is on disk."""
        while not self.finished:
            self._round(len(self.state.records))
            save_checkpoint(self.checkpoint, dict(vars(self.state)), self._arguments())
            yield self.state

    def _round(self, number: int) -> None:
        config, state, timer = self.arm.selection, self.state, StageTimer(self.state.seconds)
        if number == 0:
            with timer("select"):
                state.labelled = self._first_labels()
        labelled = torch.cat([torch.tensor(state.labelled, device=self.data.labels.device), self.data.given])
        truth = self.corpus.labels[self.data.test.cpu().numpy()]
        with timer("closed forms"):
            key = tuple(labelled.tolist())
            if key not in self.ridges:
                self.ridges[key] = self.data.ridges(labelled)
            ridges = self.ridges[key]
        with timer("train"):
            members = [self._train(number, k, labelled, ridges) for k in range(config.members)]
            paths = [m.everywhere for m in members]
        with timer("predict"):
            # Stochastic passes only serve the choice of the next labels: point predictions are scored.
            passes = self.arm.training.passes if number < config.rounds else 0
            seed = derive(self.seed, "predict", number)
            test = predict(members, self.data.inputs, paths, self.data.test, 0, seed)
            train_part = predict(members, self.data.inputs, paths, self.data.train, passes, seed)
        with timer("evaluate"):
            scores = evaluate(test.mean.double().cpu().numpy(), truth, self.corpus.family)
            each = score_per_metric(members, self.data, truth)
            rows = self.data.design.values[self.data.test.cpu().numpy()]
            baselines = {name: evaluate(fit(rows), truth, self.corpus.family) for name, fit in ridges.items()}
        record = {
            "round": number,
            "labels": len(labelled),
            "test": scores,
            "test_per_metric": each,
            "baselines": baselines,
            "members": [{**m.facts, "history": m.history} for m in members],
            "picks": [],
        }
        if number == config.rounds:
            with timer("evaluate"):
                self._finish(record, members, labelled)
        if number < config.rounds:
            with timer("select"):
                record["picks"] = self._buy(number, labelled, train_part)
            state.labelled += [pick["row"] for pick in record["picks"]]
        state.records.append(record)
        state.seconds = timer.seconds
        state.embedding, state.prediction = train_part.embedding.cpu(), train_part.mean.cpu()
        if config.keep_training:
            state.weights = [[{k: v.cpu() for k, v in n.state_dict().items()} for n in m.models] for m in members]

    def _first_labels(self) -> list[int]:
        config, data = self.arm.selection, self.data
        if self.replayed is not None:
            return self.replayed[: first_count(data, config)]
        return first_labels(data, config, self.seed, self._start(0)[1] if config.informative else None)

    def _train(self, number: int, member: int, labelled: Tensor, ridges: dict[str, Linear]) -> Trained:
        seed = derive(self.seed, "model", number, member)
        start, learned = self._start(member)
        models = [self._new_model() for _ in range(self.arm.training.folds)]
        for k, model in enumerate(models):
            model.load_state_dict(self.state.weights[member][k] if self.state.weights else start.state_dict())
        return train(models, self.data, labelled, learned, self.arm.training, seed, ridges)

    def _finish(self, record: dict[str, Any], members: list[Trained], labelled: Tensor) -> None:
        """Test the last model under every pattern, and write what it predicts."""
        rows, data = self.corpus.rows("test"), self.data
        ensemble = Ensemble(members, [ClosedForm.of(m.path, self._start(k)[0]) for k, m in enumerate(members)])
        if self.export is not None:
            known = labelled.cpu().numpy()
            value, variance = ensemble.values(data.inputs)
            calibration = calibrate(variance[known], left_out(members) - self.corpus.labels[known])
            write_predictions(self.export, self.corpus, value, calibrated(variance, calibration), rows=rows)
        record["patterns"] = {
            p.name: score_parts(
                ensemble.predict(
                    Inputs.of(replace(self.corpus, available=p.observed), data.labels.device, data.transductive), 0
                )
                .mean.double()
                .cpu()
                .numpy(),
                self.corpus,
                ["test"],
            )["test"]
            for p in self.patterns
        }

    def _start(self, member: int) -> tuple[SentimentModel, Tensor]:
        """Model before any label and its embedding of all rows: the same in every round, so checkpoints omit them."""
        key = self.arm.model, self.arm.training, self.seed, member
        if key not in self.starts:
            seed = derive(self.seed, "pretrain", member)
            torch.manual_seed(seed)
            model = self._new_model()
            learned = pretrain(model, self.data, self.arm.training, seed)
            self.starts[key] = model, learned
        return self.starts[key]

    def _new_model(self) -> SentimentModel:
        return new_model(self.corpus, self.arm.model, self.data.labels.device)

    def _buy(self, number: int, labelled: Tensor, train_part: Prediction) -> list[dict[str, Any]]:
        config = self.arm.selection
        pool = torch.isin(self.data.train, self.data.buyable) & ~torch.isin(self.data.train, labelled)
        free = self.data.train[pool]
        if self.replayed is not None:
            bought = len(self.state.labelled)
            rows = self.replayed[bought : bought + config.budget]
            return [self._describe(row, train_part, None) for row in rows]
        centres = train_part.embedding[torch.isin(self.data.train, labelled)]
        picks = acquire(
            train_part[pool], self.data.inputs.available[free], centres, config, derive(self.seed, "select", number)
        )
        values = picks.uncertainty.tolist()
        return [
            self._describe(row, train_part, value)
            for row, value in zip(free[picks.positions].tolist(), values, strict=True)
        ]

    def _describe(self, row: int, train_part: Prediction, value: float | None) -> dict[str, Any]:
        position = int(torch.searchsorted(self.data.train, row))
        return {
            "row": row,
            "id": str(self.corpus.utterance_ids[row]),
            "label": float(self.corpus.labels[row]),
            "prediction": float(train_part.mean[position]),
            "uncertainty": value,
        }

    def _arguments(self) -> dict[str, Any]:
        patterns = [p.as_dict() for p in self.patterns]
        return {
            **asdict(self.arm),
            "seed": self.seed,
            "data": self.corpus.sha256,
            "replayed": self.replayed,
            "test patterns": patterns,
            "validation labels": len(self.data.given),
            "transductive": self.data.transductive,
        }


def score_per_metric(members: list[Trained], data: Data, truth: np.ndarray) -> dict[str, dict[str, float]]:
    """Test value of each metric from the checkpoint with its best out-of-fold value; mean over members."""
    found = []
    for m in members:
        best = [[p.detach().clone() for p in model.parameters()] for model in m.models]
        found.append(m.best.scores(partial(_test_with, m, data), truth))
        for model, weights in zip(m.models, best, strict=True):
            set_parameters(model, weights)
    names = [name for name in found[0] if all(name in f for f in found)]
    return {name: {k: float(np.mean([f[name][k] for f in found])) for k in found[0][name]} for name in names}


def _test_with(member: Trained, data: Data, kept: dict[str, Any]) -> np.ndarray:
    if not kept["weight"]:
        return member.everywhere[data.test].float().double().cpu().numpy()
    for model, weights in zip(member.models, kept["networks"], strict=True):
        set_parameters(model, weights)
    judged = replace(member, weight=kept["weight"])
    return predict([judged], data.inputs, [member.everywhere], data.test, 0, 0).mean.double().cpu().numpy()
