"""A corpus on one page: what `python -m launch corpus CONFIG` builds.

    data, clean, dedup, split, tokenizer

The order of the sections is the order of the work (data_pipeline/build.py tells the story). Every
threshold stands here; nothing about Chinese text is decided by a default hidden in the code.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Source:
    """Where documents come from: files, or a dataset of the `datasets` library."""

    kind: Literal["jsonl", "txt", "datasets"]
    """jsonl: one JSON object a line; txt: plain text; both also .gz or .zst; datasets: a Hub name
    or the folder of a saved dataset."""
    path: str | tuple[str, ...]
    """A file, a folder, a pattern (`*`, `**`) or a list of these; $VARIABLES are filled in. A
    relative path is looked for in the working directory, then beside configs/."""
    name: str
    """How the source is called in ids, counts and the manifest."""
    text_field: str = "text"
    """jsonl, datasets: the field that holds the text."""
    documents: Literal["blank_line", "file"] = "blank_line"
    """txt: documents lie between blank lines, or each file is one."""
    split: str = "train"
    """datasets: which split."""
    subset: str | None = None
    """datasets: which configuration of the dataset."""

    def problems(self) -> list[str]:
        """A source without a name, without files or without a field."""
        found = [] if self.name.strip() else ["name: is empty, must be a name (须有名字)"]
        if not self.paths or not all(self.paths):
            found.append("path: is empty, must name a file, folder, pattern or dataset (须有路径)")
        if self.kind == "datasets" and len(self.paths) > 1:
            found.append(f"path: lists {len(self.paths)} datasets, a source is one (一个来源一个)")
        if not self.text_field:
            found.append("text_field: is empty, must name the field that holds the text")
        return found

    @property
    def paths(self) -> tuple[str, ...]:
        """`path`, as a list in either case."""
        return (self.path,) if isinstance(self.path, str) else tuple(self.path)


@dataclass(frozen=True)
class Data:
    """What goes in, where it comes out, and how many processes work."""

    out: str
    """The corpus folder: manifest.json, tokenizer/, train.bin ... are made in it."""
    sources: tuple[Source, ...]
    """Read in this order; of equal documents the first one stays."""
    workers: int = 0
    """Processes at a time; 0 is one for each core. The bytes that are made do not depend on it."""
    task_mb: int = 64
    """Bytes (10^6, plain or a quarter of it compressed) that one task reads: the unit of work that
    a killed build repeats. The order of documents depends on it."""

    def problems(self) -> list[str]:
        """No sources, one name twice, numbers outside their range."""
        found = [] if self.out.strip() else ["out: is empty, must name the corpus folder"]
        if not self.sources:
            found.append("sources: is empty, must list at least one source (至少一个来源)")
        names = [source.name for source in self.sources]
        found += [
            f"sources: the name '{name}' stands {names.count(name)} times; names must differ (重名)"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        if self.workers < 0:
            found.append(f"workers: is {self.workers}, must be 0 (one for each core) or more")
        if self.task_mb < 1:
            found.append(f"task_mb: is {self.task_mb}, must be at least 1")
        return found


@dataclass(frozen=True)
class Cleaning:
    """Which normalised documents are kept; a ratio is a share of the characters that are not blank.

    Normalisation itself (NFC, narrow width fold, private use, control, zero-width) has no choices:
    data_pipeline/clean.py.
    """

    min_characters: int = 20
    """Fewer characters (blanks not counted): `too_short`. Classical quatrains have 24."""
    max_characters: int = 10_000_000
    """More: `too_long`. Books are documents; this only stops what is no text."""
    min_han_ratio: float = 0.3
    """A smaller share of Chinese characters: `few_han`; web: 0.5. A page that falls below is
    counted again without its code, formulas, tags and addresses."""
    min_han_ratio_with_code: float = 0.1
    """A smaller share of the whole page, code and all: `few_han` without a second look."""
    max_digit_ratio: float = 0.3
    """A larger share of digits: `many_digits`."""
    max_symbol_ratio: float = 0.3
    """A larger share of characters that are neither letters, digits nor punctuation in use in
    Chinese text (box drawings, currency, emoji ...): `many_symbols`."""
    max_lost_ratio: float = 0.01
    """A larger share of U+FFFD, the trace of a failed decoding: `lost_characters`. Below it they
    are removed and counted."""
    max_private_use_ratio: float = 0.05
    """A larger share of private-use code points: `private_use`. Below it they are removed."""
    max_repeated_line_ratio: float = 0.5
    """A larger share of the characters in lines that stood before in the same document:
    `repeated_lines`."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if self.min_characters < 1:
            found.append(f"min_characters: is {self.min_characters}, must be at least 1")
        if self.max_characters < self.min_characters:
            found.append(
                f"max_characters: is {self.max_characters}, must be at least min_characters"
                f" ({self.min_characters})"
            )
        for name in vars(self):
            if "_ratio" in name and not 0 <= getattr(self, name) <= 1:
                found.append(f"{name}: is {getattr(self, name)}, must lie in [0, 1]")
        return found


