"""Every operator once more in plain PyTorch: the mathematics as readable code, for tests and comparisons."""

from msacore.reference import (
    contrastive,
    graph_propagation,
    hierarchical_contrastive,
    low_rank_fusion,
    matrix_fusion,
    propagation,
    rank_n_contrast,
)

__all__ = [
    "contrastive",
    "graph_propagation",
    "hierarchical_contrastive",
    "low_rank_fusion",
    "matrix_fusion",
    "propagation",
    "rank_n_contrast",
]
