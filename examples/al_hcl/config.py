"""How AL-HCL is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """How one model is trained.

    Args:
        steps: Optimiser steps, the same for any number of labels.
        batch: Labelled rows per step.
        contrast_rows: Unlabelled rows per step that only the contrastive loss sees.
        pretrain_steps: Steps of contrast alone, before the first labels.
        pretrain_rows: Train rows per such step.
        learning_rate: Learning rate of AdamW, with cosine decay to 0.
        weight_decay: Weight decay of AdamW, applied to matrices only.
        contrast_weight: λ of the contrastive loss; 0 leaves it out.
        folds: Networks of a model, each trained without one fold of the labelled videos and evaluated on that fold.
        check_every: Steps between evaluations of the out-of-fold error; the best weights are kept.
        patience: Training ends after this many evaluations in a row in which the correction deserves no weight.
        average: Decay of the running average of the weights; the averaged weights are evaluated and used.
        passes: Monte-Carlo passes of a prediction.
        view: Part to which the closed-form path is restricted, a name in ``path.VIEWS``; a stack of all parts when
            omitted.
    """

    steps: int = 40
    batch: int = 64
    contrast_rows: int = 64
    pretrain_steps: int = 200
    pretrain_rows: int = 192
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    contrast_weight: float = 0.1
    folds: int = 3
    check_every: int = 10
    patience: int = 2
    average: float = 0.9
    passes: int = 6
    view: str | None = None
