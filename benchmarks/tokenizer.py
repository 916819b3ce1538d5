"""How fast text becomes words and ids: MB of UTF-8 a second of one process.

    python benchmarks/tokenizer.py TEXT.jsonl[.gz|.zst] [--cpm chinese_vocab.model]
                                   [--bert vocab.txt] [--roformer vocab.txt] [--json]

Rows of one table were measured in turns in one process: compare them by their ratios, not with the
rows of another machine. Without `--cpm` a vocabulary is trained on the text itself.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jieba  # noqa: E402
import rjieba  # noqa: E402
import zstandard  # noqa: E402

from data_pipeline import segment, tokenizer, training, wordpiece  # noqa: E402


def read(path: Path, megabytes: float, every: int) -> list[str]:
    """Every `every`-th text of a jsonl, of `megabytes` of UTF-8 at most; a long one in part."""
    texts: list[str] = []
    left = megabytes * 1e6
    with path.open("rb") as file:
        stream: io.BufferedIOBase = file
        if path.suffix == ".gz":
            stream = gzip.open(file)  # noqa: SIM115
        elif path.suffix == ".zst":
            reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file)
            stream = io.BufferedReader(reader)  # type: ignore[type-var]
        for number, line in enumerate(stream):
            if number % every:
                continue
            text = json.loads(line)["text"][:20_000]
            texts.append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    return texts


def reference() -> jieba.Tokenizer:
    """jieba with its dictionary in memory, and no cache file in the temporary folder."""
    made = jieba.Tokenizer()
    made.FREQ, made.total = made.gen_pfdict(
        resources.files("jieba").joinpath("dict.txt").open("rb")
    )
    made.initialized = True
    return made


def bert_tokenizer(vocabulary: Path) -> Callable[[str], object]:
    """transformers' way from a text to ids, in its compiled part alone."""
    from transformers import BertTokenizer

    theirs = BertTokenizer.from_pretrained(vocabulary.parent).backend_tokenizer
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


def measure(rows: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Row -> its best CPU seconds, the rows taking turns."""
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(rounds):
        for name, work in rows.items():
            start = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", type=Path, help="a jsonl file with a `text` in each line")
    parser.add_argument("--cpm", type=Path, help="the published chinese_vocab.model")
    parser.add_argument("--bert", type=Path, help="a vocab.txt, read as characters")
    parser.add_argument("--roformer", type=Path, help="a vocab.txt, read as words")
    parser.add_argument("--vocab", type=int, default=8000, help="size of trained vocabularies")
    parser.add_argument("--megabytes", type=float, default=4.0, help="of text to read")
    parser.add_argument("--every", type=int, default=1, help="read one document of so many")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the best counts")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    said = parser.parse_args()
    texts = read(said.texts, said.megabytes, said.every)
    size = sum(len(text.encode()) for text in texts) / 1e6

    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        byte_bpe = training.train("byte_bpe", texts, folder, said.vocab)
        learning = {f"train byte_bpe {said.vocab}": time.process_time() - start}
        if said.cpm:
            cpm = tokenizer.from_cpm_model(said.cpm, folder)
        else:
            start = time.process_time()
            cpm = training.train("cpm", texts, folder, said.vocab)
            learning[f"train cpm {said.vocab}"] = time.process_time() - start
    slow = reference()
    marked = [text.replace(" ", "▂").replace("\n", "▃") for text in texts]
    spaced = segment.spaced(marked)
    rows: dict[str, Callable[[], object]] = {
        "words: jieba 0.42.1": lambda: [list(slow.cut(text)) for text in texts],
        "words: rjieba alone (other words)": lambda: [rjieba.cut(text, True) for text in texts],
        "words: segment.words": lambda: [segment.words(text) for text in texts],
        "words: segment.spaced": lambda: segment.spaced(texts),
        "cpm: segmenter alone": lambda: segment.spaced(marked),
        "cpm: sentencepiece alone": lambda: cpm._sentencepiece(spaced),
        "cpm: encode": lambda: cpm.encode_batch(texts),
        "cpm: encode_marked": lambda: cpm.encode_marked(texts),
        "byte_bpe: encode": lambda: byte_bpe.encode_batch(texts),
        "byte_bpe: encode_marked": lambda: byte_bpe.encode_marked(texts),
    }
    published: dict[str, tokenizer.Tokenizer | wordpiece.WordPiece] = {}
    if said.bert:
        published["bert"] = wordpiece.WordPiece(said.bert.read_bytes(), word=False)
        theirs = bert_tokenizer(said.bert)
        rows["bert: transformers' BertTokenizer"] = lambda: [theirs(text) for text in texts]
    if said.roformer:
        published["roformer"] = wordpiece.WordPiece(said.roformer.read_bytes(), word=True)
        rows["words: segment.words without HMM"] = lambda: segment.words("\n".join(texts), False)
    for name, made in published.items():
        rows[f"{name}: encode"] = functools.partial(made.encode_batch, texts)
        rows[f"{name}: encode_marked"] = functools.partial(made.encode_marked, texts)
    seconds = measure(rows, said.rounds) | learning
    speeds = {name: size / s for name, s in seconds.items()}
    characters = sum(map(len, texts))
    published |= {"cpm": cpm, "byte_bpe": byte_bpe}
    per_token = {
        name: characters / sum(map(len, made.encode_batch(texts)))
        for name, made in published.items()
    }
    alone = seconds["cpm: segmenter alone"] + seconds["cpm: sentencepiece alone"]
    cost = seconds["cpm: encode"] / alone
    if said.json:
        found = {"mb": size, "mb_per_s": speeds, "characters_per_token": per_token}
        print(json.dumps(found | {"cpm_cost": cost}))
        return
    print(f"{len(texts)} documents, {size:.1f} MB, the best of {said.rounds} rounds")
    jiebas = speeds["words: jieba 0.42.1"]
    for name, speed in speeds.items():
        ratio = f"{speed / jiebas:6.1f} x jieba" if name.startswith("words") else ""
        print(f"{name:36} {speed:8.2f} MB/s {ratio}".rstrip())
    print(f"{'cpm: encode / the two alone':36} {cost:8.2f} (bar: 1.25)")
    for kind, value in per_token.items():
        print(f"{kind + ': characters a token':36} {value:8.2f}")


if __name__ == "__main__":
    main()
