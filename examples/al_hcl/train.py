"""Training on the labelled rows, with contrast on labelled and unlabelled rows, and Monte-Carlo prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from examples.msa.best import BestPerMetric
from examples.msa.corpus import Corpus
from examples.msa.metrics import SIMS_BINS

from .kernel import KernelPath, feature_views, fit_path
from .model import Inputs, ModelConfig, Outputs, SentimentModel


@dataclass(frozen=True)
class TrainConfig:
    """How one model is trained.

    Args:
        steps: Optimiser steps, the same for any number of labels.
        batch: Labelled rows per step.
        contrast_rows: Unlabelled rows per step that only the contrastive loss sees.
        pretrain_steps: Steps of contrast alone, before the first labels.
        pretrain_rows: Train rows per such step.
        learning_rate: Of AdamW, falling to 0 as a cosine.
        weight_decay: Of AdamW, on matrices.
        contrast_weight: λ of the contrastive loss; 0 leaves it out.
        check_every: Steps between looks at the validation error; the best weights count.
        average: Share kept per step by the running average of the weights, which is what is validated and used.
        passes: Monte-Carlo passes of a prediction.
        view: The closed-form path's view of the features, a name in ``kernel.VIEWS``; the best of all when omitted.
    """

    steps: int = 40
    batch: int = 64
    contrast_rows: int = 64
    pretrain_steps: int = 200
    pretrain_rows: int = 192
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    contrast_weight: float = 0.1
    check_every: int = 10
    average: float = 0.9
    passes: int = 6
    view: str | None = None


@dataclass(frozen=True)
class Data:
    """A standardised corpus as tensors: inputs, labels and their classes of all rows, row numbers, and the number of
    each row's video; and the metric family.

    ``train`` holds all rows of its part; ``buyable`` those of them that have a label; ``valid`` and ``test`` hold
    labelled rows alone.
    """

    inputs: Inputs
    labels: Tensor
    classes: Tensor
    train: Tensor
    buyable: Tensor
    valid: Tensor
    test: Tensor
    video: Tensor
    family: str

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        device: torch.device | str = "cpu",
        needed: tuple[str, ...] = ("train", "valid", "test"),
    ) -> Data:
        """Raises ValueError when a part that is needed holds no labelled utterance, naming it."""
        rows = {part: corpus.rows(part, labelled=True) for part in ("train", "valid", "test")}
        empty = [part for part in needed if len(rows[part]) == 0]
        if empty:
            raise ValueError(f"corpus {corpus.name!r} has no utterance in its {' or '.join(empty)} part with a label")
        rows["buyable"], rows["train"] = rows["train"], corpus.rows("train")
        tensors = {part: torch.tensor(r, device=device) for part, r in rows.items()}
        labels = torch.tensor(corpus.labels, device=device)
        video = torch.tensor(corpus.video_index, device=device)
        classes = torch.tensor(label_classes(corpus.labels, corpus.family), device=device)
        return cls(Inputs.of(corpus, device), labels, classes, **tensors, video=video, family=corpus.family)


def label_classes(labels: np.ndarray, family: str) -> np.ndarray:
    """Classes of labels for supervised contrast, int64: whole numbers on MOSI's scale, the five classes of SIMS.

    A missing label counts as 0; such rows are never given their class.
    """
    labels = np.nan_to_num(labels)
    if family == "sims":
        return np.digitize(labels, np.float32(SIMS_BINS["acc5"]), right=True).astype(np.int64)
    return np.round(np.clip(labels, -3, 3)).astype(np.int64) + 3


@dataclass(frozen=True)
class Member:
    """A network and what belongs to it: ``ŷ = centre + scale * (path + correction)``.

    Attributes:
        model: The network, with its best averaged weights.
        centre: Mean of the known labels.
        scale: Their deviation.
        noise: Validation error (root mean square, label units), the noise of a model that predicts none.
    """

    model: SentimentModel
    centre: float
    scale: float
    noise: float


@dataclass(frozen=True)
class Trained(Member):
    """A member with what its training found.

    Attributes:
        kernel: Closed-form path.
        facts: Chosen step, validation error, and the closed-form path's choices.
        best: The best averaged weights by each metric.
    """

    kernel: KernelPath
    facts: dict[str, float | str]
    best: BestPerMetric


@dataclass(frozen=True)
class Prediction:
    """In label units: means of the stochastic passes ``[S, n]`` of all members, their noise deviations ``[S, n]``,
    means per member ``[K, n]``, unimodal predictions ``[M, n]``; and fused embeddings ``[n, k]`` without dropout."""

    passes: Tensor
    noise: Tensor
    members: Tensor
    unimodal: Tensor
    embedding: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over the members, without dropout, ``[n]``: the point prediction that is scored."""
        return self.members.mean(0)

    def __getitem__(self, rows: Tensor) -> Prediction:
        per_row = [t[:, rows] for t in (self.passes, self.noise, self.members, self.unimodal)]
        return Prediction(*per_row, self.embedding[rows])


