"""``python -m examples.msa describe FILE`` and ``convert IN OUT``: what a data set holds, or a copy in another form."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .convert import convert
from .corpus import Corpus
from .data import add_reading_arguments, load
from .report import to_json


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m examples.msa", description="Describe data sets, and convert them.")
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    describe = commands.add_parser("describe", help="what a file or folder holds, as the systems read it")
    describe.add_argument("data", type=Path, metavar="FILE", help="pickle, .npz or folder with clips.csv")
    describe.add_argument("--json", action="store_true", help="print JSON")
    add_reading_arguments(describe)
    other = commands.add_parser("convert", help="write a data set as an open folder or as .npz")
    other.add_argument("data", type=Path, metavar="IN", help="pickle, .npz or folder with clips.csv")
    other.add_argument("out", type=Path, metavar="OUT", help="a new folder, or a file that ends in .npz")
    other.add_argument("--pooled", action="store_true", help="means over time instead of sequences")
    add_reading_arguments(other)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors in the data become one line on stderr and exit status 2."""
    args = parser().parse_args(argv)
    try:
        corpus = load(
            args.data,
            family=args.family,
            split=args.split,
            blocks=tuple(args.blocks) if args.blocks else None,
            pooled=args.command == "convert" and args.pooled,
            video_key=args.video_key,
            id_pattern=args.id_pattern,
            repair=args.repair,
        )
        if args.command == "convert":
            print(f"written: {convert(corpus, args.out)}")
        else:
            print(to_json(corpus.describe()) if args.json else _text(corpus), end="")
    except (ValueError, OSError) as e:
        print(f"{args.command}: {e}", file=sys.stderr)
        return 2
    return 0


def _text(corpus: Corpus) -> str:
    facts = corpus.describe()
    missing: Any = facts["missing"]
    steps: Any = facts["sequences"]
    lines = [f"{corpus.name}: family {corpus.family} (from: {corpus.family_from})"]
    for m, width in zip(corpus.modalities, corpus.dims, strict=True):
        length = f"{steps[m]} steps of {width}" if m in steps else f"{width} numbers"
        lines.append(f"  {m}: {length}, missing in {missing[m]} of {len(corpus)} utterances")
    if corpus.sequences:
        lines.append(f"  the sequences are {'' if corpus.aligned else 'not '}aligned")
    parts = ", ".join(f"{n} {split}" for split, n in facts["utterances"].items())
    lines.append(f"  utterances: {parts}; {facts['unlabelled']} without a label; {facts['videos']} videos")
    return "\n".join([*lines, *(f"  note: {note}" for note in corpus.notes)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
