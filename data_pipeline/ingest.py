"""Sources -> documents: jsonl and txt files, plain, .gz or .zst; the door to `datasets`.

    sources --plan--> tasks of about data.task_mb, each some parts of files
                        |     plain jsonl       a part is a range of bytes, moved to line borders
                        |     packed jsonl      a part is every n-th MiB of the unpacked lines:
                        |                       each unpacks all of it, so they are few
                        |     txt               a part is a whole file
                        |     datasets          a part is a range of rows
                        +--read--> (id, text, other fields) one document after the other

The tasks are a function of the files and of task_mb alone, never of the number of workers. A line
that cannot be used stops the build with its file, line and byte: nothing is dropped silently.
"""

import glob
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import xxhash
import zstandard

from configs.corpus import Data
from configs.sources import Source
from data_pipeline.shards import CorpusError

BLOCK_BYTES = 1 << 20
LARGEST_ZSTD_WINDOW = 1 << 31
PACKED_RATIO = 4  # text is about this much larger than its archive
MOST_PARTS_OF_AN_ARCHIVE = 8  # each unpacks the whole file: 32 of a .gz cost 5 times its cleaning
SUFFIXES = {"jsonl": (".jsonl", ".ndjson", ".json"), "txt": (".txt",)}
PROJECT = Path(__file__).resolve().parents[1]

_BLANK_LINE = re.compile(rb"^[ \t\r\f\v]*\n", re.MULTILINE)
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame; one to skip (pzstd)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """A document as it comes from its source."""

    id: str
    text: str
    fields: dict[str, Any]


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


@dataclass
class Meter:
    """How far the reading of a part has come, from 0 to 1."""

    share: float = 0.0


# ---- what there is to read


def plan(data: Data) -> tuple[list[tuple[Part, ...]], list[list[Any]]]:
    """The tasks, and what identifies their input: of every file its name, bytes, time of change
    and a glance into it.

    CorpusError if a source has no files.
    """
    limit = data.task_mb * 1_000_000
    parts: list[Part] = []
    identity: list[list[Any]] = []
    for number, source in enumerate(data.sources):
        if source.kind == "datasets":
            rows = _dataset(source)
            size = max(int(rows.data.nbytes), 1)
            identity.append([source.name, rows._fingerprint, len(rows)])
            parts += _cut(Part(number, source.paths[0], False, 0, 1, size), limit, len(rows) or 1)
            continue
        for path in files(source):
            packed = _packing(path) is not None
            status = path.stat()
            glance = _glance(path, status.st_size)
            identity.append([path.name, status.st_size, status.st_mtime_ns, glance])
            weight = max(status.st_size * (PACKED_RATIO if packed else 1), 1)
            most = 1 if source.kind == "txt" else MOST_PARTS_OF_AN_ARCHIVE if packed else weight
            parts += _cut(Part(number, str(path), packed, 0, 1, weight), limit, most)
    return _tasks(parts, limit), identity


