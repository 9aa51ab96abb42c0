"""One file per operator family: its OpCases (samples, bad inputs, hidden inputs)."""

from tests.cases import matrix_fusion, propagation

ALL = [*matrix_fusion.CASES, *propagation.CASES]
