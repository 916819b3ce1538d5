"""What it costs to know where words and sentences begin: encoding with and without `.marks`.

    python benchmarks/boundaries.py TEXT.jsonl[.gz|.zst] [--tokenizer FOLDER ...] [--megabytes 3]
                                    [--json]

CPU time of one process, the rows of a table measured in turns: compare them by their ratios. Of the
texts of the first kind of row the ruler (borders.py) is sure; the sentences of the others are
encoded a second time. Without `--tokenizer` vocabularies are trained on the text itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.tokenizer import read  # noqa: E402
from configs.encoding import Tokenizing  # noqa: E402
from data_pipeline import tokenizer  # noqa: E402
from data_pipeline.encode import make_tokenizer  # noqa: E402
from data_pipeline.encoder import Encoder  # noqa: E402
from data_pipeline.gaps import gap_units  # noqa: E402

TRAINED = {
    "cpm": Tokenizing("cpm", vocab_size=8000),
    "wordpiece, words": Tokenizing("wordpiece", vocab_size=8000),
    "wordpiece, characters": Tokenizing("wordpiece", vocab_size=3000, word=False),
    "byte_bpe": Tokenizing("byte_bpe", vocab_size=8000),
}


def seconds(work: Callable[[], object]) -> float:
    """CPU time of a run."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measured(folder: Path, texts: list[str], rounds: int) -> dict[str, float]:
    """One row."""
    words = tokenizer.load(folder)
    records = [{"text": text} for text in texts]
    plain, marked = Encoder(words, boundaries=False), Encoder(words, boundaries=True)
    read = plain.read(records)
    ids = [found[:-1] for found in np.split(read.ids, np.cumsum(read.lengths)[:-1])]
    work: dict[str, Callable[[], object]] = {
        "ids": lambda: plain.read(records),
        "marks": lambda: marked.read(records),
        "gaps": lambda: gap_units(texts, ids, words),
    }
    for run in work.values():
        run()
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, run in work.items():
            best[name] = min(best[name], seconds(run))
    assert marked.borders is not None
    _, sure = marked.borders._along_the_ruler(texts, words.encode_together(texts))
    size = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "ids MB/s": size / best["ids"],
        "with marks MB/s": size / best["marks"],
        "ratio": best["marks"] / best["ids"],
        "sure": sum(sure) / len(sure),
        "gaps docs/s": len(texts) / best["gaps"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path, action="append", default=[])
    parser.add_argument("--megabytes", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts = [text[:1500] for text in read(options.text, 10 * options.megabytes, 50)]
    while sum(len(text.encode()) for text in texts) > options.megabytes * 1e6:
        texts = texts[::2]
    with tempfile.TemporaryDirectory() as place:
        folders = {folder.name: folder for folder in options.tokenizer}
        for number, (name, config) in enumerate(() if folders else TRAINED.items()):
            folders[name] = Path(place) / str(number)
            make_tokenizer(config, texts, folders[name])
        rows = {name: measured(folder, texts, options.rounds) for name, folder in folders.items()}
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{len(texts)} texts of up to 1,500 characters")
    for name, row in rows.items():
        print(f"{name:24}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
