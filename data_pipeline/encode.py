"""Kept documents -> token ids; and the tokenizer that makes them, trained or published.

    train documents --lines, spread evenly--> at most sample_bytes of text --> tokenizer/
    documents --batches of a MB--> token ids + end of document --> index (.bin, .idx)

Encoding is a step of its own, keyed by the tokenizer's files: another tokenizer costs no cleaning.
"""

import importlib.metadata
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.encoding import Tokenizing
from data_pipeline import tokenizer, vocabulary, wordpiece
from data_pipeline.aside import sync_folder
from data_pipeline.blocks import SPLITS, Block, Documents
from data_pipeline.index import IndexWriter
from data_pipeline.ingest import first_place
from data_pipeline.shards import CorpusError, records

BATCH_CHARACTERS = 500_000
TEXT_PER_SAMPLE = 50  # so many times the sample is looked through for it, not a whole web
LARGEST_UINT16_VOCABULARY = 65_500
TOKENIZERS = ("alphabet", "frozen", "segment", "tokenizer", "vocabulary", "wordpiece")
"""The code of ids and marks."""

_load = lru_cache(maxsize=1)(tokenizer.load)


def versions() -> dict[str, str]:
    """What a trained tokenizer depends on beside its text and our code."""
    guests = {name: importlib.metadata.version(name) for name in ("sentencepiece", "rjieba")}
    return guests | {"unicode": unicodedata.unidata_version}


def model_files(config: Tokenizing) -> list[Path]:
    """The files of a published tokenizer and of a base vocabulary, whose contents key the build."""
    files: list[Path] = []
    for key in ("model", "base_vocab"):
        if (named := getattr(config, key)) is not None:
            path = _place(key, named)
            files += sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    return files


def _place(key: str, named: str) -> Path:
    path = first_place(named)
    if path is None:
        raise CorpusError(f"tokenizer.{key}: there is no file or folder '{named}' (找不到分词模型)")
    return path


def make_tokenizer(config: Tokenizing, texts: Iterable[str], out: Path) -> None:
    """Train on a sample of the texts, or take the published model, into the folder `out`, which
    appears when it is whole. ValueError if the text does not support the vocabulary."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    partial.mkdir(parents=True)
    if config.model is not None:
        _freeze(config, _place("model", config.model), partial)
    else:
        assert config.vocab_size is not None
        _train(config, config.vocab_size, texts, partial)
    partial.rename(out)
    sync_folder(out.parent)


def _train(config: Tokenizing, vocab_size: int, texts: Iterable[str], out: Path) -> None:
    if config.kind != "wordpiece":
        tokenizer.train(config.kind, texts, out, vocab_size, sample_bytes=config.sample_bytes)
        return
    base = config.base_vocab
    vocabulary.build(
        tokenizer.sample(texts, config.sample_bytes),
        out,
        vocab_size,
        word=config.word,
        base=None if base is None else _place("base_vocab", base),
        dictionary_words=config.dictionary_words,
    )


def _freeze(config: Tokenizing, path: Path, out: Path) -> None:
    """A published model as it is: a tokenizer/ folder, CPM's model, or a vocab.txt."""
    if path.is_dir():
        tokenizer.load(path).save(out)
    elif config.kind == "cpm":
        tokenizer.from_cpm_model(path, out)
    elif config.kind == "wordpiece":
        wordpiece.from_vocabulary(path, out, config.word)
    else:
        raise CorpusError(
            f"tokenizer.model: '{config.model}' is a file, of CPM or of wordpiece, tokenizer.kind"
            f" is {config.kind}; set it to cpm, or name a tokenizer/ folder (种类不符)"
        )
    made = tokenizer.load(out)
    if made.kind != config.kind:
        raise CorpusError(
            f"tokenizer.model: '{config.model}' is of kind {made.kind}, tokenizer.kind is "
            f"{config.kind}; make them the same (种类不符)"
        )
    if isinstance(made, wordpiece.WordPiece) and made.word != config.word:
        raise CorpusError(
            f"tokenizer.model: '{config.model}' was frozen with word {str(made.word).lower()}, "
            f"tokenizer.word is {str(config.word).lower()}; make them the same (设置不符)"
        )


def encode(texts: Iterable[str], folder: Path, prefix: Path) -> Iterator[tuple[int, int]]:
    """Write each text's token ids and the end-of-document id as one document of an index; yields
    (tokens, bytes of text) batch by batch."""
    words = _load(folder)
    end = np.array([words.eod_id], dtype=np.int32)
    dtype = np.uint16 if words.vocab_size < LARGEST_UINT16_VOCABULARY else np.int32
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexWriter(prefix, dtype) as index:
        for batch in _batches(texts):
            tokens = 0
            for ids in encoded(batch, words):
                index.add_document(np.concatenate([ids, end]))
                tokens += len(ids) + 1
            yield tokens, sum(len(text.encode()) for text in batch)


def encoded(
    batch: list[str], words: tokenizer.Tokenizer | wordpiece.WordPiece
) -> Iterator[np.ndarray]:
    """The ids of each text. A book on its own is encoded some lines at a time: words and pieces end
    at a line break, so that the ids are the same, and memory does not grow with the book."""
    if len(batch) > 1 or len(batch[0]) < 2 * BATCH_CHARACTERS:
        yield from words.encode_batch(batch)
    else:
        yield np.concatenate([words.encode(lines) for lines in _pieces(batch[0])])


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + BATCH_CHARACTERS) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and len(text) >= 2 * BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- blocks


class MakeTokenizer(Block):
    """Train a tokenizer on a sample of the train split, or take a published one."""

    name = "tokenizer"
    modules: ClassVar = ("encode", *TOKENIZERS)

    def __init__(self, config: Tokenizing, shards: list[Path], train_bytes: int) -> None:
        super().__init__(config=config, versions=versions())
        self.config, self.shards, self.train_bytes = config, shards, train_bytes

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write data/tokenizer/."""
        make_tokenizer(self.config, self._texts(rank), self.folder / "data" / "tokenizer")
        self.tick(self.train_bytes, rank, final=True)
        yield from ()

    def _texts(self, rank: int) -> Iterator[str]:
        every = max(1, self.train_bytes // (TEXT_PER_SAMPLE * self.config.sample_bytes))
        done = 0
        for path in self.shards[::every]:
            for record in records(path):
                yield record["text"]
                done += len(record["text"].encode()) * every
                self.tick(done, rank)


class Encode(Block):
    """A shard's train and valid documents as token ids, each in an index of its own."""

    name = "encode"
    modules: ClassVar = ("encode", "index", *TOKENIZERS)

    def __init__(self, documents: Path, tokenizer: Path) -> None:
        super().__init__()
        self.documents, self.tokenizer = documents, tokenizer

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write data/train-*.bin, .idx and valid-*."""
        done = 0
        for split in SPLITS:
            path = self.documents / f"{split}-{rank:05d}.jsonl.zst"
            prefix = self.folder / "data" / f"{split}-{rank:05d}"
            texts = (record["text"] for record in records(path))
            for tokens, size in encode(texts, self.tokenizer, prefix):
                self.counts[f"{split}_tokens"] += tokens
                self.counts["worked_bytes"] += size
                done += size
                self.tick(done, rank)
        self.tick(done, rank, final=True)
        yield from ()
