"""Corpora: what the loaders read, what they refuse, and how they say so."""

import argparse
import io
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest

from examples.msa.corpus import Corpus
from examples.msa.data import add_data_arguments, load, load_from
from examples.msa.mmsa_pickle import load_mmsa

from .msa_files import mmsa, write


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_aligned_pickle_is_read(tmp_path, protocol):
    root = mmsa()
    c = load_mmsa(write(tmp_path, root, protocol=protocol))
    assert c.modalities == ("text", "audio", "vision") and c.aligned and c.sequences and c.family == "mosi"
    assert np.bincount(c.split).tolist() == [6, 3, 4]
    # Rows follow the clip numbers inside a video.
    assert c.utterance_ids[:4].tolist() == ["vid00$_$3", "vid00$_$4", "vid00$_$5", "vid00$_$6"]
    assert c.video_ptr.tolist() == [0, 4, 6, 9, 13]
    row = root["train"]["id"].index(c.utterance_ids[0])
    assert (c.features["audio"][0] == root["train"]["audio"][row]).all()
    assert c.labels[0] == root["train"]["regression_labels"][row]
    assert (c.masks["vision"][0] == (root["train"]["text_bert"][row, 1] > 0)).all()


def test_clips_are_ordered_by_number_not_by_letters(tmp_path):
    root = mmsa(n=(12, 3, 4))
    root["train"]["id"] = [f"v$_${i}" for i in range(12)]
    ids = load_mmsa(write(tmp_path, root)).utterance_ids
    assert ids[:12].tolist() == [f"v$_${i}" for i in range(12)]


def test_unaligned_lengths_make_masks(tmp_path):
    root = mmsa(aligned=False)
    c = load_mmsa(write(tmp_path, root, "unaligned_50.pkl"))
    assert not c.aligned and c.features["audio"].shape[1] == 12
    by_id = dict(zip(root["train"]["id"], root["train"]["audio_lengths"], strict=True))
    for i in c.rows("train"):
        assert c.lengths("audio")[i] == by_id[c.utterance_ids[i]]


def test_pooled_equals_the_masked_mean(tmp_path):
    path = write(tmp_path, mmsa(aligned=False), "unaligned_50.pkl")
    sequences, pooled = load_mmsa(path), load_mmsa(path, pooled=True)
    assert not pooled.sequences
    x, mask = sequences.features["vision"], sequences.masks["vision"]
    assert np.allclose(pooled.features["vision"][2], x[2][mask[2]].mean(0), atol=1e-6)
    assert all(np.allclose(sequences.pooled().features[m], pooled.features[m]) for m in pooled.modalities)


@pytest.mark.parametrize(("name", "sims", "family"), [
    ("MOSEI_aligned_50.pkl", False, "mosei"),
    ("aligned_50.pkl", True, "sims"),
    ("aligned_50.pkl", False, "mosi"),
])  # fmt: skip
def test_family_is_told_from_the_file(tmp_path, name, sims, family):
    assert load_mmsa(write(tmp_path, mmsa(sims=sims), name)).family == family


def test_infinite_audio_becomes_zero_and_is_noted(tmp_path):
    root = mmsa()
    root["train"]["audio"][2, 1, 3] = -np.inf
    c = load_mmsa(write(tmp_path, root))
    assert np.isfinite(c.features["audio"]).all()
    assert c.notes[0] == "split 'train': 1 values -inf in audio set to 0"
    root["valid"]["vision"][0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"aligned_50.pkl, split 'valid': 'vision' holds 1 values"):
        load_mmsa(write(tmp_path, root))


