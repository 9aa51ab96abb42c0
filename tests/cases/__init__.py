"""One file per operator family: its OpCases (samples, bad inputs, hidden inputs)."""

from tests.cases import matrix_fusion, propagation, rank_n_contrast

ALL = [*matrix_fusion.CASES, *propagation.CASES, *rank_n_contrast.CASES]
