"""Every operator once more in plain PyTorch: the mathematics as readable code, for tests and comparisons."""

from msacore.reference import (
    graph_propagation,
    hierarchical_contrastive,
    info_nce,
    low_rank_fusion,
    matrix_fusion,
    propagation,
    rank_n_contrast,
)

__all__ = [
    "graph_propagation",
    "hierarchical_contrastive",
    "info_nce",
    "low_rank_fusion",
    "matrix_fusion",
    "propagation",
    "rank_n_contrast",
]