def train(
    model: SentimentModel, data: Data, labelled: Tensor, learned: Tensor, config: TrainConfig, seed: int
) -> Trained:
    """Train ``model`` in place on the labelled rows; other train rows enter the contrastive loss only.

    Args:
        model: With its weights before the labels, or trained before.
        data: The corpus.
        labelled: Rows whose label is known.
        learned: Embedding of all rows that no label has shaped, ``[N, k]``: one of the closed-form path's views.
        config: How.
        seed: Of batches and dropout.

    Raises:
        ValueError: No row is labelled.
    """
    if len(labelled) == 0:
        raise ValueError("AL-HCL: there is no labelled sample to train on; raise the initial share")
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    known = data.labels[labelled]
    centre, scale = float(known.mean()), max(float(known.std(correction=0)), 1e-3)
    target = (data.labels - centre) / scale
    views = feature_views(data.inputs, learned, data.train, labelled)
    if config.view is not None:
        views = {config.view: views[config.view]}
    path = fit_path(views, target, labelled, data.valid, data.video)
    base = path.everywhere.clone()
    base[labelled] = path.left_out
    classes = -1 - torch.arange(len(target), device=target.device)
    classes[labelled] = data.classes[labelled]
    pool = data.train[~torch.isin(data.train, labelled)]
    labelled_batches = _endless(labelled, config.batch, order)
    pool_batches = _endless(pool, config.contrast_rows, order) if len(pool) else None
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.dim() > 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed}, {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        foreach=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    average = [p.detach().clone() for p in parameters]
    best_error, best_step, best = math.inf, 0, average
    per_metric = BestPerMetric(data.family, data.labels[data.valid].cpu().numpy())
    for step in range(config.steps + 1):
        if step % config.check_every == 0:
            valid = _validate(model, average, data, base)
            error = float((valid - target[data.valid]).abs().mean()) * scale
            kept = partial(_copies, average)
            per_metric.offer((centre + scale * valid).double().cpu().numpy(), step, kept)
            if error < best_error:
                best_error, best_step, best = error, step, _copies(average)
        model.train()
        rows = next(labelled_batches)
        count = len(rows)
        if config.contrast_weight and pool_batches is not None:
            rows = torch.cat([rows, next(pool_batches)])
        batch = data.inputs[rows]
        out = model(batch)
        loss = task_loss(out, (target - base)[rows[:count]], target[rows[:count]], model.config)
        if config.contrast_weight:
            loss = loss + config.contrast_weight * model.contrastive_loss(out, batch.available, classes[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(config.average, step / (step + 9)))
    set_parameters(model, best)
    with torch.no_grad():
        model.eval()
        residual = base[data.valid] + model(data.inputs[data.valid]).correction - target[data.valid]
    facts: dict[str, float | str] = {
        "best_step": best_step,
        "valid_mae": best_error,
        "view": path.view,
        "length": path.length,
        "strength": path.strength,
    }
    noise = float(residual.square().mean().sqrt()) * scale
    return Trained(model, centre, scale, noise, path, facts, per_metric)


def task_loss(out: Outputs, residual: Tensor, target: Tensor, config: ModelConfig) -> Tensor:
    """Loss on the first ``len(target)`` rows of a batch: Gaussian negative log likelihood of the residual that the
    closed-form path leaves, each sample weighted by its fixed deviation so that noisy samples are still fitted, or
    squared error; plus the squared error of the unimodal heads, which reaches only those heads."""
    n = len(target)
    error = (out.correction[:n] - residual).square()
    if config.heteroscedastic:
        log_variance = out.log_variance[:n]
        weight = (0.5 * log_variance.detach()).exp()
        error = 0.5 * weight * (error * (-log_variance).exp() + log_variance)
    return error.mean() + (out.unimodal_mean[:, :n] - target).square().mean()


@torch.no_grad()
def predict(
    members: Sequence[Member],
    inputs: Inputs,
    paths: Sequence[Tensor],
    rows: Tensor,
    passes: int,
    seed: int,
) -> Prediction:
    """Predict ``rows`` with every member: once without dropout, ``passes`` times (or never) with it.

    Args:
        members: Models.
        inputs: All rows of a corpus.
        paths: Closed-form path of every row, per member.
        rows: Row numbers.
        passes: Stochastic passes.
        seed: Of dropout.
    """
    torch.manual_seed(seed)
    x = inputs[rows]
    means, noises, plain, unimodal, embeddings = [], [], [], [], []
    for t, everywhere in zip(members, paths, strict=True):
        t.model.eval()
        out, path = t.model(x), everywhere[rows]
        plain.append(t.centre + t.scale * (path + out.correction))
        unimodal.append(t.centre + t.scale * out.unimodal_mean)
        embeddings.append(out.fused)
        t.model.train()
        for _ in range(passes):
            out = t.model(x)
            means.append(t.centre + t.scale * (path + out.correction))
            learned = t.scale * (0.5 * out.log_variance).exp()
            noises.append(learned if t.model.config.heteroscedastic else torch.full_like(learned, t.noise))
        t.model.eval()
    return Prediction(
        torch.stack(means) if means else plain[0].new_empty(0, len(rows)),
        torch.stack(noises) if noises else plain[0].new_empty(0, len(rows)),
        torch.stack(plain),
        torch.stack(unimodal).mean(0),
        torch.cat(embeddings, -1),
    )


def _endless(rows: Tensor, size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Batches of shuffled rows without end; the last of a sweep may be smaller."""
    while True:
        yield from rows[torch.randperm(len(rows), generator=order).to(rows.device)].split(size)


@torch.no_grad()
def set_parameters(model: SentimentModel, values: Sequence[Tensor]) -> None:
    """Copy values into the parameters of a model."""
    for p, value in zip(model.parameters(), values, strict=True):
        p.copy_(value)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


@torch.no_grad()
def _validate(model: SentimentModel, weights: list[Tensor], data: Data, base: Tensor) -> Tensor:
    """Predictions of the validation rows by the model with other weights, in units of the labels' deviation."""
    current = _copies(list(model.parameters()))
    set_parameters(model, weights)
    model.eval()
    predicted = base[data.valid] + model(data.inputs[data.valid]).correction
    set_parameters(model, current)
    return predicted
