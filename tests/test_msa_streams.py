"""Masks follow the data: padding at either end, and lengths that contradict it."""

import numpy as np
import pytest

from examples.msa.data import load
from examples.msa.streams import masks_of

from .msa_files import mmsa, write


def padded(front, lengths, steps, width, rng):
    """Sequences of values without a zero, padded at one end."""
    x = np.zeros((len(lengths), steps, width), np.float32)
    for row, n in zip(x, lengths, strict=True):
        values = rng.standard_normal((n, width)) + np.sign(rng.standard_normal((n, width)))
        row[steps - n if front else 0 : steps if front else n] = values
    return x


def streams(front=True, words=True, n=(40, 10, 20), steps=12, seed=0):
    """A set whose audio is padded at one end and holds the label; text_bert or audio_lengths give only its length."""
    rng = np.random.default_rng(seed)
    root = mmsa(n=n, aligned=words)
    for part in root.values():
        count = len(part["id"])
        lengths = rng.integers(1, steps // 2, count)
        part["audio"] = padded(front, lengths, steps, 5, rng)
        label = rng.uniform(-3, 3, count).astype(np.float32)
        part["audio"][..., 0] = np.where(part["audio"][..., 0] != 0, label[:, None] + 7, 0)
        part["regression_labels"] = label
        part["text"], part["vision"] = padded(False, lengths, steps, 7, rng), padded(front, lengths, steps, 6, rng)
        if words:
            part["text_bert"] = np.zeros((count, 3, steps), np.float32)
            part["text_bert"][:, 1] = np.arange(steps) < lengths[:, None]
        else:
            del part["text_bert"]
            part["audio_lengths"] = part["vision_lengths"] = lengths.tolist()
    return root


@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("front", [True, False])
def test_pooled_streams_keep_their_values_at_either_end(tmp_path, front, words):
    c = load(write(tmp_path, streams(front, words)))
    # The first column of a pooled row is its shifted label: no row became zero or was diluted by padding.
    assert np.allclose(c.features["audio"][:, 0] - 7, c.labels, atol=1e-5)
    assert c.available.all()
    said = [n for n in c.notes if n == "audio: 70 of 70 utterances are padded at the front; the mask follows the data"]
    assert len(said) == int(front)


@pytest.mark.parametrize("words", [True, False])
def test_masks_of_sequences_follow_the_data(tmp_path, words):
    c = load(write(tmp_path, streams(True, words)), pooled=False)
    assert (c.masks["audio"] == (c.features["audio"] != 0).any(-1)).all()
    assert (c.masks["text"] == (c.features["text"] != 0).any(-1)).all()
    # Steps with the same index belong to different words, whatever the equal lengths suggest.
    assert not c.aligned
    assert any("padded at different ends" in n for n in c.notes) == words


def test_streams_padded_like_the_text_stay_aligned(tmp_path):
    c = load(write(tmp_path, streams(False, True)), pooled=False)
    assert c.aligned and (c.masks["audio"] == c.masks["text"]).all()


def test_zero_steps_between_values_are_data():
    x = np.zeros((1, 6, 2), np.float32)
    x[0, 1] = x[0, 4] = 1
    assert masks_of({"a": x}, {"a": np.array([4])}).masks["a"].tolist() == [[False, True, True, True, True, False]]


def test_a_row_that_fits_both_ends_follows_the_others():
    x = np.zeros((4, 4, 1), np.float32)
    x[:3, 3], x[3, 1:3] = 1, 1
    found = masks_of({"a": x}, {"a": np.array([1, 1, 1, 3])})
    assert found.masks["a"][3].tolist() == [False, True, True, True] and found.front == {"a": 4}
    back = masks_of({"a": x[:, ::-1]}, {"a": np.array([1, 1, 1, 3])})
    assert back.masks["a"][3].tolist() == [True, True, True, False] and not back.front


@pytest.mark.parametrize(("values", "length", "own", "words"), [
    ([1, 1, 1, 0], 2, [1, 1, 1, 0], [1, 1, 0, 0]),
    ([0, 1, 1, 1], 2, [0, 1, 1, 1], [0, 1, 1, 1]),
    ([0, 1, 1, 0], 1, [0, 1, 1, 0], [0, 1, 1, 0]),
    ([1, 1, 1, 1], 2, [1, 1, 0, 0], [1, 1, 0, 0]),
    ([1, 1, 0, 0], 0, [1, 1, 0, 0], [1, 1, 0, 0]),
])  # fmt: skip
def test_values_beyond_their_length_are_counted(values, length, own, words):
    x = np.array(values, np.float32).reshape(1, 4, 1)
    for found, mask in (
        (masks_of({"a": x}, {"a": np.array([length])}), own),
        (masks_of({"a": x}, {}, np.arange(4)[None] < length), words),
    ):
        assert found.masks["a"][0].astype(int).tolist() == mask
        dropped = mask < values
        assert (found.cut, found.kept) == (({"a": 1}, {}) if dropped else ({}, {"a": 1}))


def test_values_behind_the_last_word_do_not_cost_the_alignment(tmp_path):
    root = streams(False, True)
    size = int(root["train"]["text_bert"][0, 1].sum())
    root["train"]["audio"][0, size] = 1
    c = load(write(tmp_path, root), pooled=False)
    assert c.aligned and any(n.startswith("audio: the values of 1 of 70 utterances reach beyond") for n in c.notes)


def test_contradictions_are_noted_with_their_count(tmp_path):
    root = streams(False, False)
    root["train"]["audio_lengths"][:3] = [0, 0, 0]
    notes = load(write(tmp_path, root)).notes
    assert any(n.startswith("audio: the values of 3 of 70 utterances reach beyond the length") for n in notes)


def test_all_zero_rows_are_missing_and_counted(tmp_path):
    root = streams(True, True)
    root["train"]["vision"][:4] = 0
    c = load(write(tmp_path, root))
    assert (~c.available[:, 2]).sum() == 4 and c.available[:, :2].all()
    assert "vision: 4 of 70 utterances are all zeros: read as missing" in c.notes


def test_utterances_without_any_modality_are_counted(tmp_path):
    root = streams(True, True)
    for m in ("text", "audio", "vision"):
        root["test"][m][0] = 0
    assert "1 of 70 utterances lack every modality" in load(write(tmp_path, root)).notes


def test_without_any_length_the_data_tell_the_mask(tmp_path):
    root = streams(True, False)
    for part in root.values():
        del part["audio_lengths"], part["vision_lengths"]
        part["audio"] = part["audio"][:, 2:]
    c = load(write(tmp_path, root), pooled=False)
    assert (c.masks["audio"] == (c.features["audio"] != 0).any(-1)).all() and c.features["audio"].shape[1] == 10
    assert not c.aligned


@pytest.mark.parametrize("front", [True, False])
def test_streams_of_one_length_share_a_mask(tmp_path, front):
    root = streams(front, False)
    for part in root.values():
        del part["audio_lengths"], part["vision_lengths"]
        part["text"] = part["text"][:, ::-1] if front else part["text"]
        part["vision"][:, :8] *= np.float32(not front)
    c = load(write(tmp_path, root), pooled=False)
    assert c.aligned and (c.masks["vision"] == c.masks["audio"]).all()
    assert (c.masks["text"] == (c.features["text"] != 0).any(-1)).all()
