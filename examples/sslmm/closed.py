"""Closed forms beside the graph: ridge regressions as baselines, and a stack of them that is mixed with the graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.msa.closed_form import Design, Linear, fit_views, stack_weights, stacked
from examples.msa.corpus import VALID, Corpus

NEAR = " and neighbours"
RIDGES = tuple(
    f"ridge, {what}{ending}"
    for what in ("first modality", "all modalities", "sum over modalities")
    for ending in ("", NEAR)
)
BOOSTING = "gradient boosting"


def labelled_rows(corpus: Corpus, labelled: np.ndarray) -> np.ndarray:
    """Rows whose label may be read: the labelled ones of the train part and of the validation part, which stops the
    training of the graph and which closed forms are fitted on as well."""
    return np.flatnonzero(corpus.labelled & (labelled & (corpus.split == 0) | (corpus.split == VALID)))


def ridges_of(corpus: Corpus, design: Design, labelled: np.ndarray) -> dict[str, Linear]:
    """Every ridge regression on the labels that may be read."""
    return fit_views(design, corpus.labels, labelled_rows(corpus, labelled), corpus.video_index)


def fit_ridge_named(corpus: Corpus, design: Design, rows: np.ndarray, name: str) -> Linear:
    """One of ``RIDGES``."""
    wanted = name.replace("first modality", corpus.modalities[0])
    return fit_views(design, corpus.labels, rows, corpus.video_index, only=[wanted])[wanted]


@dataclass(frozen=True)
class Blend:
    """``offset + design @ coefficient + network * graph``: closed forms and the graph, weighed out of fold.

    Args:
        coefficient: float64 ``[D]``.
        offset: Constant that is added.
        network: Weight of the graph's prediction.
        weights: Weight of every part, by its name.
        left_out: Predictions ``[n]`` of the rows on which the weights were chosen, each by models not fitted on its
            video.
        rows: Numbers of those rows: the labelled ones of the validation part.
    """

    coefficient: Tensor
    offset: float
    network: float
    weights: dict[str, float]
    left_out: np.ndarray
    rows: np.ndarray

    def __call__(self, design: np.ndarray, graph: np.ndarray) -> np.ndarray:
        """Predictions ``[N]`` from a design and the graph's predictions."""
        value: np.ndarray = self.offset + design @ self.coefficient.numpy() + self.network * graph
        return value


def blend(
    corpus: Corpus,
    design: Design,
    labelled: np.ndarray,
    graph: np.ndarray,
    ridges: dict[str, Linear] | None = None,
) -> Blend:
    """Weigh a stack of ridge regressions against the graph on the validation part.

    The regressions are stacked by their predictions for left-out labelled videos. The graph has used the labels of the
    validation part only to stop, so the predictions of both for that part are comparable. The weights are not negative,
    and one of the two gets all the weight where a mixture does not do better.

    Args:
        corpus: Standardised corpus.
        design: Design of the corpus.
        labelled: bool ``[N]``; train rows whose label is known.
        graph: Predictions of every row by the graph, ``[N]``.
        ridges: What :func:`ridges_of` returns for the same arguments, if computed already.
    """
    rows, groups = labelled_rows(corpus, labelled), corpus.video_index
    found = ridges_of(corpus, design, labelled) if ridges is None else ridges
    y = corpus.labels.astype(np.float64)
    base, parts = stacked(found, y[rows], groups[rows])
    valid = corpus.split[rows] == VALID
    pair = np.column_stack([base.left_out[valid], graph[rows[valid]]])
    weights, added = stack_weights(pair, y[rows[valid]], groups[rows[valid]])
    return Blend(
        torch.from_numpy(weights[0] * base.coefficient),
        float(weights[0] * base.offset + added),
        float(weights[1]),
        {**{k: float(weights[0] * w) for k, w in parts.items()}, "graph": float(weights[1])},
        pair @ weights + added,
        rows[valid],
    )
