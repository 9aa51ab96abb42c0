"""Models that predict together, with their closed-form paths, on any utterances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from examples.msa.checkpoint import derive
from examples.msa.corpus import Corpus

from .data import Data
from .model import Inputs, ModelConfig, SentimentModel
from .path import ClosedForm
from .predict import Member, Prediction, predict
from .pretrain import pretrain
from .train import Trained, train

if TYPE_CHECKING:
    from .active import Arm

PASSES = 20
CHUNK = 4096


@dataclass(frozen=True)
class Ensemble:
    """Members and their closed-form paths, which together predict any utterances."""

    members: Sequence[Member]
    paths: Sequence[ClosedForm]

    def predict(self, inputs: Inputs, passes: int = PASSES, seed: int = 0) -> Prediction:
        """Predict every row; the states of the global random generators are left as they were."""
        with torch.random.fork_rng():
            paths = [path(inputs) for path in self.paths]
            rows = torch.arange(len(inputs), device=inputs.available.device).split(CHUNK)
            parts = [predict(self.members, inputs, paths, r, passes, derive(seed, i)) for i, r in enumerate(rows)]
        if len(parts) == 1:
            return parts[0]
        wide = [torch.cat([getattr(p, k) for p in parts], 1) for k in ("passes", "noise", "members", "unimodal")]
        return Prediction(*wide, torch.cat([p.embedding for p in parts]))

    def values(self, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """Point predictions and their variance, ``[N]`` float64 each."""
        return values(self.predict(inputs))


def values(prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
    """Point predictions, and the variance of the passes plus the predicted noise, ``[n]`` float64 each."""
    variance = prediction.passes.var(0, correction=0) + prediction.noise.square().mean(0)
    return prediction.mean.double().cpu().numpy(), variance.double().cpu().numpy()


def fit_ensemble(corpus: Corpus, data: Data, labelled: Tensor, arm: Arm, seed: int) -> tuple[Ensemble, list[Trained]]:
    """For every member of the arm: contrastive training before labels, then training on the labelled rows.

    Args:
        corpus: Standardised corpus.
        data: The same as tensors.
        labelled: Rows to train on.
        arm: Model, training and number of members.
        seed: Seed of everything.
    """
    trained, paths, ridges = [], [], data.ridges(labelled)
    for k in range(arm.selection.members):
        start = derive(seed, "pretrain", k)
        torch.manual_seed(start)
        learner = new_model(corpus, arm.model, data.labels.device)
        learned = pretrain(learner, data, arm.training, start)
        models = [new_model(corpus, arm.model, data.labels.device) for _ in range(arm.training.folds)]
        for model in models:
            model.load_state_dict(learner.state_dict())
        trained.append(train(models, data, labelled, learned, arm.training, derive(seed, "model", k), ridges))
        paths.append(ClosedForm.of(trained[-1].path, learner))
    return Ensemble(trained, paths), trained


def left_out(trained: Sequence[Trained]) -> np.ndarray:
    """Mean prediction of the members for each labelled row, by models not fitted on its video, ``[n]``."""
    found: np.ndarray = np.mean([t.left_out for t in trained], axis=0)
    return found


def new_model(corpus: Corpus, config: ModelConfig, device: torch.device) -> SentimentModel:
    """A fresh network for a corpus."""
    return SentimentModel(corpus.dims, corpus.sequences, corpus.aligned, config).to(device)
