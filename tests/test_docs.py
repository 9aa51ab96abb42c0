"""What the README and the pages of docs/ show runs as it stands, page by page.

Blocks inside an HTML comment run too: a page creates there what its readers already have.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import msacore
from bench import summary
from msacore import distributed, selection
from msacore.selection.__main__ import main as select_from_shell

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"docs/deployment.md": "tests/test_deployment.py runs it, with its shell commands"}
SHOWN = [
    page
    for page in PAGES
    if BLOCK.search(page.read_text(encoding="utf-8")) and str(page.relative_to(ROOT)) not in ELSEWHERE
]


SLOW = {  # these import or compile for seconds
    "docs/benchmarks.md": "pytorch-metric-learning brings scikit-learn and scipy",
    "docs/guides/precision.md": "torch.compile and torch.export",
    "docs/moving.md": "pytorch-metric-learning, as above",
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def parameters() -> list[Any]:
    marks = {name: [pytest.mark.slow] for name in SLOW}
    return [pytest.param(page, id=name_of(page), marks=marks.get(name_of(page), [])) for page in SHOWN]


@pytest.mark.parametrize("page", parameters())
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    text, names = page.read_text(encoding="utf-8"), {"__name__": "page"}
    try:
        for block in BLOCK.finditer(text):
            above = text[: block.start(1)].count("\n")  # so that an error names the line of the page
            exec(compile("\n" * above + block.group(1), name_of(page), "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_no_python_hides_from_the_test_above() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^[ \t]*(?:```|~~~)[ \t]*(?:py|python|pycon)\b.*$", text, re.MULTILINE | re.IGNORECASE)
        assert len(fences) == len(BLOCK.findall(text)), f"{name_of(page)}: a block of Python is not a plain ```python"


def test_messages_that_the_faq_quotes_are_those_that_are_raised() -> None:
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    code = "".join(BLOCK.findall(text))
    quoted = re.findall(r'\*\*"([^"]+)"', text)
    assert len(quoted) > 9 and [q for q in quoted if f'assert "{q}' not in code] == []


def test_slow_pages_exist() -> None:
    assert set(SLOW) <= {name_of(page) for page in SHOWN}


def test_every_operator_has_a_page_with_an_example() -> None:
    operators = {name for name in msacore.__all__ if callable(getattr(msacore, name))} - {"select"}
    pages = "".join(page.read_text(encoding="utf-8") for page in SHOWN if page.parent.name == "operators")
    assert {name for name in operators if f"msacore.{name}(" not in pages} == set()


def test_every_public_name_has_an_entry_in_the_reference() -> None:
    public = {f"msacore.{name}" for name in msacore.__all__ if callable(getattr(msacore, name))}
    for module in (distributed, msacore.graph, msacore.nn, msacore.uncertainty, selection):
        public |= {f"{module.__name__}.{name}" for name in module.__all__ if callable(getattr(module, name))}
    public.remove("msacore.selection.select")  # documented as msacore.select
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    assert set(re.findall(r"^::: (\S+)$", text, re.MULTILINE)) == public


def test_selections_from_the_shell_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pool", "part1", "part2"):
        np.save(f"{name}.npy", torch.randn(600, 8).numpy())
    np.save("uncertainty.npy", torch.rand(600).numpy())
    np.save("labeled.npy", np.array([3, 141]))
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = re.findall(r"^python -m msacore\.selection (\w+\.npy .*--out.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)
        assert not select_from_shell([*words, "--quiet"])
        assert json.loads(Path(words[words.index("--out") + 1]).read_text())["indices"]


def test_the_readme_names_the_two_commands_and_links_to_what_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make demo", "make test", "pip install --no-build-isolation '.[faiss]'"):
        assert command in readme
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []


def test_the_readmes_table_is_what_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (files,) = re.findall(r"`python -m bench\.summary ([^`]+)`", readme)
    assert summary.ratios([json.loads((ROOT / file).read_text()) for file in files.split()]) in readme
