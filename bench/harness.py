"""Measures providers of one operation side by side; knows nothing about any operator.

A row is one operation at one shape. Its providers take turns in one process on the same tensors (A, B, C, A, B, C, …)
and their medians are compared. The machine is probed before, between and after the turns with two canaries, a matrix
product and a read of memory. Where one drifts by more than `DRIFT` the row is measured again; if it drifts in every
attempt, the row's ratios are withheld. They are also withheld where matrix products are slower than `Device.slowest`,
because others then use the machine too.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.device import Canary, Device

DRIFT = 0.20
ATTEMPTS = 3
PATIENCE = 1.0  # seconds; a provider whose turns lasted longer takes no more of them
LONG = 10.0  # seconds; where nothing is differentiated, a first call that lasted longer is the only one
DISAGREEMENT = 1e-2  # relative to the largest output; a peer that differs by more computes something else
_DTYPES = {  # tolerances; results of 16-bit inputs differ by their rounding
    torch.float32: DISAGREEMENT,
    torch.float64: DISAGREEMENT,
    torch.float16: 10 * DISAGREEMENT,
    torch.bfloat16: 10 * DISAGREEMENT,
}

Inputs = dict[str, Any]
Call = Callable[[], Any]


class Unavailable(Exception):
    """A provider that cannot run here, with the reason to print."""


@dataclass(frozen=True)
class Shape:
    name: str
    sizes: dict[str, int]
    quick: bool = False  # measured by default and by `pytest bench`; the others by `--all`
    decisive: bool = False  # `--all` and `--large` also measure it through torch.compile and by dtype
    large: bool = False  # sized for GPUs, measured by `--large` alone


@dataclass(frozen=True)
class Work:
    """The least an operation must do: floating-point operations, and bytes read or written once."""

    flops: float
    bytes: float

    def seconds(self, canary: Canary) -> float:
        return max(self.flops / (canary.gflops * 1e9), self.bytes / (canary.gbytes * 1e9))


@dataclass(frozen=True)
class Provider:
    """One implementation. `bind` prepares it outside the clock, or raises `Unavailable`."""

    name: str
    bind: Callable[[Inputs], Call]
    dtype: torch.dtype | None = None  # of its copy of the inputs; None for the inputs themselves
    compiled: bool = False  # too slow to prepare for every shape, or for the forward pass alone
    tolerance: float = DISAGREEMENT


@dataclass(frozen=True)
class Growth:
    """How our time should grow with one size: `slope` of log time over log size."""

    axis: str
    values: tuple[int, ...]
    others: dict[str, int]
    slope: float


@dataclass(frozen=True)
class Benchmark:
    """An operation: `providers[0]` is ours. `work(sizes)` gives the floor of forward and of forward plus backward."""

    name: str
    shapes: tuple[Shape, ...]
    inputs: Callable[[dict[str, int], torch.device], Inputs]
    providers: tuple[Provider, ...]
    work: Callable[[dict[str, int]], tuple[Work, Work]]
    growth: tuple[Growth, ...] = ()
    differentiable: bool = True
    remark: Callable[[Inputs, Canary], str] | None = None  # a note on ours, from inputs and the machine's rates


@dataclass
class Measurement:
    provider: str
    forward_ms: float | None = None
    total_ms: float | None = None  # forward and backward
    extra_mb: float | None = None  # peak above what was held before the call
    ratio: float | None = None  # its time over ours, with backward where there is one; None where withheld
    share: float | None = None  # of the limit: the floor's time over its time
    note: str = ""


@dataclass
class Row:
    operator: str
    shape: str
    measurements: list[Measurement] = field(default_factory=list)
    canaries: list[Canary] = field(default_factory=list)
    attempts: int = 0
    drift: float = 0.0
    withheld: str = ""

    def as_records(self) -> Iterator[dict[str, Any]]:
        middle = median_canary(self.canaries) if self.canaries else None
        gflops, gbytes = (middle.gflops, middle.gbytes) if middle else (None, None)
        for m in self.measurements:
            common = dict(operator=self.operator, shape=self.shape, gflops=gflops, gbytes=gbytes, drift=self.drift)
            yield {**common, **asdict(m), "withheld": self.withheld}


def by_dtype(benchmark: Benchmark) -> Benchmark:
    """Our provider alone, on the same inputs in every dtype; ratios are relative to float32."""
    bind = benchmark.providers[0].bind
    names = {dtype: f"msacore {str(dtype).removeprefix('torch.')}" for dtype in _DTYPES}
    providers = tuple(Provider(names[dtype], bind, dtype, tolerance=_DTYPES[dtype]) for dtype in _DTYPES)
    return replace(benchmark, providers=providers)


def cast(inputs: Inputs, dtype: torch.dtype | None) -> Inputs:
    """A copy whose floating tensors, also inside sequences, are leaves of the given dtype."""

    def change(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype).requires_grad_(value.requires_grad)
        return [change(v) for v in value] if isinstance(value, list) else value

    return inputs if dtype is None else {name: change(value) for name, value in inputs.items()}


def leaves(inputs: Inputs) -> list[Tensor]:
    """The differentiable tensors among the inputs, also inside sequences."""
    found: list[Tensor] = []
    for value in inputs.values():
        members = value if isinstance(value, (list, tuple)) else (value,)
        found += [t for t in members if isinstance(t, Tensor) and t.requires_grad]
    return found


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def with_backward(call: Call, inputs: Inputs) -> Call:
    """The call followed by the gradient of a fixed weighting of its outputs."""
    wanted = leaves(inputs)
    first = [o.detach() for o in outputs(call())]
    weights = [torch.linspace(0.5, 1.5, max(1, o.numel())).to(o)[: o.numel()].view(o.shape) for o in first]

    def run() -> Any:
        return torch.autograd.grad(outputs(call()), wanted, weights, allow_unused=True)

    return run


def without_grad(call: Call) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def median_canary(canaries: Sequence[Canary]) -> Canary:
    return Canary(statistics.median(c.gflops for c in canaries), statistics.median(c.gbytes for c in canaries))


def drift(canaries: Sequence[Canary]) -> float:
    """The larger of the two canaries' relative falls from their best to their worst probe."""
    rates = [[c.gflops for c in canaries], [c.gbytes for c in canaries]]
    return max(1 - min(rate) / max(rate) for rate in rates)


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """The order in which providers run: every provider once, then every provider again."""
    for _ in range(rounds):
        yield from names


