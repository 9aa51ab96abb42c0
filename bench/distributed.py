"""`python -m bench.distributed`: what a step of the losses with `group=` costs a rank, and a pick of `select`.

It prints three tables. Bytes that a rank receives in a step of `info_nce` (with equal shares it sends the same number),
by formula and counted at the process group of ranks that really run. Compute of a rank that has its cores to itself,
measured in this process, against 1/W of the compute of one process. Rounds and bytes of a selection whose shards are
threads of one process, also extrapolated to large pools. Nothing here says anything about the speed of a network.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import msacore
from bench.device import Cpu
from bench.harness import Call, medians
from bench.shards import together
from msacore.distributed import Sharding
from msacore.distributed.tiles import ALL, Rows, Tile, finish, merge
from msacore.selection.tree import DIGEST_ROWS

TABLES = ("bytes", "compute", "selection")
MODES = ("replicated", "sharded", "ring", "self-contrast")


class Traffic(TorchDispatchMode):
    """Counts the bytes sent to and received from other ranks in torch's functional collectives."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.sent, self.received, self.calls = rank, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "_c10d_functional" and name in ("all_gather_into_tensor", "all_to_all_single"):
            self._count(name, *args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, x: Tensor, *rest: Any) -> None:
        self.calls += 1
        row = x[:1].numel() * x.element_size() if len(x) else 0
        if name == "all_gather_into_tensor":
            others = (rest[0] - 1) * len(x) * row
            self.sent += others
            self.received += others
            return
        come, go = rest[0], rest[1]
        self.sent += (sum(go) - go[self.rank]) * row
        self.received += (sum(come) - come[self.rank]) * row


def received(rows: int, width: int, world: int, mode: str, size: int = 4) -> tuple[int, int]:
    """Bytes that a rank receives in forward and backward of a step of `info_nce`, by formula.

    The loss is symmetric with default positives; for "self-contrast" it is that of one embedding with labels. Numbers
    kept per row have 4 bytes (for ``size`` 2 or 4), the header has 8 numbers of 8 bytes and the counts have 6.

    Args:
        rows: Rows of each rank.
        width: Width d of an embedding.
        world: Number of ranks W.
        mode: One of ``MODES``.
        size: Bytes of an element of an embedding.
    """
    others, visited = world - 1, world // 2
    row, kept = width * size, 4 * 4
    header, counts = others * 8 * 8, others * 6 * 8
    if mode == "replicated":
        return header + others * rows * 2 * row, 0
    if mode == "sharded":
        return header + counts + others * rows * (row + kept), others * rows * (kept + width * 4)
    if mode == "ring":  # sums travel in float64 and, like gradients, return to their own rank
        home = world * rows if world > 1 else 0
        forward, backward = others * rows * row + home * 2 * kept, others * rows * (row + kept) + home * width * 4
        return header + counts + forward, backward
    forward, backward = visited * rows * (row + 8 + kept), visited * rows * (kept + width * 4)
    return header + counts + forward, backward


def step(group: Any, rank: int, rows: int, width: int, mode: str) -> dict[str, tuple[int, int]]:
    """Counts the bytes sent and received in forward and backward of a step."""
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(rows, width, generator=generator, requires_grad=True) for _ in range(2))
    labels = torch.arange(rows) // 2
    with Traffic(rank) as forward:
        if mode == "self-contrast":
            sharding = Sharding(group, mode="sharded")
            loss = msacore.info_nce(x, labels=labels, exclude_self=True, group=sharding)
        else:
            loss = msacore.info_nce(x, y, symmetric=True, group=Sharding(group, mode=mode))
    with Traffic(rank) as backward:
        loss.backward()
    return {name: (t.sent, t.received) for name, t in (("forward", forward), ("backward", backward))}


def _serve(rank: int, world: int, folder: str, rows: int, width: int) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = {mode: step(dist.group.WORLD, rank, rows, width, mode) for mode in MODES}
    if rank == 0:
        torch.save(found, os.path.join(folder, "found"))
    dist.destroy_process_group()


