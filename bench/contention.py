"""How much slower providers become when another process takes a core beside them."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.device import Device
from bench.harness import Benchmark, Row, Shape, bound, medians, with_backward, without_grad


@contextmanager
def busy_loop() -> Iterator[subprocess.Popen[str]]:
    """A process that computes without a pause until the block ends."""
    loop = "print('busy', flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it has started
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclass
class Contention:
    """Milliseconds of a call alone and beside a busy process."""

    operator: str
    shape: str
    provider: str
    alone_ms: float
    beside_ms: float

    @property
    def slowdown(self) -> float:
        return self.beside_ms / self.alone_ms

    def __str__(self) -> str:
        times = f"{self.alone_ms:.3g} ms alone, {self.beside_ms:.3g} ms beside a busy process"
        return f"{self.provider}: {times}, {self.slowdown:.2f} times as long"


def measure_contention(
    benchmark: Benchmark, shape: Shape, device: Device, rounds: int, without: Sequence[str] = (), turns: int = 3
) -> list[Contention]:
    """Measure every provider, all taking turns, in `turns` phases alone alternating with `turns` beside a busy process.

    For each provider the fastest phase of each kind counts: other processes only ever add time.
    """
    inputs = benchmark.inputs(shape.sizes, device.torch)
    wanted = [p for p in benchmark.providers if p.name not in without and not p.compiled]
    running = bound(benchmark, inputs, wanted, device, Row(benchmark.name, shape.name))
    calls = {
        name: with_backward(b.call, b.inputs) if benchmark.differentiable else without_grad(b.call)
        for name, b in running.items()
    }
    alone, beside = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, float("inf"))

    def phase(best: dict[str, float]) -> None:
        for name, seconds in medians(calls, rounds, device.clock).items():
            best[name] = min(best[name], 1e3 * seconds)

    for _ in range(turns):
        phase(alone)
        with busy_loop():
            phase(beside)
    return [Contention(benchmark.name, shape.name, name, alone[name], beside[name]) for name in calls]
