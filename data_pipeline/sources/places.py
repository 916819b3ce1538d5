"""Which files a path of the config means.

"$TEXT/**/*.jsonl"  --variables, the working directory, the project's folder-->  files, sorted
"""

import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configs.sources import Source
from data_pipeline.shards import CorpusError
from data_pipeline.sources.documents import readable

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
WRITTEN = (
    "documents/train-00000.jsonl.zst", "rejects/too_short/00000.jsonl.zst", "manifest.json",
    "report.html", "train.idx", "tokenizer/vocab.txt",
)  # fmt: skip
"""Files of a corpus that a source might take for text."""
PROJECT = Path(__file__).resolve().parents[2]


def files(source: Source) -> list[Path]:
    """The files of a source, in order: each path's matches sorted, no file twice."""
    return list(named_files(source))


def named_files(source: Source) -> dict[Path, str]:
    """The same, each with its name below the folder, or the part of a pattern without wildcards,
    that the source's path names: nothing above that, so that a corpus may be moved."""
    found: dict[Path, str] = {}
    for pattern in source.paths:
        above, matches = _matches(pattern, SUFFIXES[source.kind])
        matches = [path for path in matches if not path.is_dir()]
        if not matches:
            raise CorpusError(
                f"source '{source.name}': no file at '{pattern}'; correct its path (找不到文件)"
            )
        for path in matches:
            if path.exists() and not path.is_file():
                raise CorpusError(
                    f"source '{source.name}': {path} is a pipe or a device, which cannot be read "
                    "twice; write it to a file, and name that (不是普通文件)"
                )
            found.setdefault(path, readable(path.relative_to(above)))
    return found


def _matches(pattern: str, suffixes: tuple[str, ...]) -> tuple[Path, list[Path]]:
    """The folder above what a path names, and the files."""
    for candidate in places(pattern):
        if candidate.is_file():
            return candidate.parent, [candidate]
        if candidate.is_dir():
            ends = tuple(suffix + packing for suffix in suffixes for packing in PACKINGS)
            found = (path for path in candidate.rglob("*") if path.name.endswith(ends))
            return candidate, sorted(found)
        if matches := glob.glob(str(candidate), recursive=True):
            return _before_wildcards(candidate), sorted(map(Path, matches))
    return Path(), []


def reaches(source: Source, folder: Path) -> bool:
    """Whether the paths of a source would find the files of a corpus in a folder."""
    if source.kind == "datasets":
        return False
    ends = tuple(s + packing for s in SUFFIXES[source.kind] for packing in PACKINGS)
    for pattern in source.paths:
        for candidate in map(Path.absolute, places(pattern)):
            inside = folder.resolve().is_relative_to(candidate.resolve())
            if candidate.is_dir() and inside and any(name.endswith(ends) for name in WRITTEN):
                return True
            written = (folder.absolute() / name for name in WRITTEN)
            if any(_fit(path.parts, candidate.parts) for path in written):
                return True
    return False


def _fit(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether glob finds a path by a pattern, part by part; `**` is any number of parts."""
    if not patterns or not parts:
        return not patterns and not parts
    if patterns[0] == "**":
        return _fit(parts, patterns[1:]) or _fit(parts[1:], patterns)
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _fit(parts[1:], patterns[1:])


def _before_wildcards(pattern: Path) -> Path:
    return next(path for path in pattern.parents if not glob.has_magic(str(path)))


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
