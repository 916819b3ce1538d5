"""Marks and fields beside an index come back as written, merge as their shards, refuse damage."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.index import IndexFault
from data_pipeline.sidefile import (
    FIELD,
    FIELDS,
    MARKS,
    NO_LABEL,
    SENTENCE,
    WORD,
    Fields,
    FieldWriter,
    Marks,
    MarkWriter,
    Span,
)

NAMES, LABELS = ("a", "b", "同义"), ("0", "1", "中性")
CUTS = [0, 0, 1, 77, 200]


def random_marks(draw: np.random.Generator) -> np.ndarray:
    return draw.integers(0, 8, draw.integers(0, 60)).astype(np.uint8)


def write_marks(prefix: Path, documents: list[np.ndarray]) -> None:
    with MarkWriter(prefix) as writer:
        for marks in documents:
            writer.add_document(marks)


def random_fields(draw: np.random.Generator) -> tuple[list[Span], int]:
    borders = np.cumsum(draw.integers(0, 9, 2 * draw.integers(0, 5))).tolist()
    spans = [
        (NAMES[draw.integers(3)], *pair) for pair in zip(borders[::2], borders[1::2], strict=True)
    ]
    return spans, int(draw.integers(-1, 3))


def write_fields(prefix: Path, documents: list[tuple[list[Span], int]]) -> None:
    with FieldWriter(prefix, NAMES, LABELS) as writer:
        for spans, label in documents:
            writer.add_document(spans, label)


def test_the_bits_are_what_readers_count_on() -> None:
    assert (WORD, SENTENCE, FIELD, NO_LABEL) == (1, 2, 4, -1)


def test_marks_come_back_and_merge(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    documents = [random_marks(draw) for _ in range(200)]
    write_marks(tmp_path / "whole", documents)
    for part, (start, stop) in enumerate(pairwise(CUTS)):
        write_marks(tmp_path / f"part-{part}", documents[start:stop])
    MARKS.merge([tmp_path / f"part-{part}" for part in range(4)], tmp_path / "merged")
    assert (tmp_path / "merged.marks").read_bytes() == (tmp_path / "whole.marks").read_bytes()
    assert MARKS.fingerprint(tmp_path / "merged") == MARKS.fingerprint(tmp_path / "whole")
    assert MARKS.fingerprint(tmp_path / "merged") != MARKS.fingerprint(tmp_path / "part-3")
    marks, stream = (
        pickle.loads(pickle.dumps(Marks(tmp_path / "merged"))),
        np.concatenate(documents),
    )
    assert marks.tokens == len(stream)
    assert marks.slice(0, marks.tokens).dtype == np.uint8
    assert np.array_equal(marks.slice(0, marks.tokens), stream)
    assert np.array_equal(marks.slice(100, 130), stream[100:130])
    assert not np.array_equal(marks.slice(101, 131), stream[100:130])
    assert not list(tmp_path.glob("*.partial"))


def test_fields_come_back_and_merge(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    documents = [random_fields(draw) for _ in range(200)]
    write_fields(tmp_path / "whole", documents)
    for part, (start, stop) in enumerate(pairwise(CUTS)):
        write_fields(tmp_path / f"part-{part}", documents[start:stop])
    FIELDS.merge([tmp_path / f"part-{part}" for part in range(4)], tmp_path / "merged")
    assert (tmp_path / "merged.fields").read_bytes() == (tmp_path / "whole.fields").read_bytes()
    fields = pickle.loads(pickle.dumps(Fields(tmp_path / "merged")))
    assert (fields.names, fields.labels, fields.documents) == (NAMES, LABELS, 200)
    for number, (spans, label) in enumerate(documents):
        assert fields.document(number) == spans
        assert fields.label(number) == label
    assert any(spans != documents[0][0] for spans, _ in documents)
    assert not list(tmp_path.glob("*.partial"))


def test_a_corpus_without_documents_is_read(tmp_path: Path) -> None:
    write_marks(tmp_path / "x", [])
    write_fields(tmp_path / "x", [])
    assert Marks(tmp_path / "x").tokens == len(Marks(tmp_path / "x").slice(0, 0)) == 0
    assert Fields(tmp_path / "x").documents == 0


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    write_marks(tmp_path / "x", [np.ones(3, np.uint8)])
    before = (tmp_path / "x.marks").read_bytes()
    with pytest.raises(ZeroDivisionError), MarkWriter(tmp_path / "x") as writer:
        writer.add_document(np.ones(9, np.uint8))
        raise ZeroDivisionError
    assert (tmp_path / "x.marks").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.marks"]


def test_damaged_marks_are_a_sentence(tmp_path: Path) -> None:
    write_marks(tmp_path / "x", [np.arange(8, dtype=np.uint8)] * 3)
    good = (tmp_path / "x.marks").read_bytes()
    with pytest.raises(IndexFault, match="tokens 20 to 25 was asked for, it has 24"):
        Marks(tmp_path / "x").slice(20, 25)
    with pytest.raises(IndexFault, match="no such file of word and sentence borders"):
        Marks(tmp_path / "y")
    for bad, what in [
        (good[:-1], r"has 47 bytes, its header speaks of 48: cut or damaged.*请重新生成"),
        (good + b"\0", "has 49 bytes"),
        (good[:9], "does not start with BAJIEMRK"),
        (b"BAJIEGAP" + good[8:], "does not start with BAJIEMRK"),
        (good[:8] + b"\x02" + good[9:], "has version 2, 1 is read"),
    ]:
        (tmp_path / "x.marks").write_bytes(bad)
        with pytest.raises(IndexFault, match=what):
            Marks(tmp_path / "x")
        with pytest.raises(IndexFault, match=what):
            MARKS.merge([tmp_path / "x"], tmp_path / "z")


def test_damaged_fields_are_a_sentence(tmp_path: Path) -> None:
    write_fields(tmp_path / "x", [([("a", 0, 3), ("b", 3, 5)], 1), ([], -1)])
    good = (tmp_path / "x.fields").read_bytes()
    with pytest.raises(IndexFault, match="document 2 was asked for, it has 2"):
        Fields(tmp_path / "x").document(2)
    with FieldWriter(tmp_path / "y", NAMES, ()) as writer:
        writer.add_document([])
    with pytest.raises(IndexFault, match="has another 'about' than"):
        FIELDS.merge([tmp_path / "x", tmp_path / "y"], tmp_path / "z")
    head, name = 40, 40 + 8 + 8 + 8 + 8
    for bad, what in [
        (good[:-1], "cut or damaged"),
        (good[:head] + b"\x01" + good[head + 1 :], "do not add up"),
        (good[: head + 8] + b"\x03" + good[head + 9 :], "do not add up"),
        (good[:name] + b"\x07" + good[name + 1 :], "do not add up"),
        (good[:-1] + b"!", "has no list of names and labels"),
    ]:
        (tmp_path / "x.fields").write_bytes(bad)
        with pytest.raises(IndexFault, match=what):
            Fields(tmp_path / "x")
