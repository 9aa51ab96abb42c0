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
        learning_rate: Of AdamW, falling to 0 as a cosine.
        weight_decay: Of AdamW, on matrices.
        contrast_weight: λ of the contrastive loss; 0 leaves it out.
        folds: Networks of a model, each trained without a fold of the labelled videos, which judges it.
        check_every: Steps between looks at the error out of fold; the best weights count.
        patience: Training ends after so many looks in a row at which the correction deserves no weight.
        average: Share kept per step by the running average of the weights, which is what is judged and used.
        passes: Monte-Carlo passes of a prediction.
        view: What the closed-form path is confined to, a name in ``path.VIEWS``; a stack of everything when omitted.
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
