"""One file per operator family: its OpCases (samples, bad inputs, hidden inputs)."""

from tests.cases import propagation

ALL = [*propagation.CASES]
