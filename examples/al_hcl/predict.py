"""Predictions of trained networks on top of their closed-form paths, with Monte-Carlo dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Inputs, SentimentModel


@dataclass(frozen=True)
class Member:
    """Networks of one training, and the numbers of their predictions ``ŷ = path + scale * weight * mean correction``.

    Attributes:
        models: A network per fold, with its best averaged weights.
        centre: Mean of the known labels.
        scale: Deviation of the known labels.
        weight: Weight of the networks' correction, in [0, 1].
        noise: Out-of-fold error (root mean square, label units), taken as the noise of a model that predicts none.
    """

    models: list[SentimentModel]
    centre: float
    scale: float
    weight: float
    noise: float


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


@torch.no_grad()
def predict(
    members: Sequence[Member],
    inputs: Inputs,
    paths: Sequence[Tensor],
    rows: Tensor,
    passes: int,
    seed: int,
) -> Prediction:
    """Predict ``rows`` with every member: once without dropout, and ``passes`` times (possibly 0) with it.

    A pass of one network differs from the point prediction by the effect of dropout on that network's correction,
    whatever weight the correction has.

    Args:
        members: Models.
        inputs: All rows of a corpus.
        paths: Closed-form path of every row, per member.
        rows: Row numbers.
        passes: Stochastic passes of each member; its networks take turns.
        seed: Seed of the dropout.
    """
    torch.manual_seed(seed)
    x = inputs[rows]
    means, noises, plain, unimodal, embeddings = [], [], [], [], []
    for t, everywhere in zip(members, paths, strict=True):
        for model in t.models:
            model.eval()
        outs = [model(x) for model in t.models]
        path = everywhere[rows].float()
        plain.append(path + t.scale * t.weight * torch.stack([o.correction for o in outs]).mean(0))
        unimodal.append(t.centre + t.scale * torch.stack([o.unimodal_mean for o in outs]).mean(0))
        embeddings += [o.fused for o in outs]
        for s in range(passes):
            k = s % len(outs)
            t.models[k].train()
            out = t.models[k](x)
            t.models[k].eval()
            means.append(plain[-1] + t.scale * (out.correction - outs[k].correction))
            learned = t.scale * (0.5 * out.log_variance).exp()
            noises.append(learned if t.models[k].config.heteroscedastic else torch.full_like(learned, t.noise))
    return Prediction(
        torch.stack(means) if means else plain[0].new_empty(0, len(rows)),
        torch.stack(noises) if noises else plain[0].new_empty(0, len(rows)),
        torch.stack(plain),
        torch.stack(unimodal).mean(0),
        torch.cat(embeddings, -1),
    )
