"""The losses of both stages; they read only what the batch observes, or what an argument ``where`` marks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import msacore

from .config import Config
from .model import SSLMM, Batch, Output, rows_of


def drop_one_modality(observed: Tensor) -> Tensor:
    """Hide one more random modality wherever two or more are in view; bool ``[N, M]``."""
    score = torch.rand(observed.shape, device=observed.device).masked_fill(~observed, -1)
    last = torch.zeros_like(observed).scatter_(1, score.argmax(1, keepdim=True), True)
    return observed & ~(last & (observed.sum(1, keepdim=True) >= 2))


def reconstruction_error(built: list[Tensor], features: Sequence[Tensor], where: Tensor) -> Tensor:
    """Σ_m (1/d_m) Σ_{i: where} ‖x̂ − x‖² / number of utterances (the form of GCNet); only ``where`` is read."""
    total = built[0].new_zeros(())
    for m, (prediction, x) in enumerate(zip(built, features, strict=True)):
        total = total + (prediction - x.index_select(0, rows_of(where, m))).square().mean(1).sum()
    return total / len(where)


def scaled_cosine_error(built: list[Tensor], features: Sequence[Tensor], where: Tensor, power: float) -> Tensor:
    """Mean over masked nodes of (1 − cos(x̂, x))^power (GraphMAE)."""
    total, count = built[0].new_zeros(()), where.sum().clamp(min=1)
    for m, (prediction, x) in enumerate(zip(built, features, strict=True)):
        cosine = F.cosine_similarity(prediction, x.index_select(0, rows_of(where, m)), dim=1)
        total = total + ((1 - cosine).clamp(min=0) ** power).sum()
    return total / count


def pretraining_loss(model: SSLMM, batch: Batch) -> dict[str, Tensor]:
    """Stage A, without labels: masked nodes, a dropped modality, two views and the modalities against each other."""
    config, losses, own = model.config, {}, model.encode(batch)

    def nodes_of(observed: Tensor) -> Tensor:
        return model.propagate(model.dropout(model.hide(own, observed)), batch.seeing(observed))

    if config.node_weight or config.view_weight:
        masked = batch.observed & (torch.rand(batch.observed.shape, device=batch.observed.device) < config.mask_share)
        view = nodes_of(batch.observed & ~masked)
    if config.modality_weight or config.view_weight:
        harder = drop_one_modality(batch.observed)
        dropped = nodes_of(harder)
    if config.node_weight:
        built = model.reconstruct_masked(view, masked, batch)
        losses["nodes"] = config.node_weight * scaled_cosine_error(built, batch.features, masked, config.sce_power)
    if config.modality_weight:
        lost = batch.observed & ~harder
        error = reconstruction_error(model.reconstruct(dropped, lost), batch.features, lost)
        losses["modality"] = config.modality_weight * error
    if config.view_weight:
        losses["views"] = config.view_weight * msacore.info_nce(
            model.contrast(view.flatten(1)),
            model.contrast(dropped.flatten(1)),
            temperature=config.contrast_temperature,
            symmetric=True,
        )
    # Before propagation: after it, the modalities of an utterance know each other, and nothing is left to learn.
    modalities = batch.observed.shape[1]
    cross = own.new_zeros(())
    for m in range(modalities):
        for n in range(m + 1, modalities):
            both = batch.observed[:, m] & batch.observed[:, n]
            cross = cross + msacore.info_nce(
                own[:, m],
                own[:, n],
                temperature=config.contrast_temperature,
                anchor_mask=both,
                candidate_mask=both,
                symmetric=True,
            )
    losses["modalities"] = config.contrast_weight * cross
    return losses


def supervised_loss(prediction: Tensor, labels: Tensor, labelled: Tensor, task: str) -> Tensor:
    """Mean error over the labelled utterances; 0 when the batch has none. Labels of the others are not read."""
    gap = torch.where(labelled, prediction - torch.where(labelled, labels, 0), 0)
    error = gap.abs() if task == "l1" else gap.square()
    return error.sum() / labelled.sum().clamp(min=1)


def ramp_up(progress: float, ramp: float) -> float:
    """exp(−5 (1 − t/ramp)²), then 1."""
    return math.exp(-5 * (1 - min(progress / ramp, 1.0)) ** 2) if ramp > 0 else 1.0


@torch.no_grad()
def teacher_targets(teacher: SSLMM, batch: Batch, progress: float) -> tuple[Tensor, Tensor]:
    """Mean prediction over dropout passes, and 1 where their variance is among the lowest (50 % growing to 90 %)."""
    teacher.train()
    own = teacher.encode(batch)
    passes = torch.stack([teacher.read(own, batch).prediction for _ in range(teacher.config.teacher_passes)])
    variance = msacore.uncertainty.mc_variance(passes)
    weight = variance <= variance.quantile(0.5 + 0.4 * progress)
    return passes.mean(0), weight.to(passes.dtype)


def rankup_loss(weak: Output, strong: Output, labels: Tensor, labelled: Tensor) -> Tensor:
    """RankUp: an auxiliary ranking head; labelled pairs by cross-entropy, all pairs by confident pseudo-labels."""
    rows = labelled.nonzero()[:, 0]
    known = labels[rows]
    apart = known[:, None] - known[None]
    score = strong.rank[rows]
    logits = score[:, None] - score[None]
    ranked = apart != 0
    supervised = F.binary_cross_entropy_with_logits(logits, (apart > 0).to(logits.dtype), reduction="none")
    supervised = torch.where(ranked, supervised, 0).sum() / ranked.sum().clamp(min=1)

    with torch.no_grad():
        likely = torch.sigmoid((weak.rank[:, None] - weak.rank[None]) / 0.5)
        sure = torch.maximum(likely, 1 - likely) >= 0.95
    logits = strong.rank[:, None] - strong.rank[None]
    consistent = F.binary_cross_entropy_with_logits(logits, (likely > 0.5).to(logits.dtype), reduction="none")
    return supervised + torch.where(sure, consistent, 0).sum() / sure.sum().clamp(min=1)


def consistency_loss(
    model: SSLMM, teacher: SSLMM, batch: Batch, strong: Output, labels: Tensor, labelled: Tensor, progress: float
) -> Tensor:
    """The semi-supervised term of stage B, after its ramp.

    The target of the harder view is the label where there is one, else the teacher's mean (or the ranking, RankUp).
    """
    config: Config = model.config
    if config.unlabelled == "rankup":
        loss = rankup_loss(model(batch), strong, labels, labelled)
    else:
        guess, trust = teacher_targets(teacher, batch, progress)
        # A known label is a better target than the teacher's guess; labels of the others are not read.
        target, weight = torch.where(labelled, labels, guess), torch.where(labelled, 1, trust)
        gap = strong.prediction - target
        loss = (weight * (gap.abs() if config.task == "l1" else gap.square())).mean()
    return config.unlabelled_weight * ramp_up(progress, config.ramp) * loss
