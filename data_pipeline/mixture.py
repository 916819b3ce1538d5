"""What a corpus will be made of, before any of it is read.

    sources --files, sizes--> bytes on the disk, parts, tasks
            --a look into three files--> bytes of text, documents: estimates, marked by ~

    3 sources, 14 files, 5.2 GB (来源)                text  documents   share    parts
    ├─ laws    jsonl      12 files    1.1 GB      ~4.6 GB   ~1,200,000   79.9 %      96
    │  ├─ a.jsonl.zst                91.5 MB    ~380.2 MB    ~100,000    6.6 %       8
    │  └─ ... 11 more
    └─ ...

Documents of rows (parquet, datasets, an index) are counted, not estimated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.corpus import Data
from configs.sources import Source
from data_pipeline import ingest
from data_pipeline.ingest import Holding, Meter
from data_pipeline.report import aligned
from data_pipeline.sources import unpack
from data_pipeline.sources.lines import BLANK_LINE
from data_pipeline.sources.places import opened
from data_pipeline.sources.unpack import Damage

PLAIN_BYTES, UNPACKED_BYTES = 1 << 20, 1 << 28
"""Looked at for the estimates: in each place of a plain file; of packed ones all together."""
FILES_LOOKED_AT = 3
FILES_SHOWN = 5


@dataclass
class Branch:
    """A source, or a file of one."""

    name: str
    kind: str = ""
    files: int = 0
    disk_bytes: int = 0
    text_bytes: int = 0
    """About, where it is packed."""
    documents: int = 0
    counted: bool = False
    """Whether `documents` is known, not estimated."""
    parts: int = 0
    share: float = 0.0
    """Of the text of all sources."""
    below: "list[Branch]" = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        told = {key: value for key, value in vars(self).items() if key != "below"}
        told["share"] = round(self.share, 6)
        return told | ({"below": [branch.as_dict() for branch in self.below]} if self.below else {})


def survey(data: Data) -> tuple[list[Branch], int]:
    """The sources, and the number of tasks. CorpusError if one has no files."""
    tasks, _ = ingest.plan(data)
    parts: dict[tuple[int, str], int] = {}
    for task in tasks:
        for part in task:
            parts[part.source, part.path] = parts.get((part.source, part.path), 0) + 1
    branches = []
    for number, source in enumerate(data.sources):
        held = list(ingest.holdings(source))
        ratio, per_byte = _looked_at(source, held)
        branch = Branch(source.name, source.kind, counted=all(h.documents >= 0 for h in held))
        for one in held:
            text_bytes = round(one.size * ratio) if one.packed else one.text_bytes
            documents = one.documents if one.documents >= 0 else round(text_bytes * per_byte)
            leaf = Branch(one.name or Path(one.path).name, "", 1, one.size, text_bytes, documents)
            leaf.parts, leaf.counted = parts.get((number, one.path), 0), one.documents >= 0
            branch.below.append(leaf)
            branch.files += 1
            branch.disk_bytes += leaf.disk_bytes
            branch.text_bytes += leaf.text_bytes
            branch.documents += leaf.documents
            branch.parts += leaf.parts
        branches.append(branch)
    every = sum(branch.text_bytes for branch in branches) or 1
    for branch in branches:
        for shown in (branch, *branch.below):
            shown.share = shown.text_bytes / every
    return branches, len(tasks)


def _looked_at(source: Source, held: list[Holding]) -> tuple[float, float]:
    """(bytes of text per byte on the disk, documents per byte of text) of some files of a source:
    three places of a plain one, the beginning of a packed one."""
    disk = text = documents = 0
    unknown = [one for one in held if one.documents < 0]
    chosen = unknown[:: max(1, len(unknown) // FILES_LOOKED_AT)][:FILES_LOOKED_AT]
    for one in chosen:
        path, meter, seen = Path(one.path), Meter(), 0
        most = UNPACKED_BYTES // len(chosen) if one.packed else PLAIN_BYTES
        with opened(path) as file:
            packing = unpack.packing_of(path)
            starts = (0,) if one.packed else sorted({0, one.size // 2, max(one.size - most, 0)})
            for start in starts:
                pieces = (
                    unpack.pieces(file, packing, meter)
                    if one.packed
                    else unpack.plain_range(file, meter, start, min(start + most, one.size))
                )
                for piece in pieces:
                    if isinstance(piece, Damage):
                        break
                    seen += len(piece)
                    documents += _documents(source, piece)
                    if one.packed and seen >= most:
                        break
        disk += round(one.size * meter.share) if one.packed else seen
        text += seen
    if not text:
        return 1.0, 0.0
    return text / max(disk, 1), documents / text


def _documents(source: Source, data: bytes) -> int:
    """Documents in some bytes, about."""
    if source.kind == "warc":
        return data.count(b"WARC-Type: response") + data.count(b"WARC-Type: conversion")
    if source.kind == "txt":
        return sum(1 for text in BLANK_LINE.split(data) if text.strip())
    return data.count(b"\n") + (not data.endswith(b"\n") and len(data) < PLAIN_BYTES)


# ---- shown


def is_trivial(branches: list[Branch]) -> bool:
    """Whether there is nothing to compare: one file, or none (data.documents)."""
    return sum(branch.files for branch in branches) <= 1


def tree(branches: list[Branch], tasks: int) -> str:
    """The sources and, where there are several, their first files, as a tree with figures."""
    files = sum(branch.files for branch in branches)
    disk = sum(branch.disk_bytes for branch in branches)
    head = f"{_many(len(branches), 'source')}, {_many(files, 'file')}, {_size(disk)} (来源)"
    rows: list[tuple[str, ...]] = [
        (head, "files", "on disk", "text", "documents", "share", "parts")
    ]
    for branch, stem in _stems(branches):
        rows.append(_row(f"{stem[0]}{branch.name} ({branch.kind})", branch))
        shown = branch.below if len(branch.below) > 1 else []
        more = len(shown) - FILES_SHOWN
        cut = shown[: FILES_SHOWN - 1] if more > 0 else shown
        for leaf, (own, _) in _stems(cut, whole=more <= 0):
            rows.append(_row(stem[1] + own + leaf.name, leaf, False))
        if more > 0:
            rows.append((f"{stem[1]}└─ ... {more + 1:,} more", "", "", "", "", "", ""))
    return f"{aligned(rows)}\n{_many(tasks, 'task')}"


def _stems(branches: list[Branch], whole: bool = True) -> Iterator[tuple[Branch, tuple[str, str]]]:
    """Each branch with what is drawn before it, and before what hangs on it."""
    for number, branch in enumerate(branches, 1):
        last = whole and number == len(branches)
        yield branch, ("└─ ", "   ") if last else ("├─ ", "│  ")


def _row(name: str, branch: Branch, is_source: bool = True) -> tuple[str, ...]:
    about = "" if branch.text_bytes == branch.disk_bytes else "~"
    return (
        name,
        f"{branch.files:,}" if is_source else "",
        _size(branch.disk_bytes),
        about + _size(branch.text_bytes),
        ("" if branch.counted else "~") + f"{branch.documents:,}",
        f"{100 * branch.share:.1f} %",
        f"{branch.parts:,}",
    )


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(number: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number} B"
