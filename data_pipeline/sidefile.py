"""Sentences and their gap-sentence picks beside an index: PREFIX.gaps, writer, reader, merge.

    "BAJIEGAP" | version u64 = 1 | documents D u64 | units U u64 | sentences S u64
    units of each document, D x u32 | sentences of each unit, U x u32
    first token of each sentence, S x u32 | its end, S x u32 | picked or not, S x u8

Tokens are counted from the start of the document, whose place in the stream the index knows: so
the file of a split is the files of its shards, table after table. A unit is a run of sentences of
about 768 characters; its picked sentences are the target of a pseudo-summary and the others the
source. What lies between two sentences (line breaks) belongs to neither. A document without units
is a row of the first table like any other. Written aside, fsynced and renamed, as the index is.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import xxhash

from data_pipeline.index import IndexFault, path_of

SUFFIX = ".gaps"
MAGIC, VERSION = b"BAJIEGAP", 1
HEADER = struct.Struct("<8sQQQQ")  # magic, version, documents, units, sentences
TABLES = ("units", "sentences", "starts", "stops", "picked")
DTYPES = dict.fromkeys(TABLES, np.dtype("<u4")) | {"picked": np.dtype("u1")}
BLOCK_BYTES = 1 << 20


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


class GapWriter:
    """Writes the units of document after document; PREFIX.gaps appears at `close()`, whole.

    A `with` block closes it, and on an exception leaves what stood there before untouched.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.counts = dict.fromkeys(TABLES, 0)
        self._files = {name: _aside(self.prefix, name).open("wb", BLOCK_BYTES) for name in TABLES}

    def add_document(self, units: Sequence[GapUnit]) -> None:
        """Append the units of the next document of the index; none is fine."""
        self._write("units", [len(units)])
        self._write("sentences", [len(unit.starts) for unit in units])
        for unit in units:
            self._write("starts", unit.starts)
            self._write("stops", unit.stops)
            self._write("picked", unit.picked)

    def _write(self, name: str, values: Any) -> None:
        self._files[name].write(np.ascontiguousarray(values, DTYPES[name]).data)
        self.counts[name] += len(values)

    def close(self) -> None:
        """Put the tables together under the file's name."""
        for file in self._files.values():
            file.close()
        parts = [(_aside(self.prefix, name), 0, -1) for name in TABLES]
        _publish(self.prefix, [self.counts[name] for name in TABLES[:3]], parts)
        self.discard()

    def discard(self) -> None:
        """Drop what was written so far."""
        for name, file in self._files.items():
            file.close()
            _aside(self.prefix, name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class Gaps:
    """The units of PREFIX.gaps, memory-mapped.

    `documents`, `units`, `sentences` (counts); `first_unit` [documents + 1] and `first_sentence`
    [units + 1] int64: where the units of a document and the sentences of a unit begin.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.documents, self.units, self.sentences, offsets = _opened(self.prefix)
        path = path_of(self.prefix, SUFFIX)
        rows = [self.documents, self.units, *[self.sentences] * 3]
        self._tables: dict[str, np.ndarray] = {
            name: np.memmap(path, DTYPES[name], "r", offset, (count,))
            if count
            else np.empty(0, DTYPES[name])
            for name, offset, count in zip(TABLES, offsets, rows, strict=True)
        }
        self.first_unit = _running(self._tables["units"])
        self.first_sentence = _running(self._tables["sentences"])
        if self.first_unit[-1] != self.units or self.first_sentence[-1] != self.sentences:
            raise _fault(path, "has counts of units and sentences that do not add up")

    def unit(self, number: int) -> GapUnit:
        """One of all the units; see `first_unit` for the document that it is of."""
        if not 0 <= number < self.units:
            raise IndexFault(
                f"{self.prefix}{SUFFIX}: unit {number} was asked for, it has {self.units} "
                "(超出范围)"
            )
        rows = slice(self.first_sentence[number], self.first_sentence[number + 1])
        starts, stops, picked = (self._tables[name][rows] for name in TABLES[2:])
        return GapUnit(starts, stops, picked.astype(np.bool_))

    def document(self, number: int) -> list[GapUnit]:
        """The units of a document, in their order."""
        if not 0 <= number < self.documents:
            raise IndexFault(
                f"{self.prefix}{SUFFIX}: document {number} was asked for, it has {self.documents} "
                "(超出范围)"
            )
        return [self.unit(u) for u in range(self.first_unit[number], self.first_unit[number + 1])]

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}  # a worker process maps the file anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]


def merge(prefixes: Sequence[str | Path], out_prefix: str | Path) -> None:
    """Write the documents of all `prefixes`, in their order, as one file. Memory does not grow."""
    if not prefixes:
        raise IndexFault(f"{out_prefix}{SUFFIX}: there is no file to merge (没有可合并的文件)")
    heads = [_opened(Path(prefix)) for prefix in prefixes]
    parts = []
    for table, name in enumerate(TABLES):
        for prefix, (*counts, offsets) in zip(prefixes, heads, strict=True):
            size = counts[min(table, 2)] * DTYPES[name].itemsize
            parts.append((path_of(prefix, SUFFIX), offsets[table], size))
    documents, units, sentences, _ = zip(*heads, strict=True)
    _publish(Path(out_prefix), [sum(documents), sum(units), sum(sentences)], parts)


def fingerprint(prefix: str | Path) -> str:
    """ "xxh3-128:..." over the contents of PREFIX.gaps, read as a stream."""
    _opened(Path(prefix))
    digest = xxhash.xxh3_128()
    with path_of(prefix, SUFFIX).open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return f"xxh3-128:{digest.hexdigest()}"


def _running(counts: np.ndarray) -> np.ndarray:
    """0 and the sum up to each count."""
    out = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=out[1:])
    return out


def _aside(prefix: Path, name: str) -> Path:
    return path_of(prefix, f"{SUFFIX}.{name}.partial")


def _fault(path: Path, what: str) -> IndexFault:
    return IndexFault(f"{path}: {what}; build it again (句界文件损坏, 请重新生成)")


def _opened(prefix: Path) -> tuple[int, int, int, list[int]]:
    """Documents, units, sentences, and where each table begins, held against the file's size."""
    path = path_of(prefix, SUFFIX)
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise IndexFault(
            f"{path}: there is no such file of sentences; build the corpus with them, or correct "
            "the path (找不到句界文件)"
        ) from None
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise _fault(path, "is no file of sentences: it does not start with BAJIEGAP")
    _, version, documents, units, sentences = HEADER.unpack(head)
    if version != VERSION:
        raise _fault(path, f"has version {version}, {VERSION} is read")
    rows = [documents, units, sentences, sentences, sentences]
    offsets = [HEADER.size]
    for name, count in zip(TABLES, rows, strict=True):
        offsets.append(offsets[-1] + count * DTYPES[name].itemsize)
    if size != offsets[-1]:
        raise _fault(path, f"has {size} bytes, its header speaks of {offsets[-1]}: cut or damaged")
    return documents, units, sentences, offsets[:-1]


def _publish(prefix: Path, counts: list[int], parts: Sequence[tuple[Path, int, int]]) -> None:
    """Header and parts (file, offset, bytes; -1: all of it) aside, then under the file's name."""
    partial = path_of(prefix, SUFFIX + ".partial")
    with partial.open("wb") as out:
        out.write(HEADER.pack(MAGIC, VERSION, *counts))
        for path, offset, size in parts:
            with path.open("rb") as file:
                file.seek(offset)
                _copy(file, out, size)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path_of(prefix, SUFFIX))
    folder = os.open(prefix.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _copy(file: BinaryIO, out: BinaryIO, size: int) -> None:
    if size < 0:
        shutil.copyfileobj(file, out, BLOCK_BYTES)
    while size > 0:
        block = file.read(min(size, BLOCK_BYTES))
        assert block, "the header was held against the file's size"
        out.write(block)
        size -= len(block)
