"""Which utterances to label next: a measure of uncertainty, and a strategy that picks from the pool by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msacore import uncertainty as measures
from msacore.selection import select

from .predict import Prediction


@dataclass(frozen=True)
class SelectionConfig:
    """The active-learning protocol.

    Args:
        strategy: Any strategy of ``msacore.select``.
        uncertainty: A key of ``MEASURES``.
        initial: Share of the train part that is labelled before the first round.
        informative: Share of these first labels that is chosen for what they tell about the rest; the others are drawn
            at random.
        budget: Labels bought per round.
        rounds: Rounds after the first training.
        keep_training: Continue from the last round's weights instead of new ones.
        members: Models trained per round; their passes are averaged.
        gamma: Exponent of the uncertainty in "uncertainty_kcenter".
        explore: Share of each round's budget that is drawn at random, so that samples about which a model is certain
            are labelled too.
        options: Options of the strategy, as ``msacore.select`` takes them.
    """

    strategy: str = "topk"
    uncertainty: str = "margin"
    initial: float = 0.1
    informative: float = 0.5
    budget: int = 40
    rounds: int = 8
    keep_training: bool = False
    members: int = 1
    gamma: float = 1.0
    explore: float = 0.5
    options: dict[str, float] = field(default_factory=dict)


def sign_probabilities(p: Prediction) -> Tensor:
    """Probabilities of a negative and a non-negative label under each pass's Gaussian, ``[S, n, 2]``."""
    positive = 0.5 * (1 + torch.erf(p.passes / (p.noise * math.sqrt(2.0))))
    return torch.stack([1 - positive, positive], -1)


# Regression outputs have no class probabilities of their own: the confidence measures judge the sign of the label.
MEASURES: dict[str, Callable[[Prediction, Tensor], Tensor]] = {
    "mc_variance": lambda p, available: measures.mc_variance(p.passes),
    "total_variance": lambda p, available: measures.mc_variance(p.passes) + p.noise.square().mean(0),
    "ensemble_variance": lambda p, available: measures.ensemble_variance(p.members),
    "modality_disagreement": lambda p, available: measures.modality_disagreement(p.unimodal, available),
    "entropy": lambda p, available: measures.entropy(sign_probabilities(p).mean(0)),
    "least_confidence": lambda p, available: measures.least_confidence(sign_probabilities(p).mean(0)),
    "margin": lambda p, available: measures.margin(sign_probabilities(p).mean(0)),
    "bald": lambda p, available: measures.bald(sign_probabilities(p)),
}


@dataclass(frozen=True)
class Picks:
    """Positions in the pool in pick order, the uncertainty of each, and its score by the strategy."""

    positions: Tensor
    uncertainty: Tensor
    scores: Tensor


def acquire(pool: Prediction, available: Tensor, labelled: Tensor, config: SelectionConfig, seed: int) -> Picks:
    """Choose ``config.budget`` samples of the pool.

    Args:
        pool: Predictions for the samples that have no label.
        available: Their modalities, ``[n, M]``.
        labelled: Fused embeddings of the labelled samples, the centres that picks should differ from.
        config: Protocol.
        seed: Seed of everything that is drawn.
    """
    value = MEASURES[config.uncertainty](pool, available)
    asked = config.budget - round(config.explore * config.budget)
    chosen = select(
        pool.embedding,
        asked,
        strategy=config.strategy,
        uncertainty=value,
        labeled=labelled,
        gamma=config.gamma,
        seed=seed,
        options=config.options or None,
    )
    positions, scores = chosen.indices.to(value.device), chosen.scores
    if asked < config.budget:
        rest = torch.ones(len(value), dtype=torch.bool, device=value.device)
        rest[positions] = False
        rest = rest.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(rest), generator=generator)[: config.budget - asked]
        positions = torch.cat([positions, rest[drawn.to(rest.device)]])
        scores = torch.cat([scores, scores.new_zeros(len(drawn))])
    return Picks(positions, value[positions], scores)
