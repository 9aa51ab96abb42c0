"""One run: from a corpus, what is hidden of it, and a configuration to predictions for every utterance."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.msa.best import BestPerMetric
from examples.msa.checkpoint import load_checkpoint, rng_state, save_checkpoint, seed_everything, set_rng_state
from examples.msa.corpus import SPLITS, Corpus

from .config import Config
from .losses import consistency_loss, drop_one_modality, pretraining_loss, reconstruction_error, supervised_loss
from .model import SSLMM, Batch
from .predict import batch_of, conversations_of, predict_conversations


@dataclass
class Fit:
    """Predictions ``[N]`` float64 (nan outside the splits), mean losses per epoch, and the best epoch of stage B."""

    prediction: np.ndarray
    history: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    best_epoch: int = 0
    model: SSLMM | None = None


class Trainer:
    """Both stages for one corpus; all of its state can be saved after any epoch and resumed bit for bit.

    Args:
        corpus: Pooled, standardised on observed train rows.
        observed: bool ``[N, M]``; everything else stays unread, in training and evaluation.
        labelled: bool ``[N]``; only these train labels are read.
        config: Model and training.
        seed: Seed of the run.
        device: Where to train.

    Raises:
        ValueError: No train utterance is labelled, or no validation utterance, which early stopping needs.
    """

    def __init__(
        self,
        corpus: Corpus,
        observed: np.ndarray,
        labelled: np.ndarray,
        config: Config,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        labelled = labelled & corpus.labelled
        if not labelled[corpus.rows("train")].any():
            raise ValueError(f"corpus {corpus.name!r}: no labelled train utterance; stage B needs at least one")
        if len(corpus.rows("valid", labelled=True)) == 0:
            raise ValueError(f"corpus {corpus.name!r}: no validation part with labels to stop on")
        seed_everything(seed)
        self.config, self.seed, self.device = config, seed, torch.device(device)
        tensors = corpus.tensors(self.device)
        self.features: list[Tensor] = tensors["features"]  # type: ignore[assignment]
        self.labels: Tensor = tensors["labels"]  # type: ignore[assignment]
        self.observed = torch.tensor(observed & corpus.available, device=self.device)
        self.labelled = torch.tensor(labelled & (corpus.split == SPLITS["train"]), device=self.device)
        self.positions: Tensor = tensors["positions"]  # type: ignore[assignment]
        self.split = torch.tensor(corpus.split, device=self.device)
        self.conversations = {
            name: conversations_of(corpus, code, config.transductive) for name, code in SPLITS.items()
        }
        lengths = [len(rows) for rows in self.conversations["train"]]
        self.batch = max(config.conversations, round(config.utterances / (sum(lengths) / len(lengths))))
        self.valid = torch.cat(self.conversations["valid"]).to(self.device)
        self.known = self.labels[self.valid].isfinite() & (self.split[self.valid] == SPLITS["valid"])
        self.model = SSLMM(corpus.dims, config).to(self.device)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.optimiser = self._new_optimiser()
        self.stage, self.epoch = "pretrain", 0
        self.best = {"error": float("inf"), "epoch": 0, "weights": {}}
        self.per_metric = BestPerMetric(corpus.family, self.labels[self.valid][self.known].cpu().numpy())
        self.history: dict[str, list[dict[str, float]]] = {"pretrain": [], "finetune": []}
        self.start = rng_state()

    def _new_optimiser(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.Adam(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def fit(self, checkpoint: Path | None = None, every: int = 10, resume: bool = False) -> Fit:
        """Train from the current state on and predict every utterance.

        Args:
            checkpoint: File to keep the state in; none when omitted.
            every: Epochs between saved states.
            resume: Continue from the file if it exists.
        """
        arguments = {"config": asdict(self.config), "seed": self.seed}
        if resume and checkpoint is not None and checkpoint.is_file():
            self.load_state_dict(load_checkpoint(checkpoint, arguments))
        for done in self._epochs():
            if checkpoint is not None and done % every == 0:
                save_checkpoint(checkpoint, self.state_dict(), arguments)
        self.model.load_state_dict(self.best["weights"])
        return Fit(self.predict(), self.history, self.best["epoch"], self.model)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next epoch depends on (the random states are the checkpoint's)."""
        return {
            "model": self.model.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "stage": self.stage,
            "epoch": self.epoch,
            "best": self.best,
            "per_metric": self.per_metric.state,
            "history": self.history,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.stage, self.epoch = state["stage"], state["epoch"]
        self.best, self.history = state["best"], state["history"]
        self.per_metric.state = state["per_metric"]

    def _epochs(self) -> Iterator[int]:
        """Run the remaining epochs; yields the number of each, counted over both stages."""
        config = self.config
        if not any(self.history.values()):
            # Another trainer may have drawn from the global generators since this one was made.
            set_rng_state(self.start)
        while self.stage == "pretrain":
            if self.epoch >= config.pretrain_epochs:
                self.stage, self.epoch = "finetune", 0
                self.optimiser = self._new_optimiser()
                self.teacher.load_state_dict(self.model.state_dict())
                break
            self.history["pretrain"].append(self._epoch(self._pretrain_step))
            self.epoch += 1
            yield self.epoch
        while self.epoch < config.finetune_epochs and self.epoch - self.best["epoch"] < config.patience:
            self.history["finetune"].append(self._epoch(self._finetune_step))
            self.epoch += 1
            self._keep_best()
            yield config.pretrain_epochs + self.epoch
        if not self.best["weights"]:
            self._keep_best()

    def _epoch(self, step: Any) -> dict[str, float]:
        self.model.train()
        order = torch.randperm(len(self.conversations["train"])).tolist()
        totals: dict[str, float] = {}
        chunks = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        for chunk in chunks:
            chosen = [self.conversations["train"][i] for i in chunk]
            batch, rows = batch_of(self.features, self.observed, self.positions, chosen)
            losses = step(batch, rows)
            self.optimiser.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            self.optimiser.step()
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + float(loss.detach()) / len(chunks)
        return totals

    def _pretrain_step(self, batch: Batch, rows: Tensor) -> dict[str, Tensor]:
        return pretraining_loss(self.model, batch)

    def _finetune_step(self, batch: Batch, rows: Tensor) -> dict[str, Tensor]:
        config = self.config
        labels, labelled = self.labels[rows], self.labelled[rows]
        natural = self.model(batch)
        losses = {"supervised": supervised_loss(natural.prediction, labels, labelled, config.task)}
        if config.unlabelled == "none" and config.reconstruction != "observed":
            strong, harder = natural, batch.observed
        else:
            harder = drop_one_modality(batch.observed)
            strong = self.model(batch.seeing(harder), noise=config.noise)
        if config.unlabelled == "mean_teacher":
            self._update_teacher()
        if config.unlabelled != "none":
            progress = self.epoch / config.finetune_epochs
            losses["unlabelled"] = consistency_loss(self.model, self.teacher, batch, strong, labels, labelled, progress)
        if config.reconstruction != "none":
            oracle = config.reconstruction == "oracle"
            where = ~batch.observed if oracle else batch.observed & ~harder
            nodes = natural.nodes if oracle else strong.nodes
            error = reconstruction_error(self.model.reconstruct(nodes, where), batch.features, where)
            losses["reconstruction"] = config.reconstruction_weight * error
        return losses

    @torch.no_grad()
    def _update_teacher(self) -> None:
        decay = min(self.config.teacher_decay, 1 - 1 / (len(self.history["finetune"]) + 2))
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.model.parameters()), 1 - decay)

    def _keep_best(self) -> None:
        # Where a mean of the weights is kept, it predicts (as in Mean Teacher).
        model = self.teacher if self.config.unlabelled == "mean_teacher" else self.model
        predicted, _ = predict_conversations(
            model, self.features, self.observed, self.positions, self.conversations["valid"]
        )
        self.per_metric.offer(predicted[self.known].cpu().numpy(), self.epoch, lambda: _copy(model))
        error = float((predicted - self.labels[self.valid])[self.known].abs().mean())
        if error < self.best["error"]:
            self.best = {"error": error, "epoch": self.epoch, "weights": _copy(model)}

    def predict(self) -> np.ndarray:
        """Predicted score of each utterance of a split, float64 ``[N]``; nan for unused rows."""
        prediction = np.full(len(self.labels), np.nan)
        for name, conversations in self.conversations.items():
            if conversations:
                predicted, _ = predict_conversations(
                    self.model, self.features, self.observed, self.positions, conversations
                )
                rows = torch.cat(conversations).numpy()
                own = self.split.cpu().numpy()[rows] == SPLITS[name]
                prediction[rows[own]] = predicted.cpu().double().numpy()[own]
        return prediction


def _copy(model: SSLMM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
