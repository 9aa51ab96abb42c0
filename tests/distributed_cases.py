"""Losses and options that tests/test_distributed.py runs over several ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

N_QUEUE = 5


@dataclass(frozen=True)
class LossCase:
    """A loss and its options; `make` gives the whole batch of ``n`` rows as keyword arguments.

    Attributes:
        rows: Names of arguments that hold rows of the batch, and are split over the ranks as it is.
        shares: Names of arguments whose rows are split over the ranks independently of the batch (a queue).
        towers: Names of arguments that a shared encoder produces, and whose gradients reach it.
    """

    name: str
    loss: str
    make: Callable[[int, torch.Generator, torch.dtype], dict[str, Any]]
    towers: tuple[str, ...]
    rows: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    learn_temperature: bool = False


def _pair(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "anchors": torch.randn(n, 6, generator=g, dtype=dtype),
        "candidates": torch.randn(n, 6, generator=g, dtype=dtype),
    }


def _self(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    return {"anchors": torch.randn(n, 6, generator=g, dtype=dtype), "labels": torch.randint(-1, 3, (n,), generator=g)}


def _self_masked(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.rand(n, generator=g) > 0.3
    return {"anchors": torch.randn(n, 6, generator=g, dtype=dtype), "anchor_mask": mask, "candidate_mask": mask}


def _self_weighted(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    return {key: value for key, value in _weighted(n, g, dtype).items() if key != "candidates"}


def _labelled(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    labels = [torch.randint(-1, 3, (n,), generator=g) for _ in range(2)]
    return {**_pair(n, g, dtype), "labels": labels}


def _masked(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    masks = {name: torch.rand(n, generator=g) > 0.3 for name in ("anchor_mask", "candidate_mask")}
    return {**_pair(n, g, dtype), **masks}


def _weighted(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    weights = torch.rand(n, n, generator=g, dtype=dtype) * (torch.rand(n, n, generator=g) > 0.4)
    return {**_pair(n, g, dtype), "weights": weights}


def _queue(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    negatives = torch.randn(N_QUEUE, 6, generator=g, dtype=dtype)
    return {**_pair(n, g, dtype), "negatives": negatives, "negative_mask": torch.arange(N_QUEUE) != 2}


def _hierarchy(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    def draw(width: int) -> Tensor:
        return torch.randn(n, width, generator=g, dtype=dtype)

    return {
        "unimodal": [draw(6) for _ in range(3)],
        "fused": draw(6),
        "high_level": [draw(4) for _ in range(3)],
        "available": torch.rand(n, 3, generator=g) > 0.35,
        "labels": torch.randint(-1, 3, (n,), generator=g),
    }


def _all_there(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    return {key: value for key, value in _hierarchy(n, g, dtype).items() if key != "available"}


def _ranked(n: int, g: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    targets = torch.randn(n, generator=g, dtype=dtype).round(decimals=1)
    return {
        "embeddings": torch.randn(n, 6, generator=g, dtype=dtype),
        "targets": targets,
        "mask": torch.rand(n, generator=g) > 0.2,
    }


def _nce(name: str, make: Any, **options: Any) -> LossCase:
    learn = options.pop("learn_temperature", False)
    towers = ("anchors",) if make in (_self, _self_masked, _self_weighted) else ("anchors", "candidates")
    rows = ("labels", "anchor_mask", "candidate_mask", "weights")
    return LossCase(name, "info_nce", make, towers, rows, ("negatives", "negative_mask"), options, learn)


CASES = [
    _nce("default", _pair),
    _nce("symmetric", _pair, symmetric=True),
    _nce("sum", _pair, symmetric=True, reduction="sum"),
    _nce("none", _pair, reduction="none"),
    _nce("none, symmetric", _pair, reduction="none", symmetric=True, learn_temperature=True),
    _nce("learned temperature", _masked, symmetric=True, learn_temperature=True),
    _nce("labels", _labelled, symmetric=True),
    _nce("labels, self excluded", _self, exclude_self=True),
    _nce("self, none", _self, exclude_self=True, reduction="none", learn_temperature=True),
    _nce("self, sum", _self, symmetric=True, reduction="sum", learn_temperature=True),
    _nce("self, negatives alone", _self, exclude_self=True, symmetric=True, denominator="negatives"),
    _nce("self, decoupled, not normalised", _self, denominator="decoupled", normalize=False, temperature=2.0),
    _nce("self, one mask", _self_masked, learn_temperature=True),
    _nce("self, weights", _self_weighted, exclude_self=True, symmetric=True),
    _nce("masks", _masked, symmetric=True),
    _nce("weights", _weighted, symmetric=True),
    _nce("queue", _queue, symmetric=True),
    _nce("queue, negatives alone", _queue, denominator="negatives", symmetric=True),
    _nce("labels, negatives alone", _labelled, denominator="negatives", symmetric=True),
    _nce("decoupled", _labelled, denominator="decoupled"),
    _nce("not normalised", _pair, normalize=False, temperature=1.0),
    LossCase(
        "nine terms",
        "hierarchical_contrastive_loss",
        _hierarchy,
        ("unimodal", "fused", "high_level"),
        ("available", "labels"),
    ),
    LossCase(
        "intra-modal",
        "hierarchical_contrastive_loss",
        _hierarchy,
        ("unimodal", "fused", "high_level"),
        ("available", "labels"),
        options={"tier1": "intra_modal"},
    ),
    LossCase(
        "intra-modal, all there",
        "hierarchical_contrastive_loss",
        _all_there,
        ("unimodal", "fused", "high_level"),
        ("labels",),
        options={"tier1": "intra_modal", "normalize": False, "temperatures": (2.0, 0.5, 3.0)},
    ),
    LossCase("ranks", "rank_n_contrast", _ranked, ("embeddings",), ("targets", "mask")),
    LossCase(
        "ranks, learned temperature",
        "rank_n_contrast",
        _ranked,
        ("embeddings",),
        ("targets", "mask"),
        learn_temperature=True,
    ),
]
BY_NAME = {case.name: case for case in CASES}
