"""What a system must beat on the same features: an MLP on filled-in features, and boosted trees.

Ridge regressions are in ``closed_form``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from torch import nn

from .best import BestPerMetric
from .corpus import Corpus


@dataclass(frozen=True)
class Fitted:
    """Predictions for all rows, float64 ``[N]``, the facts of the fit (best epoch, its validation error), predictions
    for other features of the same rows, and the test value of each metric from its own checkpoint, as
    ``BestPerMetric.scores`` gives it (empty where there is no labelled test row)."""

    prediction: np.ndarray
    facts: dict[str, float] = field(default_factory=dict)
    others: tuple[np.ndarray, ...] = ()
    per_metric: dict[str, dict[str, float]] = field(default_factory=dict)


def fill(corpus: Corpus, observed: np.ndarray, how: str, trained: np.ndarray | None = None) -> np.ndarray:
    """Pooled features of all modalities side by side, standardised, with hidden ones filled in.

    Args:
        corpus: Pooled or sequence features; sequences are averaged.
        observed: bool ``[N, M]``; what is False is not read.
        how: ``"mean"``: the column's mean over observed train rows (0 once standardised); ``"zero"``: the raw
            value 0, standardised together with the rest, as in a pipeline that does not know about missing values.
        trained: bool ``[N, M]``: what was observed in training, from which the statistics are computed; ``observed``
            when omitted.

    Returns:
        float32 ``[N, sum of widths]``.
    """
    if how not in ("mean", "zero"):
        raise ValueError(f"fill: how must be 'mean' or 'zero', got {how!r}")
    corpus = corpus.pooled()
    trained = observed if trained is None else trained
    if how == "mean":
        return np.hstack(list(_zeroed(corpus.standardise(trained), observed).features.values()))
    before, now = (replace(_zeroed(corpus, seen), available=None) for seen in (trained, observed))
    return np.hstack(list(now.standardise_by(before.statistics()).features.values()))


def _zeroed(corpus: Corpus, observed: np.ndarray) -> Corpus:
    seen = corpus.available & observed
    features = {k: np.where(seen[:, [m]], x, np.float32(0)) for m, (k, x) in enumerate(corpus.features.items())}
    return replace(corpus, features=features)


def fit_boosting(x: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Gradient-boosted trees on the labelled rows, without early stopping: predictions of every row, float64 ``[N]``.

    Args:
        x: Features, ``[N, d]``.
        labels: ``[N]``; only those of ``rows`` are read.
        rows: Labelled rows.
    """
    trees = HistGradientBoostingRegressor(early_stopping=False, max_features=0.2, random_state=0)
    prediction: np.ndarray = trees.fit(x[rows], labels[rows].astype(np.float64)).predict(x)
    return prediction


def fit_mlp(
    x: np.ndarray,
    corpus: Corpus,
    labelled: np.ndarray | None = None,
    *,
    seed: int = 0,
    hidden: int = 128,
    dropout: float = 0.3,
    epochs: int = 100,
    batch: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    patience: int = 15,
    others: Sequence[np.ndarray] = (),
) -> Fitted:
    """Two-layer perceptron trained on absolute error, with early stopping on the validation part.

    Args:
        x: Features, ``[N, d]``.
        corpus: Labels and split.
        labelled: bool ``[N]``; train rows whose label is known, all of them when omitted.
        seed: Seed of the initial weights, dropout and order of the batches; the states of the global random generators
            are left as they were.
        hidden: Hidden units.
        dropout: Share of hidden units dropped in training.
        epochs: Maximum number of passes over the labelled rows.
        batch: Rows per step.
        learning_rate: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
        patience: Epochs without a better validation error before training stops; the best epoch's weights are used,
            and for each metric also those of the epoch that was best in it.
        others: Further features of the same rows ``[N, d]`` to predict from, for example under other missing patterns.
    """
    train, valid = _labelled_rows(corpus, labelled), corpus.rows("valid", labelled=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs, target = torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(corpus.labels)
        net = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))
        optimiser = torch.optim.Adam(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
        best_error, best_epoch, best_state = float("inf"), 0, {}
        per_metric = BestPerMetric(corpus.family, corpus.labels[valid])
        for epoch in range(1, epochs + 1):
            net.train()
            for rows in torch.from_numpy(train)[torch.randperm(len(train))].split(batch):
                loss = (net(inputs[rows])[:, 0] - target[rows]).abs().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            predicted = _predict(net, inputs[valid])
            per_metric.offer(predicted.numpy(), epoch, lambda: _copy(net))
            error = float((predicted - target[valid]).abs().mean())
            if error < best_error:
                best_error, best_epoch, best_state = error, epoch, _copy(net)
            elif epoch - best_epoch >= patience:
                break
        net.load_state_dict(best_state)
        prediction, *more = (
            _predict(net, torch.from_numpy(np.ascontiguousarray(features))).double().numpy()
            for features in (x, *others)
        )
        test = corpus.rows("test", labelled=True)

        def tested(weights: dict[str, torch.Tensor]) -> np.ndarray:
            net.load_state_dict(weights)
            return _predict(net, inputs[test]).numpy()

        each = per_metric.scores(tested, corpus.labels[test].astype(np.float64)) if len(test) else {}
    return Fitted(prediction, {"best_epoch": best_epoch, "valid_mae": best_error}, tuple(more), each)


def _copy(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def _predict(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    net.eval()
    with torch.no_grad():
        return net(x)[:, 0]


def _labelled_rows(corpus: Corpus, labelled: np.ndarray | None) -> np.ndarray:
    train = corpus.rows("train", labelled=True)
    rows = train if labelled is None else train[labelled[train]]
    if len(rows) == 0:
        raise ValueError(f"corpus {corpus.name!r}: no labelled train row to fit on")
    if len(corpus.rows("valid", labelled=True)) == 0:
        raise ValueError(f"corpus {corpus.name!r}: no validation row with a label to choose a model on")
    return rows
