"""Which steps of a sequence are data: the mask follows the values, checked against the lengths a file gives.

Published sets pad at either end: word streams at the end, audio and vision of MOSI and MOSEI at the front. A length
alone does not say at which end the padding is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Masks:
    """Result of :func:`masks_of`.

    Args:
        masks: bool ``[N, L_m]`` of each modality.
        aligned: Step ``l`` belongs to the same word in every modality.
        front: Utterances of each modality that are padded at the front although lengths were given.
        kept: Utterances of each modality whose values reach beyond the length given, and count as data.
        cut: Utterances of each modality whose values reach beyond the length given, and are left out.
        apart: The modalities have equal lengths, but are padded at different ends.
    """

    masks: dict[str, np.ndarray]
    aligned: bool
    front: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    apart: bool = False


def masks_of(features: dict[str, np.ndarray], lengths: dict[str, np.ndarray], words: np.ndarray | None = None) -> Masks:
    """Masks of all sequences of a part.

    Args:
        features: ``[N, L_m, d_m]`` of each modality; a step is padding where it is 0 in every column.
        lengths: Steps of each utterance, int ``[N]``, of the modalities for which the file gives them.
        words: Mask of the words, bool ``[N, L]``: it is the mask of text, and gives the length of every other modality
            of the same ``L`` that has no length of its own.

    Returns:
        For each utterance: where the values lie within the length counted from the start, the mask from the start;
        where they lie within the length counted from the end, the mask up to the end; where both hold, the one that
        most other utterances have. Values that reach beyond the length are data too, unless they fill the whole
        sequence (then only the length tells data from padding) or continue past the last word. Zero steps between two
        other steps are data.
    """
    spans = {m: _span(x) for m, x in features.items()}
    steps = {m: x.shape[1] for m, x in features.items()}
    result = Masks({}, False)
    shared = words is None and not lengths and len(set(steps.values())) == 1 and len(features) > 1
    if shared:
        ends = {_end(first, stop, steps[m]) for m, (first, stop) in spans.items()} - {0}
        result.apart = len(ends) > 1
        if not result.apart:
            result.masks, result.aligned = dict.fromkeys(features, _union(spans, next(iter(steps.values())))), True
            return result
    for m, (first, stop) in spans.items():
        own, size = lengths.get(m), steps[m]
        borrowed = words is not None and own is None and words.shape[1] == size
        if own is None and not borrowed:
            result.masks[m] = _between(first, stop, size)
            continue
        mask, front, kept, cut = _follow(
            first, stop, size, words.sum(1) if borrowed else own, words if borrowed else None
        )
        result.masks[m] = mask
        if borrowed and m == "text":
            # A language model gives values for padding too: they do not contradict the length.
            cut = np.zeros_like(cut)
        for counts, rows in ((result.front, front), (result.kept, kept), (result.cut, cut)):
            if rows.any():
                counts[m] = int(rows.sum())
    if words is not None and not lengths and set(steps.values()) == {words.shape[1]}:
        result.aligned = all(np.array_equal(mask, words) for mask in result.masks.values())
        result.apart = bool(result.front) and not result.aligned
    return result


def _span(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First step with a value and the step after the last one, int ``[N]``; both 0 in empty rows."""
    there = (x != 0).any(-1)
    size = there.shape[1]
    first = np.where(there.any(1), there.argmax(1), 0)
    stop = np.where(there.any(1), size - there[:, ::-1].argmax(1), 0)
    return first, stop


def _between(first: np.ndarray, stop: np.ndarray, size: int) -> np.ndarray:
    place = np.arange(size)
    return (place >= first[:, None]) & (place < stop[:, None])


def _union(spans: dict[str, tuple[np.ndarray, np.ndarray]], size: int) -> np.ndarray:
    first = np.min([np.where(stop > first, first, size) for first, stop in spans.values()], axis=0)
    stop = np.max([stop for _, stop in spans.values()], axis=0)
    return _between(first, stop, size)


def _end(first: np.ndarray, stop: np.ndarray, size: int) -> int:
    """The end at which most rows are padded: -1 the front, 1 the back, 0 where both are equally common."""
    front = ((first > 0) & (stop == size)).sum()
    back = ((first == 0) & (stop < size) & (stop > 0)).sum()
    return int(np.sign(int(back) - int(front)))


def _follow(
    first: np.ndarray, stop: np.ndarray, size: int, length: np.ndarray, words: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mask of one modality; rows padded at the front; rows whose values beyond their length are kept; those where they
    are cut."""
    start, end = np.zeros_like(first), np.full_like(first, size)
    there = stop > first
    back, front = there & (stop <= length), there & (first >= size - length)
    beyond = there & ~back & ~front
    either = back & front
    mostly_front = int((front & ~back).sum()) > int((back & ~front).sum())
    back, front = (back & ~either, front) if mostly_front else (back, front & ~either)
    at_back = _between(start, length, size) if words is None else words
    # A length counted in words is not that of the stream: there the values alone say where the stream starts.
    at_front = _between(size - length if words is None else first, end, size)
    # Values that fill the whole sequence show no padding, and values past the last word belong to no word.
    cut = beyond & (first == 0) & (length > 0) & ((stop == size) | (words is not None))
    kept = beyond & ~cut
    by_length = at_front if mostly_front and words is None else at_back
    mask = np.where(front[:, None], at_front, np.where(back[:, None], at_back, by_length))
    mask = np.where(kept[:, None], _between(first, stop, size), mask)
    padded_front = (front & (length < size)) | (kept & (first > 0) & (stop == size))
    return mask, padded_front, kept, cut
