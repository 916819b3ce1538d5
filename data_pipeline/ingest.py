"""Sources -> documents: what there is to read, cut into tasks, and the door to its readers.

    sources --plan--> tasks of about data.task_mb, each some parts of files
                        |     plain lines       a part is a range of bytes, moved to line borders
                        |     packed lines      a part is every n-th MiB of the unpacked lines:
                        |                       each unpacks all of it, so they are few
                        |     txt, html         a part is a whole file
                        |     warc              a part is every n-th record
                        |     parquet           a part is some row groups
                        |     datasets, index   a part is a range of rows, of documents
                        +--read--> (id, text, other fields) one document after the other
                                   faults: what cannot be read, each with its place

The tasks are a function of the files and of task_mb alone, never of the number of workers. Nothing
is dropped silently: what cannot be read goes to `faults`, which stops the build or writes it down.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from configs.corpus import Data
from configs.sources import Source
from data_pipeline.shards import CorpusError
from data_pipeline.sources import lines, tables, tokens, unpack, web
from data_pipeline.sources.documents import (
    Document,
    Fault,
    Faults,
    Meter,
    Part,
    stop,
)
from data_pipeline.sources.places import files, first_place, named_files, opened, reaches

__all__ = [
    "CorpusError", "Document", "Fault", "Faults", "Meter", "Part", "files", "first_place",
    "reaches", "stop",
]  # fmt: skip

MODULES = (
    "ingest", "sources/decode", "sources/documents", "sources/lines", "sources/places",
    "sources/tables", "sources/text", "sources/tokens", "sources/unpack", "sources/web",
)  # fmt: skip
"""What the documents that are read depend on."""
PACKED_RATIO = 4  # text is about this much larger than its archive
MOST_PARTS_OF_A_CRAWL = 32  # to find its text costs 100 times as much as to unpack it
MOST_PARTS_OF_AN_ARCHIVE = 8  # each unpacks the whole file: 32 of a .gz cost 5 times its cleaning
READERS = {
    "jsonl": lines.read,
    "mnbvc": lines.read,
    "tsv": lines.read,
    "txt": lines.read_text,
    "parquet": tables.read_parquet,
    "datasets": tables.read_dataset,
    "warc": web.read_warc,
    "html": web.read_html,
    "index": tokens.read,
}


@dataclass(frozen=True)
class Holding:
    """One file or dataset of a source, before it is cut."""

    path: str
    size: int
    """Bytes on the disk."""
    text_bytes: int
    """Bytes of text in it, about."""
    packed: bool
    most: int
    """Parts that it can be cut into."""
    identity: list[Any]
    """What tells it from another one."""
    documents: int = -1
    """If it is known without reading them."""
    name: str = ""
    """The file from the folder on that the source's path names."""


def plan(data: Data) -> tuple[list[tuple[Part, ...]], list[list[Any]]]:
    """The tasks, and what identifies their input: of every file its name, bytes, time of change
    and a glance into it.

    CorpusError if a source has no files.
    """
    limit = data.task_mb * 1_000_000
    parts: list[Part] = []
    identity: list[list[Any]] = []
    for number, source in enumerate(data.sources):
        for held in holdings(source):
            weight = max(held.text_bytes, 1)
            whole = Part(number, held.path, held.packed, 0, 1, weight, held.name)
            parts += _cut(whole, limit, held.most)
            identity.append(held.identity)
    return _tasks(parts, limit), identity


def holdings(source: Source) -> Iterator[Holding]:
    """What a source holds, in order. CorpusError if it has no files."""
    if source.kind == "datasets":
        rows = tables.dataset(source)
        size = int(rows.data.nbytes)
        known = [source.name, rows._fingerprint, len(rows)]
        yield Holding(source.paths[0], size, size, False, len(rows) or 1, known, len(rows))
        return
    for path, name in named_files(source).items():
        with opened(path) as file:
            status = os.fstat(file.fileno())
        size, most = status.st_size, max(status.st_size, 1)
        known = [name, size, status.st_mtime_ns, _glance(path, size)]
        if source.kind == "parquet":
            groups, text_bytes, rows = tables.row_groups(path)
            most = max(groups, 1)
            yield Holding(str(path), size, text_bytes or size, False, most, known, rows, name)
            continue
        if source.kind == "index":
            yield _index(source, path, name, known)
            continue
        packed = unpack.is_whole(path)
        if source.kind in ("txt", "html"):
            most = 1
        elif source.kind == "warc":
            packed, most = True, MOST_PARTS_OF_A_CRAWL
        elif packed:
            most = MOST_PARTS_OF_AN_ARCHIVE
        ratio = PACKED_RATIO if unpack.packing_of(path) else 1
        one = source.kind == "html" or (source.kind, source.documents) == ("txt", "file")
        documents = 1 if one else -1
        yield Holding(str(path), size, size * ratio, packed, most, known, documents, name)


def _index(source: Source, path: Path, name: str, known: list[Any]) -> Holding:
    """An index is known by its tokens and by the tokenizer that reads them."""
    stream = path.with_suffix(".bin")
    size = stream.stat().st_size if stream.exists() else 0
    known += [_glance(stream, size) if size else "", tokens.tokenizer_of(source).fingerprint]
    documents = tokens.documents(path)
    return Holding(str(path), size, 2 * size, False, max(documents, 1), known, documents, name)


def _cut(whole: Part, limit: int, most: int) -> list[Part]:
    of = max(1, min(-(-whole.weight // limit), most))
    share = max(whole.weight // of, 1)
    return [replace(whole, number=n, of=of, weight=share) for n in range(of)]


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


def _glance(path: Path, size: int) -> str:
    """A hash of 64 kB at the beginning, the middle and the end: a file may be another and have the
    size and the time of the one that it replaced (rsync -t, tar)."""
    digest = xxhash.xxh3_64()
    with opened(path) as file:
        for start in (0, size // 2, max(size - (1 << 16), 0)):
            file.seek(start)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


def versions(sources: Sequence[Source]) -> dict[str, str]:
    """Packages that decide what is read of these sources, with their versions; none for those that
    our own code reads alone."""
    return web.versions({source.kind for source in sources})


def read(source: Source, part: Part, meter: Meter, faults: Faults = stop) -> Iterator[Document]:
    """The documents of one part; what cannot be read goes to `faults`, which by default raises
    CorpusError with file, line and byte."""
    try:
        yield from READERS[source.kind](source, part, meter, faults)
    except OSError as error:
        raise CorpusError(
            f"source '{source.name}': {part.path} could not be read to its end: "
            f"{error.strerror or error}; bring it back and build again: what is done is kept "
            "(来源在读取时消失或出错)"
        ) from None
    meter.share = 1.0