def medians(
    calls: dict[str, Call], rounds: int, clock: Callable[[Call], float], patience: float = PATIENCE
) -> dict[str, float]:
    """Median seconds of each call. All take turns; one that has spent `patience` seconds takes no more of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for name in turns(list(calls), rounds):
        if not times[name] or spent[name] < patience:
            start = time.perf_counter()
            times[name].append(clock(calls[name]))
            spent[name] += time.perf_counter() - start
    return {name: statistics.median(values) for name, values in times.items()}


def disagreement(ours: Any, theirs: Any) -> float:
    """Largest difference between outputs, relative to the largest value of ours."""
    return max(
        (float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30)))
        if a.shape == b.shape
        else float("inf")
        for a, b in zip(outputs(ours), outputs(theirs), strict=True)
        if a.numel()
    )


@dataclass
class Bound:
    """A provider that runs here."""

    provider: Provider
    call: Call
    inputs: Inputs
    measurement: Measurement
    seconds: float  # of its first call


def bound(
    benchmark: Benchmark, inputs: Inputs, providers: Sequence[Provider], device: Device, row: Row
) -> dict[str, Bound]:
    """The providers that run here, each called once and compared with ours; the others get a note with the reason.

    Without a backward pass this call also measures the extra memory: selection can be too slow for a second call.
    """
    found: dict[str, Bound] = {}
    expected: Any = None
    for provider in providers:
        result: list[Any] = []
        own = cast(inputs, provider.dtype)
        m = Measurement(provider.name)
        row.measurements.append(m)
        try:
            call = provider.bind(own)
            start = time.perf_counter()
            if benchmark.differentiable:
                result.append([o.detach() for o in outputs((call if provider.compiled else without_grad(call))())])
            else:
                m.extra_mb = device.extra_peak_mb(lambda call=call, result=result: result.append(call()))
                if not result:  # where memory cannot be read
                    result.append(call())
        except Unavailable as reason:
            m.note = f"not run: {str(reason).splitlines()[0]}"
            continue
        except torch.OutOfMemoryError:
            if provider is benchmark.providers[0]:
                raise
            m.note = "not run: out of memory"
            continue
        if expected is None:
            expected = result[0]
        elif (off := disagreement(expected, result[0])) > provider.tolerance:
            m.note = f"disagrees with ours by {off:.1e}"
        found[provider.name] = Bound(provider, call, own, m, time.perf_counter() - start)
    return found


def measure(
    benchmark: Benchmark,
    shape: Shape,
    device: Device,
    rounds: int,
    without: Sequence[str] = (),
    patience: float = PATIENCE,
) -> Row:
    """One row, measured again while a canary drifts, at most `ATTEMPTS` times."""
    inputs = benchmark.inputs(shape.sizes, device.torch)
    row = Row(benchmark.name, shape.name)
    wanted = [p for p in benchmark.providers if p.name not in without and (shape.decisive or not p.compiled)]
    opening = [] if benchmark.differentiable else [device.canary()]
    running = bound(benchmark, inputs, wanted, device, row)
    if benchmark.providers[0].name not in running:
        return row
    forward, total = {}, {}
    for name, b in running.items():
        if benchmark.differentiable:
            try:
                total[name] = with_backward(b.call, b.inputs)
                total[name]()
            except torch.OutOfMemoryError:
                if b.provider is benchmark.providers[0]:
                    raise
                total.pop(name, None)
                b.measurement.note = "not run: out of memory"
                continue
            if not b.provider.compiled:
                forward[name] = without_grad(b.call)
        elif b.seconds < LONG:
            forward[name] = without_grad(b.call)
    long = {name: b.seconds for name, b in running.items() if name not in forward and not benchmark.differentiable}
    best: tuple[float, dict[str, float], dict[str, float], list[Canary]] | None = None
    for attempt in range(1, ATTEMPTS + 1):
        canaries = [*opening, device.canary()]
        forward_times = {**medians(forward, rounds, device.clock, patience), **long}
        canaries.append(device.canary())
        total_times = medians(total, rounds, device.clock, patience)
        canaries.append(device.canary())
        if best is None or drift(canaries) < best[0]:
            best = (drift(canaries), forward_times, total_times, canaries)
        row.attempts = attempt
        if best[0] <= DRIFT:
            break
    assert best is not None
    row.drift, forward_times, total_times, row.canaries = best
    if row.drift > DRIFT:
        row.withheld = f"ratio withheld: canary drift {row.drift:.0%} in {row.attempts} attempts"
    elif (rate := min(c.gflops for c in row.canaries)) < device.slowest:
        row.withheld = f"ratio withheld: a loaded machine, {rate:.0f} of {device.slowest:.0f} GFLOP/s"
    fill(row, benchmark.work(shape.sizes), forward_times, total_times)
    if benchmark.remark is not None:
        row.measurements[0].note = benchmark.remark(inputs, median_canary(row.canaries))
    for name, call in total.items():
        running[name].measurement.extra_mb = device.extra_peak_mb(call)
    return row


def fill(row: Row, work: tuple[Work, Work], forward: dict[str, float], total: dict[str, float]) -> None:
    """Times, shares of the limit at the canaries' median rate, and ratios unless they are withheld."""
    decisive = total or forward
    floor = work[1 if total else 0].seconds(median_canary(row.canaries))
    ours = decisive[row.measurements[0].provider]
    for m in row.measurements:
        if m.provider in forward:
            m.forward_ms = 1e3 * forward[m.provider]
        if m.provider in total:
            m.total_ms = 1e3 * total[m.provider]
        if m.provider in decisive:
            m.share = floor / decisive[m.provider]
            m.ratio = None if row.withheld else decisive[m.provider] / ours


def fitted_slope(values: Sequence[float], times: Sequence[float]) -> float:
    """Least-squares slope of log time over log size."""
    x, y = torch.tensor(values).double().log(), torch.tensor(times).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


@dataclass
class GrowthRow:
    operator: str
    axis: str
    values: list[int]
    times_ms: list[float]
    slope: float
    expected: float


def measure_growth(benchmark: Benchmark, growth: Growth, device: Device, rounds: int) -> GrowthRow:
    """Our forward and backward over one size. All sizes take turns, so that a slow moment does not tilt the slope."""
    calls: dict[str, Call] = {}
    for value in growth.values:
        inputs = benchmark.inputs({**growth.others, growth.axis: value}, device.torch)
        call = benchmark.providers[0].bind(inputs)
        calls[str(value)] = with_backward(call, inputs) if benchmark.differentiable else without_grad(call)
        calls[str(value)]()
    times = list(medians(calls, rounds, device.clock).values())
    slope = fitted_slope(growth.values, times)
    milliseconds = [1e3 * t for t in times]
    return GrowthRow(benchmark.name, growth.axis, list(growth.values), milliseconds, slope, growth.slope)
