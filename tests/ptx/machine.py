"""The interpreter, seen from Python."""

import ctypes
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from tests.cuda_on_host.dispatch import CudaOnHost
from tests.ptx.build import compilers_alone, host_of, interpreter, ptx_of

MMA_MODELS = ("exact", "a100", "h100")  # in the order of MmaModel


class Machine:
    """The interpreter of this process, which must have been started with `tests.ptx.build.preloaded`.

    Args:
        mma: How tensor cores add, one of `MMA_MODELS`; see tests/ptx/README.md.
        schedule: Order of threads: "forward", "reverse" or "random:SEED".
        stats: File of comma-separated values, a line for each launch; None writes no file.
    """

    def __init__(self, mma: str = "exact", schedule: str = "forward", stats: Path | None = None) -> None:
        torch.set_num_threads(1)
        self._library = library = ctypes.CDLL(str(interpreter()), ctypes.RTLD_GLOBAL)
        for name in ("ptx_load", "ptx_findings", "ptx_kernels"):
            getattr(library, name).restype = ctypes.c_char_p
        for name in ("ptx_launches", "ptx_instructions"):
            getattr(library, name).restype = ctypes.c_uint64
        probe = torch.ones(100)
        if not library.ptx_knows(ctypes.c_void_p(probe.data_ptr())):
            raise RuntimeError("torch's allocations are not seen: was the process started with LD_PRELOAD?")
        library.ptx_configure(MMA_MODELS.index(mma), schedule.encode())
        if stats:
            library.ptx_statistics(str(stats.absolute()).encode())

    def run_instead(self, sources: Sequence[Path], small: bool = True) -> None:
        """Build sources, MAX_JOBS (default: all cores) at a time; `CudaOnHost` then runs their PTX in this process."""
        host = partial(host_of, small=small)
        with compilers_alone(), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            texts = pool.map(ptx_of, sources)
            libraries = pool.map(host, sources)
            for library, text in zip(libraries, texts, strict=True):
                self.load(library, text)
        CudaOnHost.sources, CudaOnHost.binary_of = sources, host

    def load(self, library: Path, ptx: Path) -> None:
        """Make launches from a library run the kernels of a PTX file."""
        if error := self._library.ptx_load(str(library).encode(), str(ptx).encode()):
            raise RuntimeError(f"{ptx.name}: {error.decode()}")

    def name_case(self, name: str) -> None:
        self._library.ptx_name_case(name.encode())

    def findings(self) -> list[str]:
        """What was found since the last call and did not end its launch; causes first."""
        found = self._library.ptx_findings().decode().splitlines()
        return sorted(found, key=lambda line: ("in flight" not in line, line.startswith("uninitialised")))

    def kernels(self, launched: bool) -> list[str]:
        return self._library.ptx_kernels(launched).decode().splitlines()

    def idle(self) -> list[str]:
        """Kernels that were not launched for any dtype."""
        ran, not_ran = ({re.split("[<(]", name)[0] for name in self.kernels(launched)} for launched in (True, False))
        return sorted(not_ran - ran)

    @property
    def launches(self) -> int:
        return self._library.ptx_launches()

    @property
    def instructions(self) -> int:
        return self._library.ptx_instructions()
