"""The texts that docs/learning.md measures on, out of the development corpus.

python -m benchmarks.learning_data $BAJIE_DEV_DATA learning

data/dev-open.jsonl.zst --genre--> learning/laws.jsonl     laws and local regulations
                                   learning/modern.jsonl   all but verse, classics and novels
eval/csl/title_train_3k.tsv -----> learning/titles-100.tsv its first 100 papers
"""

import argparse
import io
import json
from pathlib import Path

import zstandard

OLD = ("poetry", "classical-prose", "vernacular-novel")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="the development data ($BAJIE_DEV_DATA)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--titles", type=int, default=116, help="papers to learn titles from")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    packed = words.source / "data" / "dev-open.jsonl.zst"
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    with (
        open(packed, "rb") as stream,
        open(words.out / "laws.jsonl", "w", encoding="utf-8") as laws,
        open(words.out / "verse.jsonl", "w", encoding="utf-8") as verse,
        open(words.out / "modern.jsonl", "w", encoding="utf-8") as modern,
    ):
        for line in io.TextIOWrapper(reader.stream_reader(stream), encoding="utf-8"):
            genre = json.loads(line)["genre"]
            if genre == "law":
                laws.write(line)
            if genre == "poetry":
                verse.write(line)
            if genre not in OLD:
                modern.write(line)
    rows = (words.source / "eval/csl/title_train_3k.tsv").read_text("utf-8").splitlines(True)
    (words.out / "titles.tsv").write_text("".join(rows[: words.titles]), "utf-8")


if __name__ == "__main__":
    main()
