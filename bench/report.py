"""Tables and plots of measured rows."""

import csv
import json
import platform
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import msacore
from bench.harness import GrowthRow, Measurement, Row
from msacore import _C


def environment(device: str) -> dict[str, str]:
    """Machine, versions and commit, without which a time says nothing."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{model}, {torch.get_num_threads()} threads",
        "msacore": f"{msacore.__version__}, commit {commit or 'unknown'}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": _C.build_info()["simd_active"],
    }


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}{unit}"


TERMINAL = 100  # columns
COLUMNS = ("provider", "forward ms", "fwd+bwd ms", "extra MB", "ratio", "of limit", "")


def cells(m: Measurement, withheld: str) -> tuple[str, ...]:
    note = "; ".join(part for part in (m.note, withheld if m.share is not None else "") if part)
    share = "–" if m.share is None else f"{m.share:.0%}"
    ratio = _number(m.ratio, "×")
    return m.provider, _number(m.forward_ms), _number(m.total_ms), _number(m.extra_mb), ratio, share, note


def canary_line(row: Row) -> str:
    probes = ", ".join(f"{c.gflops:.0f} GFLOP/s {c.gbytes:.1f} GB/s" for c in row.canaries)
    return f"canaries before, between, after: {probes}; drift {row.drift:.0%}"


def text(row: Row) -> str:
    """A row as aligned text that fits a terminal; a note follows the line it belongs to."""
    table = [COLUMNS[:-1], *(cells(m, "")[:-1] for m in row.measurements)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS) - 1)]
    lines = [f"{row.operator}  {row.shape}"]
    for line, note in zip(table, ["", *(m.note for m in row.measurements)], strict=True):
        figures = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join([line[0].ljust(widths[0]), *figures]))
        lines += _wrapped(note, "      ")
    return "\n".join([*lines, *_wrapped(row.withheld, "  "), *_wrapped(canary_line(row), "  ")])


def _wrapped(note: str, indent: str) -> list[str]:
    return textwrap.wrap(note, TERMINAL, initial_indent=indent, subsequent_indent=indent)


def markdown(rows: Sequence[Row], growth: Sequence[GrowthRow], about: dict[str, str]) -> str:
    """The tables of bench/results: a line per provider, `ratio` being its time over ours."""
    out = ["; ".join(f"{key}: {value}" for key, value in about.items()), ""]
    if rows:
        out += [
            "| operator | shape | " + " | ".join((*COLUMNS[:-1], "canary", "note")) + " |",
            "|---|---|---" + "|--:" * 6 + "|---|",
        ]
    for row in rows:
        probe = " / ".join(f"{c.gflops:.0f}" for c in row.canaries) + " GFLOP/s"
        for m in row.measurements:
            *figures, note = cells(m, row.withheld)
            out.append(f"| {row.operator} | {row.shape} | " + " | ".join((*figures, probe, note)) + " |")
    if growth:
        out += ["", "| operator | over | times, ms | slope | expected |", "|---|---|---|--:|--:|"]
    for g in growth:
        times = ", ".join(f"{v}: {_number(t)}" for v, t in zip(g.values, g.times_ms, strict=True))
        out.append(f"| {g.operator} | {g.axis} | {times} | {g.slope:.2f} | {g.expected:.1f} |")
    return "\n".join(out) + "\n"


def write_csv(path: Path, rows: Iterable[Row], about: dict[str, str]) -> None:
    records = [{**record, **about} for row in rows for record in row.as_records()]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)


def write_json(path: Path, rows: Sequence[Row], growth: Sequence[GrowthRow], about: dict[str, str]) -> None:
    content: dict[str, Any] = dict(
        environment=about, rows=[asdict(r) for r in rows], growth=[asdict(g) for g in growth]
    )
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, rows: Sequence[Row], growth: Sequence[GrowthRow]) -> None:
    """Time and extra memory of every provider per operator over its shapes, and growth on logarithmic axes."""
    from matplotlib.figure import Figure

    operators = list(dict.fromkeys(row.operator for row in rows))
    panels = len(operators) + len({(g.operator, g.axis) for g in growth})
    figure = Figure(figsize=(11, 3.2 * max(1, panels)), layout="constrained")
    axes = figure.subplots(max(1, panels), 2, squeeze=False)
    for (left, right), operator in zip(axes, operators, strict=False):
        mine = [row for row in rows if row.operator == operator]
        names = list(dict.fromkeys(m.provider for row in mine for m in row.measurements))
        for name in names:
            found = [(i, m) for i, row in enumerate(mine) for m in row.measurements if m.provider == name]
            timed = [(i, m.total_ms or m.forward_ms) for i, m in found if m.total_ms or m.forward_ms]
            weighed = [(i, m.extra_mb) for i, m in found if m.extra_mb]
            for axis, points in ((left, timed), (right, weighed)):
                axis.plot([i for i, _ in points], [v for _, v in points], "o-", label=name)
        for axis, what in ((left, "ms"), (right, "extra MB")):
            axis.set(title=f"{operator}, {what}", yscale="log")
            axis.set_xticks(range(len(mine)), [row.shape for row in mine], fontsize=7)
            axis.grid(alpha=0.3)
        left.legend(fontsize=7)
    for (left, right), g in zip(axes[len(operators) :], growth, strict=False):
        left.loglog(g.values, g.times_ms, "o-", label=f"slope {g.slope:.2f}")
        expected = [g.times_ms[-1] * (v / g.values[-1]) ** g.expected for v in g.values]
        left.loglog(g.values, expected, "--", label=f"expected {g.expected:.1f}")
        left.set(title=f"{g.operator} over {g.axis}, ms")
        left.legend(fontsize=7)
        right.axis("off")
    figure.savefig(path, dpi=110)
