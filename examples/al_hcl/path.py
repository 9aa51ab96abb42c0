"""Closed-form path: ridge regressions and kernels, stacked by their predictions for left-out videos.

The network corrects it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.msa.closed_form import FOLDS, NEARBY, Decomposition, Design, Linear, stack_weights

from .model import Inputs, SentimentModel
from .pretrain import embed
from .stack import drawn_weights

KERNEL_STRENGTHS = tuple(float(s) for s in 10.0 ** np.arange(-2, 1.5, 0.5))
# In units of a feature's deviation; the second is so long that the kernel is almost linear.
LENGTHS = (1.0, 3.0)
# A kernel has at most this many labelled rows as its support.
LANDMARKS = 800
VIEWS = ("first", "all", "learned")


@dataclass(frozen=True)
class LearnedScale:
    """Mean and deviation ``[k]`` of the embedding learned before labels, over the train part; float64."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, learned: Tensor, train: Tensor) -> LearnedScale:
        """From the embedding of all rows and the numbers of the train rows."""
        z = learned.double()[train]
        return cls(z.mean(0), z.std(0, correction=0).clamp_min(1e-6))

    def __call__(self, learned: Tensor) -> Tensor:
        return (learned.double() - self.mean) / self.deviation


@dataclass(frozen=True)
class Kernel:
    """Part of a path that is a sum of bumps ``exp(-D / (2 length²))``.

    Args:
        blocks: Column ranges of the design (first column, and one past the last) that ``D`` compares: ``D`` is the sum
            over blocks of the mean squared difference. Without blocks, ``D`` compares the learned embedding alone.
        length: Length scale.
        support: Centres of the bumps, float64 ``[m, k]``.
        coefficient: Heights of the bumps in the path, float64 ``[m]``.
    """

    blocks: tuple[tuple[int, int], ...]
    length: float
    support: Tensor
    coefficient: Tensor

    def __call__(self, design: Tensor, learned: Tensor | None) -> Tensor:
        """What the kernel adds to the predictions ``[N]``, given the design and the standardised embedding."""
        return bumps(coordinates(self.blocks, design, learned), self.support, self.length) @ self.coefficient


def coordinates(blocks: Sequence[tuple[int, int]], design: Tensor, learned: Tensor | None) -> Tensor:
    """Points ``[N, k]`` whose squared distance is ``D`` of :class:`Kernel`."""
    if not blocks:
        assert learned is not None
        return learned / learned.shape[1] ** 0.5
    return torch.cat([design[:, a:b].double() / (b - a) ** 0.5 for a, b in blocks], 1)


def bumps(z: Tensor, support: Tensor, length: float) -> Tensor:
    """``exp(-‖z - s‖² / (2 length²))``: ``[N, m]``."""
    power = z.square().sum(1)[:, None] + support.square().sum(1)
    return torch.exp((power - 2 * z @ support.T).clamp_min(0) / (-2 * length**2))


@dataclass(frozen=True)
class Path:
    """A fitted path, in units of the label.

    Args:
        offset: Prediction where everything else is 0.
        coefficient: Coefficients of the columns of a design, float64 ``[D]``.
        kernels: Kernels that are added.
        scale: Standardisation of the learned embedding.
        left_out: float64 ``[n]``: prediction of each labelled row by fits without its video.
        weights: Weight of each part, by its name.
    """

    offset: float
    coefficient: Tensor
    kernels: tuple[Kernel, ...]
    scale: LearnedScale
    left_out: Tensor
    weights: dict[str, float]

    def __call__(self, design: Tensor, learned: Tensor | None) -> Tensor:
        """Prediction for every row ``[N]`` float64, from its design and, where a kernel reads it, its embedding."""
        value = self.offset + design.double() @ self.coefficient
        z = None if learned is None else self.scale(learned)
        for kernel in self.kernels:
            value = value + kernel(design, z)
        return value


