"""The project's array files: splits, blocks, the leak that is refused, padding and absent text."""

import numpy as np
import pytest

from examples.msa.data import load
from examples.msa.npz import load_npz

from .real_data import MMMO, MOSI, needs_real_data


def small_npz(tmp_path, **changes):
    n = 20
    arrays = {
        "text_minilm": np.zeros((n, 4), np.float32),
        "text_cnn_bclstm": np.zeros((n, 3), np.float32),
        "audio": np.arange(n * 2, dtype=np.float32).reshape(n, 2),
        "video": np.zeros((n, 3), np.float32),
        "label": np.linspace(-3, 3, n).astype(np.float32),
        "split": np.repeat([0, 1, 2], [10, 4, 6]).astype(np.int8),
        "split_bclstm": np.repeat([0, 2], [14, 6]).astype(np.int8),
        "split_clean752": np.repeat([-1, 0, 1, 2], [8, 4, 4, 4]).astype(np.int8),
        "video_index": np.arange(n) // 2,
        "clip_id": np.arange(n)[::-1],
        "utt_id": np.array([f"u{i}" for i in range(n)]),
    }
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(tmp_path / "mosi.npz", **arrays)
    return tmp_path / "mosi.npz"


def test_npz_splits_and_blocks(tmp_path):
    path = small_npz(tmp_path)
    c = load_npz(path)
    assert c.modalities == ("text", "audio") and len(c) == 20
    assert c.utterance_ids[:4].tolist() == ["u1", "u0", "u3", "u2"]
    clean = load_npz(path, "clean752")
    assert clean.modalities == ("text", "audio", "vision") and len(clean) == 12 and (clean.split >= 0).all()
    assert load_npz(path, "clean752", ("text_cnn_bclstm", "audio")).dims == (3, 2)
    assert np.bincount(load_npz(path, "bclstm").split).tolist() == [12, 2, 6]


@pytest.mark.parametrize("blocks", [("text_cnn_bclstm", "audio"), ("text_minilm", "video"), ("video",)])
def test_leaking_blocks_are_refused_on_the_official_split(tmp_path, blocks):
    with pytest.raises(ValueError, match="trained on labels of official test"):
        load_npz(small_npz(tmp_path), "official", blocks)


@pytest.mark.parametrize(("changes", "kwargs", "message"), [
    ({"audio": None}, {}, "lacks the key 'audio'"),
    ({"audio": np.zeros((3, 2), np.float32)}, {}, "'audio' has 3 rows, expected 20"),
    ({"audio": np.full((20, 2), np.nan, np.float32)}, {}, "'audio' holds 40 values"),
    ({"utt_id": np.array([{}] * 20, dtype=object)}, {}, "plain arrays"),
    ({}, {"split": "random"}, "split must be one of"),
    ({}, {"blocks": ("text",)}, "unknown blocks"),
    ({}, {"split": "clean752", "blocks": ("text_minilm", "text_cnn_bclstm")}, "each modality once"),
])  # fmt: skip
def test_what_an_npz_lacks_is_named(tmp_path, changes, kwargs, message):
    with pytest.raises(ValueError, match=message) as e:
        load_npz(small_npz(tmp_path, **changes), **kwargs)
    assert "mosi.npz" in str(e.value)


def test_damaged_npz_is_refused(tmp_path):
    path = small_npz(tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"mosi\.npz: not a readable"):
        load(path)


@needs_real_data
def test_mosi_is_read_whole():
    c = load(MOSI)
    assert len(c) == 2199 and len(c.video_ptr) == 94 and c.dims == (384, 73)
    assert np.bincount(c.split).tolist() == [1284, 229, 686]
    clean = load(MOSI, split="clean752")
    assert len(clean) == 752 and np.bincount(clean.split).tolist() == [410, 75, 267] and clean.dims == (384, 73, 100)
    with pytest.raises(ValueError, match="inflated"):
        load(MOSI, blocks=("text_minilm", "video"))


@needs_real_data
def test_mmmo_masks_come_from_audio_and_text_is_absent_in_train():
    c = load(MMMO, pooled=False)
    assert c.aligned and (c.available[:, 0] == (c.split != 0)).all()
    assert 1 - c.masks["text"].mean() == pytest.approx(0.065, abs=1e-3)
    assert (c.lengths("audio") < 20).sum() == 136
    with pytest.raises(ValueError, match="text is observed in no train row"):
        c.standardise()
    assert load(MMMO).dims == (300, 74, 36)
