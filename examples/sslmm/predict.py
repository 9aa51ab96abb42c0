"""Predictions of a model for whole conversations, and how much they vary under dropout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from examples.msa.corpus import SPLITS, UNUSED, Corpus

from .model import SSLMM, Batch

PASSES = 20


def conversations_of(corpus: Corpus, code: int, transductive: bool = False) -> list[Tensor]:
    """Row numbers of every conversation that has utterances of a split: these alone, or all when transductive."""
    inside = corpus.split == code
    heard = np.ones_like(inside) if transductive else inside
    pieces = zip(corpus.video_ptr[:-1], corpus.video_ptr[1:], strict=True)
    rows = [np.arange(start, stop)[heard[start:stop]] for start, stop in pieces if inside[start:stop].any()]
    return [torch.from_numpy(r) for r in rows]


def batch_of(
    features: Sequence[Tensor], observed: Tensor, positions: Tensor, conversations: Sequence[Tensor]
) -> tuple[Batch, Tensor]:
    """A batch of conversations, and the row numbers of its utterances."""
    sizes = torch.tensor([0] + [len(rows) for rows in conversations])
    rows = torch.cat(list(conversations)).to(observed.device)
    offsets = sizes.cumsum(0).to(observed.device)
    return Batch([x[rows] for x in features], observed[rows], offsets, positions[rows]), rows


@torch.no_grad()
def predict_conversations(
    model: SSLMM,
    features: Sequence[Tensor],
    observed: Tensor,
    positions: Tensor,
    conversations: Sequence[Tensor],
    passes: int = 0,
) -> tuple[Tensor, Tensor]:
    """Predictions without dropout ``[n]``, and their variance over ``passes`` with it ``[n]`` (0 without passes)."""
    model.eval()
    batch, _ = batch_of(features, observed, positions, conversations)
    plain = model(batch).prediction
    if not passes:
        return plain, torch.zeros_like(plain)
    model.train()
    drawn = torch.stack([model(batch).prediction for _ in range(passes)])
    model.eval()
    return plain, drawn.var(0, correction=0)


def predict_corpus(
    model: SSLMM,
    corpus: Corpus,
    passes: int = PASSES,
    device: torch.device | str = "cpu",
    seed: int = 0,
    parts: Sequence[int] = (*SPLITS.values(), UNUSED),
) -> tuple[np.ndarray, np.ndarray]:
    """Predict every utterance from what ``corpus.available`` shows of it.

    Neighbours of other splits are used where ``model.config.transductive`` says so; else they leave gaps.

    Args:
        model: On ``device``.
        corpus: Pooled and standardised as the model's training set was.
        passes: Stochastic passes for the variance.
        device: Where to compute.
        seed: Seed of the dropout; the states of the global random generators are left as they were.
        parts: Codes of the splits to predict; utterances of other splits get 0.

    Returns:
        Predictions and their variance, float64 ``[N]`` each.
    """
    tensors = corpus.tensors(device)
    value, variance = np.zeros(len(corpus)), np.zeros(len(corpus))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for code in parts:
            conversations = conversations_of(corpus, code, model.config.transductive)
            if conversations:
                found = predict_conversations(
                    model, tensors["features"], tensors["available"], tensors["positions"], conversations, passes
                )
                rows = torch.cat(conversations).numpy()
                own = corpus.split[rows] == code
                for result, t in zip((value, variance), found, strict=True):
                    result[rows[own]] = t.double().cpu().numpy()[own]
    return value, variance