def files(source: Source) -> list[Path]:
    """The files of a source, in order: each path's matches sorted, no file twice."""
    found: dict[Path, None] = {}
    for pattern in source.paths:
        matches = [path for path in _matches(pattern, SUFFIXES[source.kind]) if not path.is_dir()]
        if not matches:
            raise CorpusError(
                f"source '{source.name}': no file at '{pattern}'; correct its path (找不到文件)"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _matches(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    for candidate in _places(pattern):
        if candidate.is_file():
            return [candidate]
        if candidate.is_dir():
            ends = tuple(suffix + packing for suffix in suffixes for packing in ("", ".gz", ".zst"))
            return sorted(path for path in candidate.rglob("*") if path.name.endswith(ends))
        if matches := glob.glob(str(candidate), recursive=True):
            return sorted(map(Path, matches))
    return []


def _places(pattern: str) -> Iterator[Path]:
    """Where a path may point: as written, or in the project's own folder."""
    path = Path(os.path.expandvars(pattern)).expanduser()
    yield path
    if not path.is_absolute():
        yield PROJECT / path


def first_place(pattern: str) -> Path | None:
    """The file or folder that a path of the config names, or None."""
    return next((place for place in _places(pattern) if place.exists()), None)


def _cut(whole: Part, limit: int, most: int) -> list[Part]:
    of = max(1, min(-(-whole.weight // limit), most))
    share = max(whole.weight // of, 1)
    return [Part(whole.source, whole.path, whole.packed, n, of, share) for n in range(of)]


def _tasks(parts: list[Part], limit: int) -> list[tuple[Part, ...]]:
    """Neighbouring small parts share a task."""
    tasks: list[list[Part]] = []
    room = 0
    for part in parts:
        if not tasks or part.weight > room:
            tasks.append([])
            room = limit
        tasks[-1].append(part)
        room -= part.weight
    return [tuple(task) for task in tasks]


# ---- reading


def read(source: Source, part: Part, meter: Meter) -> Iterator[Document]:
    """The documents of one part. CorpusError names file, line and byte of what cannot be read."""
    if source.kind == "datasets":
        yield from _rows(source, part, meter)
    elif source.kind == "jsonl":
        yield from _json_lines(source, part, meter)
    else:
        yield from _plain_text(source, Path(part.path), meter)
    meter.share = 1.0


def _json_lines(source: Source, part: Part, meter: Meter) -> Iterator[Document]:
    path = Path(part.path)
    for number, (offset, block) in enumerate(_blocks(path, part, meter)):
        if part.packed and number % part.of != part.number:
            continue
        for line in block.split(b"\n"):
            if offset == 0:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line and not line.isspace():
                yield _parse(source, path, offset, line)
            offset += len(line) + 1


def _parse(source: Source, path: Path, offset: int, line: bytes) -> Document:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _decode(line, path, offset)  # says so if the cause is not the JSON but the UTF-8
        raise _unusable(path, offset, f"is no valid JSON ({error.msg})") from None
    if not isinstance(record, dict):
        raise _unusable(path, offset, "is no JSON object, must be {...}")
    text = record.pop(source.text_field, None)
    if not isinstance(text, str):
        has = "null or not text" if source.text_field in orjson.loads(line) else "missing"
        known = ", ".join(map(repr, record)) or "nothing else"
        raise _unusable(
            path,
            offset,
            f"has no text: its field '{source.text_field}' is {has} (there are {known}); "
            f"mend the line or name the field in text_field of source '{source.name}'",
        )
    return _document(source, record, text, f"{path.name}:{offset}")


def _document(source: Source, record: dict[str, Any], text: str, place: str) -> Document:
    name = record.pop("id", None)
    name = f"{source.name}/{place}" if name is None else str(name)
    simple = (str, int, float, bool)
    fields = {key: value for key, value in record.items() if isinstance(value, simple)}
    fields["source"] = str(fields.get("source", source.name))
    return Document(name, text, fields)


def _plain_text(source: Source, path: Path, meter: Meter) -> Iterator[Document]:
    """Text between blank lines, or the whole file."""
    held: list[bytes] = []
    start = 0

    def whole(place: int) -> Iterator[Document]:
        data = b"".join(held).removeprefix(_BYTE_ORDER_MARK if place == 0 else b"")
        held.clear()
        if data and not data.isspace():
            yield Document(
                f"{source.name}/{path.name}:{place}",
                _decode(data, path, place),
                {"source": source.name},
            )

    for offset, block in _blocks(path, None, meter):
        last = 0
        for blank in _BLANK_LINE.finditer(block) if source.documents == "blank_line" else ():
            held.append(block[last : blank.start()])
            yield from whole(start)
            last = blank.end()
            start = offset + last
        held.append(block[last:])
    yield from whole(start)


def _rows(source: Source, part: Part, meter: Meter) -> Iterator[Document]:
    rows = _dataset(source)
    if source.text_field not in rows.column_names:
        raise CorpusError(
            f"source '{source.name}': the dataset has no column '{source.text_field}', it has "
            f"{', '.join(rows.column_names)}; set its text_field (没有这一列)"
        )
    first, last = (len(rows) * n // part.of for n in (part.number, part.number + 1))
    for start in range(first, last, 1000):
        stop = min(start + 1000, last)
        columns = rows[start:stop]
        for row in range(stop - start):
            record = {name: values[row] for name, values in columns.items()}
            text = record.pop(source.text_field)
            if not isinstance(text, str):
                raise CorpusError(
                    f"source '{source.name}': row {start + row} has no text in column "
                    f"'{source.text_field}'; mend the dataset or set text_field (缺少正文)"
                )
            yield _document(source, record, text, str(start + row))
        meter.share = (stop - first) / (last - first)


def _dataset(source: Source) -> Any:
    """A saved dataset from its folder, else by its name from the Hub or the Hub's local cache."""
    import datasets  # takes a second, and most corpora are files

    datasets.disable_progress_bars()
    name = source.paths[0]
    try:
        for folder in _places(name):
            if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
                rows = datasets.load_from_disk(str(folder))
                break
        else:
            rows = datasets.load_dataset(name, source.subset, split=source.split)
    except Exception as error:  # the library raises almost anything
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"source '{source.name}': the dataset '{name}' cannot be loaded ({reason}); without a "
            "network give the folder of a saved dataset as its path (数据集无法加载)"
        ) from None
    if isinstance(rows, datasets.DatasetDict):
        if source.split not in rows:
            raise CorpusError(
                f"source '{source.name}': the dataset has no split '{source.split}', it has "
                f"{', '.join(rows)}; set its split (没有这一部分)"
            )
        rows = rows[source.split]
    return rows


# ---- bytes


def _blocks(path: Path, part: Part | None, meter: Meter) -> Iterator[tuple[int, bytes]]:
    """(offset, whole lines) of a file or of a part of a plain one, a MiB or more at a time.

    A block ends at the first end of a line after a MiB, however the unpacker cuts its output: the
    parts of an archive, and so the order of documents, are the same under any version of it.
    """
    with _opened(path) as file:
        start, chunks = _chunks(file, path, part, meter)
        held: list[bytes] = []
        size = 0
        for chunk in chain(chunks, [None]):
            if chunk is not None:
                held.append(chunk)
                size += len(chunk)
                if size < BLOCK_BYTES or b"\n" not in chunk:
                    continue
            data, cut = b"".join(held), 0
            while end := data.find(b"\n", cut + BLOCK_BYTES - 1) + 1:
                yield start + cut, data[cut:end]
                cut = end
            if chunk is None and cut < len(data):
                yield start + cut, data[cut:]
            start += cut
            held = [data[cut:]]
            size = len(held[0])


def _chunks(
    file: BinaryIO, path: Path, part: Part | None, meter: Meter
) -> tuple[int, Iterator[bytes]]:
    """Where the bytes begin, and the bytes: unpacked, or a range of a plain file."""
    size = max(os.fstat(file.fileno()).st_size, 1)

    def raw(length: int, start: int = 0, stop: int = size) -> Iterator[bytes]:
        file.seek(start)
        while start < stop and (data := file.read(min(length, stop - start))):
            start += len(data)
            meter.share = start / stop
            yield data

    packing = _packing(path)
    if packing == "zstd":
        make = zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW).decompressobj
        return 0, _unpack(raw(1 << 14), make, path, packing)
    if packing == "gzip":
        return 0, _unpack(raw(1 << 16), lambda: zlib.decompressobj(wbits=31), path, packing)
    if part is None:
        return 0, raw(BLOCK_BYTES)
    start, stop = (_line_start(file, size * n // part.of) for n in (part.number, part.number + 1))
    return start, raw(BLOCK_BYTES, start, stop)


def _unpack(
    chunks: Iterator[bytes], make: Callable[[], Any], path: Path, packing: str
) -> Iterator[bytes]:
    """Unpack one or more frames. A decoder that still waits at the end means a truncated file."""
    decoder = None
    try:
        for data in chunks:
            while data:
                if decoder is None:
                    if packing == "gzip" and not data.strip(b"\0"):
                        break  # padding after the last member
                    decoder = make()
                unpacked = decoder.decompress(data)
                if unpacked:
                    yield unpacked
                data = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    except (zstandard.ZstdError, zlib.error) as error:
        raise CorpusError(
            f"{path} is damaged: {packing} says '{error}'; fetch it again (压缩文件损坏)"
        ) from None
    if decoder is not None:
        raise CorpusError(
            f"{path} is truncated: its {packing} data stops before the end; fetch it again "
            "(压缩文件不完整)"
        )


def _glance(path: Path, size: int) -> str:
    """A hash of 64 kB at the beginning, the middle and the end: a file may be another and have the
    size and the time of the one that it replaced (rsync -t, tar)."""
    digest = xxhash.xxh3_64()
    with _opened(path) as file:
        for start in (0, size // 2, max(size - (1 << 16), 0)):
            file.seek(start)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def _packing(path: Path) -> str | None:
    with _opened(path) as file:
        head = file.read(4)
    return "zstd" if _ZSTD.match(head) else "gzip" if head[:2] == b"\x1f\x8b" else None


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror} (无法读取)") from None


def _line_start(file: BinaryIO, position: int) -> int:
    """The first border of lines at or after a position."""
    if position == 0:
        return 0
    file.seek(position - 1)
    file.readline()
    return file.tell()


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise _unusable(
            path,
            offset + error.start,
            f"is no valid UTF-8 (the byte is 0x{bad:02x}); other encodings are converted first, "
            "e.g. iconv -f GB18030 -t UTF-8",
        ) from None


def _unusable(path: Path, offset: int, what: str) -> CorpusError:
    """The sentence about a bad line; only now is it worth counting the lines before it."""
    line = 1
    for start, block in _blocks(path, None, Meter()):
        if start >= offset:
            break
        line += block[: offset - start].count(b"\n")
    return CorpusError(f"{path}, line {line}, byte {offset}: the line {what} (此行无法使用)")
