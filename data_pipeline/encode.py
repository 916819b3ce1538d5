"""Kept documents -> token ids; and the tokenizer that makes them, trained or published.

    train documents --lines, spread evenly--> at most sample_bytes of text --> tokenizer/
    documents --batches of a MB--> token ids + end of document --> index (.bin, .idx)
                                |  words and sentences begin here     --> .marks
                                +  named fields and labels, if any    --> .fields

Encoding is a step of its own, keyed by the tokenizer's files: another tokenizer costs no cleaning.
Each field of a document is encoded on its own, the line ends between them are left out: the tokens
of a pair are those of its two texts, and one end of document.
"""

import importlib.metadata
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.encoding import Tokenizing
from data_pipeline import tokenizer, training, user_dictionary, vocabulary, wordpiece
from data_pipeline.aside import sync_folder
from data_pipeline.blocks import SPLITS, Block, Documents
from data_pipeline.encoder import BATCH_CHARACTERS, Encoder
from data_pipeline.fields import label_text
from data_pipeline.index import IndexWriter
from data_pipeline.ingest import first_place
from data_pipeline.shards import CorpusError, Record, records
from data_pipeline.sidefile import NO_LABEL, FieldWriter, MarkWriter

TEXT_PER_SAMPLE = 50  # so many times the sample is looked through for it, not a whole web
LARGEST_UINT16_VOCABULARY = 65_500
MISSING = {"model": "分词模型", "base_vocab": "基础词表", "user_dictionary": "用户词典"}
TOKENIZERS = (
    "alphabet",
    "frozen",
    "characters",
    "lexicon",
    "segment",
    "tokenizer",
    "training",
    "trie",
    "user_dictionary",
    "vocabulary",
    "wordpiece",
)
"""The code of ids and marks."""

_load = lru_cache(maxsize=1)(tokenizer.load)


def versions() -> dict[str, str]:
    """What a trained tokenizer depends on beside its text and our code."""
    guests = {name: importlib.metadata.version(name) for name in ("sentencepiece", "jieba")}
    return guests | {"unicode": unicodedata.unidata_version}


def model_files(config: Tokenizing) -> list[Path]:
    """The files of a published tokenizer, of a base vocabulary and of a user's dictionary, whose
    contents key the build."""
    files: list[Path] = []
    for key in ("model", "base_vocab", "user_dictionary"):
        if (named := getattr(config, key)) is not None:
            path = _place(key, named)
            files += sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    return files


def _place(key: str, named: str) -> Path:
    path = first_place(named)
    if path is None:
        raise CorpusError(
            f"tokenizer.{key}: there is no file or folder '{named}'; correct the path"
            f" (找不到{MISSING[key]})"
        )
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


def refuse(config: Tokenizing) -> None:
    """Raise now what make_tokenizer() would raise for files of the config, whatever the text: a
    build finds it before its first day of cleaning and not after it."""
    if config.model is not None:
        with tempfile.TemporaryDirectory() as folder:
            _freeze(config, _place("model", config.model), Path(folder))
        return
    if config.base_vocab is not None:
        wordpiece.tokens_of(_place("base_vocab", config.base_vocab).read_bytes())
    if (dictionary := _user_dictionary(config)) is not None:
        user_dictionary.entries(dictionary)


def _train(config: Tokenizing, vocab_size: int, texts: Iterable[str], out: Path) -> None:
    dictionary, sample = _user_dictionary(config), config.sample_bytes
    if config.kind != "wordpiece":
        training.train(
            config.kind, texts, out, vocab_size, sample_bytes=sample, dictionary=dictionary
        )
        return
    base = config.base_vocab
    vocabulary.build(
        training.sample(texts, sample),
        out,
        vocab_size,
        word=config.word,
        base=None if base is None else _place("base_vocab", base),
        dictionary_words=config.dictionary_words,
        dictionary=dictionary,
    )


