"""What lies between two blocks of a build: shards of documents, tables of their hashes.

    add({"id": ..., "source": ..., "text": ...})  --zstd-->  00042.jsonl.zst.PID.partial
                                                     fsync, rename  -->  00042.jsonl.zst

Whatever a build writes is written aside and renamed when it is whole (`aside`), so that a build
killed at any moment leaves whole files and rubbish that is recognised by its name.
"""

import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard

from data_pipeline.aside import aside as aside

Record = dict[str, Any]

KEPT_LEVEL, PASSING_LEVEL = 3, 1
"""zstd: what stays in the corpus; what only the next stage reads (2.2 times as fast)."""
WRITE_BYTES = 1 << 19
ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u4")])
"""A document of a shard: the halves of its hash, its place in the shard."""


class CorpusError(ValueError):
    """A corpus cannot be built as asked; one sentence that names the file or the key to change."""


def sweep(folder: Path, spare: Sequence[Path] = ()) -> None:
    """Remove what a killed build left half written; not in `spare`, where others are writing."""
    for path in folder.rglob("*.partial"):
        if any(path.is_relative_to(busy) for busy in spare):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def shard(path: Path, level: int = KEPT_LEVEL) -> Iterator[Callable[[Record], None]]:
    """A shard to write: the function it gives adds one document."""
    packer = zstandard.ZstdCompressor(level=level, write_checksum=True)
    held = bytearray()
    with aside(path) as file, packer.stream_writer(file, closefd=False) as stream:

        def add(record: Record) -> None:
            held.extend(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            if len(held) >= WRITE_BYTES:
                stream.write(held)
                held.clear()

        yield add
        stream.write(held)


def records(path: Path) -> Iterator[Record]:
    """The documents of a shard, in order. CorpusError if the file is damaged."""
    line = b""
    unpacker = zstandard.ZstdDecompressor().decompressobj()  # it knows where a frame must end
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 17):
                head, *rest = unpacker.decompress(chunk).split(b"\n")
                line += head
                for following in rest:
                    yield orjson.loads(line)
                    line = following
    except (zstandard.ZstdError, orjson.JSONDecodeError) as error:
        raise CorpusError(
            f"{path} is damaged ({error}); remove its folder and build again (文件损坏，删后重建)"
        ) from None
    if line or not unpacker.eof:
        raise CorpusError(
            f"{path} is cut short; remove its folder and build again (文件不完整，删后重建)"
        )


def save_table(path: Path, digests: Sequence[bytes]) -> None:
    """Write a shard's hashes, sorted, each with its row."""
    halves = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
    table = np.empty(len(halves), dtype=ROW)
    table["high"], table["low"] = halves[:, 0], halves[:, 1]
    table["row"] = np.arange(len(halves))
    table.sort(order=("high", "low", "row"))
    save(path, table)


def save(path: Path, array: np.ndarray) -> None:
    """Write an array aside, then give it its name."""
    with aside(path) as file:
        np.save(file, array)


def open_table(path: Path) -> np.ndarray:
    """A shard's hashes, left on the disk."""
    return np.load(path, mmap_mode="r")


def key_range(table: np.ndarray, bucket: int, of: int) -> slice:
    """The rows of a table (sorted by its first column, uint64) that lie in one bucket of `of`."""
    width = (1 << 64) // of
    start, stop = (
        bisect_left(range(len(table)), edge * width, key=lambda row: int(table[row][0]))
        for edge in (bucket, bucket + 1)
    )
    return slice(start, stop)
