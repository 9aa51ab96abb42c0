"""Options that several of SSLMM's commands share: which modalities are hidden."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from examples.msa.corpus import Corpus
from examples.msa.missing import KINDS, MissingPattern, missing_mask
from examples.msa.patterns import read_mask

from .cell import FROM_FILE


def add_pattern_arguments(parser: argparse._ArgumentGroup | argparse.ArgumentParser, rate: float) -> None:
    """Add the options that :func:`pattern_of` and :func:`mask_for` read; ``rate`` is the default rate."""
    parser.add_argument(
        "--rate", type=float, default=rate, help="share of the modality entries that is hidden (%(default)s)"
    )
    parser.add_argument("--pattern", choices=KINDS, default="exact", help="kind of missing pattern (%(default)s)")
    parser.add_argument(
        "--keep", nargs="+", default=[], metavar="MODALITY", help="with --pattern fixed: what stays, in all utterances"
    )
    parser.add_argument("--mask", type=Path, metavar="FILE.json", help="hide what this file lists, instead of drawing")


def pattern_of(corpus: Corpus, args: argparse.Namespace) -> tuple[str, float, tuple[str, ...]]:
    """Kind, rate and kept modalities that the options ask for; for ``fixed`` and files, the rate is the hidden share.

    Raises:
        ValueError: The options contradict each other.
    """
    if args.keep and args.pattern != "fixed":
        raise ValueError("--keep belongs to --pattern fixed")
    if args.mask is not None:
        if args.pattern != "exact":
            raise ValueError("--mask takes the place of --pattern; give one of them")
        return FROM_FILE, round(read_mask(args.mask, corpus)[1].realised, 6), ()
    if args.pattern == "fixed":
        if not args.keep:
            raise ValueError(f"--pattern fixed needs --keep with some of {', '.join(corpus.modalities)}")
        return "fixed", round(missing_mask(corpus, "fixed", keep=args.keep)[1].rate, 6), tuple(args.keep)
    return args.pattern, args.rate, ()


def mask_for(corpus: Corpus, args: argparse.Namespace, seed: int) -> tuple[np.ndarray, MissingPattern]:
    """Observed entries and pattern for one seed."""
    kind, rate, keep = pattern_of(corpus, args)
    return read_mask(args.mask, corpus) if kind == FROM_FILE else missing_mask(corpus, kind, rate, seed, keep)
