"""Which utterances belong to one video, and in which order: inferred from ids in the forms in common use."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .values import MAX_NAME

# Forms that show which part is the clip.
_EXPLICIT = (
    re.compile(r"(?P<video>.+)\$_\$(?P<clip>.*)", re.S),
    re.compile(r"(?P<video>.+)\[(?P<clip>\d+)\]", re.S),
    re.compile(r"(?P<video>dia\d+)_?(?P<clip>utt\d+)", re.I),
    re.compile(r"(?P<video>Ses\d\d[FM]_.+)_(?P<clip>[FM]\d+)"),
)
# Forms that are recognised only if all ids of the set have them.
_COMMON = (
    re.compile(r"(?P<video>.+)/(?P<clip>\d+)(\.\w{1,4})?", re.S),
    re.compile(r"(?P<video>.+)[_#:](?P<clip>\d+)", re.S),
    re.compile(r"(?P<video>.+)-(?P<clip>\d+)", re.S),
)
# Generic words for a row: they do not name a video.
_GENERIC = re.compile(
    r"(train|valid|val|dev|test|samples?(new)?|utt(erances?)?|clips?|rows?|items?|ids?|segments?|mmmo)", re.I
)
_NUMBER = re.compile(r"\d{1,18}")
SINGLE = (
    "every video has one clip, so there are no neighbours and 'block' masks hide nothing: "
    "name the video with --video-key KEY or --id-pattern REGEX, if the data has one"
)


@dataclass
class Utterances:
    """Names of utterances, their videos, and their clips as far as they are known.

    Args:
        names: One unique name each.
        videos: Name or number of each utterance's video.
        clips: Sort key within the video: a number, a time, or a text.
        notes: What a report should say.
    """

    names: list[str]
    videos: list[Any]
    clips: list[Any]
    notes: list[str] = field(default_factory=list)

    def order(self) -> np.ndarray:
        """Row numbers by video and clip."""
        keys = [(v, isinstance(c, str), c) for v, c in zip(self.videos, self.clips, strict=True)]
        return np.array(sorted(range(len(keys)), key=lambda i: keys[i]), dtype=np.int64)

    def numbers(self, order: np.ndarray, video_ptr: np.ndarray) -> np.ndarray | None:
        """Clip numbers in that order, int64; row numbers in videos whose clips lack numbers or repeat them."""
        result = np.empty(len(order), dtype=np.int64)
        known = False
        for start, stop in itertools.pairwise(video_ptr.tolist()):
            clips = [self.clips[i] for i in order[start:stop]]
            whole = all(isinstance(c, int) and abs(c) < 1 << 62 for c in clips)
            if whole and all(a < b for a, b in itertools.pairwise(clips)):
                result[start:stop] = clips
                known = known or len(clips) > 1
            else:
                result[start:stop] = np.arange(stop - start)
        return result if known else None


def utterances(
    where: str,
    ids: Sequence[Any],
    *,
    videos: Sequence[Any] | None = None,
    clips: Sequence[Any] | None = None,
    pattern: str | None = None,
) -> Utterances:
    """Names, videos and clips of utterances.

    Args:
        where: The file, for messages.
        ids: Texts, integers, or tuples ``(video, clip)`` or ``(video, start, end)``.
        videos: The video of each utterance, where the file gives it or ``--video-key`` names it.
        clips: The clip of each utterance, where the file gives it.
        pattern: ``--id-pattern``: a regular expression for the whole id with a group ``video`` (or a first group), and
            a group ``clip`` (or a second group) if there is one.

    Raises:
        ValueError: An id does not match the pattern, occurs twice, or is too long.
    """
    names = [_name(i) for i in ids]
    if any(len(n) > MAX_NAME for n in names):
        raise ValueError(f"{where}: an id has more than {MAX_NAME} characters")
    double = next((n for n, count in Counter(names).items() if count > 1), None)
    if double is not None:
        raise ValueError(f"{where}: the id {double!r} occurs {names.count(double)} times; ids must be unique")
    if pattern is not None:
        result = _by_pattern(where, names, pattern)
    elif videos is not None:
        own = [_parse(i, n)[1] for i, n in zip(ids, names, strict=True)]
        known = all(c is not None for c in own)
        result = Utterances(names, _alike(videos), own if known else _in_order(names))
    else:
        result = _by_form(ids, names)
    if clips is not None and pattern is None:
        result.clips = [_clip(c) for c in clips]
    if len({str(v) for v in result.videos}) == len(names) > 1:
        result.notes.append(SINGLE)
    return result


def _alike(videos: Sequence[Any]) -> list[Any]:
    """Keys that can be sorted: numbers if all are, else texts."""
    return list(videos) if all(isinstance(v, (int, float)) for v in videos) else [str(v) for v in videos]


def _in_order(names: list[str]) -> list[Any]:
    """Sort keys that keep the order of the rows; they are not clip numbers."""
    return [float(i) for i in range(len(names))]


def _name(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}$_${'_'.join(map(str, value[1:]))}"
    return str(value)


def _clip(value: Any) -> Any:
    text = str(value)
    return value if isinstance(value, (int, float)) else int(text) if _NUMBER.fullmatch(text) else text


def _parse(value: Any, name: str) -> tuple[str | None, Any]:
    """Video and clip of an id that says which is which; None where it does not."""
    if isinstance(value, tuple):
        try:
            return str(value[0]), int(value[1]) if _NUMBER.fullmatch(str(value[1])) else float(value[1])
        except ValueError:
            return str(value[0]), str(value[1])
    for form in _EXPLICIT:
        match = form.fullmatch(name)
        if match:
            return match["video"], _clip(re.sub(r"^(?:utt|[FM])(?=\d+$)", "", match["clip"]))
    return None, None


def _by_form(ids: Sequence[Any], names: list[str]) -> Utterances:
    parsed = [_parse(i, n) for i, n in zip(ids, names, strict=True)]
    open_rows = [i for i, (video, _) in enumerate(parsed) if video is None and not isinstance(ids[i], (int, float))]
    notes = []
    for form in _COMMON:
        found = [form.fullmatch(names[i]) for i in open_rows]
        if not open_rows or not all(found):
            continue
        videos = Counter(m["video"] for m in found)
        if len(videos) < len(found) and not all(_GENERIC.fullmatch(v) for v in videos):
            for i, m in zip(open_rows, found, strict=True):
                parsed[i] = m["video"], int(m["clip"]) if _NUMBER.fullmatch(m["clip"]) else m["clip"]
            example = names[open_rows[0]]
            notes.append(
                f"ids are read as video and clip: {example!r} is clip {found[0]['clip']} of {found[0]['video']!r}"
            )
            break
    videos = [n if video is None else video for n, (video, _) in zip(names, parsed, strict=True)]
    return Utterances(names, videos, [0 if clip is None else clip for _, clip in parsed], notes)


def _by_pattern(where: str, names: list[str], pattern: str) -> Utterances:
    try:
        form = re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{where}: --id-pattern {pattern!r} is not a regular expression ({e})") from e
    groups = form.groupindex
    if form.groups == 0:
        raise ValueError(f"{where}: --id-pattern {pattern!r} needs a group for the video, such as (?P<video>.+)_(\\d+)")
    video = groups.get("video", next(g for g in range(1, form.groups + 1) if g != groups.get("clip")))
    others = [g for g in range(1, form.groups + 1) if g != video]
    clip = groups.get("clip", others[0] if others else None)
    videos, clips = [], []
    for row, name in enumerate(names):
        match = form.fullmatch(name)
        if match is None or match[video] is None:
            raise ValueError(f"{where}: the id {name!r} does not match --id-pattern {pattern!r}")
        videos.append(match[video])
        clips.append(float(row) if clip is None or match[clip] is None else _clip(match[clip]))
    return Utterances(names, videos, clips)
