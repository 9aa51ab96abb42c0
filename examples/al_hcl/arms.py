"""The systems under comparison: the reference, its baselines, and one arm per ablated part."""

from __future__ import annotations

from dataclasses import replace

from .active import Arm

REFERENCE = "AL-HCL"
RANDOM = "random selection"
MARGIN = "ridge that buys by margin"
ALL_LABELS = "all labels"


def comparison(base: Arm) -> list[Arm]:
    """The reference, random selection from the first label on, a ridge regression that starts at random and then buys
    what is nearest to neutral, and the model trained on every label of the train part."""
    everything = replace(base.selection, initial=1.0, rounds=0)
    by_margin = replace(base.selection, informative=0.0, strategy="topk", uncertainty="margin", explore=0.0, members=1)
    alone = replace(base.training, steps=0, pretrain_steps=0, folds=1, passes=1, view="first")
    return [
        base,
        replace(base, name=RANDOM, selection=replace(base.selection, informative=0.0, strategy="random")),
        replace(
            base, name=MARGIN, model=replace(base.model, heteroscedastic=False), training=alone, selection=by_margin
        ),
        replace(base, name=ALL_LABELS, selection=everything),
    ]


def ablations(base: Arm, modalities: int) -> list[Arm]:
    """One arm per part left out. Model arms replay the reference's labels; selection arms buy their own.

    Two modalities make one pair, so tier 3 is empty and has no arm.
    """
    weights = base.model.tier_weights
    arms = []
    for tier in range(3 if modalities > 2 else 2):
        without = tuple(0.0 if i == tier else w for i, w in enumerate(weights))
        arms.append(_model_arm(base, f"without tier {tier + 1}", tier_weights=without))
    arms.append(
        replace(base, name="without contrast", training=replace(base.training, contrast_weight=0.0), replay=True)
    )
    arms.append(_model_arm(base, "intra-modal tier 1", tier1="intra_modal"))
    arms.append(_model_arm(base, "without matrix fusion", high_level="none"))
    arms.append(_model_arm(base, "MLP for matrix fusion", high_level="mlp"))
    arms.append(_model_arm(base, "without fusion guidance", guidance=False))
    for name, strategy in (
        ("uncertainty only", "topk"),
        ("diversity only", "kcenter"),
        ("uncertainty and diversity", "uncertainty_kcenter"),
    ):
        arms.append(replace(base, name=name, selection=replace(base.selection, strategy=strategy, explore=0.0)))
    arms.append(replace(base, name="random first labels", selection=replace(base.selection, informative=0.0)))
    arms.append(replace(base, name="random after the first", selection=replace(base.selection, strategy="random")))
    return arms


def contrast_sweep(base: Arm, weights: list[float]) -> list[Arm]:
    """The reference with other weights λ of the contrastive loss, on the reference's labels."""
    return [
        replace(base, name=f"λ = {w:g}", training=replace(base.training, contrast_weight=w), replay=True)
        for w in weights
    ]


def _model_arm(base: Arm, name: str, **changes: object) -> Arm:
    return replace(base, name=name, model=replace(base.model, **changes), replay=True)
