"""Shapes and kinds of features and labels that files have, and values that are not finite."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.msa.data import load

from .msa_files import mmsa, write


def changed(change, **kwargs):
    """A small set with every part changed."""
    root = mmsa(**kwargs)
    for part in root.values():
        change(part)
    return root


def plain_set(tmp_path, **kwargs):
    return load(write(tmp_path, mmsa(**kwargs), "plain.pkl"), pooled=False)


def as_objects(part):
    for m in ("text", "audio", "vision"):
        rows = np.empty(len(part[m]), dtype=object)
        rows[:] = list(part[m])
        part[m] = rows


def as_arrays(part):
    part["audio"], part["vision"] = list(part["audio"]), part["vision"].tolist()


def as_tensors(part):
    for m in ("text", "audio"):
        part[m] = torch.from_numpy(part[m])
    part["vision"] = [torch.from_numpy(x) for x in part["vision"]]
    part["regression_labels"] = torch.from_numpy(part["regression_labels"])


@pytest.mark.parametrize("change", [as_objects, as_arrays, as_tensors])
@pytest.mark.parametrize("protocol", [2, 5])
def test_containers_of_features_are_read_alike(tmp_path, change, protocol):
    c = load(write(tmp_path, changed(change), protocol=protocol), pooled=False)
    assert c.sha256 == plain_set(tmp_path).sha256


def test_files_of_torch_are_read(tmp_path):
    root = changed(as_tensors)
    torch.save(root, tmp_path / "set.pt")
    assert load(tmp_path / "set.pt", pooled=False).sha256 == plain_set(tmp_path).sha256
    whole = (tmp_path / "set.pt").read_bytes()
    (tmp_path / "set.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"set\.pt"):
        load(tmp_path / "set.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_types_of_tensors(tmp_path, dtype):
    x = (torch.arange(8 * 5 * 13) % 2).reshape(13, 5, 8).to(dtype).mT
    root = mmsa()
    start = 0
    for part in root.values():
        part["audio"] = x[start : (start := start + len(part["id"]))]
    c = load(write(tmp_path, root), pooled=False)
    ids = [i for part in root.values() for i in part["id"]]
    assert (c.features["audio"][ids.index(c.utterance_ids[0]) != 0] >= 0).all()
    rows = [ids.index(i) for i in c.utterance_ids]
    assert (c.features["audio"] == x[rows].float().numpy()).all()


def test_sequences_of_unequal_length_are_padded(tmp_path):
    root = mmsa()
    for part in root.values():
        part["audio"] = [x[: 1 + i % 3] for i, x in enumerate(part["audio"])]
        del part["text_bert"]
    root["test"]["audio"][1] = None
    c = load(write(tmp_path, root), pooled=False)
    assert c.features["audio"].shape[1] == 3 and sorted(set(c.lengths("audio").tolist())) == [0, 1, 2, 3]
    lost = c.utterance_ids.tolist().index(root["test"]["id"][1])
    assert not c.available[lost, 1] and c.available.sum() == 38


def test_pooled_features_of_files(tmp_path):
    def pool(part):
        for m in ("text", "audio", "vision"):
            part[m] = part[m].mean(1)

    c = load(write(tmp_path, changed(pool)), pooled=False)
    assert not c.sequences and c.dims == (7, 5, 6)

    def pool_audio(part):
        part["audio"] = part["audio"].mean(1)

    c = load(write(tmp_path, changed(pool_audio)), pooled=False)
    assert c.features["audio"].shape == (13, 1, 5) and c.features["text"].shape == (13, 8, 7)
    assert load(write(tmp_path, changed(pool_audio))).dims == (7, 5, 6)


def test_text_alone(tmp_path):
    def drop(part):
        del part["audio"], part["vision"]

    c = load(write(tmp_path, changed(drop)))
    assert c.modalities == ("text",) and len(c) == 13


def test_layout_of_mult(tmp_path):
    def change(part):
        n = len(part["id"])
        del part["raw_text"], part["text_bert"], part["annotations"]
        part["labels"] = part.pop("regression_labels").reshape(n, 1, 1)
        part["id"] = np.array([[b"vid", str(i).encode(), str(i + 1).encode()] for i in range(n)], dtype=object)

    root = changed(change)
    for name, part in root.items():
        part["id"][:, 0] = name.encode()
    c = load(write(tmp_path, root, "mosi_data_noalign.pkl"), pooled=False)
    assert len(c) == 13 and len(c.video_ptr) - 1 == 3 and c.labelled.all() and c.aligned


@pytest.mark.parametrize(("kind", "values", "scores"), [
    ("classification_labels", [0, 1, 2], [-1, 0, 1]),
    ("classification_labels", [0, 1, 1], [-1, 1, 1]),
    ("classification_labels", [0, 6, 3], [-3, 3, 0]),
    ("classification_labels", [-1, 0, 1], [-1, 0, 1]),
    ("annotations", ["Negative", "Neutral", "Positive"], [-1, 0, 1]),
])  # fmt: skip
def test_classes_become_scores(tmp_path, kind, values, scores):
    root = mmsa(n=(3, 3, 3))
    for part in root.values():
        del part["regression_labels"], part["annotations"]
        part[kind] = np.array(values)
    c = load(write(tmp_path, root))
    by_id = dict(zip(root["train"]["id"], scores, strict=True))
    assert [by_id[i] for i in c.utterance_ids[c.rows("train")]] == c.labels[c.rows("train")].tolist()
    assert any(kind in n for n in c.notes)


def test_labels_that_are_none(tmp_path):
    root = mmsa()
    root["train"]["regression_labels"][:4] = np.nan
    c = load(write(tmp_path, root))
    assert (~c.labelled).sum() == 4 and c.describe()["unlabelled"] == 4
    del root["test"]["regression_labels"]
    c = load(write(tmp_path, root))
    assert not c.labelled[c.rows("test")].any() and "test: no 'regression_labels': unlabelled" in c.notes
    for part in root.values():
        part.pop("regression_labels", None)
        del part["annotations"]
    c = load(write(tmp_path, root))
    assert not c.labelled.any() and "no labels: every utterance is unlabelled" in c.notes


def test_one_part_alone_is_new_data(tmp_path):
    c = load(write(tmp_path, {"test": mmsa()["test"]}))
    assert len(c) == 4 and (c.split == 2).all()


def test_train_mix_adds_what_train_lacks(tmp_path):
    root = mmsa()
    more = mmsa(n=(3, 1, 1), seed=1)["train"]
    more["id"] = [f"new$_${i}" for i in range(3)]
    root["train_mix"] = {k: np.concatenate([np.asarray(root["train"][k]), np.asarray(more[k])]) for k in more}
    c = load(write(tmp_path, root))
    assert np.bincount(c.split).tolist() == [9, 3, 4] and (~c.labelled).sum() == 3
    assert set(c.utterance_ids[~c.labelled]) == {"new$_$0", "new$_$1", "new$_$2"}
    assert any(n.startswith("train_mix: 3 utterances") for n in c.notes)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("pooled", [True, False])
def test_a_constant_modality_is_missing(tmp_path, value, pooled):
    def change(part):
        part["vision"] = np.full((len(part["id"]), 1, 1), value, np.float32)

    c = load(write(tmp_path, changed(change)), pooled=pooled)
    assert c.describe()["missing"] == {"text": 0, "audio": 0, "vision": 13}
    assert any(n.startswith("vision: ") and "missing" in n for n in c.notes)
    # A system can still run: a modality that no utterance has stays zero.
    assert (c.standardise().features["vision"] == 0).all()


def test_transcripts_and_media_come_along(tmp_path):
    root = mmsa()
    for part in root.values():
        part["media"] = [f"clips/{i}.mp4" for i in part["id"]]
    c = load(write(tmp_path, root))
    row = root["train"]["id"].index(c.utterance_ids[0])
    assert c.transcripts[0] == f"words {row}" and c.media[0] == f"clips/{c.utterance_ids[0]}.mp4"


def test_not_finite_values_are_refused_with_their_place(tmp_path):
    root = mmsa()
    root["valid"]["vision"][2, 5, 3] = np.inf
    with pytest.raises(ValueError, match=r"'valid': 'vision' holds 1 values .* row 2, step 5, column 3 .*--repair"):
        load(write(tmp_path, root))
    root["valid"]["vision"] = root["valid"]["vision"].mean(1)
    root["train"]["vision"], root["test"]["vision"] = root["train"]["vision"].mean(1), root["test"]["vision"].mean(1)
    with pytest.raises(ValueError, match=r"row 2, column 3 "):
        load(write(tmp_path, root))
    root["valid"]["vision"] = root["valid"]["vision"].astype(np.float64)
    root["valid"]["vision"][2, 3] = 1e300
    with pytest.raises(ValueError, match=r"row 2, column 3 "):
        load(write(tmp_path, root))


def test_repair_takes_the_means_of_the_train_part(tmp_path):
    root = mmsa()
    for part in root.values():
        del part["text_bert"]
    root["test"]["vision"][1, 4, 2] = np.nan
    root["train"]["vision"][0, 3, 2] = np.inf
    root["train"]["vision"][1, 7, :] = np.nan
    path = write(tmp_path, root)
    c = load(path, pooled=False, repair=True)
    train = root["train"]["vision"].astype(np.float64)
    mean = train[..., 2][np.isfinite(train[..., 2])].mean()
    rows = {i: r for r, i in enumerate(c.utterance_ids)}
    assert c.features["vision"][rows[root["test"]["id"][1]], 4, 2] == pytest.approx(mean, rel=1e-6)
    assert c.features["vision"][rows[root["train"]["id"][0]], 3, 2] == pytest.approx(mean, rel=1e-6)
    # No value of that step is known, so it becomes padding.
    assert (c.features["vision"][rows[root["train"]["id"][1]], 7] == 0).all()
    assert any(n.startswith("vision: 8 values that are not finite replaced") for n in c.notes)


def test_rows_that_are_none_are_missing(tmp_path):
    root = mmsa()
    for part in root.values():
        part["audio"] = list(part["audio"].mean(1))
        part["text"], part["vision"] = part["text"].mean(1), part["vision"].mean(1)
    root["train"]["audio"][2] = None
    c = load(write(tmp_path, root))
    lost = c.utterance_ids.tolist().index(root["train"]["id"][2])
    assert np.argwhere(~c.available).tolist() == [[lost, 1]] and (c.features["audio"][lost] == 0).all()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("settings.toml", 'rate = 0.3\nwörter = "ja"\n', "a text; data are a folder with a clips.csv, a pickle"),
    ("aligned_50.pkl", "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n", "run git lfs pull"),
    ("long.json", '{"ä": "' + "ä" * 500 + '"}', "a text"),
])  # fmt: skip
def test_texts_are_not_taken_for_pickles(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_a_pickle_of_the_textual_form_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(mmsa(n=(4, 2, 2)), protocol=0))
    assert len(load(tmp_path / "old.pkl")) == 8
