"""One door to every data source, and the command-line options both systems share for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .corpus import Corpus
from .mmsa_pickle import load_mmsa
from .npz import MOSI_BLOCKS, MOSI_SPLITS, load_npz
from .synthetic import PAIRS, SHAPES, synthetic

ZIP_MAGIC = b"PK\x03\x04"


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
) -> Corpus:
    """Load a file, or generate the embedded synthetic corpus when there is no path.

    The kind of file is told by its first bytes, not its name.

    Args:
        path: An MMSA pickle or one of the project's ``.npz`` files; None for the synthetic corpus.
        family: ``"mosi"``, ``"mosei"`` or ``"sims"``; for a pickle the metric family, for the synthetic corpus its
            shapes.
        split: Split of ``mosi.npz``.
        blocks: Feature blocks of ``mosi.npz``.
        pooled: One vector per utterance and modality instead of sequences (``mosi.npz`` has no sequences).
        size: Utterances of the synthetic corpus; all of the set's when omitted.
        seed: Seed of the synthetic corpus.
        pairs: Of the synthetic corpus: :func:`examples.msa.synthetic.synthetic` says what it changes.

    Raises:
        ValueError: The file cannot be used; the message names the file and the part.
        FileNotFoundError: There is no such file.
    """
    if path is None:
        return synthetic(family or "mosi", seed=seed, size=size, pooled=pooled, pairs=pairs)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with path.open("rb") as f:
        magic = f.read(len(ZIP_MAGIC))
    if size is not None:
        raise ValueError(f"{path}: a size can be chosen for the synthetic corpus only")
    if magic == ZIP_MAGIC:
        return load_npz(path, split=split, blocks=blocks, pooled=pooled)
    if split != "official" or blocks:
        raise ValueError(f"{path}: splits and blocks can be chosen for mosi.npz only")
    return load_mmsa(path, family=family, pooled=pooled)


def add_data_arguments(parser: argparse.ArgumentParser, pairs: str = "independent") -> None:
    """Add ``--data`` and what goes with it to a system's parser; :func:`load_from` reads them.

    Args:
        parser: The system's parser.
        pairs: The synthetic corpus the system takes unless told otherwise.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="MMSA pickle or project .npz; without it, the embedded synthetic corpus",
    )
    group.add_argument(
        "--family", choices=sorted(SHAPES), help="metric family of a pickle, or shapes of the synthetic corpus (mosi)"
    )
    group.add_argument(
        "--split", choices=sorted(MOSI_SPLITS), default="official", help="split of mosi.npz (%(default)s)"
    )
    group.add_argument(
        "--blocks",
        nargs="+",
        choices=MOSI_BLOCKS,
        metavar="BLOCK",
        help=f"feature blocks of mosi.npz: {', '.join(MOSI_BLOCKS)}",
    )
    group.add_argument("--sequences", action="store_true", help="keep token sequences where the source has them")
    group.add_argument("--size", type=int, metavar="N", help="utterances of the synthetic corpus (all of the set's)")
    group.add_argument(
        "--data-seed", type=int, default=0, metavar="S", help="seed of the synthetic corpus (%(default)s)"
    )
    group.add_argument(
        "--pairs",
        choices=PAIRS,
        default=pairs,
        help="synthetic corpus: whether what two modalities tell only together lasts over the clips (%(default)s)",
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
    )
