"""`python -m bench [operator …]`: every operator against its peers in one process, the machine probed beside it."""

import argparse
import importlib
import pkgutil
from pathlib import Path

import torch

import bench
from bench import report
from bench.device import open_device
from bench.harness import Benchmark, GrowthRow, Row, by_dtype, measure, measure_growth


def benchmarks() -> dict[str, Benchmark]:
    """What the operator files of this folder declare as `BENCHMARKS`."""
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules(bench.__path__):
        if module.name != "__main__" and not module.name.startswith("test_"):
            declared = getattr(importlib.import_module(f"bench.{module.name}"), "BENCHMARKS", ())
            found.update({b.name: b for b in declared})
    return found


def arguments(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"any of: {', '.join(names)}; default all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--large", action="store_true", help="the shapes of a size for GPUs, and no others")
    parser.add_argument(
        "--shape", action="append", default=[], help="only shapes whose name contains this, or another given"
    )
    parser.add_argument("--without", action="append", default=[], metavar="PROVIDER", help="leave out; repeatable")
    parser.add_argument("--rounds", type=int, default=21, help="turns of each provider, at most (default 21)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--growth", action="store_true", help="measure our time over each size instead of the peers")
    for kind in ("csv", "json", "markdown", "plot"):
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    if unknown := set(chosen.operators) - set(names):
        parser.error(f"no benchmark for {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    if chosen.growth and chosen.csv:
        parser.error("--csv holds comparisons with peers; use --json, --markdown or --plot with --growth")
    return chosen


def main() -> None:
    known = benchmarks()
    options = arguments(list(known))
    torch.set_num_threads(options.threads)
    device = open_device(options.device)
    about = report.environment(options.device)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    rows: list[Row] = []
    growth: list[GrowthRow] = []
    for name in options.operators or known:
        benchmark = known[name]
        for over in benchmark.growth if options.growth else ():
            growth.append(measure_growth(benchmark, over, device, options.rounds))
            g = growth[-1]
            times = ", ".join(f"{v}: {t:.2f} ms" for v, t in zip(g.values, g.times_ms, strict=True))
            print(f"\n{name} over {g.axis}: {times}; slope {g.slope:.2f}, expected {g.expected:.1f}", flush=True)
            write(options, rows, growth, about)
        for shape in () if options.growth else benchmark.shapes:
            wanted = any(part in shape.name for part in options.shape or [""])
            if wanted and shape.large == options.large and (shape.quick or not options.quick):
                torch.manual_seed(0)
                rows.append(measure(benchmark, shape, device, options.rounds, options.without))
                print("\n" + report.text(rows[-1]), flush=True)
                if shape.decisive and benchmark.differentiable:
                    torch.manual_seed(0)
                    rows.append(measure(by_dtype(benchmark), shape, device, options.rounds, options.without))
                    print("\n" + report.text(rows[-1]), flush=True)
                write(options, rows, growth, about)


def write(options: argparse.Namespace, rows: list[Row], growth: list[GrowthRow], about: dict[str, str]) -> None:
    """The files that were asked for, after every row: what is measured is kept when a later one fails."""
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
