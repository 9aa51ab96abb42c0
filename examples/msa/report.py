"""One self-contained HTML page and one JSON file per run."""

from __future__ import annotations

import base64
import importlib
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from .corpus import Corpus
from .files import write_atomic
from .timing import StageTimer, peak_memory_mib

TEMPLATE = "report.html.j2"


@dataclass
class Section:
    """A heading with notes, tables and figures in the order they were added."""

    title: str
    items: list[dict[str, Any]] = field(default_factory=list)

    def note(self, text: str) -> Section:
        """Add a paragraph of plain text."""
        self.items.append({"kind": "note", "text": text})
        return self

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        caption: str = "",
        strong: Sequence[int] = (),
    ) -> Section:
        """Add a table.

        Args:
            columns: Headings; the first column names the rows.
            rows: Cells: text, numbers (nan shows as a dash), or results of ``mean_interval`` and ``paired_difference``.
            caption: What is shown.
            strong: Numbers of the rows to set in bold.

        Raises:
            ValueError: A row does not have as many cells as there are columns.
        """
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {caption!r}: a row has {len(row)} cells, expected {len(columns)}")
        cells = [[format_cell(value) for value in row] for row in rows]
        self.items.append(
            {"kind": "table", "columns": list(columns), "rows": cells, "caption": caption, "strong": set(strong)}
        )
        return self

    def figure(self, figure: Figure, caption: str) -> Section:
        """Add a figure; its caption also serves readers who cannot see it."""
        self.items.append({"kind": "figure", "source": figure_uri(figure), "caption": caption})
        return self


@dataclass
class Report:
    """A page that is built section by section and written at the end.

    Args:
        title: Heading of the page.
        lead: One paragraph: what was run, and what the numbers are and are not.
        headline: The result in a sentence, above everything else; left out where it is empty.
        data: Every number behind the page, for the JSON file.
        run: The run card, see :func:`run_card`.
    """

    title: str
    lead: str
    data: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    headline: str = ""

    def section(self, title: str) -> Section:
        """Start a section."""
        self.sections.append(Section(title))
        return self.sections[-1]

    def html(self) -> str:
        """The whole page; it loads nothing and runs no script."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        card = [(key, _card_text(value)) for key, value in plain(self.run).items()]
        return environment.get_template(TEMPLATE).render(report=self, card=card)

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``report.html`` and ``report.json``: both are built first, and each appears whole or not at all."""
        html = self.html()
        numbers = to_json(
            {
                "title": self.title,
                "headline": self.headline,
                "lead": self.lead,
                "run": self.run,
                "data": self.data,
            }
        )
        return write_atomic(Path(folder) / "report.html", html), write_atomic(Path(folder) / "report.json", numbers)


def run_card(
    corpus: Corpus, arguments: Mapping[str, Any], seeds: Sequence[int], timer: StageTimer, **more: Any
) -> dict[str, Any]:
    """What is needed to trust and repeat a run: versions, build, machine, data, arguments, seeds, times, memory."""
    return {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "build": _build_info(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
        "corpus": corpus.describe(),
        "arguments": dict(arguments),
        "seeds": list(seeds),
        "seconds": {k: round(v, 3) for k, v in timer.seconds.items()},
        "peak_memory_mib": {k: round(v, 1) for k, v in peak_memory_mib().items()},
        **more,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for name in ("torch", "msacore", "numpy", "scipy", "sklearn", "faiss"):
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except (ImportError, RuntimeError) as e:
            # faiss raises RuntimeError where its GPU libraries are missing.
            found[name] = f"not available ({type(e).__name__})"
    return found


def _build_info() -> dict[str, Any]:
    try:
        return dict(importlib.import_module("msacore._C").build_info())
    except ImportError as e:
        return {"msacore": f"not built ({e})"}


def figure_uri(figure: Figure) -> str:
    """The figure as an SVG data address; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "msacore", "savefig.dpi": 160}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def format_cell(value: Any) -> str:
    """A table cell: three decimals, nan as a dash, intervals as ``mean ± sd [low, high]``."""
    if isinstance(value, Mapping):
        if math.isnan(value["sd"]):
            return format_cell(value["mean"])
        # Narrow columns break the line before the interval, nowhere else.
        return f"{value['mean']:.3f}\u00a0±\u00a0{value['sd']:.3f} [{value['low']:.3f},\u00a0{value['high']:.3f}]"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return f"{value:.3f}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def plain(value: Any) -> Any:
    """Plain JSON values: arrays as lists, paths as text, nan and infinities as null.

    Raises:
        TypeError: A value has no place in JSON.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.ndarray, torch.Tensor, np.generic)):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"a report cannot hold a {type(value).__name__}: {value!r}")


def to_json(value: Any) -> str:
    """Valid JSON text of any nesting of numbers, text, arrays and containers."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _card_text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{k}: {_one_line(v)}" for k, v in value.items())
    return _one_line(value)


def _one_line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
