"""Training on the labelled rows, with contrast on labelled and unlabelled rows, evaluated out of fold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.msa.best import BestPerMetric
from examples.msa.closed_form import Linear, fold_of

from .config import TrainConfig
from .data import Data
from .model import Inputs, ModelConfig, Outputs, SentimentModel
from .path import Path, fit_path
from .predict import Member


@dataclass(frozen=True)
class Trained(Member):
    """A member with what its training found.

    Attributes:
        path: Closed-form path.
        everywhere: Its predictions of all rows, ``[N]``.
        left_out: Predictions of the labelled rows ``[n]`` by models not fitted on their videos, float64.
        facts: Chosen step, out-of-fold errors of the path alone and of the whole, weights of the parts.
        best: The best averaged weights by each metric.
        history: For each look (evaluation) the step, the mean training loss since the look before, the out-of-fold
            error, and the weight of the correction.
    """

    path: Path
    everywhere: Tensor
    left_out: np.ndarray
    facts: dict[str, Any]
    best: BestPerMetric
    history: list[dict[str, float]]


def train(
    models: Sequence[SentimentModel],
    data: Data,
    labelled: Tensor,
    learned: Tensor,
    config: TrainConfig,
    seed: int,
    ridges: Mapping[str, Linear] | None = None,
) -> Trained:
    """Fit the closed-form path and train networks, in place, on its residual; other train rows enter the contrastive
    loss only.

    Every network is trained without one fold of the labelled videos. Its predictions for that fold, on top of the
    path's left-out predictions, choose the number of steps and the weight of the correction: 0, unless the correction
    lowers the error by more than chance would.

    Args:
        models: One for each fold, with the weights from before any label or from an earlier round.
        data: The corpus.
        labelled: Rows whose label is known.
        learned: Embedding of all rows, learned before any label, ``[N, k]``.
        config: Training configuration.
        seed: Seed of batches and dropout.
        ridges: ``data.ridges(labelled)``, if computed already.

    Raises:
        ValueError: No row is labelled.
    """
    if len(labelled) == 0:
        raise ValueError("AL-HCL: there is no labelled sample to train on; raise the initial share")
    known = data.labels[labelled].double()
    centre, scale = float(known.mean()), max(float(known.std(correction=0)), 1e-3)
    found = data.ridges(labelled) if ridges is None else ridges
    path = fit_path(found, data.design, learned, data.train, data.labels, labelled, data.video, config.view)
    everywhere = path(data.inputs.design, learned)
    base = ((everywhere - centre) / scale).float()
    base[labelled] = ((path.left_out - centre) / scale).float()
    target = (data.labels - centre) / scale
    fold = torch.from_numpy(fold_of(data.video[labelled].cpu().numpy(), len(models))).to(labelled.device)
    groups = data.video[labelled].cpu().numpy()
    truth, rest = known.cpu().numpy(), (known - path.left_out).cpu().numpy()
    path_error = float(np.square(rest).mean())
    per_metric = BestPerMetric(data.family, truth)
    best_off, best_error, best, best_weight = math.inf, path_error, [], 0.0
    best_step, best_left_out, history, idle = 0, path.left_out.cpu().numpy(), [], 0
    # The networks take turns, each training up to its next look: all share one stream of random numbers.
    torch.manual_seed(seed)
    networks = [
        _train_fold(model, data, labelled, fold != k, base, target, config, seed + k) for k, model in enumerate(models)
    ]
    for looks in zip(*networks, strict=True):
        correction = torch.zeros(len(labelled), dtype=torch.float64)
        for k, seen in enumerate(looks):
            held = (fold == k).cpu()
            correction[held] = seen.correction[held].double().cpu() * scale
        weight = correction_weight(correction.numpy(), rest, groups)
        left_out = path.left_out.cpu().numpy() + weight * correction.numpy()
        error = float(np.square(truth - left_out).mean())
        step, losses = looks[0].step, [seen.loss for seen in looks]
        history.append({"step": step, "loss": float(np.mean(losses)), "left_out_mse": error, "weight": weight})
        per_metric.offer(left_out, step, partial(_kept, looks, weight, left_out))
        off = float(np.abs(truth - left_out).mean())
        if off < best_off:
            best_off, best_error, best_step, best_weight, best_left_out = off, error, step, weight, left_out
            best = [seen.weights for seen in looks]
        idle = 0 if weight or not step else idle + 1
        if idle >= config.patience:
            break
    for model, weights in zip(models, best, strict=True):
        set_parameters(model, weights)
    facts = {
        "best_step": best_step,
        "labels": len(labelled),
        "left_out_rmse": math.sqrt(best_error),
        "path_left_out_rmse": math.sqrt(path_error),
        "network_weight": best_weight,
        "path_weights": path.weights,
    }
    return Trained(
        models=list(models),
        centre=centre,
        scale=scale,
        weight=best_weight,
        noise=math.sqrt(best_error),
        path=path,
        everywhere=everywhere,
        left_out=best_left_out,
        facts=facts,
        best=per_metric,
        history=history,
    )


@dataclass(frozen=True)
class _Look:
    """An evaluation of a network at some step: the mean loss since the look before (0 at the first), its averaged
    weights, and their correction for the labelled rows."""

    step: int
    loss: float
    weights: list[Tensor]
    correction: Tensor


def _kept(looks: Sequence[_Look], weight: float, left_out: np.ndarray) -> dict[str, Any]:
    return {"networks": [seen.weights for seen in looks], "weight": weight, "left_out": left_out}


def best_in(trained: Trained, metric: str) -> Trained:
    """The same training with the checkpoint that is best in a metric out of fold; its networks get those weights."""
    state = trained.best.state
    kept = state["weights"][state["best"][metric]["when"]]
    for model, weights in zip(trained.models, kept["networks"], strict=True):
        set_parameters(model, weights)
    return replace(trained, weight=kept["weight"], left_out=kept["left_out"])


def correction_weight(correction: np.ndarray, rest: np.ndarray, groups: np.ndarray) -> float:
    """Weight of a correction, in [0, 1]: the least-squares weight, shrunk according to its standard error, and 0 where
    it is within two standard errors of 0. The standard error is that over videos or that over rows, whichever is
    larger.

    Args:
        correction: Out-of-fold correction ``[n]``.
        rest: What the correction should have been ``[n]``.
        groups: Video of each row ``[n]``.
    """
    power = float(correction @ correction)
    if power < 1e-12:
        return 0.0
    weight = float(correction @ rest) / power
    if weight <= 0:
        return 0.0
    each = correction * (rest - weight * correction)
    over_videos = np.bincount(np.unique(groups, return_inverse=True)[1], each)
    count = len(over_videos)
    variance = max(float(np.square(over_videos).sum()) * count / max(1, count - 1), float(np.square(each).sum()))
    variance /= power**2
    if weight**2 < 4 * variance:
        return 0.0
    return float(np.clip(weight * (1 - variance / weight**2), 0.0, 1.0))


def _train_fold(
    model: SentimentModel,
    data: Data,
    labelled: Tensor,
    inside: Tensor,
    base: Tensor,
    target: Tensor,
    config: TrainConfig,
    seed: int,
) -> Iterator[_Look]:
    """Train one network on the labelled rows marked ``inside``, its training folds; yields looks at it on the way."""
    order = torch.Generator().manual_seed(seed)
    rows_in = labelled[inside] if bool(inside.any()) else labelled
    classes = -1 - torch.arange(len(target), device=target.device)
    classes[rows_in] = data.classes[rows_in]
    pool = data.train[~torch.isin(data.train, labelled)]
    labelled_batches = _endless(rows_in, config.batch, order)
    pool_batches = _endless(pool, config.contrast_rows, order) if len(pool) else None
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.dim() > 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed}, {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        foreach=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, config.steps))
    average = _copies(parameters)
    total, count = 0.0, 0
    for step in range(config.steps + 1):
        if step % config.check_every == 0:
            correction = _correct(model, average, data.inputs[labelled])
            yield _Look(step, total / max(1, count), _copies(average), correction)
            total, count = 0.0, 0
        if step == config.steps:
            break
        model.train()
        rows = next(labelled_batches)
        size = len(rows)
        if config.contrast_weight and pool_batches is not None:
            rows = torch.cat([rows, next(pool_batches)])
        batch = data.inputs[rows]
        out = model(batch)
        loss = task_loss(out, (target - base)[rows[:size]], target[rows[:size]], model.config)
        if config.contrast_weight:
            loss = loss + config.contrast_weight * model.contrastive_loss(out, batch.available, classes[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total, count = total + float(loss.detach()), count + 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(config.average, step / (step + 9)))


def task_loss(out: Outputs, residual: Tensor, target: Tensor, config: ModelConfig) -> Tensor:
    """Loss on the first ``len(target)`` rows of a batch: Gaussian negative log likelihood of the residual that the
    closed-form path leaves, each sample weighted by its detached deviation so that noisy samples are still fitted, or
    squared error; plus the squared error of the unimodal heads, which reaches only those heads."""
    n = len(target)
    error = (out.correction[:n] - residual).square()
    if config.heteroscedastic:
        log_variance = out.log_variance[:n]
        weight = (0.5 * log_variance.detach()).exp()
        error = 0.5 * weight * (error * (-log_variance).exp() + log_variance)
    return error.mean() + (out.unimodal_mean[:, :n] - target).square().mean()


def _endless(rows: Tensor, size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of shuffled rows; the last batch of each pass over the rows may be smaller."""
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
def _correct(model: SentimentModel, weights: list[Tensor], inputs: Inputs) -> Tensor:
    """Corrections by the model with other weights, in units of the labels' deviation."""
    current = _copies(list(model.parameters()))
    set_parameters(model, weights)
    model.eval()
    correction: Tensor = model(inputs).correction
    set_parameters(model, current)
    return correction
