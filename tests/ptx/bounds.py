"""`python -m tests.ptx.bounds [NAME …]` prints the table of bench/results/ptx.md: bounds by counted instructions.

A benchmark of bench/ runs in the interpreter at a size that is feasible there; its instructions are scaled to a real
size in proportion to the benchmark's own count of flops. If it runs at two sizes, they are split into two parts, one in
proportion to the flops and one to the bytes: work that is done once per row must not be scaled like work that is done
once per pair. These are rough bounds by arithmetic, neither measurements nor predictions: tests/ptx/README.md.
"""

import csv
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import Benchmark, Work
from tests.cuda_on_host.dispatch import CudaOnHost
from tests.nvcc import SOURCES
from tests.opcase import map_tensors, tensors_of
from tests.ptx.build import interpreter, preloaded
from tests.ptx.machine import Machine

# An H200: warp instructions, bytes and dense tensor-core flops per second; float32 takes three products of tf32.
ISSUE, BYTES = 132 * 4 * 1.75e9, 4.3e12
FLOPS = {torch.bfloat16: 790e12, torch.float32: 395e12 / 3}


@dataclass(frozen=True)
class Row:
    name: str  # of a benchmark
    module: str  # in bench/, and the folder in csrc
    run: tuple[dict[str, int], ...]  # one size, or two
    real: dict[str, int]
    dtype: torch.dtype = torch.float32


BF16 = torch.bfloat16
# Above the sizes whose similarities are kept for the backward pass, as the real size is: N * N > 2 ** 21 for info_nce,
# 9 * N * N > 2 ** 22 for the hierarchical loss.
LARGE = (1472, 1728)
PAIRS = [({"N": LARGE[0], "d": d}, {"N": LARGE[1], "d": d}) for d in (128, 256)]
FUSED = {"B": 4, "L": 50, "k": 512, "q": 64}
ROWS = [
    Row("info_nce_symmetric", "info_nce", PAIRS[0], {"N": 65536, "d": 128}, BF16),
    Row("info_nce_symmetric", "info_nce", PAIRS[1], {"N": 65536, "d": 256}, BF16),
    Row("info_nce", "info_nce", PAIRS[0], {"N": 4096, "d": 128}),
    Row("hierarchical_contrastive_loss", "hierarchical_contrastive", ({"N": 128, "d": 128},), {"N": 128, "d": 128}),
    Row(
        "hierarchical_contrastive_loss",
        "hierarchical_contrastive",
        ({"N": 704, "d": 128}, {"N": 832, "d": 128}),
        {"N": 2048, "d": 128},
    ),
    Row("rank_n_contrast", "rank_n_contrast", ({"N": 384, "d": 128}, {"N": 512, "d": 128}), {"N": 4096, "d": 128}),
    Row("matrix_fusion", "matrix_fusion", (FUSED,), FUSED | {"B": 64}, BF16),
    Row("matrix_fusion", "matrix_fusion", (FUSED,), FUSED | {"B": 64}),
    Row(
        "low_rank_fusion",
        "low_rank_fusion",
        ({"B": 128, "d": 128, "h": 128, "r": 4},),
        {"B": 1024, "d": 128, "h": 128, "r": 16},
    ),
    Row(
        "graph_propagate",
        "graph_propagation",
        ({"n": 512, "E": 10240, "d": 128, "K": 1},),
        {"n": 20000, "E": 400000, "d": 128, "K": 1},
    ),
    Row("kcenter", "kcenter", ({"N": 3000, "d": 256, "budget": 32},), {"N": 1000000, "d": 256, "budget": 10000}),
]


def benchmark_of(row: Row) -> Benchmark:
    found = importlib.import_module(f"bench.{row.module}").BENCHMARKS
    return next(benchmark for benchmark in found if benchmark.name == row.name)


