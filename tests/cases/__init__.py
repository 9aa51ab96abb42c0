"""One file per operator family: its OpCases (samples, bad inputs, hidden inputs)."""

from tests.cases import (
    contrastive,
    hierarchical_contrastive,
    low_rank_fusion,
    matrix_fusion,
    propagation,
    rank_n_contrast,
)

ALL = [
    *contrastive.CASES,
    *hierarchical_contrastive.CASES,
    *low_rank_fusion.CASES,
    *matrix_fusion.CASES,
    *propagation.CASES,
    *rank_n_contrast.CASES,
]
