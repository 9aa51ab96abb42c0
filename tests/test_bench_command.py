"""What `python -m bench` measures by default and with its options, and how it prints; nothing is timed here."""

from dataclasses import replace

import pytest

from bench import report
from bench.__main__ import arguments, benchmarks, operators_of, providers_without, shapes_of
from bench.contention import busy_loop, measure_contention
from bench.device import Canary, Cpu
from bench.harness import Measurement, Row

KNOWN = benchmarks()


def _chosen(*line: str) -> set[tuple[str, str]]:
    options = arguments(list(KNOWN), list(line))
    return {(name, shape.name) for name in operators_of(KNOWN, options) for shape in shapes_of(KNOWN[name], options)}


def test_the_default_is_a_small_shape_of_every_operator() -> None:
    names = {name for name in KNOWN if ": " not in name}
    default = _chosen()
    assert {name for name, _ in default} == names
    assert default == {(name, s.name) for name in names for s in KNOWN[name].shapes if s.quick and not s.large}


def test_all_is_everything_but_the_shapes_for_gpus() -> None:
    everything = {(name, s.name) for name, benchmark in KNOWN.items() for s in benchmark.shapes if not s.large}
    assert _chosen("--all") == everything > _chosen()
    assert _chosen("--large") == {(n, s.name) for n, b in KNOWN.items() if ": " not in n for s in b.shapes if s.large}


def test_a_part_of_a_name_chooses_among_all_shapes() -> None:
    found = _chosen("info_nce", "--shape", "4096")
    assert found and all(name == "info_nce" and "4096" in shape for name, shape in found)
    assert found - _chosen(), "shapes that the default leaves out"


@pytest.mark.parametrize("line", [[], ["--all"]])
def test_the_default_compiles_nothing(line: list[str]) -> None:
    options = arguments(list(KNOWN), line)
    without = [name for benchmark in KNOWN.values() for name in providers_without(benchmark, options)]
    compiled = [p.name for benchmark in KNOWN.values() for p in benchmark.providers if p.compiled]
    assert compiled and without == ([] if line else compiled)


def test_a_row_fits_a_terminal() -> None:
    note = "disagrees with ours by 1.0e+00 " * 9
    measurements = [Measurement(p.name, 1234.5, 12345.6, 1e4, 123.4, 0.99, note) for p in KNOWN["kcenter"].providers]
    row = Row("kcenter", "N=1", measurements, [Canary(123.0, 12.3)] * 3, withheld="ratio withheld: a loaded machine")
    lines = report.text(row).splitlines()
    assert max(map(len, lines)) <= report.TERMINAL == 100
    assert sum("disagrees" in line for line in lines) >= len(measurements)
    assert any("a loaded machine" in line for line in lines)


def test_contention_compares_every_provider_with_itself() -> None:
    benchmark = KNOWN["info_nce_symmetric"]
    shape = next(s for s in benchmark.shapes if "smallest" in s.name)
    found = measure_contention(benchmark, shape, Cpu(), rounds=1, without=["reference"], turns=1)
    assert [c.provider for c in found] == [
        p.name for p in benchmark.providers if not p.compiled and p.name != "reference"
    ]
    assert all(c.alone_ms > 0 and c.beside_ms > 0 for c in found)
    assert str(replace(found[0], alone_ms=2.0, beside_ms=3.0)).endswith("1.50 times as long")


def test_the_busy_process_runs_and_ends() -> None:
    with busy_loop() as process:
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize("line", [["--growth"], ["--csv", "x.csv"], ["--markdown", "x.md"]])
def test_contention_takes_no_other_output(line: list[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(list(KNOWN), ["--contention", *line])
