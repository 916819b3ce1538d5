"""What lies beside an index: word, sentence and field borders, gap sentences, named fields.

    PREFIX.marks    "BAJIEMRK" | version | tokens T | marks of each token, T x u8
    PREFIX.gaps     "BAJIEGAP" | version | documents D | units U | sentences S
                    | units of each document, D x u32 | sentences of each unit, U x u32
                    | first token of each sentence, S x u32 | its end, S x u32 | picked, S x u8
    PREFIX.fields   "BAJIEFLD" | version | documents D | spans S | bytes of names N
                    | spans of each document, D x u32 | label of each document, D x i32
                    | first token of each span, S x u32 | its end, S x u32 | its name, S x u8
                    | names and labels, N bytes of JSON

A mark tells what its token begins: bit 1 a word, 2 a sentence, 4 a named field; the end of a
document has one like any token, 0. Tokens of sentences and spans are counted from the start of the
document, whose place in the stream the index knows. A unit is a run of sentences of about 768
characters; its picked sentences are the target of a pseudo-summary and the others the source. What
lies between two sentences (line breaks) or two fields belongs to neither. A document without units
or fields is a row of the first table like any other. Files of tables as in tablefile.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import orjson

from data_pipeline.tablefile import Layout, Table, TableReader, TableWriter, running

WORD, SENTENCE, FIELD = 1, 2, 4
"""Bits of a mark: the token begins a word, a sentence, a named field."""
NO_LABEL = -1

_U1, _U4, _I4 = np.dtype("u1"), np.dtype("<u4"), np.dtype("<i4")

MARKS = Layout(
    ".marks", b"BAJIEMRK", 1, ("tokens",), (Table("marks", _U1, "tokens"),),
    "word and sentence borders", "词句边界文件",
)  # fmt: skip
GAPS = Layout(
    ".gaps", b"BAJIEGAP", 1, ("documents", "units", "sentences"),
    (
        Table("units", _U4, "documents"),
        Table("sentences", _U4, "units"),
        Table("starts", _U4, "sentences"),
        Table("stops", _U4, "sentences"),
        Table("picked", _U1, "sentences"),
    ),
    "sentences", "句界文件",
)  # fmt: skip
FIELDS = Layout(
    ".fields", b"BAJIEFLD", 1, ("documents", "spans", "bytes"),
    (
        Table("spans", _U4, "documents"),
        Table("labels", _I4, "documents"),
        Table("starts", _U4, "spans"),
        Table("stops", _U4, "spans"),
        Table("names", _U1, "spans"),
        Table("about", _U1, "bytes"),
    ),
    "named fields", "字段文件", shared="about",
)  # fmt: skip
LAYOUTS = (MARKS, GAPS, FIELDS)
"""All that may lie beside an index."""
MOST_NAMES = 256

Span = tuple[str, int, int]
"""A named field: its name, [start, stop)."""


# ---- marks


class MarkWriter(TableWriter):
    """Writes PREFIX.marks, document after document."""

    layout = MARKS

    def add_document(self, marks: np.ndarray) -> None:
        """Append the marks of the next document of the index: [tokens] uint8, its end included."""
        self.write("marks", marks)


class Marks(TableReader):
    """The marks of PREFIX.marks: one for each token of the stream. `tokens`: how many."""

    layout = MARKS

    def __init__(self, prefix: str | Path) -> None:
        super().__init__(prefix)
        self.tokens = self._counts["tokens"]
        self._marks = self._tables["marks"]

    def slice(self, start: int, stop: int) -> np.ndarray:
        """The marks of tokens [start, stop), uint8: a view of the file, no copy."""
        if not 0 <= start <= stop <= self.tokens:
            raise MARKS.out_of_range(self.prefix, f"tokens {start} to {stop}", self.tokens)
        return self._marks[start:stop]


# ---- gap sentences


class GapUnit(NamedTuple):
    """A unit of a document: tokens [start, stop) of each of its N sentences, and the picks."""

    starts: np.ndarray
    """[N] first token of each sentence, from the start of the document."""
    stops: np.ndarray
    """[N] one past the last token."""
    picked: np.ndarray
    """[N] bool: the sentences of the target."""

    def tokens(self, document: np.ndarray, picked: bool) -> np.ndarray:
        """The tokens of the target (`picked`) or of the source, sentence after sentence."""
        kept = [
            document[start:stop]
            for start, stop, choice in zip(self.starts, self.stops, self.picked, strict=True)
            if choice == picked
        ]
        return np.concatenate(kept) if kept else document[:0]


class GapWriter(TableWriter):
    """Writes PREFIX.gaps, the units of document after document."""

    layout = GAPS

    def add_document(self, units: Sequence[GapUnit]) -> None:
        """Append the units of the next document of the index; none is fine."""
        self.write("units", [len(units)])
        self.write("sentences", [len(unit.starts) for unit in units])
        for unit in units:
            self.write("starts", unit.starts)
            self.write("stops", unit.stops)
            self.write("picked", unit.picked)


class Gaps(TableReader):
    """The units of PREFIX.gaps.

    `documents`, `units`, `sentences` (counts); `first_unit` [documents + 1] and `first_sentence`
    [units + 1] int64: where the units of a document and the sentences of a unit begin.
    """

    layout = GAPS

    def __init__(self, prefix: str | Path) -> None:
        super().__init__(prefix)
        self.documents, self.units, self.sentences = self._counts.values()
        self.first_unit = running(self._tables["units"])
        self.first_sentence = running(self._tables["sentences"])
        if self.first_unit[-1] != self.units or self.first_sentence[-1] != self.sentences:
            raise GAPS.fault(prefix, "has counts of units and sentences that do not add up")

    def unit(self, number: int) -> GapUnit:
        """One of all the units; see `first_unit` for the document that it is of."""
        if not 0 <= number < self.units:
            raise GAPS.out_of_range(self.prefix, f"unit {number}", self.units)
        rows = slice(self.first_sentence[number], self.first_sentence[number + 1])
        starts, stops, picked = (self._tables[name][rows] for name in ("starts", "stops", "picked"))
        return GapUnit(starts, stops, picked.astype(np.bool_))

    def document(self, number: int) -> list[GapUnit]:
        """The units of a document, in their order."""
        if not 0 <= number < self.documents:
            raise GAPS.out_of_range(self.prefix, f"document {number}", self.documents)
        return [self.unit(u) for u in range(self.first_unit[number], self.first_unit[number + 1])]


# ---- named fields


class FieldWriter(TableWriter):
    """Writes PREFIX.fields, the spans and the label of document after document.

    `names` and `labels` are those of the whole corpus, so that shards can be merged.
    """

    layout: ClassVar = FIELDS

    def __init__(self, prefix: str | Path, names: Sequence[str], labels: Sequence[str]) -> None:
        assert len(names) <= MOST_NAMES  # the config says so
        self._numbers = {name: number for number, name in enumerate(names)}
        self._about = orjson.dumps({"names": list(names), "labels": list(labels)})
        super().__init__(prefix)
        self.write("about", np.frombuffer(self._about, np.uint8))

    def add_document(self, spans: Sequence[Span], label: int = NO_LABEL) -> None:
        """Append the fields of the next document of the index: (name, start, stop) in tokens from
        the document's start, and the number of its label."""
        self.write("spans", [len(spans)])
        self.write("labels", [label])
        self.write("names", [self._numbers[name] for name, _, _ in spans])
        self.write("starts", [start for _, start, _ in spans])
        self.write("stops", [stop for _, _, stop in spans])