@dataclass(frozen=True)
class Near:
    """Which documents are nearly the same: letters and digits alone are compared, in n-grams."""

    jaccard: float = 0.5
    """Two documents are near when their sets of n-grams have at least this share in common."""
    ngram: int = 5
    """Characters in a row: one edited character changes so many n-grams."""
    bands: int = 18
    """Keys of a document; pairs that share one are compared (Jaccard s: 1 - (1 - s^rows)^bands)."""
    rows: int = 6
    """Hash functions that make a key. The usual 14 bands of 8 find 85 % of the copies with 2 % of
    their characters replaced, 18 of 6 find 98 %, and what is found by chance is compared anyway."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if not 0 < self.jaccard <= 1:
            found.append(f"jaccard: is {self.jaccard}, must lie in (0, 1]")
        for name, most in (("ngram", 50), ("bands", 500), ("rows", 50)):
            if not 1 <= getattr(self, name) <= most:
                found.append(f"{name}: is {getattr(self, name)}, must lie in [1, {most}]")
        return found


@dataclass(frozen=True)
class Dedup:
    """Which documents are the same."""

    exact: bool = True
    """Of documents whose letters and digits are the same (punctuation and blanks do not count) only
    the first one is kept."""
    near: Near | None = None
    """Of documents that are nearly the same only the first one is kept, with their number in its
    field `near_duplicates`; `{}` takes the values above, null leaves them all (近似去重)."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation set whose text must not be in the corpus: a document that holds some of it is
    dropped as `contaminated:NAME`, and noted in contamination/."""

    name: str
    """How the set is called in the rejects."""
    path: str
    """A .json, .jsonl or .tsv file, else a text file with one item a line."""
    fields: tuple[str | int, ...] = ()
    """JSON: the fields with the text, at any depth; .tsv: numbers of columns, from 0."""
    characters: int = 13
    """Letters or digits in a row (punctuation and blanks left out), more than half of them Han,
    that a document must not share with an item."""

    def problems(self) -> list[str]:
        """A name that is no folder's, no file, fields that are missing or no columns."""
        found = []
        if not all(part.isalnum() for part in self.name.replace("-", "_").split("_")):
            found.append(
                f"name: is '{self.name}', must be letters and digits, joined by '-' or '_'"
                " (名称不合法)"
            )
        if not self.path:
            found.append("path: is empty, must name the file of the evaluation set (须有路径)")
        if self.path.endswith((".json", ".jsonl")):
            if not self.fields:
                found.append("fields: is empty, must name the fields with the text (须有字段名)")
        elif not all(str(field).isdecimal() for field in self.fields):
            found.append(
                f"fields: is {list(self.fields)}, must be numbers of columns from 0 (须为列号)"
            )
        if not 5 <= self.characters <= 1000:
            found.append(f"characters: is {self.characters}, must lie in [5, 1000]")
        return found


