"""The bytes of a file, unpacked: gzip, zstd, bzip2, xz, one frame after the other.

    file --packing--> frame, frame, ...  --> bytes, bytes, ... Damage, bytes ...

Of a damaged frame everything before the damage is given, then a Damage, then the next frame that
can be recognised. A checksum comes at the end of a frame: what was given before it is found to be
wrong was given.
"""

import bz2
import codecs
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from data_pipeline.sources.documents import Meter
from data_pipeline.sources.places import opened

LARGEST_ZSTD_WINDOW = 1 << 31
LARGEST_XZ_MEMORY = 1 << 30
ERRORS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError, ValueError)


@dataclass(frozen=True)
class Packing:
    """How a file is packed."""

    name: str
    suffix: str
    """What the name of such a file ends in."""
    begins: "re.Pattern[bytes]"
    """How a frame begins: strict enough not to be met by chance within one."""
    decoder: Callable[[], Any]
    padded: bool = False
    """Zeros may follow a frame."""
    read_bytes: int = 1 << 16
    """Packed bytes at a time: what they become is in memory at once, which zstd may make much."""


PACKINGS = (
    Packing(
        "gzip",
        ".gz",
        re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL),
        lambda: zlib.decompressobj(wbits=31),
        padded=True,
    ),
    Packing(
        "zstd",
        ".zst",
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame; one to skip (pzstd)
        lambda: zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW).decompressobj(),
        read_bytes=1 << 14,
    ),
    Packing("bzip2", ".bz2", re.compile(rb"BZh[1-9]\x31\x41\x59\x26\x53\x59"), bz2.BZ2Decompressor),
    Packing(
        "xz",
        ".xz",
        re.compile(rb"\xfd7zXZ\x00"),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LARGEST_XZ_MEMORY),
        padded=True,
    ),
)
_UTF_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


@dataclass(frozen=True)
class Damage:
    """A place in the unpacked bytes where some are missing."""

    kind: str
    """truncated | damaged"""
    what: str
    """The sentence about the file, behind its name."""


Pieces = Iterator[bytes | Damage]


def packing_of(path: Path) -> Packing | None:
    """How a file is packed, by its first bytes, or by its name if it has none: a download that
    brought nothing. CorpusError if it cannot be opened."""
    with opened(path) as file:
        head = file.read(16)
    for packing in PACKINGS:
        if packing.begins.match(head) or (packing.name == "gzip" and head[:2] == b"\x1f\x8b"):
            return packing
        if not head and path.suffix == packing.suffix:
            return packing
    return None


def is_whole(path: Path) -> bool:
    """Whether a file must be read from its beginning: it is packed, or UTF-16."""
    with opened(path) as file:
        return packing_of(path) is not None or file.read(2) in _UTF_16


def pieces(file: BinaryIO, packing: Packing | None, meter: Meter) -> Pieces:
    """The bytes of a whole file, unpacked; UTF-16 with its mark becomes UTF-8."""
    size = max(os.fstat(file.fileno()).st_size, 1)
    stream = _plain(file, meter, 0, size) if packing is None else _frames(file, packing, meter)
    first = next(stream, b"")
    again = chain([first], stream)
    if isinstance(first, bytes) and first[:2] in _UTF_16:
        return _as_utf_8(again, _UTF_16[first[:2]])
    return again


def plain_range(file: BinaryIO, meter: Meter, start: int, stop: int) -> Pieces:
    """The bytes of a plain file from one place to another."""
    return _plain(file, meter, start, stop)


def _plain(file: BinaryIO, meter: Meter, start: int, stop: int) -> Pieces:
    file.seek(start)
    while start < stop and (data := file.read(min(1 << 20, stop - start))):
        start += len(data)
        meter.share = start / stop
        yield data


def _as_utf_8(stream: Pieces, encoding: str) -> Pieces:
    """A half of a pair that stands alone stays one, in bytes that are no UTF-8: the record that
    holds it is refused, not the file."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        for piece in stream:
            yield (
                decoder.decode(piece).encode("utf-8", "surrogatepass")
                if isinstance(piece, bytes)
                else piece
            )
        yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        yield Damage("truncated", "ends within a character of UTF-16")


def _frames(file: BinaryIO, packing: Packing, meter: Meter) -> Pieces:
    """What lies in one frame after the other. A decoder that waits at the end was cut short."""
    size = max(os.fstat(file.fileno()).st_size, 1)
    at = begin = 0  # where `data` begins in the file, and the frame in hand
    data = file.read(packing.read_bytes)
    decoder = None
    if not data:
        yield Damage("truncated", f"is truncated: it is empty, which no {packing.name} data is")
    while data:
        if decoder is None:
            if packing.padded:
                rest = data.lstrip(b"\0")
                at, data = at + len(data) - len(rest), rest
            if data:
                begin, decoder = at, packing.decoder()
        if data and decoder is not None:
            try:
                unpacked = decoder.decompress(data)
            except ERRORS as error:
                yield from _before_damage(file, packing, begin, at, len(data))
                yield Damage("damaged", f"is damaged: {packing.name} says '{error}'")
                at = _next_frame(file, packing, max(at, begin + 1))
                decoder, data = None, b""
                file.seek(at)
            else:
                at += len(data)
                meter.share = min(at / size, 1.0)
                if unpacked:
                    yield unpacked
                data = decoder.unused_data if decoder.eof else b""
                at -= len(data)
                decoder = None if decoder.eof else decoder
        data = data or file.read(packing.read_bytes)
    if decoder is not None:
        what = f"is truncated: its {packing.name} data stops before the end"
        yield Damage("truncated", what)


def _before_damage(
    file: BinaryIO, packing: Packing, begin: int, at: int, length: int
) -> Iterator[bytes]:
    """What the decoder had unpacked of `length` bytes when it met the damage: its frame once more,
    these bytes one by one."""
    decoder = packing.decoder()
    file.seek(begin)
    try:
        while begin < at:
            data = file.read(min(packing.read_bytes, at - begin))
            decoder.decompress(data)
            begin += len(data)
        for byte in file.read(length):
            if unpacked := decoder.decompress(bytes([byte])):
                yield unpacked
    except ERRORS:
        return


def _next_frame(file: BinaryIO, packing: Packing, start: int) -> int:
    """Where the next frame after a place begins, or the end of the file."""
    overlap = 16
    file.seek(start)
    held = b""
    while data := file.read(1 << 20):
        held += data
        if found := packing.begins.search(held):
            return start + found.start()
        start += max(len(held) - overlap, 0)
        held = held[-overlap:]
    return start + len(held)
