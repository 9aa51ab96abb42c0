"""Videos and clips, read from ids in the forms that people use."""

import numpy as np
import pytest

from examples.msa.conversations import SINGLE, utterances
from examples.msa.data import load

from .msa_files import mmsa, write

VIDEOS = ["ab", "ab", "c_1", "c_1", "c_1"]
CLIPS = [10, 2, 0, 1, 5]


def read(ids, **options):
    found = utterances("file", ids, **options)
    order = found.order()
    return [(found.videos[i], found.clips[i]) for i in order], found.notes


@pytest.mark.parametrize("form", [
    lambda v, c: f"{v}$_${c}",
    lambda v, c: f"{v}[{c}]",
    lambda v, c: f"{v}_{c}",
    lambda v, c: f"{v}/{c:04d}",
    lambda v, c: f"{v}/{c}.mp4",
    lambda v, c: f"{v}-{c}",
    lambda v, c: f"{v}#{c}",
    lambda v, c: (v, c),
    lambda v, c: (v, str(c)),
])  # fmt: skip
def test_forms_of_ids(form):
    pairs, notes = read([form(v, c) for v, c in zip(VIDEOS, CLIPS, strict=True)])
    assert pairs == [("ab", 2), ("ab", 10), ("c_1", 0), ("c_1", 1), ("c_1", 5)] and SINGLE not in notes


def test_forms_of_dialogue_sets():
    assert read(["dia0_utt10", "dia0_utt9", "dia1_utt0"])[0] == [("dia0", 9), ("dia0", 10), ("dia1", 0)]
    pairs, _ = read(["Ses01F_impro01_F000", "Ses01F_impro01_M001", "Ses01F_impro02_F000"])
    assert pairs == [("Ses01F_impro01", 0), ("Ses01F_impro01", 1), ("Ses01F_impro02", 0)]


def test_times_order_clips_but_are_no_numbers():
    found = utterances("file", [("a", 7.5, 9.0), ("a", 0.5, 3.0), ("b", 1.0, 2.0)])
    order = found.order()
    assert order.tolist() == [1, 0, 2] and found.numbers(order, np.array([0, 2, 3])) is None


@pytest.mark.parametrize("ids", [
    [7, 8, 9], ["train_1", "train_2", "test_3"], ["sample_1", "sample_2"], ["x", "y"], ["a_1", "b_2"], ["a_1", "a_1x"],
])  # fmt: skip
def test_ids_that_tell_no_video_are_said_to(ids):
    found = utterances("file", ids)
    assert len(set(found.videos)) == len(ids) and found.notes == [SINGLE]
    assert "--video-key" in SINGLE and "--id-pattern" in SINGLE


def test_a_form_that_is_a_guess_is_said():
    assert read(["v1_0", "v1_1", "v2_0"])[1] == ["ids are read as video and clip: 'v1_0' is clip 0 of 'v1'"]
    assert read(["v1$_$0", "v1$_$1", "v2$_$0"])[1] == []


def test_patterns_and_keys_say_it_for_other_forms():
    ids = ["2of_a", "1of_a", "1of_b"]
    assert read(ids, pattern=r"(?P<clip>\d+)of_(?P<video>.)")[0] == [("a", 1), ("a", 2), ("b", 1)]
    assert read(ids, pattern=r"\d+of_(.)")[0] == [("a", 0.0), ("a", 1.0), ("b", 2.0)]
    assert read(ids, videos=["y", "x", "x"])[0] == [("x", 1.0), ("x", 2.0), ("y", 0.0)]
    assert read(ids, videos=[1, 1, 0], clips=["9", "8", "7"])[0] == [(0, 7), (1, 8), (1, 9)]


@pytest.mark.parametrize(("ids", "options", "message"), [
    (["a_1", "b"], {"pattern": r"(.)_\d"}, "file: the id 'b' does not match --id-pattern"),
    (["a_1"], {"pattern": r"._\d"}, "needs a group for the video"),
    (["a_1"], {"pattern": "("}, "is not a regular expression"),
    (["a", "b", "a"], {}, "the id 'a' occurs 2 times"),
    (["a" * 501], {}, "more than 500 characters"),
])  # fmt: skip
def test_wrong_ids_are_named(ids, options, message):
    with pytest.raises(ValueError, match=message):
        utterances("file", ids, **options)


IDS = {
    "brackets": lambda v, c: f"{v}[{c}]",
    "underscore": lambda v, c: f"{v}_{c}",
    "bytes": lambda v, c: f"{v}_{c}".encode(),
    "tuple": lambda v, c: (v, c),
    "list of bytes": lambda v, c: [v.encode(), str(c).encode()],
    "own list": lambda v, c: [f"{v}$_${c}"],
}


@pytest.mark.parametrize("form", IDS)
@pytest.mark.parametrize("array", [False, True])
def test_files_keep_conversations(tmp_path, form, array):
    root = mmsa(n=(6, 3, 4))
    for name, part in root.items():
        n = len(part["id"])
        ids = [IDS[form](f"{name}{i // 2}", 10 - i) for i in range(n)]
        part["id"] = np.array(ids, dtype=object) if array else ids
    c = load(write(tmp_path, root))
    assert len(c.video_ptr) - 1 == 7 and np.diff(c.video_ptr).tolist() == [2, 2, 2, 2, 2, 2, 1]
    assert c.positions.tolist()[:4] == [9, 10, 7, 8] and c.videos[0] == "test0"


def test_integers_of_each_split_and_a_key_for_the_video(tmp_path):
    root = mmsa(n=(6, 3, 4))
    for part in root.values():
        part["id"] = np.arange(len(part["id"]))
    c = load(write(tmp_path, root))
    assert len(c.video_ptr) - 1 == 13 and SINGLE in c.notes and "train/0" in c.utterance_ids
    for name, part in root.items():
        part["film"] = [f"{name}{i // 3}" for i in range(len(part["id"]))]
    c = load(write(tmp_path, root), video_key="film")
    assert np.diff(c.video_ptr).tolist() == [3, 1, 3, 3, 3] and SINGLE not in c.notes
    with pytest.raises(ValueError, match=r"split 'train': it lacks the key 'movie' of --video-key"):
        load(write(tmp_path, root), video_key="movie")
    with pytest.raises(ValueError, match="give one"):
        load(write(tmp_path, root), video_key="film", id_pattern="(.)")


def test_gaps_between_clips_stay_visible(tmp_path):
    root = mmsa(n=(3, 3, 4))
    root["train"]["id"] = ["v[4]", "v[1]", "v[9]"]
    c = load(write(tmp_path, root))
    rows = c.rows("train")
    assert c.positions[rows].tolist() == [1, 4, 9] and c.utterance_ids[rows].tolist() == ["v[1]", "v[4]", "v[9]"]
