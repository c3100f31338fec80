"""Turn text into tokens on the disk, once, for train_gpt.py.

    python examples/prepare.py shakespeare --out data/shakespeare
    python examples/prepare.py notes/ --out data/notes --vocab-size 8192

A source is a UTF-8 text file, a folder of .txt and .md files, a .csv or .jsonl file with the field `text`, or one of the
built-in sources shakespeare, imdb and bbc. Texts that occur twice are taken once. Training and validation share no
document (a single document is cut). Below --out appears a folder with train.bin and val.bin, which are memory-mapped in
training, tokenizer.json and manifest.json; it is named after a hash of the text and the settings.
train_gpt.py prepares its data by itself; this script does it beforehand, for several runs with --tokens, and shows what
came out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import corpus
import training
from corpus import DataError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="file, folder or built-in source")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for the tokens (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="size of the byte-pair vocabulary (%(default)s)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share of the text held out (%(default)s)")
    arguments = parser.parse_args(argv)
    try:
        sizes = arguments.vocab_size, arguments.val_fraction
        prepared = corpus.prepare(arguments.source, arguments.out, *sizes, training.say)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    training.say(json.dumps(prepared.manifest, indent=2))
    pieces = [prepared.tokenizer.decode([token]) for token in prepared.train[:40].tolist()]
    training.say(f"the first tokens: {'|'.join(pieces)!r}")
    training.say(f"in {prepared.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
