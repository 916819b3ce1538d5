"""A record of a source becomes a document, or is a fault.

    {"title": "春晓", "body": "春眠不觉晓……", "kind": "poem", "id": 7}
        |  fields: [source=body, target=title]   label_field: kind
        v
    id "7", text "春眠不觉晓……\n春晓", label "poem", spans [["source", 0, 7], ["target", 8, 10]]

A field that is a list of texts gives several spans of one name. Simple fields stay beside the text.
Ids need not differ: nothing in the pipeline takes an id for an identity, a document is known by its
place; two documents with one id stay two documents.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from configs.sources import Source
from data_pipeline.shards import CorpusError

SIMPLE = (str, int, float, bool)
TAKEN = frozenset(
    {
        *("text", "label", "spans", "scores", "digest", "columns of scores"),
        *("near_duplicates", "kept", "alike", "jaccard"),
    }
)
"""Names that the pipeline gives to fields of its own: what a source calls so keeps its value under
another name, NAME_of_source."""


class Document(NamedTuple):
    """A document as it comes from its source."""

    id: str
    text: str
    fields: dict[str, Any]
    """Simple fields; `spans` [[name, start, stop], ...] of a document with named fields."""
    own_id: bool = False
    """Whether the id is the source's and was not made of the document's place."""


@dataclass(frozen=True)
class Part:
    """The `number`-th of `of` parts of one file or dataset."""

    source: int
    path: str
    packed: bool
    number: int
    of: int
    weight: int
    """Bytes of text in it, about."""
    called: str = ""
    """The file within its source, as ids have it: see `name`."""

    @property
    def name(self) -> str:
        """The file from the folder on that the source's path names: nothing above that, so that a
        corpus may be moved."""
        return self.called or readable(Path(self.path).name)


@dataclass
class Meter:
    """How far the reading of a part has come, from 0 to 1, and what it met that is no fault."""

    share: float = 0.0
    met: "Counter[str]" = field(default_factory=Counter)
    """Records in another encoding than UTF-8 (gb18030 ...), mended (control_characters), or left
    out because the source marks them so (repeated_files, repeated_paragraphs)."""


class Unusable(Exception):
    """A record that cannot be a document: a kind for the counts, the rest of the sentence that
    begins with its place, and how many of its bytes lie before the reason."""

    def __init__(self, kind: str, what: str, at: int = 0) -> None:
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.at = at


class Fault(NamedTuple):
    """Something of a file that cannot be read."""

    kind: str
    """What is counted: no_text, broken_json, encoding, truncated, damaged ..."""
    path: str
    place: str
    """Line and byte, or whatever counts in this kind of file."""
    sentence: str
    """All of it, for the user."""
    excerpt: str
    """What can be shown of it, bytes that are no text as \\xff."""
    records: int = 1
    """How many are lost, as far as that is known."""


Faults = Callable[[Fault], None]
EXCERPT_BYTES = 2000


def stop(fault: Fault) -> NoReturn:
    """The faults of a source with `bad_lines: stop`: the first one ends the build."""
    raise CorpusError(fault.sentence)


def readable(path: str | Path) -> str:
    """A path as text: names that are not UTF-8 are read as GB18030 (archives made on Windows), else
    their bytes are written out as \\xff."""
    name = os.fsencode(path)
    for encoding in ("utf-8", "gb18030"):
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return name.decode("utf-8", "backslashreplace")


def excerpt(data: bytes) -> str:
    """The beginning of what cannot be read, nothing of it lost."""
    return data[:EXCERPT_BYTES].decode("utf-8", "backslashreplace")


def document(source: Source, record: dict[str, Any], place: str) -> Document:
    """A record without its text, its fields and its id in their places. Raises Unusable."""
    spans: list[list[Any]] = []
    if source.fields:
        text = _joined(source, record, spans)
    else:
        text = _text_of(source, record, source.text_field, "text_field")
        if not isinstance(text, str):
            raise _missing(source, record, source.text_field, "text_field")
        del record[source.text_field]
    label = record.pop(source.label_field, None) if source.label_field else None
    if source.label_field and not isinstance(label, SIMPLE):
        raise Unusable(
            "no_label",
            f"has no label: its field '{source.label_field}' is missing or no plain value; mend "
            f"it or correct label_field of source '{source.name}'",
        )
    name = record.pop("id", None)
    own = name is not None
    name = str(name) if own else f"{source.name}/{place}"
    fields: dict[str, Any] = {
        key: value for key, value in record.items() if isinstance(value, SIMPLE)
    }
    for key in sorted(TAKEN & fields.keys()):
        fields[f"{key}_of_source"] = fields.pop(key)
    fields["source"] = str(fields.get("source", source.name))
    if label is not None:
        fields["label"] = label
    if spans:
        fields["spans"] = spans
    return Document(name, text, fields, own)


def _joined(source: Source, record: dict[str, Any], spans: list[list[Any]]) -> str:
    """The texts of the fields, one a line; where each lies goes to `spans`."""
    texts: list[str] = []
    start = 0
    for name, column in source.columns:
        value = _text_of(source, record, column, "fields")
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise _missing(source, record, column, "fields")
            texts.append(text)
            spans.append([name, start, start + len(text)])
            start += len(text) + 1
    for _, column in source.columns:
        record.pop(column, None)
    return "\n".join(texts)


def _text_of(source: Source, record: dict[str, Any], column: str, key: str) -> Any:
    value = record.get(column)
    if value is None:
        raise _missing(source, record, column, key)
    return value


def _missing(source: Source, record: dict[str, Any], column: str, key: str) -> Unusable:
    has = "null or not text" if column in record else "missing"
    known = ", ".join(repr(name) for name in record if name != column) or "nothing else"
    return Unusable(
        "no_text",
        f"has no text: its field '{column}' is {has} (there are {known}); "
        f"mend it or name the field in {key} of source '{source.name}'",
    )
