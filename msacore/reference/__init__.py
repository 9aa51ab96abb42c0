"""Every operator once more in plain PyTorch: the mathematics as readable code, for tests and comparisons."""

from msacore.reference import propagation

__all__ = ["propagation"]