class Fields(TableReader):
    """The fields of PREFIX.fields.

    `documents` (a count), `names` and `labels` of the corpus; `first_span` [documents + 1] int64:
    where the spans of a document begin.
    """

    layout = FIELDS

    def __init__(self, prefix: str | Path) -> None:
        super().__init__(prefix)
        self.documents = self._counts["documents"]
        try:
            about = orjson.loads(self._tables["about"].tobytes())
            self.names: tuple[str, ...] = tuple(about["names"])
            self.labels: tuple[str, ...] = tuple(about["labels"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise FIELDS.fault(prefix, "has no list of names and labels") from None
        self.first_span = running(self._tables["spans"])
        labels, names = self._tables["labels"], self._tables["names"]
        if (
            self.first_span[-1] != self._counts["spans"]
            or not np.all((labels >= NO_LABEL) & (labels < len(self.labels)))
            or not np.all(names < len(self.names))
        ):
            raise FIELDS.fault(prefix, "has spans, names or labels that do not add up")

    def document(self, number: int) -> list[Span]:
        """The fields of a document in their order: (name, start, stop), tokens from its start."""
        self._check(number)
        rows = slice(self.first_span[number], self.first_span[number + 1])
        name, start, stop = (self._tables[t][rows].tolist() for t in ("names", "starts", "stops"))
        return [(self.names[n], a, b) for n, a, b in zip(name, start, stop, strict=True)]

    def label(self, number: int) -> int:
        """The number of a document's label in `labels`, -1 if it has none."""
        self._check(number)
        return int(self._tables["labels"][number])

    def documents_of_labels(self) -> dict[str, int]:
        """How many documents each label has."""
        labels = self._tables["labels"]
        counts = np.bincount(labels[labels != NO_LABEL], minlength=len(self.labels))
        return dict(zip(self.labels, counts.tolist(), strict=True))

    def _check(self, number: int) -> None:
        if not 0 <= number < self.documents:
            raise FIELDS.out_of_range(self.prefix, f"document {number}", self.documents)
