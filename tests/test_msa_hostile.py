"""Files made to do harm or damaged by chance: each raises one clear ValueError, before much memory is allocated."""

import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.msa.convert import convert
from examples.msa.data import load
from examples.msa.npy import FREE_BYTES, read_npy
from examples.msa.safe_pickle import plain, read_pickle

from .msa_files import mmsa


def shared(levels: int) -> bytes:
    """Lists that each hold the previous one twice: a walk through them visits 2 ** levels lists."""
    level = b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(levels))
    return b"\x80\x04]\x94" + level + b"."


def array_state(shape: bytes, data: bytes) -> bytes:
    """The pickle of a float32 array with a forged shape and forged data."""
    whole = pickle.dumps(np.zeros(3, np.float32), protocol=2)
    own = b"K\x01K\x03\x85"
    assert whole.count(own) == 1
    return whole.replace(own, b"K\x01" + shape).replace(b"X\x0c\x00\x00\x00" + bytes(12), data)


HOSTILE_PICKLES = {
    "deep tuples": b")" + b"\x85" * 2_000_000 + b".",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep dictionaries": b"".join(b"}K\x01" for _ in range(100_000)) + b"N" + b"s" * 100_000 + b".",
    "deep by the memo": b"]\x94]\x94h\x00h\x01a0" * 3 + b".",
    "endless bytes": b"\x8e" + struct.pack("<Q", 3 << 30) + b".",
    "endless bytearray": b"\x96" + struct.pack("<Q", 3 << 30) + b".",
    "endless text": b"\x8d" + struct.pack("<Q", 3 << 30) + b".",
    "bytearray by count": b"cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.",
    "shared lists": shared(60),
    "a list in itself": b"]\x94h\x00a.",
    "a dictionary in itself": b"}\x94K\x01h\x00s.",
    "a call of text": b"X\x01\x00\x00\x00a)R.",
    "endless array": array_state(b"\x8a\x05\x00\x00\x00\x00\x01\x85", b"X\x00\x00\x00\x00"),
    "empty array of many rows": array_state(b"\x8a\x05\x00\x00\x00\x00\x01K\x00\x86", b"X\x00\x00\x00\x00"),
    "odd dtype": b"cnumpy\ndtype\nX\x09\x00\x00\x00f4,f4,'((\x85R.",
    "odd codec": b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.",
    "set of lists": b"cbuiltins\nset\n](]]e\x85R.",
    "colliding keys": b"}(" + b"".join(b"\x8a\x09" + struct.pack("<Q", i) + b"\x01N" for i in range(9)) + b"u.",
    "extension": b"\x82\x01.",
    "new object": b"ccollections\nOrderedDict\n)\x81.",
    "persistent id": b"K\x01Q.",
    "no stack": b"0.",
    "no mark": b"e.",
    "many marks": b"(" * 100_000 + b".",
    "long number": b"I" + b"9" * 100_000 + b"\n.",
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles_end_in_one_sentence(tmp_path, name):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(HOSTILE_PICKLES[name])
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"hostile\.pkl") as e:
        plain(load(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert peak < 128 << 20


def test_a_memo_index_allocates_nothing(tmp_path):
    (tmp_path / "memo.pkl").write_bytes(b"]r\xff\xff\xff\x7f.")
    tracemalloc.start()
    assert read_pickle(tmp_path / "memo.pkl") == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_what_is_shared_within_reason_is_read(tmp_path):
    value = [1.0, 2.0, 3.0]
    (tmp_path / "shared.pkl").write_bytes(pickle.dumps([value] * 8 + [np.arange(3)] * 4))
    read = read_pickle(tmp_path / "shared.pkl")
    assert read[:8] == [value] * 8 and plain(read[9]).tolist() == [0, 1, 2]


def test_types_that_are_not_read_matter_only_where_they_are_wanted(tmp_path):
    root = mmsa(n=(2, 2, 2))
    odd = [np.zeros(2, "M8[s]"), np.zeros(2, complex), np.zeros(2, [("a", "f4")]), np.datetime64(0, "s")]
    root["train"]["odd"] = odd
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(root))
    assert len(load(tmp_path / "x.pkl")) == 6
    for array in odd[:3]:
        root["train"]["audio"] = array
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(root))
        with pytest.raises(ValueError, match=r"x\.pkl, split 'train': 'audio' is not an array of numbers"):
            load(tmp_path / "x.pkl")


