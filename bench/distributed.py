"""`python -m bench.distributed`: what a step of the losses with `group=` costs a rank: bytes, and compute against 1/W.

Ranks are simulated in one process: the rows of one rank are evaluated against those of all, without a network. Bytes
are counted by formula; `tests/test_distributed.py` counts those that four ranks really send. Nothing here says anything
about the speed of a network.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

import msacore
from msacore.distributed.directions import Direction, Side


def rank_seconds(n: int, width: int, world: int, rounds: int) -> float:
    """Median time of forward and backward of a rank's share: both directions, n / world rows against n."""
    generator = torch.Generator().manual_seed(0)
    anchors, candidates = (torch.randn(n, width, generator=generator, requires_grad=True) for _ in range(2))
    rows = slice(0, n // world)
    options = dict(temperature=0.1, normalize=True, denominator="all", negatives=None, negative_mask=None)

    def step() -> None:
        total: Tensor = torch.zeros(())
        for x, y in ((anchors, candidates), (candidates, anchors)):
            direction = Direction(Side(x[rows]), Side(y), 0, None, False, options).aligned()
            total = total + direction.losses(msacore.ops.info_nce.info_nce).sum() / n / 2
        total.backward()
        anchors.grad = candidates.grad = None

    return median(step, rounds)


def median(step: Callable[[], None], rounds: int) -> float:
    step()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def received(n: int, width: int, world: int, mode: str, size: int = 4) -> tuple[int, int]:
    """Bytes that a rank receives in forward and backward of symmetric `info_nce` with default positives.

    Replicated: the other ranks' rows of both towers. Sharded: the same forward, and backward the other ranks' parts of
    the gradient of this rank's rows, for both towers.
    """
    others = n - n // world
    forward = 2 * others * width * size
    return forward, 0 if mode == "replicated" else 2 * (n // world) * (world - 1) * width * size


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="rows N of the whole batch")
    parser.add_argument("--width", type=int, default=128, help="width d of an embedding")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64], help="numbers of ranks W")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    alone = rank_seconds(options.rows, options.width, 1, options.rounds)
    print(f"info_nce, symmetric, N = {options.rows}, d = {options.width}, float32, {torch.get_num_threads()} threads")
    columns = ("W", "compute", "of 1/W", "replicated MB", "sharded MB forward", "backward")
    print("  ".join(f"{c:>18}" for c in columns))
    for world in options.worlds:
        seconds = alone if world == 1 else rank_seconds(options.rows, options.width, world, options.rounds)
        share = seconds / (alone / world)
        replicated = received(options.rows, options.width, world, "replicated")[0] / 1e6
        forward, backward = (b / 1e6 for b in received(options.rows, options.width, world, "sharded"))
        cells = (
            world,
            f"{seconds * 1e3:.1f} ms",
            f"{share:.2f}",
            f"{replicated:.2f}",
            f"{forward:.2f}",
            f"{backward:.2f}",
        )
        print("  ".join(f"{c:>18}" for c in cells))


if __name__ == "__main__":
    main()
