"""Which files a path of the config means.

"$TEXT/**/*.jsonl"  --variables, the working directory, the project's folder-->  files, sorted
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configs.sources import Source
from data_pipeline.shards import CorpusError

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "mnbvc": (".jsonl", ".ndjson", ".json"),
    "txt": (".txt",),
    "tsv": (".tsv", ".csv", ".txt"),
    "parquet": (".parquet",),
    "warc": (".warc", ".wet"),
    "html": (".html", ".htm"),
    "index": (".idx",),
}
PACKINGS = ("", ".gz", ".zst", ".bz2", ".xz")
PROJECT = Path(__file__).resolve().parents[2]


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
    for candidate in places(pattern):
        if candidate.is_file():
            return [candidate]
        if candidate.is_dir():
            ends = tuple(suffix + packing for suffix in suffixes for packing in PACKINGS)
            return sorted(path for path in candidate.rglob("*") if path.name.endswith(ends))
        if matches := glob.glob(str(candidate), recursive=True):
            return sorted(map(Path, matches))
    return []


def places(pattern: str) -> Iterator[Path]:
    """Where a path may point: as written, or in the project's own folder."""
    path = Path(os.path.expandvars(pattern)).expanduser()
    yield path
    if not path.is_absolute():
        yield PROJECT / path


def first_place(pattern: str) -> Path | None:
    """The file or folder that a path of the config names, or None."""
    return next((place for place in places(pattern) if place.exists()), None)


def opened(path: Path) -> BinaryIO:
    """A file to read. CorpusError if it cannot be opened."""
    try:
        return path.open("rb")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror} (无法读取)") from None