def test_names_of_old_and_new_numpy_are_read(tmp_path):
    data = pickle.dumps(mmsa(), protocol=4)
    assert b"numpy._core" in data
    path = tmp_path / "old.pkl"
    # The same pickle with the old module name, in protocol 2: later protocols store the length of a name.
    old = pickle.dumps(mmsa(), protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(old)
    assert len(load_mmsa(path)) == 13


def test_object_arrays_and_scalars_are_read(tmp_path):
    root = mmsa()
    root["train"]["id"] = np.array([[i] for i in root["train"]["id"]], dtype=object)
    root["test"]["regression_labels"] = [np.float64(1.5)] * 4
    c = load_mmsa(write(tmp_path, root))
    assert (c.labels[c.rows("test")] == 1.5).all()


class Hostile:
    def __reduce__(self):
        return os.system, ("echo hostile > hostile",)


def forged_dtype() -> bytes:
    """An object array whose dtype state claims that there are no objects: NumPy would take its bytes for pointers."""
    state = pickle.dumps(np.array([None]), protocol=2)
    return state.replace(b"K?", b"K\x00")


@pytest.mark.parametrize("build", [
    lambda: pickle.dumps(Hostile()),
    lambda: pickle.dumps({"train": {"text": Hostile()}}),
    lambda: b"cbuiltins\neval\n(S'1'\ntR.",
    lambda: b"cnumpy\nload\n(S'x'\ntR.",
    lambda: b"cnumpy._core.multiarray\n_reconstruct\n(cbuiltins\nset\n(K\x00tS'b'\ntR.",
])  # fmt: skip
def test_hostile_pickles_run_nothing(tmp_path, monkeypatch, build):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pkl"
    path.write_bytes(build())
    with pytest.raises(ValueError, match=r"hostile\.pkl: refused or corrupt pickle"):
        load_mmsa(path)
    assert not (tmp_path / "hostile").exists()


def test_forged_dtype_flags_reach_no_numpy_state(tmp_path):
    from examples.msa.safe_pickle import plain, read_pickle

    data = forged_dtype()
    assert data != pickle.dumps(np.array([None]), protocol=2)
    (tmp_path / "forged.pkl").write_bytes(data)
    assert plain(read_pickle(tmp_path / "forged.pkl")).tolist() == [None]


@pytest.mark.parametrize("damage", [
    lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a pickle", lambda b: b[:-1],
    lambda b: b[:20] + bytes(64) + b[84:],
])  # fmt: skip
def test_corrupt_pickles_name_the_file(tmp_path, damage):
    path = tmp_path / "damaged.pkl"
    path.write_bytes(damage(pickle.dumps(mmsa(), protocol=4)))
    with pytest.raises(ValueError, match=r"damaged\.pkl"):
        load_mmsa(path)


def drop(*keys):
    def change(root):
        for key in keys[:-1]:
            root = root[key]
        del root[keys[-1]]

    return change


def put(value, *keys):
    def change(root):
        for key in keys[:-1]:
            root = root[key]
        root[keys[-1]] = value

    return change


@pytest.mark.parametrize(("change", "message"), [
    (drop("valid"), r"lacks the split 'valid'"),
    (drop("test", "audio"), r"split 'test': it lacks the modality 'audio'"),
    (drop("train", "id"), r"split 'train': it lacks the key 'id'"),
    (drop("train", "regression_labels"), r"split 'train': it lacks the key 'regression_labels'"),
    (put(["a"], "train", "id"), r"split 'train': 'id' must list one entry"),
    (put([None] * 6, "train", "id"), r"split 'train': 'id' must hold strings"),
    (put(np.zeros((5, 7), np.float32), "train", "text"), r"'text' must be \[6, L, d\] or \[6, d\], got \(5, 7\)"),
    (put(np.zeros((6, 7), np.float32), "train", "text"), r"split 'valid': 'text' is \(3, 8, 7\), but in another split"),
    (put(np.zeros((6, 8, 9), np.float32), "train", "audio"), r"'audio' has different shapes"),
    (put(["x"] * 6, "train", "vision"), r"'vision' is not an array of numbers"),
    (put(np.full(6, 7.0), "train", "regression_labels"), r"outside \[-3, 3\] of mosi"),
    (put([99] * 6, "train", "audio_lengths"), r"'audio_lengths' must hold 6 numbers in \[0, 8\]"),
    (put(np.zeros((6, 2, 8)), "train", "text_bert"), r"'text_bert' must be \[6, 3, 8\]"),
])  # fmt: skip
def test_what_a_pickle_lacks_is_named(tmp_path, change, message):
    root = mmsa()
    change(root)
    with pytest.raises(ValueError, match=message) as e:
        load_mmsa(write(tmp_path, root))
    assert "aligned_50.pkl" in str(e.value)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a dictionary with the splits"):
        load_mmsa(write(tmp_path, [1, 2]))


def test_load_tells_formats_by_content(tmp_path):
    c = load(write(tmp_path, mmsa(), "data.npz"), pooled=False)
    assert c.sequences
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        load(tmp_path / "nowhere.pkl")
    with pytest.raises(ValueError, match=r"mosi\.npz only"):
        load(write(tmp_path, mmsa()), split="clean752")
    with pytest.raises(ValueError, match="synthetic corpus only"):
        load(write(tmp_path, mmsa()), size=100)


def test_options_reach_the_loader():
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    options = ["--family", "sims", "--size", "120", "--data-seed", "3", "--sequences"]
    c = load_from(parser.parse_args(options))
    assert c.family == "sims" and len(c) == 120 and c.sequences
    assert c.sha256 == load(family="sims", size=120, seed=3, pooled=False).sha256
    persistent = load_from(parser.parse_args([*options, "--pairs", "persistent"]))
    assert persistent.sha256 == load(family="sims", size=120, seed=3, pooled=False, pairs="persistent").sha256
    assert persistent.sha256 != c.sha256


def toy(**changes):
    arguments = {
        "name": "toy", "family": "mosi", "features": {"a": np.ones((4, 2), np.float32)},
        "labels": np.zeros(4, np.float32),
        "split": np.zeros(4, np.int8), "video_ptr": np.array([0, 2, 4]), "utterance_ids": np.array(list("abcd")),
    }  # fmt: skip
    return Corpus(**(arguments | changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"family": "iemocap"}, "family must be one of"),
    ({"features": {}}, "no modality"),
    ({"features": {"a": np.ones((3, 2), np.float32)}}, "a has 3 rows"),
    ({"features": {"a": np.ones((4, 2))}}, "expected float32"),
    ({"features": {"a": np.ones((4, 3, 2), np.float32)}}, "need a token mask"),
    ({"labels": np.full(4, np.inf, np.float32)}, "label is infinite"),
    ({"split": np.full(4, 5, np.int8)}, "0, 1, 2 or -1"),
    ({"video_ptr": np.array([0, 3, 2, 4])}, "video_ptr must rise"),
    ({"utterance_ids": np.array(list("aacd"))}, "not unique"),
    ({"available": np.ones((4, 2), bool)}, "available must be"),
])  # fmt: skip
def test_a_corpus_that_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        toy(**changes)


