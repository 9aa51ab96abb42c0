"""Compiles the CUDA sources for the host; with `--all` in every way the tests need, and prints a table of the kernels.

Runs MAX_JOBS builds at a time (default: all cores): for the host, and with `--all` for the host under sanitizers and,
where nvcc is installed, with nvcc and for the interpreter of PTX. The tests take the results from their caches; what
fails to compile here fails there, with the compiler's message.
"""

import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from tests.cuda_on_host.build import HERE, build, files_of
from tests.nvcc import ARCHITECTURES, SOURCES, kernels_of, report
from tests.ptx.build import host_of, ptx_of


def main() -> None:
    everything = "--all" in sys.argv[1:]
    nvcc = everything and shutil.which("nvcc") is not None
    by_size = sorted(SOURCES, key=lambda source: -sum(file.stat().st_size for file in files_of(source)))
    shim = HERE / "shim_kernels.cpp"
    jobs: list[Callable[[], Any]] = []
    if nvcc:
        for source in by_size:
            jobs.append(partial(ptx_of, source))
            jobs += [partial(host_of, source, small) for small in (True, False)]
        jobs += [partial(made, shim) for made in (ptx_of, host_of)]
        jobs += [partial(report, source, arch) for arch in ARCHITECTURES for source in by_size]
    if everything:
        jobs += [partial(build, source, sanitize=True) for source in (*by_size, shim)]
    jobs += [partial(build, source) for source in (*by_size, shim)]
    jobs.append(partial(build, shim, "-DCUDA_ON_HOST_UCONTEXT"))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        failed = [f.exception() for f in [pool.submit(job) for job in jobs] if f.exception()]
    print(f"CUDA sources: {len(jobs) - len(failed)} of {len(jobs)} builds done")
    if nvcc:
        columns = f"{'arch':>5} {'kernels':>7} {'registers':>9} {'shared':>7} {'spilled':>7}"
        print(f"{'most under nvcc, of':<36} {columns}")
    for source in SOURCES if nvcc else []:
        kernels = kernels_of(source)
        for arch in sorted({k.architecture for k in kernels}):
            of_arch = [k for k in kernels if k.architecture == arch]
            most = [max(getattr(k, what) for k in of_arch) for what in ("registers", "shared", "spilled")]
            print(f"{source.name:<36} sm_{arch} {len(of_arch):>7} {most[0]:>9} {most[1]:>7} {most[2]:>7}")


if __name__ == "__main__":
    main()
