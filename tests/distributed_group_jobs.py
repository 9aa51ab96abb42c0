"""What the ranks of tests/test_distributed.py run besides comparing losses: groups, memory, selection, killed ranks."""

import os
import re
import signal
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import msacore
from msacore.distributed import Sharding, join, tiles
from tests.distributed_cases import BY_NAME
from tests.workers import split

# A mesh creates process groups, which all processes have to create together and only once.
MESHES: dict[int, DeviceMesh] = {}


def meshes(group: Any, rank: int) -> list[tuple[float, float]]:
    """Losses over a 1-D mesh and over each dimension of a 2-D mesh, each with that of one process on the same rows."""
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
        raise AssertionError("a 2-D mesh was accepted")
    return found


def at_place(group: Any, rank: int, name: str, mode: str, order: Sequence[int]) -> list[Tensor]:
    """Loss and gradients of a rank that has the rows of the rank ``order[rank]``."""
    case, sizes = BY_NAME[name], (7, 0, 12, 1)
    whole = case.make(sum(sizes), torch.Generator().manual_seed(6), torch.float64)
    mine = {key: split(value, sizes, order[rank]) for key, value in whole.items()}
    for key in case.towers:
        mine[key] = tree_map(lambda x: x.clone().requires_grad_(), mine[key])
    mode, _, padded = mode.partition(", ")
    sharding = Sharding(group, capacity=12 if padded else None, mode=mode)
    loss = getattr(msacore, case.loss)(**mine, **case.options, group=sharding)
    loss.backward()
    return [loss.detach(), *(x.grad for key in case.towers for x in tree_leaves(mine[key]))]


def bits(group: Any, rank: int, name: str, mode: str, step: Callable[..., Any]) -> bool:
    """Whether two runs are equal in every bit."""
    first, second = (step(group, rank, name, (7, 0, 12, 1), mode, torch.float32) for _ in range(2))
    found = [[x for x in tree_leaves(run) if isinstance(x, Tensor)] for run in (first, second)]
    return len(found[0]) > 1 and all(torch.equal(p, q) for p, q in zip(*found, strict=True))


class LiveTensors(TorchDispatchMode):
    """The most bytes, at any one time, of live tensors that were made inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(getattr(tensor, "elem", tensor).untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def most_bytes(group: Any, rank: int, mode: str, rows: int) -> int:
    """Most bytes of live tensors in a step of a symmetric loss with labels, besides the embeddings themselves."""
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(rows, 32, generator=generator, requires_grad=True) for _ in range(2))
    labels = torch.arange(rows)
    with LiveTensors() as live:
        loss = msacore.info_nce(x, y, labels=(labels, labels), symmetric=True, group=Sharding(group, mode=mode))
        loss.backward()
    return live.most


def most_resident(group: Any, rank: int, rows: int, width: int) -> int:
    """Bytes of memory that a step in ring mode took at its peak, beyond what the process had before it."""
    x, y = (torch.randn(rows, width, requires_grad=True) for _ in range(2))
    own = Path("/proc/self")

    def kilobytes(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+) kB", (own / "status").read_text())[1])  # type: ignore[index]

    (own / "clear_refs").write_text("5")  # resets the high-water mark
    before = kilobytes("VmRSS")
    msacore.info_nce(x, y, symmetric=True, group=Sharding(group, mode="ring")).backward()
    return 1024 * (kilobytes("VmHWM") - before)


class Step(nn.Module):
    """An encoder and its loss, whose collectives a rank that has no steps left must shadow together."""

    def __init__(self, encoder: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.encoder, self.loss = encoder, loss

    def forward(self, x: Tensor) -> Any:
        first, second = self.encoder(torch.cat([x, x.roll(1, 1)])).split([len(x), len(x)])
        return self.loss(first, second)


def train(encoder: nn.Module, loss: nn.Module, batches: Sequence[Tensor], join: Callable[[nn.Module], Any]) -> Any:
    """Losses of the steps, and the weights at the end."""
    step, losses = Step(encoder, loss), []
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    with join(step):
        for x in batches:
            optimizer.zero_grad()
            losses.append(step(x))
            losses[-1].backward()
            optimizer.step()
    return [found.item() for found in losses], [p.detach().clone() for p in step.parameters()]


def encoder_of_all() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 6, dtype=torch.float64)


def batch_of(step: int, rank: int) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)


def trains_unevenly(group: Any, rank: int, mode: str, steps: Sequence[int]) -> Any:
    """Training under DistributedDataParallel with different numbers of steps."""
    model = DistributedDataParallel(encoder_of_all(), process_group=group)
    loss = msacore.nn.InfoNCE(group=Sharding(group, mode=mode), learn_temperature=True)
    loss.double()
    batches = [batch_of(step, rank) for step in range(steps[rank])]
    return train(model, DistributedDataParallel(loss, process_group=group), batches, lambda step: join(step, group))


def joins_shares(group: Any, rank: int) -> str:
    sharded = fully_shard(nn.Linear(6, 6), mesh=DeviceMesh.from_group(group, "cpu"))
    try:
        join(sharded, group)
    except ValueError as error:
        return str(error)
    return ""


def selects(group: Any, rank: int, arguments: dict[str, Any], sizes: Sequence[int], state: Any) -> Any:
    """A selection over the ranks; each rank has its rows."""
    own = {key: split(arguments[key], sizes, rank) for key in ("embeddings", "uncertainty")}
    return msacore.select(**{**arguments, **own}, state=state, group=group)


def dies_selecting(group: Any, rank: int, victim: int) -> None:
    """One rank is killed in the middle of a selection."""
    gather, calls = dist.all_gather_object, 0

    def until(*arguments: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        gather(*arguments, **named)

    if rank == victim:
        dist.all_gather_object = until
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(rank))
    msacore.select(x, 40, strategy="mmr", uncertainty=torch.ones(60), group=group)


def dies_in_backward(group: Any, rank: int, victim: int) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    loss = msacore.info_nce(x, x.detach(), group=Sharding(group, mode="sharded"))
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


def visited_pairs(group: Any, rank: int, tier1: str, rows: int) -> int:
    """Pairs of rows that this rank compares in the forward pass of the hierarchical loss."""
    generator = torch.Generator().manual_seed(rank)
    x = [torch.randn(rows, 4, generator=generator) for _ in range(7)]
    labels, found, sums = torch.arange(rows), 0, tiles.Tile.sums

    def counted(tile: tiles.Tile) -> tuple[Tensor, Tensor]:
        nonlocal found
        found += len(tile.anchors.x) * len(tile.candidates.x)
        return sums(tile)

    sharding = Sharding(group, mode="sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles.Tile, "sums", counted)
        msacore.hierarchical_contrastive_loss(x[:3], x[3], x[4:], tier1=tier1, labels=labels, group=sharding)
    return found


def no_ring(group: Any, rank: int) -> str:
    try:
        msacore.rank_n_contrast(torch.randn(3, 2), torch.randn(3), group=Sharding(group, mode="ring"))
    except ValueError as error:
        return str(error)
    return ""
