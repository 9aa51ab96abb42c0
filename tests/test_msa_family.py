"""Which data set a file is scored as, and how that is reported."""

from pathlib import Path

import numpy as np
import pytest

from examples.msa.data import load
from examples.msa.family import family_of

from .msa_files import mmsa, write
from .test_msa_npz import small_npz

SMALL, LARGE = np.array([-1, 0.4, 1, np.nan], np.float32), np.array([-2.4, 3, np.nan], np.float32)


@pytest.mark.parametrize(("path", "labels", "unimodal", "family"), [
    ("SIMS/Processed/unaligned_39.pkl", SMALL, False, "sims"),
    ("CH-SIMSv2/a/b/c.pkl", SMALL, False, "sims"),
    ("cmumosi/x.pkl", SMALL, True, "mosi"),
    ("MOSEI/Processed/aligned_50.pkl", LARGE, False, "mosei"),
    ("MOSI/sims_style/aligned_50.pkl", SMALL, False, "sims"),
    ("MOSI/mosi_to_sims/x.pkl", SMALL, False, "mosi"),
    ("what_i_did_with_sims_at_first/data.pkl", LARGE, False, "mosi"),
    ("all/cmu_mosei_unaligned_50_glove.pkl", LARGE, False, "mosei"),
    ("data.pkl", LARGE, True, "mosi"),
    ("data.pkl", SMALL, True, "sims"),
])  # fmt: skip
def test_path_keys_and_range_tell_the_family(path, labels, unimodal, family):
    found = family_of(Path("/data") / path, labels, unimodal)
    assert found.name == family and found.note is None and found.source


@pytest.mark.parametrize("labels", [SMALL, np.full(3, np.nan, np.float32)])
def test_in_doubt_it_is_mosi_with_a_note(labels):
    found = family_of(Path("/data/x.pkl"), labels)
    assert found.name == "mosi" and "--family" in found.note
    assert family_of(Path("/data/x.pkl"), labels, given="sims").name == "sims"


def test_contradictions_stop():
    with pytest.raises(ValueError, match=r"outside \[-1, 1\] of sims, which was taken from the path .SIMS.*--family"):
        family_of(Path("/data/SIMS/x.pkl"), LARGE)
    with pytest.raises(ValueError, match=r"outside \[-1, 1\] of sims$"):
        family_of(Path("/data/x.pkl"), LARGE, given="sims")
    assert family_of(Path("/data/SIMS/x.pkl"), LARGE, given="mosi").name == "mosi"


@pytest.mark.parametrize(("folder", "sims", "limit", "family"), [
    ("SIMS/Processed", False, 1, "sims"),
    ("set/Processed", True, 3, "mosi"),
    ("set/Processed", False, 1, "mosi"),
    ("set/Processed", True, 1, "sims"),
])  # fmt: skip
def test_files_are_scored_as_their_set(tmp_path_factory, folder, sims, limit, family):
    root = mmsa(sims=sims)
    for part in root.values():
        part["regression_labels"] = np.linspace(-limit, limit, len(part["id"])).astype(np.float32)
    path = tmp_path_factory.mktemp("files") / folder
    path.mkdir(parents=True)
    c = load(write(path, root, "unaligned_39.pkl"))
    assert c.family == family and c.describe()["family_from"] == c.family_from
    assert any("--family" in n for n in c.notes) == (not sims and folder.startswith("set"))


def test_family_is_honoured_for_every_format(tmp_path):
    npz = small_npz(tmp_path, label=np.linspace(-1, 1, 20).astype(np.float32))
    assert load(npz, family="sims").family == "sims" and load(npz, family="sims").label_range == (-1, 1)
    with pytest.raises(ValueError, match="family must be one of"):
        load(npz, family="iemocap")
