"""One node per utterance and modality; messages alternate within and between modalities; heads read the nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

import msacore
from msacore.nn import AlternatingPropagation, LowRankFusion

from .config import Config


@dataclass(frozen=True)
class Batch:
    """Whole conversations.

    Args:
        features: Per modality, float32 ``[N, d_m]``; rows that ``observed`` hides may hold anything.
        observed: bool ``[N, M]``.
        offsets: int64 ``[V + 1]``.
        positions: Clip numbers, int64 ``[N]``: missing clips leave a gap.
    """

    features: Sequence[Tensor]
    observed: Tensor
    offsets: Tensor
    positions: Tensor

    def seeing(self, observed: Tensor) -> Batch:
        """The same conversations with other modalities in view."""
        return Batch(self.features, observed, self.offsets, self.positions)


@dataclass(frozen=True)
class Output:
    """``nodes`` after propagation, ``[N, M, width]``; ``prediction`` and ``rank``, ``[N]``."""

    nodes: Tensor
    prediction: Tensor
    rank: Tensor


def rows_of(where: Tensor, modality: int) -> Tensor:
    """Numbers of the rows that ``where`` (bool ``[N, M]``) marks for one modality, int64."""
    return where[:, modality].nonzero()[:, 0]


class Dropout(nn.Module):
    """Dropout that draws bytes, in a fifth of the time of Bernoulli draws on a CPU; ``chance`` is rounded to n/256."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.below = round(256 * chance)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.below == 0:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.below
        return x * (kept.to(x.dtype) * (256 / (256 - self.below)))


class SSLMM(nn.Module):
    """Encoders, mask tokens, alternating propagation, read-out, sentiment head, reconstruction heads.

    A missing modality starts as its mask token and receives what its neighbours and the other modalities of the
    utterance send (nodes per utterance and modality as in MMGCN, teleport as in APPNP, reconstruction as in GCNet). The
    read-out concatenates the nodes of an utterance. Propagation averages, so what an utterance alone says, and what
    only two modalities together say, is faint in these nodes; ``readout="products"`` puts a low-rank product of every
    two modalities beside them. Products take the nodes from before propagation, and for a missing modality what its
    reconstruction head makes of the propagated node.
    """

    def __init__(self, dims: Sequence[int], config: Config) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(d, width), nn.LayerNorm(width)) for d in dims)
        self.dropout = Dropout(config.dropout)
        self.mask_token = nn.Parameter(torch.randn(len(dims), width) * 0.02)
        self.remask_token = nn.Parameter(torch.zeros(width))
        self.propagation = AlternatingPropagation(
            width,
            config.steps,
            variant=config.variant,
            alpha=config.alpha,
            window=(config.window, config.window),
            send=config.send,
        )
        self.pairs = list(combinations(range(len(dims)), 2)) if config.readout == "products" else []
        self.products = nn.ModuleList(LowRankFusion((width, width), width, rank=1) for _ in self.pairs)
        read = (len(dims) + len(self.pairs)) * width
        self.head = nn.Sequential(nn.GELU(), Dropout(config.dropout), nn.Linear(read, width), nn.GELU())
        self.sentiment = nn.Linear(width, 1)
        self.ranking = nn.Linear(width, 1)
        self.contrast = nn.Linear(len(dims) * width, width)
        self.decoders = nn.ModuleList(nn.Linear(width, d) for d in dims)
        self.mask_decoders = nn.ModuleList(nn.Linear(width, d) for d in dims)

    def forward(self, batch: Batch, noise: float = 0.0) -> Output:
        """Propagate and predict.

        Args:
            batch: The conversations.
            noise: Deviation of Gaussian noise added to observed features.
        """
        return self.read(self.encode(batch, noise), batch)

    def encode(self, batch: Batch, noise: float = 0.0) -> Tensor:
        """Nodes before propagation, ``[N, M, width]``: encoded features, or the mask token where hidden."""
        nodes = []
        for m, (encoder, x) in enumerate(zip(self.encoders, batch.features, strict=True)):
            # Hidden rows are never read: a hidden NaN would otherwise reach the weights' gradient as 0 · NaN.
            rows = rows_of(batch.observed, m)
            x = x.index_select(0, rows)
            if noise:
                x = x + noise * torch.randn_like(x)
            nodes.append(self.mask_token[m].expand(len(batch.observed), -1).index_copy(0, rows, encoder(x)))
        return torch.stack(nodes, 1)

    def hide(self, own: Tensor, observed: Tensor) -> Tensor:
        """What :meth:`encode` gave, with more of it hidden."""
        return torch.where(observed[..., None], own, self.mask_token)

    def propagate(self, own: Tensor, batch: Batch) -> Tensor:
        """Nodes after propagation, ``[N, M, width]``."""
        return self.propagation(own, batch.offsets, available=batch.observed, positions=batch.positions)

    def read(self, own: Tensor, batch: Batch) -> Output:
        """Propagate and predict from what :meth:`encode` gave; every call draws its own dropout."""
        own = self.dropout(own)
        nodes = self.propagate(own, batch)
        parts = [nodes.flatten(1)]
        if self.pairs:
            members = self.fill(own, nodes, batch.observed)
            parts += [p([members[m], members[n]]) for p, (m, n) in zip(self.products, self.pairs, strict=True)]
        hidden = self.head(torch.cat(parts, 1))
        return Output(nodes, self.sentiment(hidden)[:, 0], self.ranking(hidden)[:, 0])

    def fill(self, own: Tensor, nodes: Tensor, observed: Tensor) -> list[Tensor]:
        """Per modality ``[N, width]``: its node before propagation; where missing, its rebuilt features encoded.

        The encoded features are not normalised: the less the neighbours tell about them, the shorter they are, and the
        more the other member of a pair stands alone.
        """
        rebuilt = self.reconstruct(nodes, ~observed)
        return [
            own[:, m].index_copy(0, rows_of(~observed, m), encoder[0](features))
            for m, (encoder, features) in enumerate(zip(self.encoders, rebuilt, strict=True))
        ]

    def reconstruct(self, nodes: Tensor, where: Tensor) -> list[Tensor]:
        """Features of the nodes that ``where`` (bool ``[N, M]``) marks: per modality ``[rows of it, d_m]``."""
        return _decode(self.decoders, nodes, where)

    def reconstruct_masked(self, nodes: Tensor, masked: Tensor, batch: Batch) -> list[Tensor]:
        """As :meth:`reconstruct`, from masked nodes that are masked again first: only neighbours can fill them.

        The error of this task ignores lengths, so the task has heads of its own (GraphMAE, too, drops its decoder
        afterwards).
        """
        hidden = torch.where(masked[..., None], self.remask_token, nodes)
        filled = msacore.propagate(
            hidden,
            batch.offsets,
            available=~masked,
            positions=batch.positions,
            window=(self.config.window, self.config.window),
            steps=1,
            alpha=self.config.alpha,
            send=self.config.send,
        )
        return _decode(self.mask_decoders, filled, masked)


def _decode(decoders: nn.ModuleList, nodes: Tensor, where: Tensor) -> list[Tensor]:
    return [decoder(nodes[:, m].index_select(0, rows_of(where, m))) for m, decoder in enumerate(decoders)]
