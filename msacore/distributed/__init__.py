"""Several processes: what ``group=`` of the losses and of ``select`` takes, on torch.distributed with gloo or NCCL."""

from msacore.distributed.overlap import join, start
from msacore.distributed.sharding import Sharding

__all__ = ["Sharding", "join", "start"]