def fit_path(
    ridges: Mapping[str, Linear],
    design: Design,
    learned: Tensor,
    train: Tensor,
    labels: Tensor,
    labelled: Tensor,
    video: Tensor,
    view: str | None = None,
) -> Path:
    """Stack ridge regressions, kernels on features with those of neighbours, and kernels on the embedding learned
    before labels.

    Args:
        ridges: Ridge regressions fitted on the labelled rows, by name.
        design: What the ridge regressions read.
        learned: Embedding of all rows ``[N, k]``; its columns are standardised over ``train``.
        train: Row numbers of the train part.
        labels: Labels of all rows ``[N]``; only those of ``labelled`` are read.
        labelled: Row numbers ``[n]``.
        video: Video number of all rows ``[N]``.
        view: One of ``VIEWS``, to which the path is restricted: ridge regression on the first modality and its
            neighbours, ridge regression on all modalities, or kernels on the learned embedding.
    """
    y, groups = labels[labelled].double().cpu().numpy(), video[labelled].cpu().numpy()
    scale = LearnedScale.of(learned, train)
    parts: dict[str, Linear | _FittedKernel] = {}
    if view != "learned":
        first = next(iter(ridges))
        wanted = {"first": [f"{first} and neighbours"], "all": ["ridge, all modalities"]}
        parts |= {k: ridges[k] for k in (list(ridges) if view is None else wanted[view])}
    inputs = torch.from_numpy(design.values[labelled.cpu().numpy()]).to(learned.device)
    z = scale(learned[labelled])
    if view is None:
        wide = design.modalities if len(design.modalities) > 1 else ()
        for name, own in (("all modalities", wide), (design.modalities[0], design.modalities[:1])):
            near = [design.columns[b] for b in (*own, *(m + NEARBY for m in own))]
            if near:
                blocks = tuple((c.start, c.stop) for c in near)
                parts[f"kernel, {name} and neighbours"] = _fit_kernel(blocks, inputs, z, y, groups, LENGTHS[0])
    if view in (None, "learned"):
        for length in LENGTHS:
            parts[f"kernel, learned embedding, length {length:g}"] = _fit_kernel((), inputs, z, y, groups, length)
    left_out = np.column_stack([p.left_out for p in parts.values()])
    kernels_on_features = [i for i, p in enumerate(parts.values()) if isinstance(p, _FittedKernel) and p.blocks]
    if kernels_on_features and len(y) >= FOLDS:
        home = min(kernels_on_features, key=lambda i: float(np.square(left_out[:, i] - y).mean()))
        weights, added = drawn_weights(left_out, y, groups, home)
    else:
        weights, added = stack_weights(left_out, y, groups)
    device = learned.device
    width = next(iter(ridges.values())).coefficient.shape[0]
    offset, coefficient, kernels = added, np.zeros(width), []
    for w, part in zip(weights, parts.values(), strict=True):
        offset += w * part.offset
        if isinstance(part, Linear):
            coefficient += w * part.coefficient
        elif w:
            kernels.append(Kernel(part.blocks, part.length, part.support, w * part.coefficient))
    return Path(
        float(offset),
        torch.from_numpy(coefficient).to(device),
        tuple(kernels),
        scale,
        torch.from_numpy(left_out @ weights + added).to(device),
        {k: float(w) for k, w in zip(parts, weights, strict=True)},
    )


@dataclass(frozen=True)
class _FittedKernel:
    """A kernel regression on its own."""

    blocks: tuple[tuple[int, int], ...]
    length: float
    support: Tensor
    coefficient: Tensor
    offset: float
    left_out: np.ndarray


def _fit_kernel(
    blocks: tuple[tuple[int, int], ...], design: Tensor, z: Tensor, y: np.ndarray, groups: np.ndarray, length: float
) -> _FittedKernel:
    """Kernel ridge regression on the labelled rows; where there are more than ``LANDMARKS``, through that many evenly
    spaced ones (Nyström)."""
    points = coordinates(blocks, design, z)
    chosen = torch.arange(len(z)) if len(z) <= LANDMARKS else torch.linspace(0, len(z) - 1, LANDMARKS).long()
    support = points[chosen]
    power, u = torch.linalg.eigh(bumps(support, support, length))
    keep = power > 1e-8 * power[-1]
    root = u[:, keep] / power[keep].sqrt()
    features = bumps(points, support, length) @ root
    coefficient, offset, left_out, _ = Decomposition(features.cpu().numpy(), groups).fit(y, KERNEL_STRENGTHS)
    heights = root @ torch.from_numpy(coefficient).to(root)
    return _FittedKernel(blocks, length, support, heights, float(offset), left_out)


@dataclass(frozen=True)
class ClosedForm:
    """A path for utterances other than those it was fitted on.

    Args:
        path: Fitted path.
        learner: Model before any label, whose embedding the kernels read; None where no kernel reads it.
    """

    path: Path
    learner: SentimentModel | None

    @classmethod
    def of(cls, path: Path, learner: SentimentModel) -> ClosedForm:
        """From a path and the model before any label."""
        return cls(path, learner if any(not k.blocks for k in path.kernels) else None)

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Tensor:
        """Prediction for every row ``[N]`` float64."""
        return self.path(inputs.design, None if self.learner is None else embed(self.learner, inputs))

    def facts(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        kernels = [{"length": k.length, "blocks": k.blocks} for k in self.path.kernels]
        return {"offset": self.path.offset, "kernels": kernels, "weights": self.path.weights}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        path = self.path
        result = {"coefficient": path.coefficient, "mean": path.scale.mean, "deviation": path.scale.deviation}
        for i, kernel in enumerate(path.kernels):
            result |= {f"support{i}": kernel.support, f"height{i}": kernel.coefficient}
        if self.learner is not None:
            result |= {f"learner.{name}": value for name, value in self.learner.state_dict().items()}
        return result

    @classmethod
    def load(cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], learner: SentimentModel) -> ClosedForm:
        """Rebuild from :meth:`facts` and :meth:`tensors`; ``learner`` gets the weights of the model before any label.

        Raises:
            KeyError: A tensor is missing.
            RuntimeError: The learner's weights do not fit.
        """
        weights = {k.removeprefix("learner."): v for k, v in tensors.items() if k.startswith("learner.")}
        if weights:
            learner.load_state_dict(weights)
        kernels = tuple(
            Kernel(tuple((a, b) for a, b in k["blocks"]), k["length"], tensors[f"support{i}"], tensors[f"height{i}"])
            for i, k in enumerate(facts["kernels"])
        )
        scale = LearnedScale(tensors["mean"], tensors["deviation"])
        nothing = scale.mean[:0]
        path = Path(float(facts["offset"]), tensors["coefficient"], kernels, scale, nothing, dict(facts["weights"]))
        return cls(path, learner if weights else None)
