"""Predictions of a model for whole conversations, and how much they vary under dropout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from examples.msa.corpus import SPLITS, UNUSED, Corpus

from .model import SSLMM, Batch

PASSES = 20


def conversations_of(corpus: Corpus, code: int) -> list[Tensor]:
    """Row numbers of every conversation, restricted to one split."""
    inside = corpus.split == code
    pieces = zip(corpus.video_ptr[:-1], corpus.video_ptr[1:], strict=True)
    rows = [np.arange(start, stop)[inside[start:stop]] for start, stop in pieces]
    return [torch.from_numpy(r) for r in rows if len(r)]


def batch_of(features: Sequence[Tensor], observed: Tensor, conversations: Sequence[Tensor]) -> tuple[Batch, Tensor]:
    """A batch of conversations, and the row numbers of its utterances."""
    sizes = torch.tensor([0] + [len(rows) for rows in conversations])
    rows = torch.cat(list(conversations)).to(observed.device)
    return Batch([x[rows] for x in features], observed[rows], sizes.cumsum(0).to(observed.device)), rows


@torch.no_grad()
def predict_conversations(
    model: SSLMM, features: Sequence[Tensor], observed: Tensor, conversations: Sequence[Tensor], passes: int = 0
) -> tuple[Tensor, Tensor]:
    """Predictions without dropout ``[n]``, and their variance over ``passes`` with it ``[n]`` (0 without passes)."""
    model.eval()
    batch, _ = batch_of(features, observed, conversations)
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
    """Predict every utterance from what ``corpus.available`` shows of it; neighbours of other splits are not heard.

    Args:
        model: On ``device``.
        corpus: Pooled and standardised as the model's training set was.
        passes: Stochastic passes for the variance.
        device: Where to compute.
        seed: Of dropout; the global generators are left as they were.
        parts: Codes of the splits to predict; 0 stands for the others.

    Returns:
        Predictions and their variance, float64 ``[N]`` each.
    """
    tensors = corpus.tensors(device)
    value, variance = np.zeros(len(corpus)), np.zeros(len(corpus))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for code in parts:
            conversations = conversations_of(corpus, code)
            if conversations:
                found = predict_conversations(model, tensors["features"], tensors["available"], conversations, passes)
                rows = torch.cat(conversations).numpy()
                value[rows], variance[rows] = (t.double().cpu().numpy() for t in found)
    return value, variance
