"""Fast operators for multimodal sentiment analysis (text, audio, vision) on PyTorch."""

import torch

from msacore._load import load_extension
from msacore._version import __version__

load_extension()

from msacore import graph, nn, uncertainty  # noqa: E402
from msacore.losses import hierarchical_contrastive_loss, info_nce, rank_n_contrast  # noqa: E402
from msacore.ops import info_nce_partial as _info_nce_partial  # noqa: E402, F401  # registers the fake kernels
from msacore.ops import kcenter as _kcenter  # noqa: E402, F401  # registers the fake kernels
from msacore.ops.graph_propagation import alternating_graph_propagate, graph_propagate  # noqa: E402
from msacore.ops.low_rank_fusion import low_rank_fusion  # noqa: E402
from msacore.ops.matrix_fusion import matrix_fusion  # noqa: E402
from msacore.ops.propagation import modality_mean, propagate, window_mean  # noqa: E402
from msacore.selection import select  # noqa: E402

if torch.distributed.is_available():
    from msacore import distributed  # noqa: F401

__all__ = [
    "__version__",
    "alternating_graph_propagate",
    "graph",
    "graph_propagate",
    "hierarchical_contrastive_loss",
    "info_nce",
    "low_rank_fusion",
    "matrix_fusion",
    "modality_mean",
    "nn",
    "propagate",
    "rank_n_contrast",
    "select",
    "uncertainty",
    "window_mean",
]
