"""TensorFlow's checkpoint V2 (a tensor bundle), read and written without TensorFlow.

    PREFIX.index                   a sorted table: "" -> header, NAME -> type, shape, offset, CRC
    PREFIX.data-00000-of-00001     the tensors' bytes, little-endian, one after the other

The table is LevelDB's format: blocks of (shared, unshared, length, key, value), each with a type
byte and a masked CRC-32C behind it, an index block, a footer. The values are protocol buffers of a
handful of fields. Facts: tensorflow/core/util/tensor_bundle, tensorflow/core/lib/io/format.

Every CRC is checked; a file that fails is named and nothing of it is used.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from pretrain.convert.rules import ConversionError

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16}
DTYPES[19] = torch.float16
FLOAT = 1


class Place(NamedTuple):
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


# ---- CRC-32C


@cache
def _table() -> np.ndarray:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(0x82F63B78), crc >> 1).astype(np.uint32)
    return crc


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _crc(data, table):  # type: ignore[no-untyped-def]
    crc = np.uint32(0xFFFFFFFF)
    for byte in data:
        crc = table[(crc ^ byte) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)


def masked_crc(data: Any) -> int:
    """CRC-32C (Castagnoli) of bytes, masked as LevelDB stores it."""
    crc = int(_crc(np.frombuffer(data, np.uint8), _table()))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# ---- protocol buffers


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message: whole numbers and bytes."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        if key & 7 == 0:
            value, at = _read_varint(data, at)
            yield key >> 3, value
        elif key & 7 == 2:
            size, at = _read_varint(data, at)
            yield key >> 3, data[at : at + size]
            at += size
        else:
            size = {1: 8, 5: 4}[key & 7]
            yield key >> 3, int.from_bytes(data[at : at + size], "little")
            at += size


def _place(data: bytes) -> Place:
    found: dict[int, Any] = {}
    shape: tuple[int, ...] = ()
    for number, value in _fields(data):
        if number == 2:
            dims = [dict(_fields(dim)).get(1, 0) for n, dim in _fields(value) if n == 2]
            shape = tuple(dims)
        else:
            found[number] = value
    numbers = (found.get(n, 0) for n in (3, 4, 5, 6))
    return Place(found.get(1, 0), shape, *numbers)


def _entry(place: Place) -> bytes:
    dims = b"".join(
        b"\x12" + _varint(len(dim)) + dim for dim in (b"\x08" + _varint(n) for n in place.shape)
    )
    return (
        b"\x08"
        + _varint(place.dtype)
        + b"\x12"
        + _varint(len(dims))
        + dims
        + (b"\x20" + _varint(place.offset) if place.offset else b"")
        + b"\x28"
        + _varint(place.size)
        + b"\x35"
        + struct.pack("<I", place.crc)
    )


# ---- the table


def _block(data: bytes, offset: int, size: int, path: Path) -> bytes:
    block, kind = data[offset : offset + size], data[offset + size : offset + size + 1]
    (crc,) = struct.unpack("<I", data[offset + size + 1 : offset + size + 5])
    if masked_crc(block + kind) != crc:
        raise ConversionError(f"{path}: a block differs from its CRC; fetch it again (文件损坏)")
    if kind != b"\0":
        raise ConversionError(
            f"{path}: its table is compressed (snappy), which TensorFlow has not written since "
            "1.2; save the checkpoint again (不支持压缩的索引)"
        )
    return block


def _rows(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    (restarts,) = struct.unpack("<I", block[-4:])
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _read_varint(block, at)
        unshared, at = _read_varint(block, at)
        size, at = _read_varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + size]
        at += size


def places(prefix: Path) -> dict[str, Place]:
    """Every tensor's place. ConversionError for a file that is no bundle or is damaged."""
    path = prefix.with_name(prefix.name + ".index")
    try:
        data = path.read_bytes()
    except OSError:
        raise ConversionError(f"{path}: cannot be read (找不到索引文件)") from None
    if len(data) < FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise ConversionError(f"{path}: is no index of a TensorFlow checkpoint V2 (格式不符)")
    try:
        found: dict[str, Place] = {}
        for _, handle in _rows(_block(data, *_index_handle(data[-FOOTER_BYTES:]), path)):
            start, after = _read_varint(handle, 0)
            size, _ = _read_varint(handle, after)
            for key, value in _rows(_block(data, start, size, path)):
                if key:
                    found[key.decode()] = _place(value)
        return found
    except (IndexError, struct.error, UnicodeDecodeError, KeyError):
        raise ConversionError(
            f"{path}: cannot be read as a table; fetch it again (文件已损坏)"
        ) from None


