"""Token files in Megatron's layout, PREFIX.bin and PREFIX.idx: writer, reader, merge in one place.

    PREFIX.bin   the tokens of all documents, one after another: uint16 or int32, little-endian
    PREFIX.idx   "MMIDIDX", two zeros | version u64 = 1 | dtype u8 | sequences S u64 | borders u64
                 | length of each sequence, S x i32 | byte offset of each sequence, S x i64
                 | sequences before each document and after the last, (documents + 1) x i64

They equal, byte for byte, what `IndexedDatasetBuilder` of megatron-core 0.16 writes. A document of
ours is one sequence; any number is read. A writer holds neither tokens nor lengths: the lengths go
to a file of their own and from there, a block at a time, into the .idx. Nothing is seen under its
name before it is whole: both files are written aside, fsynced and renamed, the .idx last.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import xxhash

from data_pipeline.aside import partial_of, settle

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, borders of documents
INTEGERS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's dtype codes
DTYPES = {code: np.dtype(name) for code, name in INTEGERS.items()}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 1 << 18  # entries of a table in memory at a time
BLOCK_BYTES = 1 << 23

Blocks = Callable[[], Iterator[np.ndarray]]


class IndexFault(ValueError):
    """A token file that is missing, cut short or at odds with itself; or tokens that do not fit."""


def path_of(prefix: str | Path, suffix: str) -> Path:
    """PREFIX + suffix (".bin", ".idx"); a dot in the prefix's own name stays."""
    return Path(f"{prefix}{suffix}")


class IndexWriter:
    """Writes documents into PREFIX.bin and PREFIX.idx; they appear at `close()`, whole.

    A `with` block closes it, and on an exception leaves what stood there before untouched.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        """`dtype`: uint16 where the vocabulary is under 65,500 tokens, else int32."""
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise IndexFault(
                f"{prefix}: Megatron's files have no dtype {np.dtype(dtype)}; use uint16 or int32 "
                "(不支持的数据类型)"
            )
        self.documents = self.tokens = 0
        bounds = np.iinfo(self.dtype)
        self._least, self._most = int(bounds.min), int(bounds.max)
        self._bin = _aside(self.prefix, ".bin").open("wb", BLOCK_BYTES)
        self._lengths = _aside(self.prefix, ".lengths").open("wb", BLOCK_BYTES)

    def add_document(self, ids: np.ndarray) -> None:
        """Append one document, an array of token ids (empty is fine)."""
        ids = np.asarray(ids)
        self.add_documents(ids, np.array([ids.size]))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents whose ids lie one after the other; `lengths`: how many each has."""
        if ids.size and not (self._least <= ids.min() and ids.max() <= self._most):
            raise IndexFault(
                f"{self.prefix}: document {self._bad(ids, lengths)} has token ids from {ids.min()} "
                f"to {ids.max()}, {self.dtype} holds {self._least} to {self._most}; write it as "
                "int32 (词表超出 uint16)"
            )
        self._bin.write(np.ascontiguousarray(ids, self.dtype).data)
        self._lengths.write(np.ascontiguousarray(lengths, "<i4").data)
        self.documents += len(lengths)
        self.tokens += ids.size

    def _bad(self, ids: np.ndarray, lengths: np.ndarray) -> int:
        """The number of the first document with an id that does not fit."""
        place = int(np.argmax((ids < self._least) | (ids > self._most)))
        return self.documents + int(np.searchsorted(np.cumsum(lengths), place, side="right"))

    def close(self) -> None:
        """Write the .idx and rename both files into place."""
        self._bin.close()
        self._lengths.close()
        lengths = _aside(self.prefix, ".lengths")
        borders = _aligned_blocks(self.documents)
        _publish(
            self.prefix, self.dtype, self.documents, self.documents,
            lambda: _file_blocks(lengths, np.dtype("<i4")), borders,
        )  # fmt: skip
        lengths.unlink()

    def discard(self) -> None:
        """Drop what was written so far."""
        for file, suffix in [(self._bin, ".bin"), (self._lengths, ".lengths")]:
            file.close()
            _aside(self.prefix, suffix).unlink(missing_ok=True)

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


