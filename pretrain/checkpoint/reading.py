"""Reading checkpoints: what is damaged, the newest good one, a state mapped from its files.

A tensor is mapped when it is read, and its pages go when it goes: a process that reads one after
the other has only those that it holds. A map of whole files would keep all that it has seen.
"""

import errno
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash

from pretrain.averaged import Averaged, averaged, unmarked
from pretrain.checkpoint.places import (
    DTYPES,
    FORMAT,
    NAME,
    CheckpointError,
    Slot,
    StorageError,
    slots_of,
)
from pretrain.checkpoint.ranks import EVERYONE
from pretrain.state import Entry, State

AGAIN_S = 3.0
"""Before a file that could not be read is looked at once more."""
AWAY = {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH}
AWAY |= {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of a file system that is away, or lets nobody in, and may be back: no damage of a file."""


def describe(path: Path, sync: bool = False) -> dict[str, Any]:
    """Size and hash of a file, read in pieces; `sync`: and safe on the disk."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def own_hash(manifest: dict[str, Any]) -> str:
    """The hash of a manifest without the hash in it."""
    body = {key: value for key, value in manifest.items() if key != "xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: one sentence for each missing, cut or changed file.

    `part` of `parts` checks its share of the files, so that the ranks of a job share the reading.
    Raises StorageError for a file system that is away: the checkpoint may be whole.
    """
    try:
        manifest = _manifest(folder)
    except StorageError:
        raise
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, entry in list(manifest["files"].items())[part::parts]:
        path = folder / name
        try:
            found += _again(path, partial(_wrong, path, entry))
        except OSError as error:  # a disk that gives out; an older checkpoint may lie on another
            found.append(f"{path}: cannot be read: {error.strerror} (无法读取)")
    return found


def _wrong(path: Path, entry: dict[str, Any]) -> list[str]:
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return [f"{path}: is missing"]
    if size != entry["bytes"]:
        return [f"{path}: has {size} bytes, was written with {entry['bytes']}"]
    if describe(path)["xxh3_128"] != entry["xxh3_128"]:
        return [f"{path}: its content differs from its hash (文件已损坏)"]
    return []


def _again(path: Path, look: Callable[[], Any]) -> Any:
    """What a look at a file says, or a second one after a while. Raises the OSError of the second;
    StorageError if the file system is away."""
    try:
        return look()
    except FileNotFoundError:
        raise
    except OSError:
        time.sleep(AGAIN_S)
    try:
        return look()
    except OSError as error:
        if error.errno in AWAY:
            raise StorageError(f"{path}: cannot be read: {error.strerror} (无法读取)") from None
        raise


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(_again(path, lambda: path.read_text("utf-8")))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: is no checkpoint, it has no manifest.json (不是检查点)"
        ) from None
    except StorageError:
        raise
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: cannot be read, it is damaged (文件已损坏)") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not of the format {FORMAT} (检查点格式不符)")
    if manifest.get("xxh3_128") != own_hash(manifest):
        raise CheckpointError(f"{path}: its content differs from its hash (文件已损坏)")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise CheckpointError(
            f"{path}: names a file outside of the checkpoint (文件路径越出检查点)"
        )
    return manifest


def read(folder: str | Path) -> State:
    """A checkpoint as a state; tensors are mapped from their files when they are read.

    Raises CheckpointError for a folder that is none, or whose headers do not fit its manifest,
    StorageError for a file system that is away. The content is checked by damage() / newest(). An
    Averaged folder: its averaged weights.
    """
    if isinstance(folder, Averaged):
        return averaged(read(Path(folder)))
    folder = Path(folder)
    manifest = _manifest(folder)
    entries: dict[str, Entry] = {}
    for name in manifest["files"]:
        if not name.endswith(".safetensors"):
            continue
        kind = name.rsplit("-", 1)[0]
        prefix = kind if kind in ("weights", "buffers") else f"optim/{kind}"
        try:
            file = _again(folder / name, partial(_File, folder / name))
            slots = _again(file.path, partial(slots_of, file.path))
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder / name}: cannot be read: {error} (文件已损坏)"
            ) from None
        for key, slot in slots.items():
            entries[f"{prefix}/{key}"] = Entry(slot.shape, slot.dtype, _reader(file, slot))
    record = _json(folder / "state.json")
    if not isinstance(record.get("model"), dict) or "family" not in record["model"]:
        raise CheckpointError(f"{folder / 'state.json'}: cannot be read (文件已损坏)")
    return State(entries, record, _verify(folder, manifest))


def _verify(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What a load is compared with; a checkpoint of an earlier format has nothing."""
    return _json(folder / "verify.json") if "verify.json" in manifest["files"] else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(_again(path, lambda: path.read_text("utf-8"))))
    except StorageError:
        raise
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{path}: cannot be read (文件已损坏)") from None


class _File:
    """A file held open, so that what is read of it stays the same when it is rotated away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _reader(file: _File, slot: Slot) -> Callable[[], torch.Tensor]:
    dtype, width = getattr(torch, slot.dtype), DTYPES[slot.dtype][1]
    count = prod(slot.shape)

    def read() -> torch.Tensor:
        if not count:
            return torch.empty(slot.shape, dtype=dtype)
        lead = slot.offset % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            file.descriptor,
            lead + count * width,
            access=mmap.ACCESS_COPY,
            offset=slot.offset - lead,
        )
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=lead).view(slot.shape)

    return read


def found_in(run: Path) -> list[Path]:
    """The checkpoints of a run folder, newest (stage, step) first; unverified."""
    folder = run / "checkpoints"
    named = [(NAME.match(p.name), p) for p in folder.iterdir()] if folder.is_dir() else []
    ordered = sorted(((int(m[1]), int(m[2]), p) for m, p in named if m), reverse=True)
    return [path for _, _, path in ordered]


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that verifies, and the damage found in newer ones.

    All ranks of a job call this together and share the reading.
    """
    complaints: list[str] = []
    for path in EVERYONE.gather(found_in(run))[0]:
        if not (wrong := _damage_shared(path)):
            return path, complaints
        complaints += wrong
    return None, complaints


def _damage_shared(path: Path) -> list[str]:
    """damage(), each rank reading its part; the StorageError of one is everybody's."""
    found, away = [], ""
    try:
        found = damage(path, EVERYONE.rank, EVERYONE.world)
    except StorageError as error:
        away = str(error)
    parts = EVERYONE.gather((found, away))
    for _, sentence in parts:
        if sentence:
            raise StorageError(sentence)
    return sorted({sentence for part, _ in parts for sentence in part})


def resolve(path: str | Path) -> Path:
    """A verified checkpoint folder from what a user names: a checkpoint, or a run (its newest).

    All ranks of a job call this together and share the reading. Damage of a run's newer checkpoints
    is told on stderr, and which one is taken. Raises CheckpointError for what is not there, holds
    none, or is damaged.
    """
    path, average = unmarked(path)  # RUN@ema
    if average:
        return Averaged(resolve(path))
    # As the first rank sees it: on a shared disk that lags the ranks would go different ways.
    named, there = EVERYONE.gather(((path / "manifest.json").exists(), path.is_dir()))[0]
    if named:
        if wrong := _damage_shared(path):
            raise CheckpointError("\n".join(wrong))
        return path
    if not there:
        raise CheckpointError(f"{path}: there is no such folder (没有这个文件夹)")
    good, wrong = newest(path)
    if good is None:
        what = "\n".join(wrong) or f"{path}: holds no checkpoint (没有检查点)"
        raise CheckpointError(what)
    if wrong and EVERYONE.rank == 0:
        lines = [f"damaged, passed over: {sentence}" for sentence in wrong]
        print(*lines, f"reading {good} (改用较早的检查点)", sep="\n", file=sys.stderr)
    return good
