"""Runs the operators' cases on the PTX that nvcc makes of their kernels, on the CPU; see tests/ptx/README.md.

Prints a line for each case and the number of those that passed and failed; the exit status is 1 if one failed or none
ran.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from tests.ptx.build import interpreter, preloaded
from tests.ptx.machine import MMA_MODELS, Machine
from tests.ptx.run import Case, Run, families, samples, source_of

DTYPES = "float32,float64,float16,bfloat16"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("operators", nargs="*", help="names of operators or of folders in csrc; all by default")
    parser.add_argument("--dtypes", default=DTYPES, help="comma separated; all four by default")
    parser.add_argument("--in-turn", action="store_true", help="every sample in one of the dtypes, which take turns")
    parser.add_argument(
        "--samples",
        action="append",
        metavar="NAME",
        help="part of the samples' names, repeatable; those too large for a host run (on_host=False) need their whole "
        "name",
    )
    parser.add_argument("--mma", choices=MMA_MODELS, default="exact", help="how tensor cores add; see README.md")
    parser.add_argument("--production-sizes", action="store_true", help="sizes of a CUDA build, not of tests")
    parser.add_argument("--schedule", default="forward", help="order of threads: forward, reverse or random:SEED")
    parser.add_argument("--stats", metavar="FILE", type=Path, help="write what each launch issues and moves, as CSV")
    parser.add_argument("--list", action="store_true", help="list operators and samples, and run nothing")
    parser.add_argument(
        "--verbose", action="store_true", help="every finding of a case; kernels that were not launched"
    )
    return parser.parse_args()


def chosen(names: list[str]) -> list[Case]:
    everything = families()
    known = set(everything) | {case.name for family in everything.values() for case in family}
    if unknown := sorted(set(names) - known):
        sys.exit(f"no operator {', '.join(unknown)}; --list names them")
    return [c for f, family in everything.items() for c in family if not names or f in names or c.name in names]


def main() -> int:
    options = arguments()
    found = chosen(options.operators)
    if options.list:
        for case in found:
            names = [name for name, _ in samples(case, torch.float32, [""])]
            print(f"{case.name}: {', '.join(names) if any(names) else 'one sample'}")
        return 0
    for tool in ("nvcc", "nm"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is not on PATH")
    if os.environ.get("LD_PRELOAD") != str(interpreter()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], preloaded())
    started = time.time()
    sources = sorted({source_of(case) for case in found}, key=lambda source: -source.stat().st_size)
    machine = Machine(options.mma, options.schedule, options.stats)
    machine.run_instead(sources, small=not options.production_sizes)
    print(f"built or found {len(sources)} sources in {time.time() - started:.0f} s", flush=True)
    run = Run(machine, options.verbose)
    dtypes = options.dtypes.split(",")
    for shift, case in enumerate(found):
        for turn, dtype in enumerate(dtypes):
            for number, (sample, args) in enumerate(samples(case, getattr(torch, dtype), options.samples or [""])):
                if not options.in_turn or (number + shift) % len(dtypes) == turn:
                    run.one(case, sample, dtype, args)
    idle = machine.kernels(launched=False)
    print(
        f"{machine.launches} launches, {machine.instructions / 1e6:.0f} M instructions, {len(idle)} kernels never ran"
    )
    if options.verbose:
        print("\n".join(f"    {name}" for name in idle))
    print(f"in no dtype: {' '.join(machine.idle()) or 'none'}")
    print(f"{run.passed} passed, {run.failed} failed")
    return 1 if run.failed or not run.passed else 0


if __name__ == "__main__":
    sys.exit(main())
