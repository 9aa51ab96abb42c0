"""Encoders of one modality, and fusion guidance: text attends to the other modalities and is shifted by them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """``x [B, L, d]`` where ``mask [B, L]`` is true, else exactly 0, whatever ``x`` holds there."""
    return torch.where(mask[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over valid tokens, ``[B, d]``; zeros for rows without one."""
    return keep(tokens, mask).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


class Encoder(nn.Module):
    """Maps tokens of one modality to the common width; sequences also pass one self-attention block.

    Args:
        in_features: Width of the raw features.
        width: Common width ``k``.
        heads: Attention heads, for sequences.
        dropout: Share of hidden units dropped.
        input_dropout: Share of raw features dropped.
        sequences: Whether there is more than one token to attend to.
    """

    def __init__(
        self, in_features: int, width: int, heads: int, dropout: float, input_dropout: float, sequences: bool
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Dropout(input_dropout), nn.Linear(in_features, width))
        self.bend = nn.Sequential(nn.GELU(), nn.Dropout(dropout))
        self.attention = Attention(width, heads) if sequences else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x [B, L, d]``, ``mask [B, L]`` → tokens ``[B, L, k]``, 0 outside the mask."""
        tokens = self.project(keep(x, mask))
        tokens = tokens + self.bend(tokens)
        if self.attention is not None:
            tokens = tokens + self.attention(tokens, tokens, mask)
        return keep(tokens, mask)


class Attention(nn.Module):
    """Multi-head attention over valid tokens.

    Args:
        width: Width ``k`` of queries, tokens and answers.
        heads: Number of heads; must divide ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.answer = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """``query [B, Q, k]``, ``tokens [B, L, k]``, ``mask [B, L]`` → ``[B, Q, k]``; rows without a valid token get
        0, not the nan of an empty softmax."""
        some = mask.any(1)
        value = self.value(tokens)
        if tokens.shape[1] > 1:
            q, k, v = (self._split(t) for t in (self.query(query), self.key(tokens), value))
            visible = (mask | ~some[:, None])[:, None, None]
            value = nn.functional.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2)
        # The softmax over a single token is 1 whatever the query: pooled features need no scores.
        answer = self.answer(value).expand(query.shape)
        return keep(answer, some[:, None].expand(query.shape[:2]))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FusionGuidance(nn.Module):
    """Queries made of all modalities attend to each guiding modality; the answers shift the base modality.

    ``q = W_q [x_0; x_1; …]``, ``a_m = attention_m(q, x_m)`` with separate attention for each guiding modality, and
    ``LayerNorm(x_0 + W_s [x_0; a_1; …])``. The released code uses one attention module for both audio and vision.

    Args:
        width: Common width ``k``.
        modalities: Number of modalities; the first (text) is the base.
        heads: Attention heads.
    """

    def __init__(self, width: int, modalities: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(width * modalities, width)
        self.attentions = nn.ModuleList(Attention(width, heads) for _ in range(modalities - 1))
        self.shift = nn.Linear(width * modalities, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """Guided tokens of the base modality, ``[B, L_0, k]``; a missing modality has an empty mask.

        Sequences of a different length enter the query by their mean.
        """
        base = tokens[0]
        beside = [
            t if t.shape[1] == base.shape[1] else masked_mean(t, m)[:, None].expand_as(base)
            for t, m in zip(tokens[1:], masks[1:], strict=True)
        ]
        query = self.query(torch.cat([base, *beside], -1))
        answers = [
            attention(query, t, m) for attention, t, m in zip(self.attentions, tokens[1:], masks[1:], strict=True)
        ]
        return self.norm(base + self.shift(torch.cat([base, *answers], -1)))


class PairPerceptron(nn.Module):
    """High-level features of every pair without products: a perceptron on the concatenation, shared by the pairs.

    It stands in for ``msacore.nn.MatrixFusion`` where that is ablated, with more parameters (two matrices).

    Args:
        in_features: Width ``k`` of every modality.
        rows: High-level features ``q`` per pair, and hidden units.
    """

    def __init__(self, in_features: int, rows: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * in_features, rows), nn.ReLU(), nn.Linear(rows, rows))

    def forward(self, features: Sequence[Tensor], available: Tensor) -> tuple[Tensor, Tensor]:
        """``features`` M tensors ``[B, k]``, ``available [B, M]`` → the pairs' features ``[B, P, q]``, twice: once to
        be joined, once to be contrasted. A missing member counts as zeros."""
        seen = [keep(x, available[:, m]) for m, x in enumerate(features)]
        pairs = self.layers(torch.stack([torch.cat(pair, -1) for pair in combinations(seen, 2)], 1))
        return pairs, pairs
