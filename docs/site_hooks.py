"""What the documentation site adds to MkDocs: links in docstrings, and a list of the links that leave the site."""

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
EXTERNAL = re.compile(r"""\b(?:href|src)=["'](https?://[^"']+)""")
LIST = "external-links.txt"
ENTRY = re.compile(r"^::: (msacore\.[\w.]+)$", re.MULTILINE)
ENTRIES = {name for page in (Path(__file__).parent / "api").glob("*.md") for name in ENTRY.findall(page.read_text())}

_external: dict[str, set[str]] = {}


def _linked(match: re.Match[str]) -> str:
    """A public name, whole or short, becomes a link to its entry; any other stays code."""
    name = match.group(1)
    full = name if name.startswith("msacore.") else f"msacore.{name}"
    return f"[`{name}`][{full}]" if full in ENTRIES else f"`{name}`"


class SphinxRoles(griffe.Extension):
    """Docstrings name functions as ``:func:`msacore.propagate```, which Markdown does not know."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_linked, obj.docstring.value)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Remember the links that leave the site. They are listed and not followed, because a build needs no network."""
    for address in EXTERNAL.findall(html):
        _external.setdefault(address, set()).add(page.file.src_uri)
    return html


def on_post_build(config: Any, **_: Any) -> None:
    """Write the list beside the pages. Each line has an address and the pages that link to it."""
    lines = [f"{address}  {', '.join(sorted(pages))}\n" for address, pages in sorted(_external.items())]
    (Path(config.site_dir) / LIST).write_text("".join(lines), encoding="utf-8")
