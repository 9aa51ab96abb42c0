"""Every operator once more in plain PyTorch: the mathematics as readable code, for tests and comparisons."""

from msacore.reference import matrix_fusion, propagation, rank_n_contrast

__all__ = ["matrix_fusion", "propagation", "rank_n_contrast"]