class Index:
    """The documents of PREFIX.bin and PREFIX.idx, memory-mapped.

    `documents`, `tokens` (counts), `dtype`; `lengths` [documents] int32 and `offsets`
    [documents + 1] int64: the tokens of each document and where it starts in the flat stream.
    Opening reads the tables once, to see that they agree with one another and with the .bin;
    the two take 12 bytes a document, from when they are first asked for.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._tables = _Tables(self.prefix)
        self.dtype = self._tables.dtype
        self.documents = self._tables.documents
        self.tokens = self._tables.bin_bytes // self.dtype.itemsize
        path = path_of(self.prefix, ".bin")
        self._stream: np.ndarray = (
            np.memmap(path, self.dtype, "r") if self.tokens else np.empty(0, self.dtype)
        )

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each document starts in the flat stream, and the end."""
        return self._tables.token_offsets()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets).astype(np.int32)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all documents laid end to end: a view of the file, no copy."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexFault(
                f"{self.prefix}: tokens {start} to {stop} were asked for, it has {self.tokens} "
                "(超出范围)"
            )
        return self._stream[start:stop]

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document: a view of the file."""
        if not 0 <= number < self.documents:
            raise IndexFault(
                f"{self.prefix}: document {number} was asked for, it has {self.documents} "
                "(超出范围)"
            )
        return self._stream[self.offsets[number] : self.offsets[number + 1]]

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}  # a worker process maps the files anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]


def merge(prefixes: Sequence[str | Path], out_prefix: str | Path) -> None:
    """Write the documents of all `prefixes`, in their order, as one index. Their dtypes must agree.

    Files of several sequences a document keep them. Memory does not grow with the files.
    """
    if not prefixes:
        raise IndexFault(f"{out_prefix}: there is no index to merge (没有可合并的索引)")
    parts = [_Tables(Path(prefix)) for prefix in prefixes]
    dtype = parts[0].dtype
    for part in parts:
        if part.dtype != dtype:
            raise IndexFault(
                f"{part.prefix} holds {part.dtype}, {parts[0].prefix} {dtype}; indexes that are "
                "merged have one dtype (数据类型不一致)"
            )
    with _aside(Path(out_prefix), ".bin").open("wb") as out:
        for part in parts:
            with path_of(part.prefix, ".bin").open("rb") as data:
                shutil.copyfileobj(data, out, BLOCK_BYTES)

    def lengths() -> Iterator[np.ndarray]:
        for part in parts:
            yield from part.blocks(part.lengths)

    def borders() -> Iterator[np.ndarray]:
        before = 0
        yield np.zeros(1, np.int64)
        for part in parts:
            for block in part.blocks(part.borders[1:]):
                yield block + before
            before += part.sequences

    sequences = sum(part.sequences for part in parts)
    documents = sum(part.documents for part in parts)
    _publish(Path(out_prefix), dtype, sequences, documents, lengths, borders)


def fingerprint(prefix: str | Path) -> str:
    """ "xxh3-128:..." over the contents of PREFIX.idx and PREFIX.bin, read as a stream."""
    digest = xxhash.xxh3_128()
    for suffix in (".idx", ".bin"):
        path = path_of(prefix, suffix)
        with _opened(path) as file:
            digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return f"xxh3-128:{digest.hexdigest()}"


# ---- reading: the tables of an .idx


class _Tables:
    """The tables of PREFIX.idx, held against the sizes of both files.

    Each is mapped when it is looked at and for as long: a merge of thousands of shards would run
    out of file handles.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.path = path_of(prefix, ".idx")
        with _opened(self.path) as file:
            head = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
        with _opened(path_of(prefix, ".bin")) as file:
            self.bin_bytes = os.fstat(file.fileno()).st_size
        if not head.startswith(MAGIC[: len(head)]) or not head:
            raise self._fault(
                "is not an index of Megatron's layout: it does not start with MMIDIDX"
            )
        if len(head) < HEADER.size:
            raise self._fault(f"is cut short: {size} bytes, the header alone has {HEADER.size}")
        _, version, code, self.sequences, borders = HEADER.unpack(head)
        if version != VERSION or code not in DTYPES or borders < 1:
            raise self._fault(
                f"has version {version}, dtype code {code} and {borders} document borders; "
                f"version 1, one of the integer codes {sorted(DTYPES)} and at least 1 are read"
            )
        self.documents = borders - 1
        self.dtype = DTYPES[code]
        whole = HEADER.size + 12 * self.sequences + 8 * borders
        if size not in (whole, whole + self.sequences):  # Megatron may add a mode per sequence
            raise self._fault(f"has {size} bytes, its header speaks of {whole}: cut or damaged")
        self._check()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        return self._table("<i4", HEADER.size, self.sequences)

    @property
    def pointers(self) -> np.ndarray:
        """Byte offset of each sequence."""
        return self._table("<i8", HEADER.size + 4 * self.sequences, self.sequences)

    @property
    def borders(self) -> np.ndarray:
        """Sequences before each document, and after the last."""
        return self._table("<i8", HEADER.size + 12 * self.sequences, self.documents + 1)

    def _table(self, dtype: str, offset: int, count: int) -> np.ndarray:
        if not count:
            return np.empty(0, dtype)
        return np.memmap(self.path, dtype, "r", offset, (count,))

    def _fault(self, what: str) -> IndexFault:
        return IndexFault(f"{self.path}: {what}; build it again (索引文件损坏, 请重新生成)")

    @staticmethod
    def blocks(table: np.ndarray) -> Iterator[np.ndarray]:
        """A table a block at a time."""
        for start in range(0, len(table), BLOCK):
            yield table[start : start + BLOCK]

    def _check(self) -> None:
        """Lengths must give the pointers and the size of the .bin; borders must rise to the end."""
        at = 0
        for lengths, pointers in zip(
            self.blocks(self.lengths), self.blocks(self.pointers), strict=True
        ):
            ends = at + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            starts = np.concatenate([[at], ends[:-1]])
            if int(lengths.min()) < 0 or not np.array_equal(starts, pointers):
                raise self._fault("has lengths and offsets of sequences that do not add up")
            at = int(ends[-1])
        if at != self.bin_bytes:
            raise IndexFault(
                f"{path_of(self.prefix, '.bin')}: has {self.bin_bytes} bytes, the lengths in the "
                f".idx add up to {at}: cut short or of another build; build both again "
                "(数据文件与索引不符, 请重新生成)"
            )
        first, before = int(self.borders[0]), 0
        for borders in self.blocks(self.borders):
            if int(borders[0]) < before or (np.diff(borders) < 0).any():
                raise self._fault("has borders of documents that fall")
            before = int(borders[-1])
        if first != 0 or before != self.sequences:
            raise self._fault(
                f"has borders of documents from {first} to {before}, they must run from "
                f"0 to the number of sequences, {self.sequences}"
            )

    def token_offsets(self) -> np.ndarray:
        """Where each document starts in the flat stream, and the end: [documents + 1] int64."""
        offsets = np.empty(self.documents + 1, np.int64)
        end = self.bin_bytes // self.dtype.itemsize
        table, pointers = self.borders, self.pointers
        for start in range(0, len(table), BLOCK):
            borders = np.asarray(table[start : start + BLOCK])
            inside = borders < self.sequences
            block = np.full(len(borders), end, np.int64)
            block[inside] = pointers[borders[inside]] // self.dtype.itemsize
            offsets[start : start + BLOCK] = block
        return offsets


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise IndexFault(
            f"{path}: there is no such token file; build the corpus, or correct the path "
            "(找不到数据文件)"
        ) from None


