"""`python -m bench [operator …]`: every operator against its peers in one process, the machine probed beside it."""

import argparse
import importlib
import pkgutil
import warnings
from pathlib import Path

import torch

import bench
from bench import report
from bench.contention import measure_contention
from bench.device import open_device
from bench.harness import PATIENCE, Benchmark, GrowthRow, Row, Shape, by_dtype, measure, measure_growth


def benchmarks() -> dict[str, Benchmark]:
    """What the operator files of this folder declare as `BENCHMARKS`."""
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules(bench.__path__):
        if module.name != "__main__" and not module.name.startswith("test_"):
            declared = getattr(importlib.import_module(f"bench.{module.name}"), "BENCHMARKS", ())
            found.update({b.name: b for b in declared})
    return found


def arguments(names: list[str], line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"any of: {', '.join(names)}; default all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every shape, dtype and argument, and torch.compile: takes hours",
    )
    parser.add_argument("--large", action="store_true", help="the shapes sized for GPUs, and no others")
    parser.add_argument(
        "--shape", action="append", default=[], help="all shapes whose name contains this, and no others; repeatable"
    )
    parser.add_argument(
        "--without", action="append", default=[], metavar="PROVIDER", help="leave this provider out; repeatable"
    )
    parser.add_argument("--rounds", type=int, default=21, help="most turns that a provider takes (default 21)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--growth", action="store_true", help="measure our time over each size instead of the peers")
    parser.add_argument(
        "--contention",
        action="store_true",
        help="print how much longer each provider takes beside a process that keeps one core busy, and nothing else",
    )
    for kind in ("csv", "json", "markdown", "plot"):
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE")
    chosen = parser.parse_args(line)
    if unknown := set(chosen.operators) - set(names):
        parser.error(f"no benchmark for {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    if chosen.growth and chosen.csv:
        parser.error("--csv holds comparisons with peers; use --json, --markdown or --plot with --growth")
    if chosen.contention and (chosen.growth or any((chosen.csv, chosen.json, chosen.markdown, chosen.plot))):
        parser.error("--contention prints its figures; it takes neither --growth nor a file")
    return chosen


def operators_of(known: dict[str, Benchmark], options: argparse.Namespace) -> list[str]:
    """The named operators, or else all; what single arguments cost (`operator: argument`) is measured by `--all`."""
    return options.operators or [name for name in known if options.all or ": " not in name]


def shapes_of(benchmark: Benchmark, options: argparse.Namespace) -> list[Shape]:
    """The small shapes, unless options ask for others."""
    every = options.all or options.shape
    shapes = [s for s in benchmark.shapes if (s.large if options.large else not s.large and (every or s.quick))]
    return [s for s in shapes if any(part in s.name for part in options.shape or [""])]


def providers_without(benchmark: Benchmark, options: argparse.Namespace) -> list[str]:
    """The providers to leave out, among them torch.compile by default, which takes tens of seconds per shape."""
    slow = [] if options.all or options.large else [p.name for p in benchmark.providers if p.compiled]
    return [*options.without, *slow]


def main() -> None:
    known = benchmarks()
    options = arguments(list(known))
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Sparse ")  # torch's, on the formats of some peers
    device = open_device(options.device)
    about = report.environment(options.device)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    rows: list[Row] = []
    growth: list[GrowthRow] = []
    # By default somebody waits for the whole run, and medians of fewer turns will do.
    patience = PATIENCE if options.all or options.large or options.shape else PATIENCE / 4
    for name in operators_of(known, options):
        benchmark = known[name]
        for over in benchmark.growth if options.growth else ():
            growth.append(measure_growth(benchmark, over, device, options.rounds))
            g = growth[-1]
            times = ", ".join(f"{v}: {t:.2f} ms" for v, t in zip(g.values, g.times_ms, strict=True))
            print(f"\n{name} over {g.axis}: {times}; slope {g.slope:.2f}, expected {g.expected:.1f}", flush=True)
            write(options, rows, growth, about)
        without = providers_without(benchmark, options)
        for shape in shapes_of(benchmark, options) if options.contention else ():
            print(f"\n{name}  {shape.name}, {options.threads} threads")
            for found in measure_contention(benchmark, shape, device, options.rounds, without):
                print(f"  {found}", flush=True)
        for shape in () if options.growth or options.contention else shapes_of(benchmark, options):
            kinds = [benchmark]
            if (options.all or options.large) and shape.decisive and benchmark.differentiable:
                kinds.append(by_dtype(benchmark))
            for kind in kinds:
                torch.manual_seed(0)
                rows.append(measure(kind, shape, device, options.rounds, without, patience))
                print("\n" + report.text(rows[-1]), flush=True)
                write(options, rows, growth, about)


def write(options: argparse.Namespace, rows: list[Row], growth: list[GrowthRow], about: dict[str, str]) -> None:
    """Write the files that were asked for. Called after every row, so that rows are kept when a later one fails."""
    if options.csv:
        report.write_csv(options.csv, rows, about)
    if options.json:
        report.write_json(options.json, rows, growth, about)
    if options.markdown:
        options.markdown.write_text(report.markdown(rows, growth, about))
    if options.plot:
        report.plot(options.plot, rows, growth)


if __name__ == "__main__":
    main()
