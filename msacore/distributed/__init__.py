"""More than one process: what ``group=`` of the losses and of ``select`` takes. On torch.distributed, gloo and NCCL."""

from msacore.distributed.overlap import join, start
from msacore.distributed.sharding import Sharding

__all__ = ["Sharding", "join", "start"]
