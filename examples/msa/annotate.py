"""A page for people who label clips: it is self-contained, makes no request, and saves ``labels.csv``."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
import numpy as np
from markupsafe import Markup

from .corpus import Corpus
from .files import write_atomic

HERE = Path(__file__).parent
STEP, DIGITS = 0.1, 1
SCHEMES = ("", "http", "https", "file")


def write_page(
    path: str | Path, corpus: Corpus, rows: Sequence[int], known: Mapping[str, float], base: Path | None = None
) -> Path:
    """Write ``annotate.html``.

    Args:
        path: File to write.
        corpus: Ids, transcripts, media and label range.
        rows: Clips to label, in this order.
        known: Labels that people gave before, by id; ``labels.csv`` includes them.
        base: Folder that relative media paths start from.

    Note:
        The page's policy forbids every request and every script but its own; ids and transcripts are escaped.
    """
    low, high = corpus.label_range
    clips = [_clip(corpus, row, base) for row in rows]
    ids = [clip["id"] for clip in clips]
    facts = {
        "key": hashlib.sha256(json.dumps([corpus.sha256, ids, dict(known)]).encode()).hexdigest()[:24],
        "ids": ids,
        "known": [[name, round(value, 6)] for name, value in known.items()],
        "low": low,
        "high": high,
        "step": STEP,
        "digits": DIGITS,
    }
    style, script = (Markup((HERE / f"annotate.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("annotate.html.j2").render(
        title=f"{len(clips)} clips of {corpus.name}",
        clips=clips,
        low=f"{low:g}",
        high=f"{high:g}",
        middle=f"{(low + high) / 2:g}",
        step=f"{STEP:g}",
        round=_script_json(facts),
        style=style,
        script=script,
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
    )
    return write_atomic(path, page)


def _clip(corpus: Corpus, row: int, base: Path | None) -> dict[str, Any]:
    media = _text(corpus.media, row)
    transcript = _text(corpus.transcripts, row)
    return {
        "id": str(corpus.utterance_ids[row]),
        "transcript": transcript,
        "media": media,
        "link": media_link(media, base),
    }


def _text(column: np.ndarray | None, row: int) -> str:
    return "" if column is None else str(column[row])


def media_link(media: str, base: Path | None = None) -> str:
    """Address of a recording; empty where a link should not open it (a script, for example).

    Example:
        >>> media_link("https://example.org/a.mp4")
        'https://example.org/a.mp4'
        >>> media_link("javascript:alert(1)")
        ''
    """
    try:
        scheme = urlsplit(media.strip()).scheme.lower()
    except ValueError:
        return ""
    if base is not None and media and scheme not in ("http", "https", "file"):
        file = base / media
        try:
            if file.is_file():
                return file.resolve().as_uri()
        except (OSError, ValueError):
            return ""
    return media.strip() if scheme in SCHEMES else ""


def _script_json(value: Any) -> Markup:
    """JSON in which no HTML parser can find the end of the script element."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _policy_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