# ---- writing: aside, then under its name


def _aside(prefix: Path, suffix: str) -> Path:
    return partial_of(path_of(prefix, suffix))


def _file_blocks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while block := file.read(BLOCK * dtype.itemsize):
            yield np.frombuffer(block, dtype)


def _aligned_blocks(documents: int) -> Blocks:
    """Borders of documents of one sequence each: 0, 1, 2 and so on."""
    return lambda: (
        np.arange(start, min(start + BLOCK, documents + 1))
        for start in range(0, documents + 1, BLOCK)
    )


def _publish(
    prefix: Path,
    dtype: np.dtype,
    sequences: int,
    documents: int,
    lengths: Blocks,
    borders: Blocks,
) -> None:
    """Write the .idx for the .bin that lies aside, and rename both; `lengths` is read twice."""

    def pointers() -> Iterator[np.ndarray]:
        at = 0
        for block in lengths():
            ends = at + np.cumsum(block, dtype=np.int64) * dtype.itemsize
            yield np.concatenate([[at], ends[:-1]])
            at = int(ends[-1])

    tables: Iterable[tuple[Blocks, str]] = [(lengths, "<i4"), (pointers, "<i8"), (borders, "<i8")]
    with _aside(prefix, ".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, documents + 1))
        for blocks, kind in tables:
            for block in blocks():
                file.write(np.ascontiguousarray(block, kind).data)
    whole = [path_of(prefix, suffix) for suffix in (".bin", ".idx")]
    # An old .idx beside a new .bin would be a lie, if only for a moment: without .idx, no index.
    settle(whole, gone=whole[1:])
