"""The open folder format, any array file with the documented keys, and the commands ``describe`` and ``convert``."""

import json
from pathlib import Path

import numpy as np
import pytest

from examples.msa.__main__ import main
from examples.msa.data import load

from .msa_files import mmsa, write
from .real_data import DATA, MMMO, MOSI, needs_real_data
from .test_msa_streams import streams

TABLE = """id,video,clip,split,label,transcript,media
a_1,a,1,train,1.5,"well, yes",a/1.mp4
a_0,a,0,train,-2,"two
lines",
b_7,b,7,valid,,"",b/7.mp4
c_0,c,0,test,0.2,no,
c_2,c,2,unused,3,no,
"""
N = 5


def folder(tmp_path: Path, table: str = TABLE, **arrays: np.ndarray) -> Path:
    """A folder with a table and a file for each array; arrays that are not given are random."""
    rng = np.random.default_rng(0)
    path = tmp_path / "set"
    path.mkdir(exist_ok=True)
    (path / "clips.csv").write_text(table, encoding="utf-8")
    for name, array in (arrays or {"text": rng.standard_normal((N, 4)), "audio": rng.standard_normal((N, 3))}).items():
        np.save(path / f"{name}.npy", array)
    return path


def test_a_table_beside_arrays(tmp_path):
    path = folder(tmp_path)
    c = load(path)
    assert c.utterance_ids.tolist() == ["a_0", "a_1", "b_7", "c_0"] and c.modalities == ("text", "audio")
    assert c.video_ptr.tolist() == [0, 2, 3, 4] and c.positions.tolist()[:2] == [0, 1]
    assert np.isnan(c.labels[2]) and c.labels[1] == 1.5 and np.bincount(c.split).tolist() == [2, 1, 1]
    assert c.transcripts[0] == "two\nlines" and c.media.tolist() == ["", "a/1.mp4", "b/7.mp4", ""]
    assert (c.features["text"][0] == np.load(path / "text.npy")[1].astype(np.float32)).all()
    assert load(path / "clips.csv").sha256 == c.sha256


@pytest.mark.parametrize("names", ["id", "video/clip", "npz"])
def test_one_file_per_clip(tmp_path, names):
    path = folder(tmp_path, text=np.random.default_rng(1).standard_normal((N, 4)))
    (path / "audio").mkdir()
    rng = np.random.default_rng(0)
    values = {(v, c): rng.standard_normal((2 + c, 3)) for v, c in (("a", 1), ("a", 0), ("c", 0))}
    for (video, clip), x in values.items():
        if names == "id":
            np.save(path / "audio" / f"{video}_{clip}.npy", x)
        elif names == "npz":
            np.savez(path / "audio" / f"{video}_{clip}.npz", x)
        else:
            (path / "audio" / video).mkdir(exist_ok=True)
            np.save(path / "audio" / video / f"{clip}.npy", x)
    c = load(path)
    assert c.available[:, 1].tolist() == [True, True, False, True]
    assert np.allclose(c.features["audio"][1], values["a", 1].mean(0), atol=1e-6)
    s = load(path, pooled=False)
    assert s.lengths("audio").tolist() == [2, 3, 0, 2]


def test_a_folder_of_steps_and_an_archive_by_id(tmp_path):
    path = folder(tmp_path, text=np.random.default_rng(1).standard_normal((N, 4)))
    for step in range(3):
        (path / "features" / "vision" / "a_1").mkdir(parents=True, exist_ok=True)
        np.save(path / "features" / "vision" / "a_1" / f"{step}.npy", np.array([[step, 1.0]]))
    np.savez(path / "audio.npz", a_1=np.ones(3), a_0=np.arange(3.0), c_0=np.zeros(3))
    c = load(path)
    assert c.features["vision"][1].tolist() == [1.0, 1.0] and c.available[:, 2].tolist() == [False, True, False, False]
    assert c.features["audio"][0].tolist() == [0, 1, 2] and c.available[:, 1].tolist() == [True, True, False, True]


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.replace("id,video", "key,film"), r"lacks the column 'id'"),
    (lambda t: t.replace("1.5", "good"), r"entry 2: the label must be a number or empty, got 'good'"),
    (lambda t: t.replace("valid", "later"), r"entry 4: the split must be train, valid, test or unused, got 'later'"),
    (lambda t: t.replace("c_0,", "a_0,"), r"the id 'a_0' occurs 2 times"),
    (lambda t: t.replace("b_7,b,", "b_7,,"), r"entry 4: 'video' is empty"),
    (lambda t: t + "x,y\n", r"entry 7: 2 cells, but there are 7 columns"),
    (lambda t: t[:42], r"lists no clip"),
    (lambda t: t.replace("no,", '"no,'), r"not a readable table"),
    (lambda t: t + "d_0,d,0,train,0,,\n", r"expected \[6, d\] or \[6, L, d\], a row for each line"),
])  # fmt: skip
def test_tables_that_cannot_be_used_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as e:
        load(folder(tmp_path, change(TABLE)))
    assert str(tmp_path) in str(e.value)


