"""The operators as modules: parameters and their initialisation; all mathematics is in the operators."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from msacore._contrast import HierarchicalContrastiveLoss, InfoNCE
from msacore._ranking import RankNContrast
from msacore.ops.low_rank_fusion import low_rank_fusion
from msacore.ops.matrix_fusion import ACTIVATIONS, Activation, matrix_fusion
from msacore.ops.propagation import SEND, Send, modality_mean, propagate, window_mean

__all__ = [
    "AlternatingPropagation",
    "HierarchicalContrastiveLoss",
    "InfoNCE",
    "LowRankFusion",
    "MatrixFusion",
    "RankNContrast",
]

Variant = Literal["linear", "gcnii", "gated"]


class MatrixFusion(nn.Module):
    """Fuse modalities through the Gram matrix of every pair: :func:`msacore.matrix_fusion` with its parameters.

    Args:
        in_features: Feature width k of every modality.
        rows: High-level rows q per pair.
        channels: Number of mixed channels C; the number of pairs when omitted.
        modalities: Number of modalities M, at least 2.
        augment: Append a 1 to the features, so that a pair also carries each of its members alone.
        activation: "relu", "gelu" (tanh form) or "identity".
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Example:
        >>> fusion = MatrixFusion(in_features=8, rows=4)
        >>> fused, pairs = fusion([torch.randn(2, 5, 8) for _ in range(3)])
        >>> fused.shape, pairs.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 3, 4]))
    """

    def __init__(
        self,
        in_features: int,
        rows: int,
        channels: int | None = None,
        modalities: int = 3,
        augment: bool = True,
        activation: Activation = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if modalities < 2:
            raise ValueError(f"MatrixFusion: expected `modalities` to be at least 2, got {modalities}")
        if activation not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"MatrixFusion: expected `activation` to be one of {names}, got {activation!r}")
        pairs = modalities * (modalities - 1) // 2
        self.in_features, self.rows, self.modalities = in_features, rows, modalities
        self.channels = pairs if channels is None else channels
        self.augment, self.activation = augment, activation
        self.row_weight = nn.Parameter(torch.empty(rows, in_features + augment, device=device, dtype=dtype))
        self.row_bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.pair_weight = nn.Parameter(torch.empty(self.channels, pairs, device=device, dtype=dtype))
        self.pair_bias = nn.Parameter(torch.empty(self.channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise both mixings as ``torch.nn.Linear`` and ``torch.nn.Conv2d`` do: uniform in ± 1/sqrt(inputs)."""
        for weight, bias in ((self.row_weight, self.row_bias), (self.pair_weight, self.pair_bias)):
            bound = max(1, weight.shape[1]) ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(
        self, features: Sequence[Tensor], mask: Tensor | None = None, available: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``fused`` ``[B, C, q]`` and ``pairs`` ``[B, P, q]`` of M features ``[B, L, k]`` or ``[B, k]``.

        Args:
            features: M tensors of one shape.
            mask: Valid tokens, ``[B, L]``, bool.
            available: Modalities present in a sample, ``[B, M]``, bool.
        """
        parameters = self.row_weight, self.row_bias, self.pair_weight, self.pair_bias
        return matrix_fusion(
            features, *parameters, mask=mask, available=available, augment=self.augment, activation=self.activation
        )

    def extra_repr(self) -> str:
        """Return the sizes and options, as in the constructor."""
        return (
            f"in_features={self.in_features}, rows={self.rows}, channels={self.channels}, "
            f"modalities={self.modalities}, augment={self.augment}, activation={self.activation!r}"
        )


class LowRankFusion(nn.Module):
    """Fuse modalities by a low-rank tensor product: :func:`msacore.low_rank_fusion` with its parameters.

    Args:
        in_features: Feature width d_m of each modality.
        out_features: Width h of the result.
        rank: Number of rank-one terms r.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Example:
        >>> fusion = LowRankFusion(in_features=(8, 4, 6), out_features=5)
        >>> fusion([torch.randn(2, 8), torch.randn(2, 4), torch.randn(2, 6)]).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        rank: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = tuple(in_features), out_features, rank
        self.factors = nn.ParameterList(
            torch.empty(rank, d + 1, out_features, device=device, dtype=dtype) for d in self.in_features
        )
        self.rank_weight = nn.Parameter(torch.empty(rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every factor by Xavier's normal rule over (d_m + 1, h), average the ranks, and zero the bias."""
        for factor in self.factors:
            for one in factor:
                nn.init.xavier_normal_(one)
        nn.init.constant_(self.rank_weight, 1 / max(1, self.rank))
        nn.init.zeros_(self.bias)

    def forward(self, features: Sequence[Tensor], available: Tensor | None = None) -> Tensor:
        """Return ``[B, h]`` of M features ``[B, d_m]``; ``available`` ``[B, M]``, bool, says which are present."""
        return low_rank_fusion(features, list(self.factors), self.rank_weight, self.bias, available=available)

    def extra_repr(self) -> str:
        """Return the sizes, as in the constructor."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class _GatedUpdate(nn.Module):
    """``h ← (1 - z) h + z tanh(W [m; r h])`` with gates z and r from ``[m; h]``, m the message."""

    def __init__(self, features: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * features, 2 * features, device=device, dtype=dtype)
        self.candidate = nn.Linear(2 * features, features, device=device, dtype=dtype)

    def forward(self, message: Tensor, h: Tensor) -> Tensor:
        update, reset = torch.sigmoid(self.gates(torch.cat([message, h], -1))).chunk(2, -1)
        candidate = torch.tanh(self.candidate(torch.cat([message, reset * h], -1)))
        return torch.lerp(h, candidate.to(h.dtype), update.to(h.dtype))  # under autocast both are narrower than h


class AlternatingPropagation(nn.Module):
    """Send messages within modalities and between them, in turn: :func:`msacore.propagate` and its learned variants.

    Every half-step averages what arrives, ``a = A h``, and mixes in the initial states ``x``:

    - ``"linear"``: ``h ← (1 - alpha) a + alpha x``, without parameters;
    - ``"gcnii"``: ``h ← relu((1 - alpha) ((1 - θ) a + θ W a) + alpha x)``, a matrix W per half-step and
      ``θ = log(decay / step + 1)`` for step = 1, 2, …;
    - ``"gated"``: ``m = (1 - alpha) a + alpha x`` enters a gated recurrent update of ``h``, one for the intra-modal
      and one for the inter-modal half-steps.

    Args:
        features: Width d of the states.
        steps: Number of steps, each of two half-steps.
        variant: "linear", "gcnii" or "gated".
        alpha: Share of the initial states in each half-step, in [0, 1].
        window: (past, future), how far each side reaches; one integer for both; -1 for the whole side.
        include_self: Whether an utterance is in its own window.
        send: When missing nodes send: "after_fill" (from the first inter-modal half-step on) or "never".
        decay: How much of W the "gcnii" variant uses; positive.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Example:
        >>> propagation = AlternatingPropagation(8, steps=2, variant="gcnii")
        >>> propagation(torch.randn(5, 3, 8), torch.tensor([0, 2, 5]), available=torch.rand(5, 3) < 0.7).shape
        torch.Size([5, 3, 8])
    """

    def __init__(
        self,
        features: int,
        steps: int,
        variant: Variant = "linear",
        *,
        alpha: float = 0.1,
        window: int | tuple[int, int] = (2, 2),
        include_self: bool = True,
        send: Send = "after_fill",
        decay: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if variant not in ("linear", "gcnii", "gated"):
            raise ValueError(
                f'AlternatingPropagation: expected `variant` "linear", "gcnii" or "gated", got {variant!r}'
            )
        if send not in SEND:
            raise ValueError(f'AlternatingPropagation: expected `send` "after_fill" or "never", got {send!r}')
        if features < 1 or steps < 0 or not 0 <= alpha <= 1 or decay <= 0:
            raise ValueError(
                "AlternatingPropagation: expected `features` at least 1, `steps` at least 0, `alpha` in [0, 1] and "
                f"`decay` positive, got {features}, {steps}, {alpha} and {decay}"
            )
        self.features, self.steps, self.variant, self.alpha = features, steps, variant, alpha
        self.window, self.include_self, self.send, self.decay = window, include_self, send, decay
        half_steps = {"linear": 0, "gcnii": 2 * steps, "gated": 2}[variant]
        self.updates = nn.ModuleList(
            nn.Linear(features, features, bias=False, device=device, dtype=dtype)
            if variant == "gcnii"
            else _GatedUpdate(features, device, dtype)
            for _ in range(half_steps)
        )

    def forward(
        self, x: Tensor, offsets: Tensor, available: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Propagate.

        Args:
            x: Initial states, ``[N, M, features]``; a missing node holds a placeholder, such as a mask token.
            offsets: Utterances of conversation v are ``offsets[v]:offsets[v + 1]``; ``[V + 1]``, integers.
            available: Which nodes are present, ``[N, M]``, bool; all when omitted.
            positions: The utterances' numbers, ``[N]``, integers that increase strictly within a conversation; the
                row's number when omitted.

        Returns:
            ``[N, M, features]``.
        """
        windows: dict[str, Any] = dict(positions=positions, window=self.window, include_self=self.include_self)
        if self.variant == "linear":
            return propagate(
                x, offsets, available=available, steps=self.steps, alpha=self.alpha, send=self.send, **windows
            )
        h = x.clone()
        for step in range(self.steps):
            never = self.send == "never"
            arrived = window_mean(h, offsets, senders=available if never or step == 0 else None, **windows)
            h = self._update(step, 0, arrived, h, x)
            h = self._update(step, 1, modality_mean(h, senders=available if never else None), h, x)
        return h

    def _update(self, step: int, half: int, arrived: Tensor, h: Tensor, x: Tensor) -> Tensor:
        if self.variant == "gated":
            return self.updates[half]((1 - self.alpha) * arrived + self.alpha * x, h)
        theta = math.log(self.decay / (step + 1) + 1)
        mapped = torch.lerp(arrived, self.updates[2 * step + half](arrived).to(arrived.dtype), theta)
        return torch.relu((1 - self.alpha) * mapped + self.alpha * x)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, steps={self.steps}, variant={self.variant!r}, alpha={self.alpha}, "
            f"window={self.window}, include_self={self.include_self}, send={self.send!r}"
        )
