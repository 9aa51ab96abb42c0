"""The clock, the canaries and the memory meter of a device.

Extra peak memory on the CPU: the allocator gives freed pages back (`malloc_trim`), the kernel's high-water mark is
reset, the warm call runs once, and the mark is read. This counts every allocation, whether of torch, of MKL or of our
kernels.
The CUDA side has not been run yet.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from msacore import _C


@dataclass(frozen=True)
class Canary:
    """What the machine could do at one moment."""

    gflops: float
    gbytes: float


class Device(Protocol):
    torch: torch.device
    slowest: float  # GFLOP/s of matrix products; slower ones mean that others use the machine too

    def clock(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""

    def canary(self) -> Canary:
        """The rates at which the machine multiplies matrices and reads memory now."""

    def extra_peak_mb(self, call: Callable[[], Any]) -> float | None:
        """Peak memory of one call above what was held before it; None where it cannot be read."""


SHORTEST = 2e-3  # a turn repeats its call until it lasts this long


class Cpu:
    torch = torch.device("cpu")

    def __init__(self) -> None:
        self.slowest = 50.0 * torch.get_num_threads()
        self._square = torch.randn(768, 768)
        self._product = torch.empty(768, 768)
        self._stream = torch.ones(24 << 20)  # 96 MiB, beyond the caches

    def clock(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if seconds >= SHORTEST:
            return seconds
        repeats = int(SHORTEST / seconds) + 1
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def canary(self) -> Canary:
        product = min(self.clock(lambda: torch.mm(self._square, self._square, out=self._product)) for _ in range(5))
        read = min(self.clock(self._stream.sum) for _ in range(5))
        return Canary(2 * 768**3 / product / 1e9, self._stream.nbytes / read / 1e9)

    def extra_peak_mb(self, call: Callable[[], Any]) -> float | None:
        reset = Path("/proc/self/clear_refs")
        if not reset.exists():
            return None
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = _status_kb("VmRSS")
        kept = call()
        peak = _status_kb("VmHWM")
        del kept
        return max(0, peak - before) / 1024


def _status_kb(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


class Cuda:
    """Times with events after overwriting the L2 cache; calls below 100 µs are timed as a replayed CUDA graph.

    What cannot be captured (a call that waits for the device, say) is timed without a graph, its launches included.
    """

    torch = torch.device("cuda")
    slowest = 0.0  # a device serves one process, so what a product reaches is all there is

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self._square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self._graphs: dict[int, tuple[Callable[[], Any], torch.cuda.CUDAGraph | None]] = {}

    def clock(self, call: Callable[[], Any]) -> float:
        if id(call) not in self._graphs:
            seconds = self._events(call)
            if seconds >= 1e-4:
                return seconds
            self._graphs[id(call)] = (call, _captured(call))  # holds the call, so that no other gets its id
        graph = self._graphs[id(call)][1]
        return self._events(call if graph is None else graph.replay)

    def _events(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def canary(self) -> Canary:
        product = min(self._events(lambda: self._square @ self._square) for _ in range(5))
        read = min(self._events(self._flush.amax) for _ in range(5))
        return Canary(2 * 8192**3 / product / 1e9, self._flush.nbytes / read / 1e9)

    def extra_peak_mb(self, call: Callable[[], Any]) -> float | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def _captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """The call as a graph, or None where it cannot be one."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def open_device(name: str) -> Device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: --device cuda needs a CUDA device, and torch sees none")
    if name == "cuda" and not _C.build_info()["cuda"]:
        raise SystemExit("bench: --device cuda needs a build with CUDA, and this one is for the CPU (docs/build.md)")
    return Cuda() if name == "cuda" else Cpu()