def run(row: Row, sizes: dict[str, int], machine: Machine) -> None:
    """Run forward, and backward if there is one, as the cases "forward" and "backward" of the statistics."""
    benchmark = benchmark_of(row)
    torch.manual_seed(0)
    inputs: dict[str, Any] = benchmark.inputs(sizes, torch.device("cpu"))
    inputs = map_tensors(
        inputs, lambda t: t.detach().to(row.dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
    )
    call = benchmark.providers[0].bind(inputs)
    with CudaOnHost():
        machine.name_case("forward")
        outputs = [t for _, t in tensors_of((call(),))]
        if not benchmark.differentiable:
            return
        machine.name_case("backward")
        leaves = [t for _, t in tensors_of(inputs) if t.requires_grad]
        wanted = [t for t in outputs if t.requires_grad]
        torch.autograd.grad(wanted, leaves, [torch.ones_like(t) for t in wanted], allow_unused=True)
    found = machine.findings()
    assert not found, found[0]


Launches = list[dict[str, str]]


def issued(launches: Launches) -> float:
    return sum(float(x["warp_instructions"]) - float(x["move"]) - float(x["parameter"]) for x in launches)


def at_real_size(counts: list[float], work: list[Work], real: Work) -> float:
    """Instructions at the real size, from one or two counts."""
    if len(counts) == 1:
        return counts[0] * real.flops / work[0].flops
    (x, y), (first, second) = counts, work
    determinant = first.flops * second.bytes - second.flops * first.bytes
    by_flops = (x * second.bytes - y * first.bytes) / determinant
    by_bytes = (first.flops * y - second.flops * x) / determinant
    return by_flops * real.flops + by_bytes * real.bytes


def lines_of(row: Row, runs: list[Launches]) -> Iterator[str]:
    benchmark = benchmark_of(row)
    for both in (False, True) if benchmark.differentiable else (False,):
        work, real = [benchmark.work(sizes)[both] for sizes in row.run], benchmark.work(row.real)[both]
        launches = [[x for x in run if both or x["case"] == "forward"] for run in runs]
        counts = [issued(those) for those in launches]
        seconds = at_real_size(counts, work, real) / ISSUE
        roof = max(real.flops / FLOPS[row.dtype], real.bytes / BYTES)
        mma = sum(float(x["mma"]) for x in launches[-1])
        sizes = ", ".join(f"{k} = {v:,}" for k, v in row.real.items())
        ran = ", ".join(f"{k} = {' and '.join(f'{v:,}' for v in sorted({r[k] for r in row.run}))}" for k in row.real)
        yield (
            f"| {row.name} | {sizes} | {str(row.dtype).removeprefix('torch.')} | {'both' if both else 'forward'} "
            f"| {ran} | {' and '.join(f'{count / 1e3:,.0f}' for count in counts)} | {100 * mma / counts[-1]:.1f} "
            f"| {1e3 * seconds:.3g} | {1e3 * roof:.3g} | {100 * roof / max(roof, seconds):.0f} % |"
        )


def main() -> None:
    if os.environ.get("LD_PRELOAD") != str(interpreter()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], preloaded())
    rows = [row for row in ROWS if not sys.argv[1:] or row.name in sys.argv[1:]]
    folders = {row.module for row in rows}
    print(
        "| benchmark | real size | dtype | pass | counted at | warp instructions (thousands) | of them mma (%) |",
        end="",
    )
    print(" bound by issue (ms) | roofline (ms) | roofline of bound |")
    print("|---|---|---|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "launches.csv"
        machine = Machine(stats=stats)
        machine.run_instead([s for s in SOURCES if s.parent.name in folders], small=False)
        before = 0
        for row in rows:
            runs = []
            for sizes in row.run:
                run(row, sizes, machine)
                launches = list(csv.DictReader(stats.open()))
                runs.append(launches[before:])
                before = len(launches)
            for line in lines_of(row, runs):
                print(line, flush=True)


if __name__ == "__main__":
    main()
