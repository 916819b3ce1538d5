"""Documents as tokens, a MB of them at a time: ids, where words, sentences and fields begin.

    texts --tokenizer, borders--> ids and marks of all texts, one after the other
          --put together, compiled--> documents with their ends, fields marked --> encode.py

Everything is done for all the texts of a batch as one: most documents of a corpus are short, and a
call for each would cost more than its tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.borders import Borders
from data_pipeline.frozen import Frozen
from data_pipeline.kernels import compiled
from data_pipeline.shards import Record
from data_pipeline.sidefile import FIELD, SENTENCE, WORD, Span

BATCH_CHARACTERS = 500_000


class Read(NamedTuple):
    """Some documents as tokens."""

    ids: np.ndarray
    """[tokens] int32: of one document after the other, each with its end."""
    lengths: np.ndarray
    """[documents] int64: how many of them each has."""
    marks: np.ndarray
    """[tokens] uint8."""
    spans: list[list[Span]]
    """The named fields of each document in its tokens."""


class Encoder:
    """Documents -> ids with the end of document, marks, fields in tokens."""

    def __init__(self, words: Frozen, boundaries: bool) -> None:
        self.words = words
        self.borders = Borders(words) if boundaries else None
        self._counts: Counter[str] = Counter()

    def counts(self) -> "Counter[str]":
        """Words, sentences, texts whose sentences were not found: since it was last asked."""
        counts, self._counts = self._counts, Counter()
        return counts

    def read(self, batch: Sequence[Record]) -> Read:
        """Some documents; a book is a batch of its own."""
        named = [record.get("spans") for record in batch]
        texts: list[str] = []
        for record, fields in zip(batch, named, strict=True):
            whole = record["text"]
            texts += [whole] if fields is None else [whole[a:b] for _, a, b in fields]
        ids_T, ends_P, marks_T = self.texts(texts)
        parts_D = np.array([1 if spans is None else len(spans) for spans in named], np.int64)
        named_D = np.array([spans is not None for spans in named], np.bool_)
        eod = np.int32(self.words.eod_id)
        ids, lengths, marks = _documents(ids_T, marks_T, ends_P, parts_D, named_D, eod)
        spans = self._spans(named, ends_P) if named_D.any() else [[] for _ in named]
        return Read(ids, lengths, marks, spans)

    def texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of the texts, where those of each end, marks. A book on its own is encoded some lines
        at a time: words, pieces and sentences end at a line break, so that the ids are the same,
        and memory does not grow with the book."""
        if len(texts) != 1 or len(texts[0]) < 2 * BATCH_CHARACTERS:
            return self._marked(texts)
        ids, ends, marks = zip(*(self._marked([lines]) for lines in _pieces(texts[0])), strict=True)
        end = np.array([sum(int(some[-1]) for some in ends)], np.int64)
        return np.concatenate(ids), end, np.concatenate(marks)

    def _spans(self, named: Sequence[Any], ends_P: np.ndarray) -> list[list[Span]]:
        """Where the fields of each document lie in its tokens."""
        ends, part, at, out = ends_P.tolist(), 0, 0, []
        for spans in named:
            begin, found = at, list[Span]()
            for name, *_ in [[None]] if spans is None else spans:
                if name is not None:
                    found.append((name, at - begin, ends[part] - begin))
                at, part = ends[part], part + 1
            out.append(found)
        return out

    def _marked(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.borders is None:
            parts = self.words.encode_batch(texts)  # which need not be cut into words
            ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
            ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
            return ids, ends, np.zeros(len(ids), np.uint8)
        whole, marks, unknown = self.borders.encode(texts)
        self._counts["boundaries_words"] += int(np.count_nonzero(marks & WORD))
        self._counts["boundaries_sentences"] += int(np.count_nonzero(marks & SENTENCE))
        self._counts["boundaries_no_sentences"] += unknown
        return whole.ids, whole.ends, marks


@compiled
def _documents(ids_T, marks_T, ends_P, parts_D, named_D, eod):  # type: ignore[no-untyped-def]
    """The parts of documents (P), one after the other, with an end behind each document, which has
    no mark; the first token of a named part is marked. Also the lengths of the documents."""
    count = len(ids_T) + len(parts_D)
    out_ids, out_marks = np.empty(count, np.int32), np.empty(count, np.uint8)
    lengths_D = np.empty(len(parts_D), np.int64)
    t = place = p = 0
    for d in range(len(parts_D)):
        first = place
        for _ in range(parts_D[d]):
            begin = place
            while t < ends_P[p]:
                out_ids[place], out_marks[place] = ids_T[t], marks_T[t]
                t += 1
                place += 1
            if named_D[d] and place > begin:
                out_marks[begin] |= FIELD
            p += 1
        out_ids[place], out_marks[place] = eod, 0
        place += 1
        lengths_D[d] = place - first
    return out_ids, lengths_D, out_marks


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + BATCH_CHARACTERS) + 1 or len(text)
        yield text[start:stop]
        start = stop