def test_unwanted_arrays_stay_in_the_file(tmp_path):
    root = {"wanted": np.arange(4.0), "other": np.zeros(1 << 22, np.float32)}
    for protocol in (2, 4, 5):
        (tmp_path / "set.pkl").write_bytes(pickle.dumps(root, protocol=protocol))
        tracemalloc.start()
        assert plain(read_pickle(tmp_path / "set.pkl")["wanted"]).tolist() == [0, 1, 2, 3]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("code", [0x110000, 0xFFFFFFFF, 0xD800])
@pytest.mark.parametrize("order", ["<", ">"])
def test_texts_of_no_character_are_refused(tmp_path, code, order):
    words = np.array(["ab", "cd"], dtype=order + "U2")
    numbers = words.view(order + "u4")
    numbers[3] = code
    np.savez(tmp_path / "x.npz", label=np.zeros(2), x=np.eye(2), utt_id=words)
    with pytest.raises(ValueError, match=r"x\.npz"):
        load(tmp_path / "x.npz")
    root = mmsa(n=(2, 2, 2))
    root["train"]["id"] = words
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(root))
    with pytest.raises(ValueError, match=r"x\.pkl, split 'train': 'id'"):
        load(tmp_path / "x.pkl")


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1") + data


HEADERS = {
    "endless": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }", b"1234"),
    "overflow": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }"),
    "empty rows": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 0), }"),
    "objects": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([None])),
    "records": npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", b"1234"),
    "nested": npy("(" * 9000),
    "no size": npy("{'descr': '<U0', 'fortran_order': False, 'shape': (99,), }"),
    "program": npy("__import__('os').system('true')"),
    "cut off": b"\x93NUMPY\x01\x00\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(tmp_path, name):
    (tmp_path / "x.npy").write_bytes(HEADERS[name])
    with pytest.raises(ValueError, match=r"x\.npy: not a readable \.npy of plain arrays"):
        read_npy(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("label.npy", HEADERS[name])
    with pytest.raises(ValueError, match=r"x\.npz"):
        load(tmp_path / "x.npz")


def test_a_small_archive_does_not_unfold_to_gigabytes(tmp_path):
    rows = 2 * FREE_BYTES // 4000
    header = npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 1000), }}")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x.npy", "w") as f:
            f.write(header)
            for _ in range(rows):
                f.write(bytes(4000))
        archive.writestr(
            "label.npy", npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows},), }}", bytes(4 * rows))
        )
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.npz.*unfolds to 1342\d+ bytes"):
        load(tmp_path / "bomb.npz")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packings_are_refused(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", kind) as archive:
        archive.writestr("label.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"1234"))
    with pytest.raises(ValueError, match=r"x\.npz: .*packed"):
        load(tmp_path / "x.npz")


def test_only_wanted_arrays_of_an_archive_are_read(tmp_path):
    n = 6
    junk = np.array([b"x" * 99] * 9, dtype=object).reshape(3, 3)
    arrays = {"label": np.zeros(n), "x": np.eye(n), "y": np.eye(n), "utt_id": np.array(list("abcdef")), "junk": junk}
    np.savez(tmp_path / "x.npz", **arrays)
    assert "the array 'junk' holds objects and is not read" in load(tmp_path / "x.npz").notes
    data = (tmp_path / "x.npz").read_bytes()
    assert data.count(np.eye(n).tobytes()) == 2
    (tmp_path / "x.npz").write_bytes(np.ones((n, n)).tobytes().join(data.rsplit(np.eye(n).tobytes(), 1)))
    assert len(load(tmp_path / "x.npz", blocks=("x",))) == n
    with pytest.raises(ValueError, match=r"x\.npz"):
        load(tmp_path / "x.npz")


@pytest.mark.parametrize("magic", [b"\x89HDF\r\n\x1a\n" + bytes(99), b"PK\x03\x04" + bytes(99), npy("x")])
def test_other_files_are_named_for_what_they_are(tmp_path, magic):
    (tmp_path / "set.csd").write_bytes(magic)
    with pytest.raises(ValueError, match=r"set\.csd"):
        load(tmp_path / "set.csd")
    (tmp_path / "table.csv").write_text("id\na\n")
    with pytest.raises(ValueError, match=r"read under the name clips\.csv"):
        load(tmp_path / "table.csv")
    with pytest.raises((ValueError, FileNotFoundError), match="/dev/null"):
        load("/dev/null")


def originals(folder: Path) -> list[Path]:
    """One small file or folder of each kind that `load` reads."""
    root = mmsa(n=(3, 2, 2))
    files = []
    for protocol in (0, 2, 4, 5):
        files.append(folder / f"{protocol}.pkl")
        files[-1].write_bytes(pickle.dumps(root, protocol=protocol))
    tensors = {
        s: {k: torch.from_numpy(v) if k in ("text", "audio") else v for k, v in p.items()} for s, p in root.items()
    }
    (folder / "tensors.pkl").write_bytes(pickle.dumps(tensors))
    torch.save(tensors, folder / "set.pt")
    corpus = load(files[0], pooled=False)
    convert(corpus, folder / "set.npz")
    np.savez(
        folder / "stored.npz", **{m: x for m, x in corpus.features.items()}, label=corpus.labels, split=corpus.split
    )
    convert(corpus, folder / "open")
    return [
        *files,
        folder / "tensors.pkl",
        folder / "set.pt",
        folder / "set.npz",
        folder / "stored.npz",
        folder / "open",
    ]


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to three changes: flipped, replaced, deleted, doubled, set to special values, or cut off."""
    result = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if not result:
            break
        at = int(rng.integers(len(result)))
        span = int(rng.integers(1, 9))
        # Small changes get further into a reader than cuts do.
        kind = rng.choice([0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 5, 6])
        if kind == 0:
            result[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            result[at : at + span] = rng.bytes(span)
        elif kind == 2:
            del result[at : at + span]
        elif kind == 3:
            result[at:at] = result[at : at + span * 8]
        elif kind == 4:
            result[at : at + span] = b"\xff" * span
        elif kind == 5:
            result[at : at + 1] = bytes([rng.choice(list(b"]}()\x85\x86\x87\x94hjr.\x8e\x96RbcQea0tlud"))])
        else:
            del result[at:]
    return bytes(result)


def mutate_member(source: Path, target: Path, rng: np.random.Generator) -> Path:
    """A valid zip file with a damaged member: the checksums of the members do not reveal the damage."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", old.infolist()[0].compress_type) as new:
        victim = int(rng.integers(len(old.namelist())))
        for i, name in enumerate(old.namelist()):
            new.writestr(name, mutate(old.read(name), rng) if i == victim else old.read(name))
    return target


def check_mutants(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read ``count`` damaged files: each is either read as a corpus or raises one ValueError that names the file."""
    rng = np.random.default_rng(seed)
    (folder / "originals").mkdir()
    sources = originals(folder / "originals")
    outcome = {"read": 0, "refused": 0}
    for number in range(count):
        source = sources[number % len(sources)]
        if source.is_dir():
            target = folder / "open"
            target.mkdir(exist_ok=True)
            for file in source.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            victim = sorted(target.iterdir())[int(rng.integers(len(list(target.iterdir()))))]
            victim.write_bytes(mutate(victim.read_bytes(), rng))
        elif source.suffix in (".npz", ".pt") and number % 4 > 0:
            target = mutate_member(source, folder / f"mutant{source.suffix}", rng)
        else:
            target = folder / f"mutant{source.suffix}"
            target.write_bytes(mutate(source.read_bytes(), rng))
        try:
            corpus = load(target, pooled=bool(number % 2), repair=bool(number % 3 == 0))
            assert len(corpus) > 0
            corpus.describe()
            outcome["read"] += 1
        except ValueError as e:
            assert str(folder) in str(e), f"file {number}: {e}"
            outcome["refused"] += 1
    return outcome


def test_damaged_files_are_read_or_refused(tmp_path):
    outcome = check_mutants(tmp_path, 450, seed=0)
    assert outcome["read"] > 0 and outcome["refused"] > 0


# Ten thousand files take minutes.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_ten_thousand_damaged_files(tmp_path, seed):
    outcome = check_mutants(tmp_path, 2500, seed)
    print(f"\nseed {seed}: {sum(outcome.values())} damaged files, {outcome['read']} read, {outcome['refused']} refused")
    assert sum(outcome.values()) == 2500 and min(outcome.values()) > 0
