"""The benchmark's own logic, on a device whose clock and canaries are scripted: nothing is timed here."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import kcenter, report, summary
from bench.__main__ import benchmarks
from bench.device import Canary, Cpu, Cuda
from bench.harness import (
    ATTEMPTS,
    Benchmark,
    Growth,
    Inputs,
    Provider,
    Row,
    Shape,
    Unavailable,
    Work,
    by_dtype,
    drift,
    fitted_slope,
    measure,
    measure_growth,
    medians,
    turns,
)

STEADY = Canary(100.0, 10.0)


class ScriptedDevice:
    """A call takes as long as `SECONDS` says; canaries come from a list, then stay steady."""

    torch = torch.device("cpu")
    slowest = 40.0

    def __init__(self, canaries: list[Canary] | None = None) -> None:
        self.canaries: Iterator[Canary] = iter(canaries or [])
        self.order: list[str] = []

    def clock(self, call: Callable[[], Any]) -> float:
        call()
        return SECONDS[CALLED[-1]]

    def canary(self) -> Canary:
        return next(self.canaries, STEADY)

    def extra_peak_mb(self, call: Callable[[], Any]) -> float | None:
        return 3.0


SECONDS = {"ours": 1e-3, "peer": 4e-3, "wrong": 2e-3}
CALLED: list[str] = []


def _provider(name: str, factor: float = 2.0) -> Provider:
    def bind(inputs: Inputs) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            CALLED.append(name)
            return factor * inputs["x"]

        return call

    return Provider(name, bind)


def _absent(inputs: Inputs) -> Callable[[], Any]:
    raise Unavailable("needs the package nowhere")


SHAPE = Shape("n=4", {"n": 4}, quick=True)
BENCHMARK = Benchmark(
    name="double",
    shapes=(SHAPE,),
    inputs=lambda sizes, device: {"x": torch.ones(sizes["n"], device=device, requires_grad=True)},
    providers=(_provider("ours"), _provider("peer"), _provider("wrong", factor=3.0), Provider("absent", _absent)),
    work=lambda sizes: (Work(1e6, 1.0), Work(1.0, 2e6)),
)


@pytest.fixture(autouse=True)
def _nothing_called() -> None:
    CALLED.clear()


def test_providers_take_turns() -> None:
    assert list(turns(["a", "b", "c"], 2)) == ["a", "b", "c", "a", "b", "c"]
    order: list[str] = []
    medians({name: lambda name=name: order.append(name) for name in "ab"}, 3, lambda call: call() or 1.0)
    assert order == ["a", "b", "a", "b", "a", "b"]


def test_medians_ignore_one_slow_turn() -> None:
    times = iter([1.0, 90.0, 2.0])
    assert medians({"a": lambda: None}, 3, lambda call: next(times)) == {"a": 2.0}


def test_a_slow_provider_takes_fewer_turns() -> None:
    order: list[str] = []

    def clock(call: Callable[[], Any]) -> float:
        order.append(call())
        return 1.0

    medians({"a": lambda: "a", "b": lambda: "b"}, 3, clock, patience=0.0)
    assert order == ["a", "b"]
    order.clear()
    medians({"a": lambda: "a", "b": lambda: "b"}, 3, clock, patience=60.0)
    assert order == ["a", "b"] * 3


def test_a_row_by_dtype_casts_the_inputs_and_refers_to_float32() -> None:
    seen: list[torch.dtype] = []

    def remember(inputs: Inputs) -> Callable[[], Any]:
        seen.append(inputs["x"].dtype)
        return _provider("ours").bind(inputs)

    ours = replace(BENCHMARK, providers=(Provider("ours", remember), _provider("peer")))
    row = measure(by_dtype(ours), SHAPE, ScriptedDevice(), rounds=1)
    assert seen == [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    assert [m.provider.split()[1] for m in row.measurements] == ["float32", "float64", "float16", "bfloat16"]
    assert [m.ratio for m in row.measurements] == [1, 1, 1, 1]


def test_compiled_providers_run_at_decisive_shapes_only() -> None:
    compiled = replace(BENCHMARK, providers=(_provider("ours"), replace(_provider("peer"), compiled=True)))
    names = [m.provider for m in measure(compiled, SHAPE, ScriptedDevice(), rounds=1).measurements]
    assert names == ["ours"]
    ours, peer = measure(compiled, replace(SHAPE, decisive=True), ScriptedDevice(), rounds=1).measurements
    assert ours.forward_ms == pytest.approx(1)
    assert peer.forward_ms is None
    assert peer.ratio == pytest.approx(4)


@pytest.mark.parametrize("backward", [False, True])
def test_a_peer_without_room_is_named_and_the_row_goes_on(backward: bool) -> None:
    class NoRoom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            if not backward:
                raise torch.OutOfMemoryError
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError

    big = Provider("big", lambda inputs: lambda: NoRoom.apply(inputs["x"]))
    row = measure(replace(BENCHMARK, providers=(_provider("ours"), big)), SHAPE, ScriptedDevice(), rounds=1)
    ours, peer = row.measurements
    assert ours.total_ms is not None
    assert peer.note == "not run: out of memory" and peer.total_ms is None
    with pytest.raises(torch.OutOfMemoryError):
        measure(replace(BENCHMARK, providers=(big,)), SHAPE, ScriptedDevice(), rounds=1)


@pytest.mark.parametrize("can", [True, False])
def test_a_call_that_no_graph_can_hold_is_timed_as_it_is(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def replay(self) -> None:
            order.append("replay")

    class Capture:
        def __init__(self, graph: Graph) -> None:
            order.append("capture")

        def __enter__(self) -> None:
            if not can:
                raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *error: object) -> None: ...

    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = object.__new__(Cuda)
    device._graphs = {}
    monkeypatch.setattr(device, "_events", lambda call: call() or 1e-5)

    def call() -> None:
        order.append("call")

    assert [device.clock(call) for _ in range(3)] == [1e-5] * 3
    again = ["replay"] if can else ["call"]
    assert order == ["call", "capture", *(["call"] if can else []), *again, *again, *again]


def test_drift_is_the_larger_fall_of_the_two_canaries() -> None:
    assert drift([STEADY, STEADY, STEADY]) == 0
    assert drift([STEADY, Canary(90.0, 10.0), STEADY]) == pytest.approx(0.1)
    assert drift([Canary(95.0, 7.0), STEADY, STEADY]) == pytest.approx(0.3)


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    assert Work(1e9, 1e6).seconds(STEADY) == pytest.approx(1e-2)
    assert Work(1e6, 1e9).seconds(STEADY) == pytest.approx(1e-1)


def test_a_steady_row_has_times_ratios_shares_and_memory() -> None:
    row = measure(BENCHMARK, SHAPE, ScriptedDevice(), rounds=2)
    ours, peer, wrong, absent = row.measurements
    assert (row.attempts, row.withheld, row.drift) == (1, "", 0)
    assert (ours.ratio, peer.ratio) == (1, pytest.approx(4))
    assert ours.total_ms == pytest.approx(1)
    assert ours.share == pytest.approx(2e6 / 10e9 / 1e-3)  # the backward work, bound by memory
    assert ours.extra_mb == 3
    assert ours.note == peer.note == ""
    assert "disagrees" in wrong.note
    assert absent.total_ms is None
    assert "needs the package nowhere" in absent.note


def test_a_row_is_measured_again_after_drift_and_then_given() -> None:
    row = measure(BENCHMARK, SHAPE, ScriptedDevice([STEADY, Canary(50.0, 10.0), STEADY]), rounds=1)
    assert row.attempts == 2
    assert row.withheld == ""
    assert row.measurements[1].ratio == pytest.approx(4)


def test_ratios_are_withheld_while_a_canary_drifts() -> None:
    restless = [STEADY, Canary(100.0, 5.0), STEADY] * ATTEMPTS
    row = measure(BENCHMARK, SHAPE, ScriptedDevice(restless), rounds=1)
    assert row.attempts == ATTEMPTS
    assert all(m.ratio is None for m in row.measurements)
    assert row.measurements[0].total_ms is not None
    assert "ratio withheld: canary drift 50%" in row.withheld
    assert "ratio withheld" in report.text(row)
    assert "ratio withheld" in report.markdown([row], [], {})


def test_ratios_are_withheld_on_a_loaded_machine() -> None:
    row = measure(BENCHMARK, SHAPE, ScriptedDevice([Canary(39.0, 10.0)] * 3), rounds=1)
    assert row.attempts == 1
    assert all(m.ratio is None for m in row.measurements)
    assert "a loaded machine, 39 of 40 GFLOP/s" in report.text(row)


def test_a_provider_left_out_takes_no_turn() -> None:
    row = measure(BENCHMARK, SHAPE, ScriptedDevice(), rounds=1, without=["peer"])
    assert "peer" not in CALLED
    assert [m.provider for m in row.measurements] == ["ours", "wrong", "absent"]


def test_slope_of_a_power_law() -> None:
    assert fitted_slope([1, 2, 4, 8], [3.0 * v**1.7 for v in (1, 2, 4, 8)]) == pytest.approx(1.7)
    growth = Growth("n", (2, 4, 8), {}, slope=0)
    measured = measure_growth(BENCHMARK, growth, ScriptedDevice(), rounds=2)
    assert measured.slope == pytest.approx(0)
    assert measured.times_ms == pytest.approx([1, 1, 1])


def test_files_hold_every_row_with_machine_and_commit(tmp_path: Path) -> None:
    rows, growth = [measure(BENCHMARK, SHAPE, ScriptedDevice(), rounds=1)], []
    about = report.environment("cpu")
    assert {"date", "device", "msacore", "torch", "kernels"} <= set(about)
    report.write_csv(tmp_path / "t.csv", rows, about)
    with (tmp_path / "t.csv").open() as file:
        records = list(csv.DictReader(file))
    assert [r["provider"] for r in records] == ["ours", "peer", "wrong", "absent"]
    assert records[1]["ratio"] == "4.0"
    assert records[1]["torch"] == torch.__version__
    report.write_json(tmp_path / "t.json", rows, growth, about)
    assert json.loads((tmp_path / "t.json").read_text())["rows"][0]["measurements"][1]["ratio"] == 4
    table = report.markdown(rows, growth, about).splitlines()
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1


def test_the_summary_takes_rows_and_peers_that_exist() -> None:
    known = benchmarks()
    for operator, shape, peers in summary.HEADLINES:
        assert any(s.name.startswith(shape) for s in known[operator].shapes), (operator, shape)
        assert set(peers) <= {p.name for p in known[operator].providers}, (operator, peers)


def test_the_summary_sets_runs_side_by_side() -> None:
    operator, shape, peers = summary.HEADLINES[0]

    def run(ratio: float | None) -> dict[str, Any]:
        ours = dict(provider="msacore", total_ms=65.14, forward_ms=20.0, extra_mb=9.0, share=0.72, ratio=1.0)
        peer = dict(provider=peers[0], total_ms=None, forward_ms=None, extra_mb=None, share=None, ratio=ratio)
        return {"rows": [dict(operator=operator, shape=shape, measurements=[ours, peer])]}

    line = summary.summary([run(25.4), run(None)]).splitlines()[2]
    assert line.startswith(
        f"| {operator} | {shape} | 65.1 / 65.1 | 72% / 72% | 9.00 / 9.00 | {peers[0]}: 25× / withheld"
    )
    assert line.endswith(f"{peers[1]}: – / – |")
    short = summary.ratios([run(25.4), run(None), run(9.31)]).splitlines()[2]
    assert short == f"| `{operator}` | {shape} | {peers[0]} **9.3×** |"
    assert summary.ratios([run(None)]).splitlines()[2] == f"| `{operator}` | {shape} | withheld |"


def test_a_row_that_ours_cannot_run_is_said_and_not_timed() -> None:
    def refuse(inputs: Inputs) -> Callable[[], Any]:
        raise Unavailable("needs more memory")

    nothing = Benchmark("none", (SHAPE,), BENCHMARK.inputs, (Provider("ours", refuse),), BENCHMARK.work)
    row = measure(nothing, SHAPE, ScriptedDevice(), rounds=1)
    assert row.canaries == []
    assert "needs more memory" in report.text(row)
    assert [r["gflops"] for r in row.as_records()] == [None]
    assert isinstance(row, Row)


def test_extra_memory_counts_what_a_call_holds_at_most() -> None:
    def hold() -> torch.Tensor:
        return torch.ones(8 << 20).sum()  # 32 MiB, gone when the call ends

    extra = Cpu().extra_peak_mb(hold)
    assert extra is None or 30 < extra < 40


@pytest.mark.parametrize("name", list(benchmarks()))
def test_every_benchmark_agrees_with_its_peers_on_its_smallest_shape(name: str) -> None:
    benchmark = benchmarks()[name]
    shape = next(s for s in benchmark.shapes if s.quick)
    compiled = [p.name for p in benchmark.providers if "torch.compile" in p.name]
    row = measure(benchmark, shape, AnyDevice(), rounds=1, without=compiled)
    ran = [m for m in row.measurements if not m.note.startswith("not run")]
    assert ran[0].provider == "msacore"
    assert len(ran) >= 2
    assert not [m for m in ran if "disagrees" in m.note]
    flops = [w.flops for w in benchmark.work(shape.sizes)]
    assert 0 < flops[0] <= flops[1]


def test_selection_names_its_pool_reads_beside_one_read_per_pick() -> None:
    benchmark = benchmarks()["kcenter"]
    shape = next(s for s in benchmark.shapes if s.quick)
    row = measure(benchmark, shape, AnyDevice(), rounds=1)
    milliseconds = 20 * 1284 * 128 * 4 / STEADY.gbytes / 1e6
    assert f"pool reads; a loop's 20 take {milliseconds:.1f} ms at" in row.measurements[0].note
    assert "pool reads" in report.text(row)


def test_selection_takes_a_pool_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "pool.npz", text=np.eye(9, 5, dtype=np.float16))
    monkeypatch.setenv("MSACORE_BENCH_POOL", f"{tmp_path / 'pool.npz'}:text")
    shape = kcenter.shapes()[-1]
    assert shape.sizes["N"] == 9
    inputs = benchmarks()["kcenter"].inputs(shape.sizes, torch.device("cpu"))
    assert torch.equal(inputs["pool"], torch.eye(9, 5))
    assert inputs["budget"] == 8


class AnyDevice(ScriptedDevice):
    def clock(self, call: Callable[[], Any]) -> float:
        call()
        return 1.0