def test_statistics_of_one_set_standardise_another():
    first, second = (
        toy(),
        toy(features={"a": np.full((4, 2), 7, np.float32)}, available=np.array([[1], [1], [0], [1]], bool)),
    )
    statistics = first.statistics()
    mean, scale = statistics["a"]
    out = second.standardise_by(statistics).features["a"]
    assert out[[0, 1, 3]].tolist() == [((7 - mean) * scale).tolist()] * 3 and (out[2] == 0).all()
    assert np.array_equal(first.standardise_by(statistics).features["a"], first.standardise().features["a"])


def test_standardise_reads_observed_train_rows_only():
    x = np.array([[1.0, 5.0], [3.0, 5.0], [100.0, 7.0], [np.nan, np.nan]], np.float32)
    c = toy(features={"a": x}, split=np.array([0, 0, 2, 0], np.int8))
    out = c.standardise(observed=np.array([[True], [True], [True], [False]])).features["a"]
    assert out[:2, 0].tolist() == [-1.0, 1.0] and out[2, 0] == 98.0
    # A column that is constant in the train part becomes 0, also outside it.
    assert (out[:3, 1] == 0).all()
    with pytest.raises(ValueError, match="a is observed in no train row"):
        c.standardise(observed=np.zeros((4, 1), bool))


def test_standardise_leaves_padding_and_absent_rows_zero():
    x = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32) + 5
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
    available = np.array([[True], [True], [True], [False]])
    hidden = x.copy()
    hidden[0, 2], hidden[1, 1:], hidden[3] = np.nan, np.nan, np.nan
    c = toy(features={"a": hidden}, masks={"a": mask}, available=available).standardise()
    out = c.features["a"]
    seen = mask & available
    assert (out[~seen] == 0).all() and np.abs(out[seen].mean(0)).max() < 1e-5
    assert np.allclose(out[seen].std(0), 1, atol=1e-5)


