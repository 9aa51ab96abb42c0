"""`python -m tests.ptx.bounds [NAME …]` prints the table of bench/results/ptx.md: bounds by counted instructions.

A benchmark of bench/ runs in the interpreter at a size it can do; its instructions grow to a real size as the
benchmark's own count of flops does. Rough bounds by arithmetic, no measurement and no prediction: tests/ptx/README.md.
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

from bench.harness import Benchmark
from tests.cuda_on_host.dispatch import CudaOnHost
from tests.nvcc import SOURCES
from tests.opcase import map_tensors, tensors_of
from tests.ptx.build import interpreter, preloaded
from tests.ptx.machine import Machine

# An H200: warp instructions and bytes a second, and flops of tensor cores, dense; float32 takes three products of tf32.
ISSUE, BYTES = 132 * 4 * 1.75e9, 4.3e12
FLOPS = {torch.bfloat16: 790e12, torch.float32: 395e12 / 3}


@dataclass(frozen=True)
class Row:
    name: str  # of a benchmark
    module: str  # in bench/, and the folder in csrc
    run: dict[str, int]
    real: dict[str, int]
    dtype: torch.dtype = torch.float32


BF16 = torch.bfloat16
ROWS = [
    Row("info_nce_symmetric", "info_nce", {"N": 512, "d": 128}, {"N": 65536, "d": 128}, BF16),
    Row("info_nce_symmetric", "info_nce", {"N": 512, "d": 256}, {"N": 65536, "d": 256}, BF16),
    Row("info_nce", "info_nce", {"N": 512, "d": 128}, {"N": 4096, "d": 128}),
    Row("hierarchical_contrastive_loss", "hierarchical_contrastive", {"N": 128, "d": 128}, {"N": 128, "d": 128}),
    Row("hierarchical_contrastive_loss", "hierarchical_contrastive", {"N": 576, "d": 128}, {"N": 2048, "d": 128}),
    Row("rank_n_contrast", "rank_n_contrast", {"N": 512, "d": 128}, {"N": 4096, "d": 128}),
    Row(
        "matrix_fusion",
        "matrix_fusion",
        {"B": 4, "L": 50, "k": 512, "q": 64},
        {"B": 64, "L": 50, "k": 512, "q": 64},
        BF16,
    ),
    Row("matrix_fusion", "matrix_fusion", {"B": 4, "L": 50, "k": 512, "q": 64}, {"B": 64, "L": 50, "k": 512, "q": 64}),
    Row(
        "low_rank_fusion",
        "low_rank_fusion",
        {"B": 128, "d": 128, "h": 128, "r": 4},
        {"B": 1024, "d": 128, "h": 128, "r": 16},
    ),
    Row(
        "graph_propagate",
        "graph_propagation",
        {"n": 512, "E": 10240, "d": 128, "K": 1},
        {"n": 20000, "E": 400000, "d": 128, "K": 1},
    ),
    Row(
        "kcenter",
        "kcenter",
        {"N": 3000, "d": 256, "budget": 32},
        {"N": 1000000, "d": 256, "budget": 10000},
    ),
]


def benchmark_of(row: Row) -> Benchmark:
    found = importlib.import_module(f"bench.{row.module}").BENCHMARKS
    return next(benchmark for benchmark in found if benchmark.name == row.name)


def run(row: Row, machine: Machine) -> None:
    """Forward, and backward where there is one, under the names "forward" and "backward" of the statistics."""
    benchmark = benchmark_of(row)
    torch.manual_seed(0)
    inputs: dict[str, Any] = benchmark.inputs(row.run, torch.device("cpu"))
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


def issued(launches: list[dict[str, str]]) -> float:
    return sum(float(x["warp_instructions"]) - float(x["move"]) - float(x["parameter"]) for x in launches)


def lines_of(row: Row, launches: list[dict[str, str]]) -> Iterator[str]:
    benchmark = benchmark_of(row)
    forward, total = benchmark.work(row.run)
    real_forward, real_total = benchmark.work(row.real)
    parts = [("forward", forward, real_forward, [x for x in launches if x["case"] == "forward"])]
    if benchmark.differentiable:
        parts.append(("both", total, real_total, launches))
    for words, small, real, those in parts:
        seconds = issued(those) / ISSUE * real.flops / small.flops
        roof = max(real.flops / FLOPS[row.dtype], real.bytes / BYTES)
        mma = sum(float(x["mma"]) for x in those)
        sizes, ran = (", ".join(f"{k} = {v:,}" for k, v in s.items()) for s in (row.real, row.run))
        yield (
            f"| {row.name} | {sizes} | {str(row.dtype).removeprefix('torch.')} | {words} | {ran} "
            f"| {issued(those) / 1e3:,.0f} | {100 * mma / issued(those):.1f} | {1e3 * seconds:.3g} | {1e3 * roof:.3g} "
            f"| {100 * roof / max(roof, seconds):.0f} % |"
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
            run(row, machine)
            launches = list(csv.DictReader(stats.open()))
            for line in lines_of(row, launches[before:]):
                print(line, flush=True)
            before = len(launches)


if __name__ == "__main__":
    main()