def _index_handle(footer: bytes) -> tuple[int, int]:
    at = 0
    for _ in range(2):  # the metaindex is passed over
        _, at = _read_varint(footer, at)
    offset, at = _read_varint(footer, at)
    size, _ = _read_varint(footer, at)
    return offset, size


# ---- tensors


def read(prefix: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> how to read that tensor; its CRC is checked when it is read."""
    found = places(prefix)
    shards = 1 + max((place.shard for place in found.values()), default=0)
    readers = {}
    for name, place in found.items():
        if place.dtype in DTYPES:  # strings, such as an object graph, are not tensors of a model
            path = prefix.with_name(f"{prefix.name}.data-{place.shard:05d}-of-{shards:05d}")
            readers[name] = _reader(path, name, place)
    return readers


def _reader(path: Path, name: str, place: Place) -> Callable[[], torch.Tensor]:
    def read_it() -> torch.Tensor:
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                data = bytearray(file.read(place.size))
        except OSError:
            raise ConversionError(f"{path}: cannot be read (找不到数据文件)") from None
        if len(data) != place.size or masked_crc(data) != place.crc:
            raise ConversionError(f"{path}: '{name}' differs from its CRC; fetch it again (损坏)")
        if not data:
            return torch.empty(place.shape, dtype=DTYPES[place.dtype])
        return torch.frombuffer(data, dtype=DTYPES[place.dtype]).view(place.shape)

    return read_it


def write(prefix: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A bundle of float32 tensors in one shard, and the file `checkpoint` that names it."""
    found: dict[bytes, Place] = {}
    offset = 0
    with prefix.with_name(prefix.name + ".data-00000-of-00001").open("wb") as file:
        for name, tensor in tensors:
            data = tensor.float().contiguous().numpy().tobytes()
            shape = tuple(tensor.shape)
            found[name.encode()] = Place(FLOAT, shape, 0, offset, len(data), masked_crc(data))
            file.write(data)
            offset += len(data)
    rows = [(b"", b"\x08\x01\x1a\x02\x08\x01")]  # one shard, little-endian, version 1
    rows += [(name, _entry(found[name])) for name in sorted(found)]
    with prefix.with_name(prefix.name + ".index").open("wb") as file:
        data = _put(file, rows)
        metaindex = _put(file, [])
        index = _put(file, [(rows[-1][0], data)])
        footer = metaindex + index
        file.write(footer.ljust(FOOTER_BYTES - 8, b"\0") + struct.pack("<Q", MAGIC))
    note = f'model_checkpoint_path: "{prefix.name}"\nall_model_checkpoint_paths: "{prefix.name}"\n'
    (prefix.parent / "checkpoint").write_text(note, "utf-8")


def _put(file: Any, rows: list[tuple[bytes, bytes]]) -> bytes:
    """Write a block; returns its handle."""
    block = b"".join(
        _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value for key, value in rows
    )
    block += struct.pack("<II", 0, 1)  # one restart, at 0
    offset = file.tell()
    file.write(block + b"\0" + struct.pack("<I", masked_crc(block + b"\0")))
    return _varint(offset) + _varint(len(block))
