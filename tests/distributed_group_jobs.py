"""What the ranks of tests/test_distributed.py run that is no comparison of a loss: groups, and steps run twice."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

import msacore

# Meshes make groups, which all processes make together, and once.
MESHES: dict[int, DeviceMesh] = {}


def meshes(group: Any, rank: int) -> list[tuple[float, float]]:
    """Losses over a mesh of one dimension and over each dimension of one of two, beside one process on those rows."""
    if not MESHES:
        MESHES[1] = DeviceMesh.from_group(group, "cpu")
        MESHES[2] = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("across", "along"))
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine = x[2 * rank : 2 * rank + 2]
    members = {"across": [rank % 2, rank % 2 + 2], "along": [rank // 2 * 2, rank // 2 * 2 + 1]}
    found = []
    for given, together in [(MESHES[1], range(4)), *(((MESHES[2], name), members[name]) for name in members)]:
        rows = torch.cat([x[2 * r : 2 * r + 2] for r in together])
        loss = msacore.info_nce(mine, mine.roll(1, 1), group=given)
        found.append((loss.item(), msacore.info_nce(rows, rows.roll(1, 1)).item()))
    try:
        msacore.info_nce(mine, mine, group=MESHES[2])
    except ValueError as error:
        assert "expected a 1-D DeviceMesh, or (mesh, dimension), got 2 dimensions" in str(error), error
    else:
        raise AssertionError("a mesh of two dimensions was taken")
    return found


def bits(group: Any, rank: int, name: str, mode: str, step: Callable[..., Any]) -> bool:
    """Whether two runs are equal in every bit."""
    first, second = (step(group, rank, name, (7, 0, 12, 1), mode, torch.float32) for _ in range(2))
    found = [[x for x in tree_leaves(run) if isinstance(x, Tensor)] for run in (first, second)]
    return len(found[0]) > 1 and all(torch.equal(p, q) for p, q in zip(*found, strict=True))
