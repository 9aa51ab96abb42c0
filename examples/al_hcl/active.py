"""One active-learning run: train, score, buy labels, checkpoint; again until the budget is spent."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.msa.checkpoint import load_checkpoint, save_checkpoint
from examples.msa.corpus import Corpus
from examples.msa.metrics import evaluate
from examples.msa.timing import StageTimer

from .acquire import SelectionConfig, acquire
from .model import ModelConfig, SentimentModel
from .pretrain import pretrain
from .train import Data, Prediction, TrainConfig, Trained, predict, train


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
    training goes on from them.
    """

    labelled: list[int]
    records: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    embedding: Tensor | None = None
    prediction: Tensor | None = None
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Number of labels at each training."""
        return [r["labels"] for r in self.records]

    def curve(self, metric: str) -> list[float]:
        """A test metric at each training."""
        return [r["test"][metric] for r in self.records]


# Weights and embedding of all rows by model, training, seed and member.
Starts = dict[tuple[ModelConfig, TrainConfig, int, int], tuple[dict[str, Tensor], Tensor]]


class Run:
    """One arm with one seed.

    Args:
        arm: The system.
        corpus: Standardised corpus.
        data: The same as tensors.
        seed: Of the first labels, the models and the draws; arms with equal seeds start from equal labels.
        checkpoint: File that is rewritten after every round.
        resume: Go on from that file if it is there.
        replayed: Finished run whose labels are bought, for arms that replay.
        starts: Where runs of one corpus share what they learned before any label.

    Raises:
        ValueError: The protocol needs more labels than the train part has, the checkpoint is corrupt or belongs to a
            run with other arguments or data.
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
    ) -> None:
        self.arm, self.corpus, self.data, self.seed, self.checkpoint = arm, corpus, data, seed, checkpoint
        self.replayed = replayed.labelled if replayed else None
        self.starts: Starts = {} if starts is None else starts
        start = first_labels(data, arm.selection, seed)
        wanted, there = len(start) + arm.selection.rounds * arm.selection.budget, len(data.buyable)
        if wanted > there:
            raise ValueError(
                f"{arm.name}: {len(start)} first labels and {arm.selection.rounds} rounds of {arm.selection.budget} "
                f"ask for {wanted} labels, but the train part has {there} utterances with one"
            )
        self.state = State(start)
        if resume and checkpoint.exists():
            self.state = State(**load_checkpoint(checkpoint, self._arguments()))

    @property
    def finished(self) -> bool:
        """Whether the last round is done."""
        return len(self.state.records) > self.arm.selection.rounds

    def rounds(self) -> Iterator[State]:
        """Do what is left to do, one training at a time; each yields after its checkpoint is on disk."""
        while not self.finished:
            self._round(len(self.state.records))
            save_checkpoint(self.checkpoint, dict(vars(self.state)), self._arguments())
            yield self.state

    def _round(self, number: int) -> None:
        config, state, timer = self.arm.selection, self.state, StageTimer(self.state.seconds)
        labelled = torch.tensor(state.labelled, device=self.data.labels.device)
        with timer("train"):
            members = [self._train(number, k, labelled) for k in range(config.members)]
        with timer("predict"):
            # Passes serve the choice of the next labels alone: scores are point predictions.
            passes = self.arm.training.passes if number < config.rounds else 0
            seed = _derive(self.seed, "predict", number)
            test = predict(members, self.data, self.data.test, 0, seed)
            train_part = predict(members, self.data, self.data.train, passes, seed)
        with timer("evaluate"):
            truth = self.corpus.labels[self.data.test.cpu().numpy()]
            scores = evaluate(test.mean.double().cpu().numpy(), truth, self.corpus.family)
        facts = [m.facts for m in members]
        record = {"round": number, "labels": len(labelled), "test": scores, "members": facts, "picks": []}
        if number < config.rounds:
            with timer("select"):
                record["picks"] = self._buy(number, labelled, train_part)
            state.labelled += [pick["row"] for pick in record["picks"]]
        state.records.append(record)
        state.seconds = timer.seconds
        state.embedding, state.prediction = train_part.embedding.cpu(), train_part.mean.cpu()
        if config.keep_training:
            state.weights = [{k: v.cpu() for k, v in m.model.state_dict().items()} for m in members]

    def _train(self, number: int, member: int, labelled: Tensor) -> Trained:
        seed = _derive(self.seed, "model", number, member)
        start, learned = self._start(member)
        model = self._new_model()
        model.load_state_dict(self.state.weights[member] if self.state.weights else start)
        return train(model, self.data, labelled, learned, self.arm.training, seed)

    def _start(self, member: int) -> tuple[dict[str, Tensor], Tensor]:
        """Weights before any label and the embedding of all rows: alike in every round, so checkpoints omit them."""
        key = self.arm.model, self.arm.training, self.seed, member
        if key not in self.starts:
            seed = _derive(self.seed, "pretrain", member)
            torch.manual_seed(seed)
            model = self._new_model()
            learned = pretrain(model, self.data, self.arm.training, seed)
            self.starts[key] = {k: v.clone() for k, v in model.state_dict().items()}, learned
        return self.starts[key]

    def _new_model(self) -> SentimentModel:
        corpus = self.corpus
        model = SentimentModel(corpus.dims, corpus.sequences, corpus.aligned, self.arm.model)
        return model.to(self.data.labels.device)

    def _buy(self, number: int, labelled: Tensor, train_part: Prediction) -> list[dict[str, Any]]:
        config = self.arm.selection
        pool = torch.isin(self.data.train, self.data.buyable) & ~torch.isin(self.data.train, labelled)
        free = self.data.train[pool]
        if self.replayed is not None:
            rows = self.replayed[len(labelled) : len(labelled) + config.budget]
            return [self._describe(row, train_part, None) for row in rows]
        centres = train_part.embedding[torch.isin(self.data.train, labelled)]
        picks = acquire(
            train_part[pool], self.data.inputs.available[free], centres, config, _derive(self.seed, "select", number)
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
        return {**asdict(self.arm), "seed": self.seed, "data": self.corpus.sha256, "replayed": self.replayed}


def first_labels(data: Data, config: SelectionConfig, seed: int) -> list[int]:
    """Rows labelled before the first training: a share of the train rows that have a label, at random, at least one.

    Raises:
        ValueError: The share is outside (0, 1].
    """
    if not 0.0 < config.initial <= 1.0:
        raise ValueError(f"the initial share of labels must lie in (0, 1], got {config.initial}: no labelled sample")
    generator = torch.Generator().manual_seed(_derive(seed, "first labels"))
    count = max(1, round(config.initial * len(data.buyable)))
    return data.buyable.cpu()[torch.randperm(len(data.buyable), generator=generator)[:count]].tolist()


def _derive(seed: int, *what: object) -> int:
    """A seed of its own for every purpose, so that a resumed run needs no generator state."""
    return zlib.crc32(repr((seed, *what)).encode())