def test_hash_follows_content():
    base = toy()
    assert base.sha256 == toy().sha256
    changed = [
        toy(labels=np.ones(4, np.float32)),
        toy(split=np.ones(4, np.int8)),
        toy(video_ptr=np.array([0, 1, 4])),
        toy(features={"b": base.features["a"]}),
        toy(utterance_ids=np.array(list("abce"))),
    ]
    assert len({c.sha256 for c in [base, *changed]}) == 6


def test_keeping_videos_and_modalities():
    c = load(size=200)
    part = c.keep_videos([1, 3])
    rows = np.flatnonzero(np.isin(c.video_index, [1, 3]))
    assert part.utterance_ids.tolist() == c.utterance_ids[rows].tolist()
    assert (np.diff(part.video_ptr) == np.diff(c.video_ptr)[[1, 3]]).all()
    assert c.keep_modalities(["vision", "text"]).dims == (20, 768)
    with pytest.raises(ValueError, match="no modality"):
        c.keep_modalities(["smell"])


def test_tensors_have_the_declared_types():
    t = load(size=60, pooled=False).tensors()
    assert [x.ndim for x in t["features"]] == [3, 3, 3] and len(t["masks"]) == 3
    assert str(t["features"][0].dtype) == "torch.float32" and str(t["masks"][0].dtype) == "torch.bool"
    assert t["available"].shape == (60, 3) and str(t["video_ptr"].dtype) == "torch.int64"


def test_replace_keeps_checking():
    with pytest.raises(ValueError, match="split must hold"):
        replace(toy(), split=np.full(4, 9, np.int8))


def test_pickle_reader_allows_no_wide_codec():
    from examples.msa.safe_pickle import _encode

    assert _encode("é") == b"\xe9"
    with pytest.raises(pickle.UnpicklingError, match="codec"):
        _encode("x", "zlib")
    assert io.BytesIO(_encode("a", "utf-8")).read() == b"a"


def test_labels_clips_and_texts_may_be_absent():
    c = toy(labels=np.array([1, np.nan, np.nan, 0], np.float32))
    assert c.labelled.tolist() == [True, False, False, True] and c.describe()["unlabelled"] == 2
    assert c.positions.tolist() == [0, 1, 0, 1] and c.transcripts is None and c.media is None
    full = toy(clips=np.array([3, 7, 0, 1]), transcripts=np.array(list("wxyz"), object), media=np.array(list("mnop")))
    part = full.keep_videos([0])
    assert part.positions.tolist() == [3, 7] and part.transcripts.tolist() == ["w", "x"]
    assert part.media.tolist() == ["m", "n"]
    assert full.sha256 != toy().sha256
    with pytest.raises(ValueError, match="clips must rise within each video"):
        toy(clips=np.array([7, 3, 0, 1]))
    with pytest.raises(ValueError, match=r"transcripts must be \[4\]"):
        toy(transcripts=np.array(["w"], object))


def test_description_has_fixed_keys():
    described = toy(available=np.array([[True], [False], [True], [True]])).describe()
    assert described["modalities"] == {"a": 2} and described["missing"] == {"a": 1} and described["videos"] == 2
    assert described["utterances"] == {"train": 4, "valid": 0, "test": 0} and described["unlabelled"] == 0
    assert described["notes"] == [] and described["family"] == "mosi"


def test_a_modality_nobody_has_stays_zero():
    x = {"a": np.ones((4, 2), np.float32) * np.arange(4, dtype=np.float32)[:, None], "b": np.ones((4, 3), np.float32)}
    c = toy(features=x, available=np.array([[True, False]] * 4)).standardise()
    assert (c.features["b"] == 0).all() and abs(c.features["a"].mean()) < 1e-6


def test_only_labelled_rows_keep_their_label():
    from examples.msa.missing import label_mask

    c = toy(labels=np.array([1, np.nan, np.nan, 0], np.float32))
    for by in ("utterance", "video"):
        mask, facts = label_mask(c, share=1.0, by=by)
        assert mask.tolist() == [True, False, False, True] and facts["labels"] == 2 and facts["realised"] == 1
    with pytest.raises(ValueError, match="no train row with a label"):
        label_mask(toy(labels=np.full(4, np.nan, np.float32)))