def _user_dictionary(config: Tokenizing) -> bytes | None:
    """The contents of the user's dictionary, if there is one."""
    if config.user_dictionary is None:
        return None
    path = _place("user_dictionary", config.user_dictionary)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(
            f"tokenizer.user_dictionary: '{config.user_dictionary}' cannot be read: "
            f"{error.strerror} (无法读取)"
        ) from None


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
    if (dictionary := _user_dictionary(config)) is not None:
        if made.user_dictionary not in (None, dictionary):
            raise CorpusError(
                f"tokenizer.user_dictionary: '{config.model}' was frozen with another dictionary; "
                "leave the key out, or name the vocabulary alone (已有另一用户词典)"
            )
        made.with_dictionary(dictionary).save(out)
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


@dataclass(frozen=True)
class Beside:
    """What is stored beside the ids."""

    boundaries: bool = True
    """Where words and sentences begin, in .marks."""
    names: tuple[str, ...] = ()
    """The named fields of the corpus; with these or labels there is a file .fields."""
    labels: tuple[str, ...] = ()
    """The labels of the corpus, in the order of their numbers."""


def encode(
    documents: Iterable[Record], folder: Path, prefix: Path, beside: Beside
) -> Iterator["Counter[str]"]:
    """Write each document's token ids and the end-of-document id as one document of an index, and
    what is stored `beside` them; yields counts (tokens, bytes, words ...) batch by batch."""
    words = _load(folder)
    encoder = Encoder(words, beside.boundaries)
    dtype = np.uint16 if words.vocab_size < LARGEST_UINT16_VOCABULARY else np.int32
    numbers = {label: number for number, label in enumerate(beside.labels)}
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        index = stack.enter_context(IndexWriter(prefix, dtype))
        marks = fields = None
        if beside.boundaries:
            marks = stack.enter_context(MarkWriter(prefix))
        if beside.names or beside.labels:
            fields = stack.enter_context(FieldWriter(prefix, beside.names, beside.labels))
        for batch in _batches(documents):
            found = encoder.read(batch)
            index.add_documents(found.ids, found.lengths)
            if marks is not None:
                marks.add_document(found.marks)
            counts = Counter(
                tokens=len(found.ids), bytes=len("".join([r["text"] for r in batch]).encode())
            )
            if fields is not None:
                for record, spans in zip(batch, found.spans, strict=True):
                    label = record.get("label") if beside.labels else None
                    number = NO_LABEL if label is None else numbers[label_text(label)]
                    fields.add_document(spans, number)
                    counts["fields_spans"] += len(spans)
                    counts["fields_labelled"] += number != NO_LABEL
            counts.update(encoder.counts())
            yield counts


def _batches(documents: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in documents:
        length = len(record["text"])
        if batch and length >= 2 * BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += length
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
        """Every shard from its beginning, as far as its share of what is looked through goes."""
        share = TEXT_PER_SAMPLE * self.config.sample_bytes // max(1, len(self.shards))
        done = 0
        for path in self.shards:
            left = max(share, 1)
            for record in records(path):
                yield record["text"]
                size = len(record["text"].encode())
                done, left = done + size, left - size
                self.tick(done, rank)
                if left <= 0:
                    break


class Encode(Block):
    """A shard's train and valid documents as token ids, each in an index of its own, and what is
    stored beside it.

    Counts of a split: tokens; boundaries_words, boundaries_sentences, boundaries_no_sentences
    (documents, or fields of them, whose sentences could not be found in their tokens);
    fields_spans, fields_labelled.
    """

    name = "encode"
    modules: ClassVar = (
        "borders",
        "encode",
        "encoder",
        "index",
        "kernels",
        "fields",
        "sidefile",
        "tablefile",
        *TOKENIZERS,
    )

    def __init__(self, documents: Path, tokenizer: Path, beside: Beside) -> None:
        super().__init__(beside=asdict(beside))
        self.documents, self.tokenizer, self.beside = documents, tokenizer, beside

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write data/train-*.bin, .idx, side files, and valid-*."""
        done = 0
        for split in SPLITS:
            path = self.documents / f"{split}-{rank:05d}.jsonl.zst"
            prefix = self.folder / "data" / f"{split}-{rank:05d}"
            for counts in encode(records(path), self.tokenizer, prefix, self.beside):
                size = counts.pop("bytes")
                self.counts.update({f"{split}_{name}": n for name, n in counts.items()})
                self.counts["worked_bytes"] += size
                done += size
                self.tick(done, rank)
        self.tick(done, rank, final=True)
        yield from ()
