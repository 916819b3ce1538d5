"""Where the sentences of a pseudo-summary lie in the tokens of their document.

    text    盘古开天。　女娲补天。\\n后羿射日。
    parts   [盘古开天。][　][女娲补天。][\\n][后羿射日。]      sentences, and the blanks between
    tokens  2 3 9 | | 7 5 9 | 1 | 8 4 9                        each part on its own
    equal?  2 3 9 7 5 9 1 8 4 9                                the document's own tokens

The tokens of kept sentences laid end to end must be slices of the document's: so borders are those
of the parts encoded alone, and only where the parts together are the document's tokens. Tokenizers
that cut words first (cpm, wordpiece) end a word at 。 and at a line break, wherever it stands. A
document where it does not hold has no units, and is counted: byte_bpe has pieces such as 。” that
lie across a border (92 of 400 documents of ten genres); in cpm two ways to cut `1.2` may score
alike, and sentencepiece's sums round by where they stand (1 of 400); wordpiece had none in 400.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from data_pipeline import tokenizer
from data_pipeline.blocks import SPLITS, Block, Documents
from data_pipeline.index import Index
from data_pipeline.pseudo_summary import Unit, pick_batch
from data_pipeline.shards import records
from data_pipeline.sidefile import GapUnit, GapWriter

PARTS_AT_ONCE = 20_000  # are encoded together: memory does not grow with a book
DOCUMENTS_AT_ONCE = 500

_load = lru_cache(maxsize=1)(tokenizer.load)


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    def encode_batch(self, texts: Sequence[str], /) -> list[np.ndarray]:
        """The ids of each text."""
        ...


def gap_units(
    texts: Sequence[str], ids: Sequence[np.ndarray], words: Encoder, criterion: str = "lcs"
) -> list[list[GapUnit] | None]:
    """The units of each text with their picks, in tokens of `ids`, the text as `words` encodes it.

    None for a text that has units, but whose tokens lie across the borders of its sentences.
    """
    out: list[list[GapUnit] | None] = []
    for text, whole, units in zip(texts, ids, pick_batch(texts, criterion), strict=True):
        sizes = _sizes(_parts(text, units), whole, words) if units else np.empty(0, np.int64)
        out.append(None if sizes is None else _in_tokens(units, sizes))
    return out


def _sizes(parts: Sequence[str], whole: np.ndarray, words: Encoder) -> np.ndarray | None:
    """Tokens of each part, None unless all of them in their order are `whole`."""
    sizes = np.zeros(len(parts), np.int64)
    at = 0
    for start in range(0, len(parts), PARTS_AT_ONCE):
        numbers = [i for i in range(start, min(start + PARTS_AT_ONCE, len(parts))) if parts[i]]
        encoded = words.encode_batch([parts[i] for i in numbers])
        sizes[numbers] = [len(piece) for piece in encoded]
        together = np.concatenate(encoded) if encoded else whole[:0]
        if not np.array_equal(together, whole[at : at + len(together)]):
            return None
        at += len(together)
    return sizes if at == len(whole) else None


def _parts(text: str, units: Sequence[Unit]) -> list[str]:
    """The text cut into: blanks, sentence, blanks, sentence, ..., what is left."""
    parts: list[str] = []
    at = 0
    for unit in units:
        for sentence in unit.segments:
            start = text.find(sentence, at)  # only blanks were stripped between
            assert start >= 0 and not text[at:start].strip()
            parts += [text[at:start], sentence]
            at = start + len(sentence)
    return [*parts, text[at:]]


def _in_tokens(units: Sequence[Unit], sizes: np.ndarray) -> list[GapUnit]:
    ends = np.cumsum(sizes)
    stops, starts = ends[1:-1:2], ends[0:-2:2]
    out, at = [], 0
    for unit in units:
        rows = slice(at, at + len(unit.segments))
        picked = np.zeros(len(unit.segments), np.bool_)
        picked[unit.picks] = True
        out.append(GapUnit(starts[rows], stops[rows], picked))
        at += len(unit.segments)
    return out


# ---- the block


class FindGaps(Block):
    """A shard's gap sentences, beside the index of its tokens: data/train-*.gaps and valid-*.

    Counts of a split, each after gaps_: units, sentences, gap_sentences (those of targets),
    no_borders (documents with units whose tokens lie across the borders).
    """

    name = "gaps"
    modules: ClassVar = ("gaps", "pseudo_summary", "sidefile", "tablefile")

    def __init__(
        self, documents: Path, encoded: Path, tokenizer: Path, criterion: str = "lcs"
    ) -> None:
        super().__init__(criterion=criterion)
        self.documents, self.encoded, self.tokenizer = documents, encoded, tokenizer
        self.criterion = criterion

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write a file for each split."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        done = 0
        for split in SPLITS:
            name = f"{split}-{rank:05d}"
            index = Index(self.encoded / name)
            number = 0
            with GapWriter(self.folder / "data" / name) as writer:
                for texts in _some(self.documents / f"{name}.jsonl.zst"):
                    ids = [index.document(number + i)[:-1] for i in range(len(texts))]
                    for units in gap_units(texts, ids, _load(self.tokenizer), self.criterion):
                        writer.add_document(units or [])
                        self._count(split, units)
                    number += len(texts)
                    size = sum(len(text.encode()) for text in texts)
                    self.counts["worked_bytes"] += size
                    done += size
                    self.tick(done, rank)
            assert number == index.documents
        self.tick(done, rank, final=True)
        yield from ()

    def _count(self, split: str, units: list[GapUnit] | None) -> None:
        self.counts[f"{split}_gaps_no_borders"] += units is None
        for unit in units or []:
            self.counts[f"{split}_gaps_units"] += 1
            self.counts[f"{split}_gaps_sentences"] += len(unit.starts)
            self.counts[f"{split}_gaps_gap_sentences"] += int(unit.picked.sum())


def _some(path: Path) -> Iterator[list[str]]:
    texts: list[str] = []
    for record in records(path):
        texts.append("" if record.get("spans") else record["text"])  # fields are their own parts
        if len(texts) == DOCUMENTS_AT_ONCE or len(texts[-1]) > PARTS_AT_ONCE:
            yield texts
            texts = []
    if texts:
        yield texts