@dataclass(frozen=True)
class Split:
    """Which kept documents are held out for validation: decided by a hash of the document itself,
    so that it does not move when other documents come or go, and equal text falls on one side."""

    valid_fraction: float | None = None
    """Share of the documents, about; 0 holds nothing out."""
    valid_documents: int | None = None
    """The same as a number of documents, exactly (of distinct ones)."""
    seed: int = 0
    """Another seed, another choice."""

    def problems(self) -> list[str]:
        """Exactly one of the two, in its range."""
        found = []
        if (self.valid_fraction is None) == (self.valid_documents is None):
            found.append("valid_fraction, valid_documents: give exactly one of them (二者择一)")
        if self.valid_fraction is not None and not 0 <= self.valid_fraction < 1:
            found.append(f"valid_fraction: is {self.valid_fraction}, must lie in [0, 1)")
        if self.valid_documents is not None and self.valid_documents < 0:
            found.append(f"valid_documents: is {self.valid_documents}, must not be negative")
        if not 0 <= self.seed < 1 << 63:
            found.append(f"seed: is {self.seed}, must lie in [0, 2^63)")
        return found


@dataclass(frozen=True)
class Tokenizing:
    """Which tokenizer: a published one, or one trained on the train split."""

    kind: Literal["cpm", "byte_bpe", "wordpiece"]
    """cpm: words, then sentencepiece unigram, as CPM-1; byte_bpe: BPE that falls back to bytes and
    gives every document back to the last character; wordpiece: BERT's, or, with `word`, WoBERT's,
    RoFormer's and T5 PEGASUS'."""
    vocab_size: int | None = None
    """Size of the vocabulary to train; goes without `model`."""
    model: str | None = None
    """A published chinese_vocab.model (cpm) or vocab.txt (wordpiece), or a tokenizer/ folder made
    here: used as it is."""
    sample_bytes: int = 20_000_000
    """Text that training sees, at most, drawn evenly over the train split. sentencepiece needs 17
    to 33 times as much memory."""
    word: bool = True
    """wordpiece: words of jieba's that the vocabulary has are one token; false: characters."""
    base_vocab: str | None = None
    """wordpiece, trained: the vocab.txt to choose from, such as bert-base-chinese's, whose control
    tokens are kept; null: the characters of the text."""
    dictionary_words: int = 200_000
    """wordpiece, trained, with `word`: so many words of jieba's dictionary, the commonest, stand
    for choice beside `base_vocab` (T5 PEGASUS: 200,000)."""

    def problems(self) -> list[str]:
        """A model or a size, not both; a sample that fits a worker."""
        found = []
        if (self.vocab_size is None) == (self.model is None):
            found.append(
                "vocab_size, model: give exactly one, a size to train or a model (二者择一)"
            )
        if self.vocab_size is not None and not 256 <= self.vocab_size <= 1_000_000:
            found.append(f"vocab_size: is {self.vocab_size}, must lie in [256, 1000000]")
        if not 1_000 <= self.sample_bytes <= 100_000_000:
            found.append(
                f"sample_bytes: is {self.sample_bytes}, must lie in [1000, 100000000]:"
                " sentencepiece needs 17 to 33 times its input in memory"
            )
        if self.base_vocab is not None and (self.kind != "wordpiece" or self.model is not None):
            found.append(
                f"base_vocab: is '{self.base_vocab}', goes with kind: wordpiece, without a model"
                " (仅用于构建 wordpiece 词表)"
            )
        if self.dictionary_words < 0:
            found.append(f"dictionary_words: is {self.dictionary_words}, must not be negative")
        return found


@dataclass(frozen=True)
class Encoding:
    """What is stored beside the token ids."""

    pseudo_summary: bool = False
    """Sentences, units of 768 characters and their gap sentences as T5 PEGASUS picks them, in
    train.gaps and valid.gaps. Not for a document where a token lies across the border of two
    sentences: with cpm and wordpiece hardly any, with byte_bpe about a quarter (伪摘要)."""


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus build."""

    data: Data
    """Sources, folder, processes."""
    tokenizer: Tokenizing
    """Words to numbers."""
    split: Split
    """Train and validation."""
    clean: Cleaning = field(default_factory=Cleaning)
    """Filters."""
    dedup: Dedup = field(default_factory=Dedup)
    """Duplicates."""
    encode: Encoding = field(default_factory=Encoding)
    """Beside the tokens."""
    decontaminate: tuple[Evaluation, ...] = ()
    """Evaluation sets."""

    def problems(self) -> list[str]:
        """One name twice."""
        names = [part.name for part in self.decontaminate]
        return [
            f"decontaminate: the name '{name}' stands {names.count(name)} times; names must differ"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
