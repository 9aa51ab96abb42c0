"""The operators as modules: parameters and their initialisation; all mathematics is in the operators."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msacore.ops.low_rank_fusion import low_rank_fusion
from msacore.ops.matrix_fusion import ACTIVATIONS, matrix_fusion

__all__ = ["LowRankFusion", "MatrixFusion"]


class MatrixFusion(nn.Module):
    """Fuse modalities through the Gram matrix of every pair: :func:`msacore.matrix_fusion` with its parameters.

    Args:
        in_features: Feature width k of every modality.
        rows: High-level rows q per pair.
        channels: Mixed channels C; as many as pairs when omitted.
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
        activation: str = "relu",
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
        """Draw both mixings as ``torch.nn.Linear`` and ``torch.nn.Conv2d`` draw theirs: uniform in ± 1/sqrt(inputs)."""
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
        """Draw every factor by Xavier's normal rule over (d_m + 1, h), average the ranks, and start without bias."""
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
