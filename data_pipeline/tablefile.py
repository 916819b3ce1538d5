"""A file of tables beside an index: counts in its head, then each table whole, one after another.

    magic, 8 bytes | version u64 | counts, each u64 | table | table | ...

Writer, reader, merge and fingerprint of whatever a `Layout` describes (sidefile.py holds ours). A
row says nothing of its place in the file, so that the file of a split is the files of its shards,
table after table; memory does not grow with them. A writer's tables lie aside, each in a file of
its own, until `close()` puts them together under the name.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self

import numpy as np
import xxhash

from data_pipeline.aside import partial_of, settle
from data_pipeline.index import IndexFault, path_of

BLOCK_BYTES = 1 << 20


class Table(NamedTuple):
    """One table: `rows` names what counts its rows."""

    name: str
    dtype: np.dtype
    rows: str


@dataclass(frozen=True)
class Layout:
    """What a kind of file holds."""

    suffix: str
    """PREFIX + suffix is the file."""
    magic: bytes
    """Its first 8 bytes."""
    version: int
    """Of the layout; another one is refused."""
    counts: tuple[str, ...]
    """What is counted in the head."""
    tables: tuple[Table, ...]
    """In the order of the file; the rows of each are one of `counts`."""
    holds: str
    """What an error calls its contents."""
    chinese: str
    """And in Chinese."""
    shared: str | None = None
    """A table that is the same in every shard of a corpus and stands once in a merged file."""

    def path(self, prefix: str | Path) -> Path:
        """The file beside the index at `prefix`."""
        return path_of(prefix, self.suffix)

    def open(self, prefix: str | Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """Counts, and the tables memory-mapped. IndexFault if it is missing, cut or damaged."""
        path = self.path(prefix)
        counts, offsets = self._head(prefix)
        tables: dict[str, np.ndarray] = {}
        for table, offset in zip(self.tables, offsets, strict=True):
            rows = counts[table.rows]
            tables[table.name] = (
                np.memmap(path, table.dtype, "r", offset, (rows,))
                if rows
                else np.empty(0, table.dtype)
            )
        return counts, tables

    def merge(self, prefixes: Sequence[str | Path], out_prefix: str | Path) -> None:
        """Write what all `prefixes` hold, in their order, as one file."""
        if not prefixes:
            raise IndexFault(
                f"{self.path(out_prefix)}: there is no file to merge (没有可合并的文件)"
            )
        heads = [self._head(prefix) for prefix in prefixes]
        total = {name: sum(counts[name] for counts, _ in heads) for name in self.counts}
        parts = []
        for number, table in enumerate(self.tables):
            some = list(zip(prefixes, heads, strict=True))
            if table.name == self.shared:
                self._check_shared(prefixes, table.name)
                total[table.rows] = heads[0][0][table.rows]
                some = some[:1]
            for prefix, (counts, offsets) in some:
                size = counts[table.rows] * table.dtype.itemsize
                parts.append((self.path(prefix), offsets[number], size))
        self._put_together(Path(out_prefix), total, parts)

    def fingerprint(self, prefix: str | Path) -> str:
        """ "xxh3-128:..." over the file's contents, read as a stream."""
        self._head(prefix)
        digest = xxhash.xxh3_128()
        with self.path(prefix).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return f"xxh3-128:{digest.hexdigest()}"

    def fault(self, prefix: str | Path, what: str) -> IndexFault:
        """The sentence about a file that is not what it says."""
        return IndexFault(
            f"{self.path(prefix)}: {what}; build it again ({self.chinese}损坏, 请重新生成)"
        )

    def out_of_range(self, prefix: str | Path, what: str, has: int) -> IndexFault:
        """The sentence about a question for what is not there."""
        return IndexFault(f"{self.path(prefix)}: {what} was asked for, it has {has} (超出范围)")

    @property
    def _header(self) -> struct.Struct:
        return struct.Struct(f"<8sQ{len(self.counts)}Q")

    def _head(self, prefix: str | Path) -> tuple[dict[str, int], list[int]]:
        """Counts, and where each table begins, held against the file's size."""
        path, header = self.path(prefix), self._header
        try:
            with path.open("rb") as file:
                head = file.read(header.size)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            raise IndexFault(
                f"{path}: there is no such file of {self.holds}; build the corpus with them, or "
                f"correct the path (找不到{self.chinese})"
            ) from None
        if len(head) < header.size or not head.startswith(self.magic):
            raise self.fault(
                prefix,
                f"is no file of {self.holds}: it does not start with {self.magic.decode()}",
            )
        _, version, *numbers = header.unpack(head)
        if version != self.version:
            raise self.fault(prefix, f"has version {version}, {self.version} is read")
        counts = dict(zip(self.counts, numbers, strict=True))
        ends = [header.size]
        for table in self.tables:
            ends.append(ends[-1] + counts[table.rows] * table.dtype.itemsize)
        if size != ends[-1]:
            raise self.fault(
                prefix, f"has {size} bytes, its header speaks of {ends[-1]}: cut or damaged"
            )
        return counts, ends[:-1]

    def _check_shared(self, prefixes: Sequence[str | Path], name: str) -> None:
        first = self.open(prefixes[0])[1][name]
        for prefix in prefixes[1:]:
            if not np.array_equal(self.open(prefix)[1][name], first):
                raise self.fault(
                    prefix,
                    f"has another '{name}' than {self.path(prefixes[0])}: not of one corpus",
                )

    def _put_together(
        self, prefix: Path, counts: dict[str, int], parts: Sequence[tuple[Path, int, int]]
    ) -> None:
        """Head and parts (file, offset, bytes) aside, then under the file's name."""
        path = self.path(prefix)
        with partial_of(path).open("wb") as out:
            numbers = [counts[name] for name in self.counts]
            out.write(self._header.pack(self.magic, self.version, *numbers))
            for source, offset, size in parts:
                with source.open("rb") as file:
                    file.seek(offset)
                    _copy(file, out, size)
        settle([path])


