"""Which files a path of the config means.

"$TEXT/**/*.jsonl"  --variables, the working directory, the project's folder-->  files, sorted

Links to folders are followed, and no folder is walked twice; a folder that cannot be listed ends
the build, since what lies in it would be missing.
"""

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
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
        try:
            above, matches = _matches(pattern, SUFFIXES[source.kind])
            matches = [path for path in matches if not path.is_dir()]
        except OSError as error:
            raise CorpusError(
                f"source '{source.name}': {error.filename} cannot be looked into: {error.strerror};"
                " let this user read it, or correct the path (无法读取目录)"
            ) from None
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
            names = ((here, name) for here, names in _folders(candidate, True) for name in names)
            found = (here / name for here, name in names if name.lower().endswith(ends))
            return candidate, sorted(found)
        if glob.has_magic(str(candidate)):
            above = _before_wildcards(candidate)
            parts = candidate.relative_to(above).parts
            if above.is_dir() and (matches := set(_matching(above, parts))):
                return above, sorted(matches)
    return Path(), []


def _folders(top: Path, hidden: bool) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `top` down, with the names of its files: first those that lie there, then
    those that links lead to, each once. `hidden`: also what begins with a dot."""

    def stop(error: OSError) -> None:
        raise error

    real_top, seen, waiting = os.path.realpath(top), set[str](), [str(top)]
    for place in waiting:  # which grows
        for here, folders, names in os.walk(place, onerror=stop):
            real = os.path.realpath(here)
            above = real != real_top and Path(real_top).is_relative_to(real)  # a link back
            if real in seen or above:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
            if os.path.ismount(here) and "lost+found" in folders:
                folders.remove("lost+found")  # of a disk's own check: no text, and root's alone
            inside = [os.path.join(here, name) for name in folders]
            waiting += [path for path in inside if os.path.islink(path)]
            yield Path(here), [name for name in names if hidden or not name.startswith(".")]


def _matching(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What glob finds below a folder by the parts of a pattern; `**` is any number of folders."""
    first, *rest = parts
    if first == "**":
        for here, names in _folders(folder, False):
            yield from _matching(here, rest) if rest else (here / name for name in names)
        return
    if glob.has_magic(first):
        names = [name for name in os.listdir(folder) if fnmatch.fnmatchcase(name, first)]
        names = [name for name in names if first.startswith(".") or not name.startswith(".")]
    else:
        names = [first] if os.path.lexists(folder / first) else []
    for name in names:
        if not rest:
            yield folder / name
        elif (folder / name).is_dir():
            yield from _matching(folder / name, rest)


def reaches(source: Source, folder: Path) -> bool:
    """Whether the paths of a source would find the files of a corpus in a folder."""
    if source.kind == "datasets":
        return False
    ends = tuple(s + packing for s in SUFFIXES[source.kind] for packing in PACKINGS)
    for pattern in source.paths:
        for candidate in map(Path.absolute, places(pattern)):
            holds = any(name.endswith(ends) for name in WRITTEN)
            if candidate.is_dir() and holds and _walks_into(candidate, folder):
                return True
            written = (folder.absolute() / name for name in WRITTEN)
            if any(_fit(path.parts, candidate.parts) for path in written):
                return True
    return False


def _walks_into(top: Path, folder: Path) -> bool:
    """Whether a walk from `top` down, links included, comes by a folder, made or not yet."""
    inside = [folder.resolve(), *folder.resolve().parents]
    return top.resolve() in inside or any(
        here.is_symlink() and here.resolve() in inside for here, _ in _folders(top, True)
    )


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
