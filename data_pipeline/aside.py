"""Files that take their names only when they are whole and on the disk.

    PATH.partial --written--> --fsync--> renamed to PATH --> the folder's own fsync

A process killed at any moment leaves whole files, and rubbish that is recognised by its name.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when the block ends; on an exception it is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """Where a file is written until `settle` gives it its name."""
    return path.with_name(path.name + ".partial")


def settle(paths: Sequence[Path], gone: Sequence[Path] = ()) -> None:
    """Give files that lie in `partial_of` their names, in this order, when all are on the disk;
    `gone` are removed just before. All lie in one folder."""
    for path in paths:
        with partial_of(path).open("rb") as whole:
            os.fsync(whole.fileno())
    for path in gone:
        path.unlink(missing_ok=True)
    for path in paths:
        partial_of(path).replace(path)
    sync_folder(paths[0].parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