def test_folders_that_cannot_be_used(tmp_path):
    path = folder(tmp_path)
    (path / "text").mkdir()
    np.save(path / "text" / "a_0.npy", np.ones(3))
    with pytest.raises(ValueError, match="the modality 'text' is there twice"):
        load(path)
    (path / "text.npy").unlink()
    (path / "text" / "a_0.npy").rename(path / "text" / "other.npy")
    with pytest.raises(ValueError, match="none of its files is called like an id"):
        load(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder has no clips\.csv"):
        load(tmp_path / "empty")


def test_ids_do_not_leave_the_folder(tmp_path):
    np.save(tmp_path / "secret.npy", np.ones(3))
    table = "id,split,label\n../../secret,train,1\nok,train,2\n"
    path = folder(tmp_path, table, text=np.random.default_rng(0).standard_normal((2, 4)))
    (path / "audio").mkdir()
    np.save(path / "audio" / "ok.npy", np.arange(3.0))
    assert load(path).available[:, 1].sum() == 1


def test_the_table_of_mmsa_is_read(tmp_path):
    path = folder(tmp_path, text=np.random.default_rng(0).standard_normal((2, 4)))
    (path / "clips.csv").unlink()
    table = "video_id,clip_id,text,label,annotation,mode\nv,0001,hi,0.4,Positive,train\nv,0003,,-1,Negative,test\n"
    (path / "label.csv").write_text(table)
    c = load(path)
    assert c.utterance_ids.tolist() == ["v$_$0001", "v$_$0003"] and c.positions.tolist() == [1, 3]
    assert c.transcripts.tolist() == ["hi", ""] and c.split.tolist() == [0, 2]


def any_npz(tmp_path, **changes):
    n, rng = 12, np.random.default_rng(0)
    arrays = {
        "lexical": rng.standard_normal((n, 4)).astype(np.float16),
        "prosody": rng.standard_normal((n, 5, 3)),
        "prosody_lengths": np.full(n, 2),
        "lexical_present": np.arange(n) != 3,
        "label": np.linspace(-1, 1, n),
        "split": np.repeat([0, 1, 2, -1], 3),
        "video_index": np.arange(n) // 2,
        "video_id": np.array(list("fedcba")),
        "clip_id": np.arange(n) * 2,
        "utt_id": np.array([f"u{i}" for i in range(n)]),
        "transcript": np.array([f"t{i}" for i in range(n)]),
        "speaker_names": np.array(["x"]),
    }
    np.savez_compressed(tmp_path / "any.npz", **{k: v for k, v in (arrays | changes).items() if v is not None})
    return tmp_path / "any.npz"


def test_any_npz_with_the_documented_keys(tmp_path):
    c = load(any_npz(tmp_path), pooled=False)
    assert c.modalities == ("lexical", "prosody") and len(c) == 9 and c.masks["prosody"].sum(1).tolist() == [2] * 9
    assert c.videos.tolist() == list("fedcb") and c.positions[:2].tolist() == [0, 2] and c.transcripts[0] == "t0"
    assert c.describe()["missing"]["lexical"] == 1
    assert load(any_npz(tmp_path), blocks=("prosody",)).dims == (3,)
    pool = load(any_npz(tmp_path, label=None, split=None, video_index=None, video_id=None))
    assert not pool.labelled.any() and (pool.split == 0).all() and len(pool) == 12


@pytest.mark.parametrize(("changes", "kwargs", "message"), [
    ({}, {"blocks": ("smell",)}, r"unknown blocks \['smell'\]"),
    ({}, {"split": "clean752"}, "one split"),
    ({"lexical": np.zeros((3, 4))}, {}, "'lexical' has 3 rows, expected 12"),
    ({"prosody_lengths": np.full(12, 9)}, {}, r"numbers in \[0, 5\]"),
    ({"lexical": None, "prosody": None}, {}, "it holds no features"),
    (dict.fromkeys(("label", "split", "utt_id", "video_id", "video_index")), {}, "lacks the keys 'label'"),
    ({"split": np.full(12, 7)}, {}, "0, 1, 2 or -1"),
])  # fmt: skip
def test_what_an_array_file_lacks_is_named(tmp_path, changes, kwargs, message):
    with pytest.raises(ValueError, match=message) as e:
        load(any_npz(tmp_path, **changes), **kwargs)
    assert "any.npz" in str(e.value)


def test_a_value_that_is_not_finite_has_its_row_in_the_file(tmp_path):
    x = np.ones((12, 4))
    x[8, 3] = np.nan
    split = np.repeat([-1, 0, 1, 2], 3)
    with pytest.raises(ValueError, match=r"row 8, column 3"):
        load(any_npz(tmp_path, lexical=x, split=split))
    values = np.random.default_rng(0).standard_normal((N, 4))
    values[3, 1] = np.inf
    path = folder(tmp_path, TABLE.replace("a_0,a,0,train", "a_0,a,0,unused"), text=values)
    with pytest.raises(ValueError, match=r"row 3, column 1"):
        load(path)


def test_describe_prints_what_was_read(tmp_path, capsys):
    root = streams(True, True)
    root["train"]["regression_labels"][0] = np.nan
    path = write(tmp_path, root)
    assert main(["describe", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "mosi" and facts["modalities"] == {"text": 7, "audio": 5, "vision": 6}
    assert facts["utterances"] == {"train": 40, "valid": 10, "test": 20} and facts["unlabelled"] == 1
    assert facts["missing"] == {"text": 0, "audio": 0, "vision": 0} and facts["videos"] == 18
    assert any("padded at the front" in n for n in facts["notes"])
    assert main(["describe", str(path)]) == 0
    assert "audio: 12 steps of 5, missing in 0 of 70" in capsys.readouterr().out


def test_describe_refuses_and_repairs_as_the_systems_do(tmp_path, capsys):
    root = mmsa()
    root["train"]["vision"][3, 2, 1] = np.nan
    path = write(tmp_path, root)
    assert main(["describe", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "row 3, step 2, column 1" in error
    assert main(["describe", str(path), "--repair", "--json"]) == 0
    assert any("replaced by the means" in n for n in json.loads(capsys.readouterr().out)["notes"])
    assert main(["describe", str(tmp_path / "nothing.pkl")]) == 2


@pytest.mark.parametrize("out", ["open", "copy.npz"])
@pytest.mark.parametrize("source", ["aligned", "streams", "back", "npz", "folder"])
def test_what_is_converted_is_read_as_it_was(tmp_path, out, source, capsys):
    if source == "npz":
        path = any_npz(tmp_path)
    elif source == "folder":
        path = folder(tmp_path)
    else:
        root = mmsa() if source == "aligned" else streams(source == "streams", False)
        root["train"]["vision"][1] = 0
        root["test"]["regression_labels"][0] = np.nan
        path = write(tmp_path, root)
    before = load(path, pooled=False)
    assert main(["convert", str(path), str(tmp_path / out)]) == 0
    after = load(tmp_path / out, pooled=False)
    assert after.sha256 == before.sha256 and after.family == before.family and after.aligned == before.aligned
    assert [None if v is None else v.tolist() for v in (after.transcripts, after.videos)] == [
        None if v is None else v.tolist() for v in (before.transcripts, before.videos)
    ]
    assert set(before.notes) <= set(after.notes)
    assert main(["convert", str(path), str(tmp_path / "copy.pkl")]) == 2
    if out == "open":
        assert main(["convert", str(path), str(tmp_path / out)]) == 2 and "already exists" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@needs_real_data
def test_real_files_are_described(capsys):
    assert main(["describe", str(DATA / "meld_views.npz"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["modalities"] == {"text_minilm": 384, "style": 100, "context": 35} and facts["videos"] == 1432
    assert facts["utterances"] == {"train": 9989, "valid": 1109, "test": 2610} and facts["unlabelled"] == 0
    assert facts["family"] == "mosi" and any("--family" in n for n in facts["notes"])
    meld = load(DATA / "meld_views.npz", family="sims")
    assert meld.family == "sims" and meld.clips is not None and meld.videos[0] == "train_0"
    gaps = np.diff(meld.positions)[np.diff(meld.video_index) == 0]
    assert (gaps > 1).sum() == 73
    assert load(MOSI).videos is not None and load(MMMO).describe()["missing"]["text"] == 220