class TableWriter:
    """Writes a file of tables, a few rows at a time; it appears at `close()`, whole.

    A `with` block closes it, and on an exception leaves what stood there before untouched.
    """

    layout: ClassVar[Layout]

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.rows = {table.name: 0 for table in self.layout.tables}
        self._dtypes = {table.name: table.dtype for table in self.layout.tables}
        self._files = {name: self._aside(name).open("wb", BLOCK_BYTES) for name in self.rows}

    def write(self, name: str, values: Any) -> None:
        """Append rows to a table."""
        self._files[name].write(np.ascontiguousarray(values, self._dtypes[name]).data)
        self.rows[name] += len(values)

    def close(self) -> None:
        """Put the tables together under the file's name."""
        for file in self._files.values():
            file.close()
        counts = {table.rows: self.rows[table.name] for table in self.layout.tables}
        assert all(counts[table.rows] == self.rows[table.name] for table in self.layout.tables)
        parts = [
            (self._aside(table.name), 0, self.rows[table.name] * table.dtype.itemsize)
            for table in self.layout.tables
        ]
        self.layout._put_together(self.prefix, counts, parts)
        self.discard()

    def discard(self) -> None:
        """Drop what was written so far."""
        for name, file in self._files.items():
            file.close()
            self._aside(name).unlink(missing_ok=True)

    def _aside(self, name: str) -> Path:
        return partial_of(path_of(self.prefix, f"{self.layout.suffix}.{name}"))

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


class TableReader:
    """The tables of a file, memory-mapped; a copy in another process maps it anew."""

    layout: ClassVar[Layout]

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._counts, self._tables = self.layout.open(self.prefix)

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]


def running(counts: np.ndarray) -> np.ndarray:
    """0 and the sum up to each count, int64."""
    out = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=out[1:])
    return out


def _copy(file: BinaryIO, out: BinaryIO, size: int) -> None:
    while size > 0:
        block = file.read(min(size, BLOCK_BYTES))
        assert block, "the header was held against the file's size"
        out.write(block)
        size -= len(block)
