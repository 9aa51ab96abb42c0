"""One entry point to every data source, and the command-line options for reading one."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

from .corpus import LABEL_RANGE, Corpus
from .folder import TABLES, load_folder
from .mmsa_pickle import load_mmsa
from .npz import MOSI_SPLITS, load_npz
from .synthetic import PAIRS, synthetic

HDF_MAGIC = b"\x89HDF"


def load(
    path: str | Path | None = None,
    *,
    family: str | None = None,
    split: str = "official",
    blocks: tuple[str, ...] | None = None,
    pooled: bool = True,
    size: int | None = None,
    seed: int = 0,
    pairs: str = "independent",
    video_key: str | None = None,
    id_pattern: str | None = None,
    repair: bool = False,
) -> Corpus:
    """Load a file or folder, or generate the embedded synthetic corpus when there is no path.

    The kind of file is recognised by its content, not its name.

    Args:
        path: A pickle or torch file in the layout of MMSA or MulT, an ``.npz`` with the documented keys, or a folder
            with ``clips.csv`` (or that table itself); None for the synthetic corpus.
        family: ``"mosi"``, ``"mosei"`` or ``"sims"``: metrics and label range, by default inferred from the file; for
            the synthetic corpus also its shapes.
        split: Split of ``mosi.npz``.
        blocks: Feature arrays to take from an ``.npz``.
        pooled: One vector per utterance and modality instead of sequences.
        size: Utterances of the synthetic corpus; as many as the set has when omitted.
        seed: Seed of the synthetic corpus.
        pairs: Kind of pairs in the synthetic corpus, see :func:`examples.msa.synthetic.synthetic`.
        video_key: Key, array or column that holds the video of each utterance, where ids do not show it.
        id_pattern: Regular expression for the whole id, with a group ``video`` and perhaps a group ``clip``.
        repair: Replace features that are not finite by the means of the train part instead of refusing them.

    Raises:
        ValueError: The file cannot be used; the message names the file and the part.
        FileNotFoundError: There is no such file.
    """
    if path is None:
        return synthetic(family or "mosi", seed=seed, size=size, pooled=pooled, pairs=pairs)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if size is not None:
        raise ValueError(f"{path}: a size can be chosen for the synthetic corpus only")
    if video_key is not None and id_pattern is not None:
        raise ValueError(f"{path}: --video-key and --id-pattern both say which video an utterance belongs to: give one")
    reading = {"video_key": video_key, "id_pattern": id_pattern, "repair": repair, "family": family, "pooled": pooled}
    try:
        kind = _kind(path)
        if kind == "npz":
            return load_npz(path, split=split, blocks=blocks, **reading)
        if split != "official" or blocks:
            raise ValueError(f"{path}: splits and blocks can be chosen for .npz files only, splits for mosi.npz only")
        if kind == "folder":
            return load_folder(path if path.is_dir() else path.parent, **reading)
        return load_mmsa(path, **reading)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise ValueError(f"{path}: it cannot be read ({e.strerror or e})") from e


def _kind(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.is_dir() or path.name in TABLES:
        return "folder"
    if path.suffix == ".csv":
        raise ValueError(f"{path}: a table is read under the name clips.csv, in a folder with the features")
    with path.open("rb") as f:
        magic = f.read(512)
        f.seek(max(0, path.stat().st_size - 16))
        end = f.read(16)
    if magic.startswith(HDF_MAGIC):
        raise ValueError(f"{path}: HDF5 (.csd, .h5) is not read: write the features as .npy beside a clips.csv")
    if magic.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path}: one array alone is not a data set: put it beside a clips.csv and name the folder")
    if magic.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the data it stands for: run git lfs pull")
    # A pickle of the old textual form ends with a full stop.
    if _is_text(magic) and not end.rstrip().endswith(b"."):
        raise ValueError(f"{path}: a text; data are a folder with a clips.csv, a pickle, a torch file or an .npz")
    if magic[:4] != b"PK\x03\x04":
        return "pickle"
    try:
        with zipfile.ZipFile(path) as archive:
            return "pickle" if any(n.endswith("data.pkl") for n in archive.namelist()) else "npz"
    except Exception as e:
        # A damaged directory can make zipfile fail in any way.
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({type(e).__name__}: {e})") from e


def _is_text(start: bytes) -> bool:
    text = start.decode("utf-8", errors="ignore")
    # Up to three bytes may belong to a character that continues beyond what was read.
    return len(start) > 0 and len(start) - len(text.encode()) < 4 and all(c.isprintable() or c.isspace() for c in text)


def add_reading_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how a file is to be read."""
    parser.add_argument(
        "--family", choices=sorted(LABEL_RANGE), help="metrics, label range (inferred from the file; synthetic: mosi)"
    )
    parser.add_argument(
        "--split", choices=sorted(MOSI_SPLITS), default="official", help="split of mosi.npz (%(default)s)"
    )
    parser.add_argument("--blocks", nargs="+", metavar="BLOCK", help="feature arrays of an .npz (all of them)")
    parser.add_argument("--video-key", metavar="KEY", help="key, array or column that holds each utterance's video")
    parser.add_argument(
        "--id-pattern", metavar="REGEX", help="form of the whole id, as in '(?P<video>.+)_(?P<clip>[0-9]+)'"
    )
    parser.add_argument(
        "--repair", action="store_true", help="replace features that are not finite by the means of the train part"
    )


def add_data_arguments(parser: argparse.ArgumentParser, pairs: str = "independent") -> None:
    """Add ``--data`` and what goes with it to a system's parser; :func:`load_from` reads them.

    Args:
        parser: The system's parser.
        pairs: Default of ``--pairs``, the kind of pairs in the synthetic corpus.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="pickle, .npz or folder with clips.csv; without it, the embedded synthetic corpus",
    )
    add_reading_arguments(group)
    group.add_argument("--sequences", action="store_true", help="keep token sequences where the source has them")
    group.add_argument("--size", type=int, metavar="N", help="utterances of the synthetic corpus (as in the set)")
    group.add_argument(
        "--data-seed", type=int, default=0, metavar="S", help="seed of the synthetic corpus (%(default)s)"
    )
    group.add_argument(
        "--pairs",
        choices=PAIRS,
        default=pairs,
        help="synthetic corpus: whether what only two modalities together tell lasts over the clips (%(default)s)",
    )


def load_from(args: argparse.Namespace) -> Corpus:
    """The corpus that parsed options of :func:`add_data_arguments` ask for."""
    return load(
        args.data,
        family=args.family,
        split=args.split,
        blocks=tuple(args.blocks) if args.blocks else None,
        pooled=not args.sequences,
        size=args.size,
        seed=args.data_seed,
        pairs=args.pairs,
        video_key=args.video_key,
        id_pattern=args.id_pattern,
        repair=args.repair,
    )
