"""The corpus of benchmarks/growth_savings.py: every n-th document of the development data.

    python -m benchmarks.growth_data DATA.jsonl.zst OUT [--every 5] [--vocab 1024]

Byte BPE of a small vocabulary, so that a model in miniature is made of layers and not of its head:
the head takes part in every step of the small model and of the large one, and hides what a growth
of layers saves. Writes OUT/text.jsonl and builds OUT/corpus.
"""

import argparse
import io
from pathlib import Path

import yaml
import zstandard

from launch.cli import main as launch


def main() -> None:
    """Write the text, build the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=1024)
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    text = words.out / "text.jsonl"
    with words.data.open("rb") as raw, text.open("w", encoding="utf-8") as out:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), encoding="utf-8")
        out.writelines(line for number, line in enumerate(lines) if number % words.every == 0)
    page = {
        "data": {
            "out": str(words.out / "corpus"),
            "sources": [{"kind": "jsonl", "name": "growth", "path": str(text)}],
        },
        "split": {"valid_fraction": 0.03},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": words.vocab, "sample_bytes": 8_000_000},
        "encode": {"boundaries": False},
    }
    (words.out / "corpus.yaml").write_text(yaml.safe_dump(page, allow_unicode=True), "utf-8")
    raise SystemExit(launch(["corpus", str(words.out / "corpus.yaml")]))


if __name__ == "__main__":
    main()
