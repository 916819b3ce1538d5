"""Writing checkpoints: pieces of all ranks -> files aside -> fsync, hashes, manifest -> one rename.

    rank 0 makes the files at full size -> each rank writes its pieces in place and sums them ->
    each rank hashes its share of the files -> rank 0: state, sums, manifest, rename

Every step is taken by all ranks or by none (ranks.py); what was there before stays good.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.places import (
    DTYPES,
    FORMAT,
    CheckpointError,
    Piece,
    Slot,
    aside_of,
    layout,
)
from pretrain.checkpoint.ranks import EVERYONE, Ranks
from pretrain.checkpoint.reading import describe, own_hash
from pretrain.checkpoint.sums import added, sum_of
from pretrain.state import Record, State


def save(
    folder: Path,
    shapes: dict[str, tuple[tuple[int, ...], str]],
    pieces: Iterable[Piece],
    record: Record | dict[str, Any],
    tokenizer: Path | None = None,
    *,
    replay: Mapping[str, Any] | None = None,
    ranks: Ranks = EVERYONE,
) -> Path:
    """Write a checkpoint; every rank of the job calls this with the pieces that it holds.

    `folder` is RUN/checkpoints/NAME; `replay` a recorded micro-batch and its loss, kept beside the
    sums. Returns folder. If any rank fails, nothing is left behind, the older checkpoints stay as
    they are and every rank raises the same CheckpointError.
    """
    aside = aside_of(folder)
    slots, headers, sizes = layout(shapes)
    first = ranks.rank == 0

    def begin() -> None:
        if first:
            _make_files(aside, headers, sizes, tokenizer)

    ranks.together(begin, aside)
    written = ranks.together(lambda: _write_pieces(aside, slots, pieces), aside)
    for key, (size, _) in shapes.items():
        values = sum(counts.get(key, 0) for counts, _ in written)
        assert values == prod(size), f"{key}: the ranks hold {values} of {prod(size)} values"
    verify = {"sums": added(sums for _, sums in written), "replay": dict(replay or {})}
    mine = sorted(sizes)[ranks.rank :: ranks.world]
    hashes = ranks.together(lambda: {f: describe(aside / f, sync=True) for f in mine}, aside)
    files = {name: entry for part in hashes for name, entry in part.items()}

    def finish() -> None:
        if first:
            _finish(aside, folder, files, record, verify)

    ranks.together(finish, aside)
    return folder


def write_state(folder: Path, state: State, tokenizer: Path | None = None) -> Path:
    """Write a whole state, a tensor at a time (grow, extend, convert); ranks share the tensors."""
    shapes = {key: (entry.shape, entry.dtype) for key, entry in state.entries.items()}
    rank, world = EVERYONE.rank, EVERYONE.world

    def pieces() -> Iterable[Piece]:
        for key in list(shapes)[rank::world]:
            flat = state.read(key).reshape(-1)
            assert flat.numel() == prod(shapes[key][0]), f"{key}: reads {flat.numel()} values"
            yield key, flat, [(0, 0, flat.numel())]

    return save(folder, shapes, pieces(), state.record, tokenizer)


def _make_files(
    aside: Path, headers: dict[str, bytes], sizes: dict[str, int], tokenizer: Path | None
) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    need, free = sum(sizes.values()), shutil.disk_usage(aside).free
    if need > free:
        raise CheckpointError(
            f"{aside.parent}: this checkpoint takes {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are "
            "free; make room or lower run.keep_checkpoints (磁盘空间不足)"
        )
    for file, header in headers.items():
        with open(aside / file, "wb") as out:
            out.write(header)
            os.posix_fallocate(out.fileno(), 0, sizes[file])
    if tokenizer is not None:
        shutil.copytree(tokenizer, aside / "tokenizer")


def _write_pieces(
    aside: Path, slots: dict[str, Slot], pieces: Iterable[Piece]
) -> tuple[dict[str, int], dict[str, int]]:
    """Write what this rank holds; returns how many values of each key that was, and their sum."""
    opened: dict[str, int] = {}
    written: dict[str, int] = {}
    sums: dict[str, int] = {}
    try:
        for key, values, runs in pieces:
            slot = slots[key]
            if slot.file not in opened:
                opened[slot.file] = os.open(aside / slot.file, os.O_WRONLY)
            width = DTYPES[slot.dtype][1]
            assert str(values.dtype) == f"torch.{slot.dtype}", f"{key} is {values.dtype}"
            values = values.detach().cpu().contiguous()
            raw = memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
            sums[key] = sums.get(key, 0) + sum_of(values, runs)
            for logical, local, length in runs:
                written[key] = written.get(key, 0) + int(length)
                _write_all(
                    opened[slot.file],
                    raw[local * width : (local + length) * width],
                    slot.offset + logical * width,
                )
        for descriptor in opened.values():
            os.fsync(descriptor)
        return written, sums
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _write_all(descriptor: int, raw: memoryview, offset: int) -> None:
    while raw:
        written = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[written:], offset + written


def _finish(
    aside: Path,
    folder: Path,
    files: dict[str, Any],
    record: Record | dict[str, Any],
    verify: dict[str, Any],
) -> None:
    """State, manifest, rename: after this the checkpoint exists."""
    _write_synced(aside / "state.json", json.dumps(record, ensure_ascii=False, indent=1))
    _write_synced(aside / "verify.json", json.dumps(verify, indent=1))
    for path in sorted(p for p in aside.rglob("*") if p.is_file()):
        files.setdefault(str(path.relative_to(aside)), describe(path, sync=True))
    manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
    manifest["xxh3_128"] = own_hash(manifest)
    _write_synced(aside / "manifest.json", json.dumps(manifest, indent=1))
    _sync_folder(aside)
    replaced = folder.parent / f".{folder.name}.replaced"
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # a kill may have left one
        os.rename(folder, replaced)
    try:
        os.rename(aside, folder)
    except OSError:
        if replaced.exists():
            os.rename(replaced, folder)  # the one that was there is good still
        raise
    try:
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(replaced, ignore_errors=True)


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
