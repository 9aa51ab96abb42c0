"""One file per operator family: its OpCases (samples, bad inputs, hidden inputs)."""

from tests.cases import (
    graph_propagation,
    hierarchical_contrastive,
    info_nce,
    low_rank_fusion,
    matrix_fusion,
    propagation,
    rank_n_contrast,
)

ALL = [
    *graph_propagation.CASES,
    *hierarchical_contrastive.CASES,
    *info_nce.CASES,
    *low_rank_fusion.CASES,
    *matrix_fusion.CASES,
    *propagation.CASES,
    *rank_n_contrast.CASES,
]
