"""The closed-form path as something that predicts utterances it was not fitted with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernel import VIEW_WEIGHTS, KernelPath, LearnedScale, feature_blocks, view_distances
from .model import Inputs, SentimentModel
from .pretrain import embed
from .train import Data


@dataclass(frozen=True)
class ClosedForm:
    """A fitted path without its corpus.

    Args:
        view: Name of its view of the features.
        length: Length scale.
        slope: Stretch of its predictions.
        offset: Mean target of the labelled rows.
        weights: Of the labelled rows, ``[n]`` float64.
        support: Of the labelled rows, float64: features of each modality ``[n, d_m]``, standardised learned embedding
            ``[n, k]`` last; empty where the view does not read them.
        scale: Of the learned embedding.
        learner: Model before any label, whose embedding is the learned view; None where the view does not read it.
    """

    view: str
    length: float
    slope: float
    offset: float
    weights: Tensor
    support: list[Tensor]
    scale: LearnedScale
    learner: SentimentModel | None

    @classmethod
    def of(cls, path: KernelPath, data: Data, labelled: Tensor, learned: Tensor, learner: SentimentModel) -> ClosedForm:
        """From a path and what it was fitted with."""
        first, beside, own = VIEW_WEIGHTS[path.view]
        scale = LearnedScale.of(learned, data.train)
        blocks = [*feature_blocks(data.inputs[labelled]), scale(learned[labelled])]
        used = [first, *[beside] * (len(blocks) - 2), own]
        support = [b if w else b[:0, :0] for w, b in zip(used, blocks, strict=True)]
        return cls(
            path.view, path.length, path.slope, path.offset, path.weights, support, scale, learner if own else None
        )

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Tensor:
        """Prediction for every row ``[N]`` float32, in units of the target."""
        blocks = feature_blocks(inputs)
        learned = self.scale(embed(self.learner, inputs)) if self.learner is not None else self.support[-1]
        distances = view_distances(self.view, [*blocks, learned], self.support)
        kernel = torch.exp(distances / (-2 * self.length**2))
        return (self.offset + self.slope * (kernel @ self.weights)).float()

    def facts(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {"view": self.view, "length": self.length, "slope": self.slope, "offset": self.offset}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        result = {f"support{i}": block for i, block in enumerate(self.support)}
        result |= {"weights": self.weights, "mean": self.scale.mean, "deviation": self.scale.deviation}
        if self.learner is not None:
            result |= {f"learner.{name}": value for name, value in self.learner.state_dict().items()}
        return result

    @classmethod
    def load(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], modalities: int, learner: SentimentModel
    ) -> ClosedForm:
        """What :meth:`facts` and :meth:`tensors` gave; ``learner`` gets the weights of the learned view.

        Raises:
            KeyError: A tensor is missing.
            RuntimeError: The learner's weights do not fit.
        """
        weights = {k.removeprefix("learner."): v for k, v in tensors.items() if k.startswith("learner.")}
        if weights:
            learner.load_state_dict(weights)
        return cls(
            str(facts["view"]),
            float(facts["length"]),
            float(facts["slope"]),
            float(facts["offset"]),
            tensors["weights"],
            [tensors[f"support{i}"] for i in range(modalities + 1)],
            LearnedScale(tensors["mean"], tensors["deviation"]),
            learner if weights else None,
        )