def count(world: int, rows: int, width: int) -> dict[str, dict[str, tuple[int, int]]]:
    """:func:`step` of every mode on new processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_serve, (world, folder, rows, width), nprocs=world)
        return torch.load(os.path.join(folder, "found"))


WAYS = ("sharded", "ring", "self-contrast")  # the modes in which the ranks share the pairs of rows


def sweeps(n: int, width: int, world: int, way: str) -> Call:
    """The sweeps of one of ``world`` ranks, forward and backward, over a batch of n rows: n / world against n.

    The rows of the others are in this process, and nothing travels: this is the compute of a rank that has its cores
    to itself.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, width, generator=generator) for _ in range(2))
    own = n // world
    mine = Rows(x[:own], None, None, 0)
    common = (False, True, ALL, 0.1)
    if way == "self-contrast":  # one embedding: of two ranks, one visits the pairs between them for both
        others = Rows(y[: (n - own) // 2], None, None, 2 * n)
        tiles = [Tile(mine, mine, False, *common), Tile(mine, others, True, *common)]
    elif way == "ring":
        blocks = zip(y.split(own), range(0, n, own), strict=True)
        tiles = [Tile(mine, Rows(block, None, None, begin), True, *common) for block, begin in blocks]
    else:
        tiles = [Tile(mine, Rows(y, None, None, 0), True, *common)]
    scale, many = torch.tensor(0.5 / n), torch.tensor(n)

    def once() -> None:
        for tile in tiles:
            stats = [finish(merge([part], 0.1), None, ALL, 0.1)[1] for part in tile.sums()]
            tile.gradients((scale, scale), (stats[0], stats[1]), (many, many))

    return once


def table(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    for line in (columns, *lines):
        print("  ".join(f"{cell!s:>18}" for cell in line))
    print()


def print_bytes(world: int, rows: int, width: int) -> None:
    print(f"info_nce, bytes that a rank of {world} receives in a step, {rows} rows of {width} float32 each")
    counted = count(world, rows, width)
    lines = []
    for mode in MODES:
        formula = received(rows, width, world, mode)
        for name, by_formula in zip(("forward", "backward"), formula, strict=True):
            sent, came = counted[mode][name]
            lines.append((mode, name, by_formula, came, sent))
    table(("mode", "pass", "by formula", "received", "sent"), lines)


def print_compute(n: int, width: int, worlds: Sequence[int], rounds: int) -> None:
    threads, device = torch.get_num_threads(), Cpu()
    print(f"info_nce, symmetric: sweeps of a rank, N = {n}, d = {width}, float32, {threads} threads, taking turns")
    calls = {f"{way} {world}": sweeps(n, width, world, way) for way in WAYS for world in (1, *worlds)}
    for call in calls.values():
        call()
    canaries = [device.canary()]
    times = medians(calls, rounds, device.clock, math.inf)
    canaries.append(device.canary())
    alone = times["sharded 1"]
    lines = []
    for world in worlds:
        found = [times[f"{way} {world}"] for way in WAYS]
        shares = (f"{seconds * 1e3:.2f} ms, {seconds / (alone / world):.2f}" for seconds in found)
        bytes_of = [f"{sum(received(n // world, width, world, mode)) / 1e6:.2f}" for mode in MODES]
        lines.append((world, *shares, *bytes_of))
    rates = ", ".join(f"{canary.gflops:.0f}" for canary in canaries)
    print(f"time, and times 1/W of the {alone * 1e3:.1f} ms of one process; GFLOP/s before and after: {rates}")
    table(("W", *WAYS, *(f"{mode} MB" for mode in MODES)), lines)


def print_selection(worlds: Sequence[int], sizes: Sequence[int], width: int, budget: int, largest: int) -> None:
    """Rounds and bytes of selections whose shards are threads, and of a larger pool by extrapolation."""
    print(f"kcenter of {budget} picks, d = {width}, float32; shards are threads of one process, clustered rows")
    lines = []
    for world in worlds:
        rounds = []
        for n in sizes:
            generator = torch.Generator().manual_seed(n)
            x = (
                torch.randn(n, width, generator=generator)
                + 3 * torch.randn(50, width, generator=generator)[torch.randint(50, (n,), generator=generator)]
            )
            parts = [{"embeddings": part, "budget": budget, "strategy": "kcenter"} for part in x.tensor_split(world)]
            shards = together(parts)
            exchanges, sent = shards.exchanges, max(shards.sent)
            rounds.append(exchanges)
            lines.append((world, n, exchanges, f"{sent / budget / 1e3:.2f} kB", "measured"))
        # Rounds grow at most with the logarithm of the rows: the last two sizes give the slope.
        slope = max(0.0, (rounds[-1] - rounds[-2]) / math.log(sizes[-1] / sizes[-2]))
        expected = rounds[-1] + slope * math.log(largest / sizes[-1])
        # The pool's digest takes 32 bytes for every DIGEST_ROWS rows of a rank.
        digests = 32 * largest / world / DIGEST_ROWS
        bytes_of = (sent / rounds[-1] * expected + digests) / budget / 1e3
        lines.append((world, f"{largest:.0e}", f"{expected:.0f}", f"{bytes_of:.2f} kB", "extrapolated"))
    table(("W", "rows", "exchanges", "sent a pick, rank", ""), lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"any of: {', '.join(TABLES)}; default all")
    parser.add_argument("--rows", type=int, default=4096, help="rows N of the whole batch")
    parser.add_argument("--width", type=int, default=128, help="width d of an embedding")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], help="numbers of ranks W")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4, help="processes that count the bytes of a step")
    parser.add_argument("--budget", type=int, default=256, help="picks of the selection")
    parser.add_argument("--pool", type=int, nargs="+", default=[16_384, 65_536], help="rows of its pools, two or more")
    parser.add_argument("--largest", type=int, default=10**8, help="rows of the pool that is extrapolated")
    options = parser.parse_args()
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are: {', '.join(TABLES)}")
    chosen = options.tables or TABLES
    if "bytes" in chosen:
        print_bytes(options.ranks, options.rows // options.ranks, options.width)
    if "compute" in chosen:
        print_compute(options.rows, options.width, options.worlds, options.rounds)
    if "selection" in chosen:
        shards = [world for world in options.worlds if world > 1]
        print_selection(shards, options.pool, 32, options.budget, options.largest)


if __name__ == "__main__":
    main()
