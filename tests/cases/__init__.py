"""One file per operator family: its OpCases (samples, bad inputs, hidden inputs)."""

from tests.cases import contrastive, matrix_fusion, propagation, rank_n_contrast

ALL = [*contrastive.CASES, *matrix_fusion.CASES, *propagation.CASES, *rank_n_contrast.CASES]
