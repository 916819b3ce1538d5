"""The run folder's checkpoints: one logical state on disk, written by all ranks at once.

    RUN/checkpoints/stage-00-step-00001000/
        weights-00000.safetensors exp_avg-00000.safetensors ...   whole tensors, <= 512 MB a file
        state.json      progress, configs, fingerprints
        tokenizer/      what turns text into these tokens
        manifest.json   every file with its size and hash, and its own hash; written last

    header and offsets follow from names and shapes, so every rank knows every byte's place:
    rank 0 makes the files aside -> each rank writes its pieces in place -> fsync, hashes,
    manifest -> one rename. A folder without the rename is no checkpoint; a file that differs from
    its hash is named and the next older checkpoint is taken.

The bytes do not depend on world size, ZeRO stage or tensor parallelism. safetensors and JSON only.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open

from pretrain.averaged import Averaged, averaged, unmarked
from pretrain.state import Entry, State

FORMAT = "bajie-checkpoint-1"
FILE_BYTES = 512 * 10**6
NAME = re.compile(r"stage-(\d+)-step-(\d+)$")
DTYPES = {"float32": ("F32", 4), "int64": ("I64", 8)}

Piece = tuple[str, torch.Tensor, Iterable[tuple[int, int, int]]]
"""(key, flat local values, runs of (logical offset, local offset, length))."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which file and why."""


@dataclass(frozen=True)
class Slot:
    """Where one logical tensor lies."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: str


def checkpoint_name(stage: int, step: int) -> str:
    """Folder name of the checkpoint of a stage and step; sorts by both."""
    return f"stage-{stage:02d}-step-{step:08d}"


def layout(
    shapes: dict[str, tuple[tuple[int, ...], str]],
) -> tuple[dict[str, Slot], dict[str, bytes], dict[str, int]]:
    """Place tensors (key -> shape, dtype) into files.

    Returns the slot of each key, the safetensors header of each file and the size of each file in
    bytes; a function of names and shapes alone.
    """
    files: dict[str, list[str]] = {}
    filled: dict[str, tuple[int, int]] = {}
    for key, (size, dtype) in shapes.items():
        kind = key.split("/")[-2]
        nbytes = prod(size) * DTYPES[dtype][1]
        number, used = filled.get(kind, (0, 0))
        if used and used + nbytes > FILE_BYTES:
            number, used = number + 1, 0
        filled[kind] = number, used + nbytes
        files.setdefault(f"{kind}-{number:05d}.safetensors", []).append(key)
    slots: dict[str, Slot] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    for file, keys in files.items():
        entries: dict[str, Any] = {}
        end = 0
        for key in keys:
            size, dtype = shapes[key]
            code, width = DTYPES[dtype]
            start, end = end, end + prod(size) * width
            entries[key.split("/")[-1]] = {
                "dtype": code,
                "shape": list(size),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + end
        for key in keys:
            at = len(headers[file]) + entries[key.split("/")[-1]]["data_offsets"][0]
            slots[key] = Slot(file, at, *shapes[key])
    return slots, headers, sizes


def save(
    folder: Path,
    shapes: dict[str, tuple[tuple[int, ...], str]],
    pieces: Iterable[Piece],
    record: dict[str, Any],
    tokenizer: Path | None = None,
) -> Path:
    """Write a checkpoint; every rank of the job calls this with the pieces that it holds.

    `folder` is RUN/checkpoints/NAME. Returns it. If any rank fails, nothing is left behind, the
    older checkpoints stay as they are and every rank raises the same CheckpointError.
    """
    aside = folder.parent / f".{folder.name}.writing"
    slots, headers, sizes = layout(shapes)
    rank, world = _rank()
    if rank == 0:
        _together(lambda: _make_files(aside, headers, sizes, tokenizer), aside)
    else:
        _together(lambda: None, aside)
    written = _together(lambda: _write_pieces(aside, slots, pieces), aside)
    for key, (size, _) in shapes.items():
        values = sum(part.get(key, 0) for part in written)
        assert values == prod(size), f"{key}: the ranks hold {values} of {prod(size)} values"
    mine = sorted(sizes)[rank::world]
    hashes = _together(lambda: {f: _describe(aside / f, sync=True) for f in mine}, aside)
    files = {name: entry for part in hashes for name, entry in part.items()}
    _together((lambda: _finish(aside, folder, files, record)) if rank == 0 else lambda: None, aside)
    return folder


def write_state(folder: Path, state: State, tokenizer: Path | None = None) -> Path:
    """Write a whole state, a tensor at a time (grow, extend, convert); ranks share the tensors."""
    shapes = {key: (entry.shape, entry.dtype) for key, entry in state.entries.items()}
    rank, world = _rank()

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


def _write_pieces(aside: Path, slots: dict[str, Slot], pieces: Iterable[Piece]) -> dict[str, int]:
    """Write what this rank holds; returns how many values of each key that was."""
    opened: dict[str, int] = {}
    written: dict[str, int] = {}
    try:
        for key, values, runs in pieces:
            slot = slots[key]
            if slot.file not in opened:
                opened[slot.file] = os.open(aside / slot.file, os.O_WRONLY)
            width = DTYPES[slot.dtype][1]
            assert str(values.dtype) == f"torch.{slot.dtype}", f"{key} is {values.dtype}"
            raw = memoryview(values.detach().cpu().contiguous().numpy().view(np.uint8))  # type: ignore[arg-type]
            for logical, local, length in runs:
                written[key] = written.get(key, 0) + int(length)
                _write_all(
                    opened[slot.file],
                    raw[local * width : (local + length) * width],
                    slot.offset + logical * width,
                )
        for descriptor in opened.values():
            os.fsync(descriptor)
        return written
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _write_all(descriptor: int, raw: memoryview, offset: int) -> None:
    while raw:
        written = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[written:], offset + written


def _describe(path: Path, sync: bool = False) -> dict[str, Any]:
    """Size and hash of a file, read in pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _finish(aside: Path, folder: Path, files: dict[str, Any], record: dict[str, Any]) -> None:
    """State, manifest, rename: after this the checkpoint exists."""
    _write_synced(aside / "state.json", json.dumps(record, ensure_ascii=False, indent=1))
    for path in sorted(p for p in aside.rglob("*") if p.is_file()):
        files.setdefault(str(path.relative_to(aside)), _describe(path, sync=True))
    manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
    manifest["xxh3_128"] = _own_hash(manifest)
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


def _own_hash(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


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


def _rank() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def first_rank() -> bool:
    """Whether this process is the one that acts for all."""
    return _rank()[0] == 0


def gather(value: Any) -> list[Any]:
    """What every rank hands in, on every rank."""
    _, world = _rank()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def _together(act: Callable[[], Any], aside: Path) -> list[Any]:
    """Do a step on every rank; if it fails on one, all clean up and raise that one's sentence."""
    error, value, bug = None, None, None
    try:
        value = act()
    except CheckpointError as wrong:
        error = str(wrong)
    except OSError as wrong:
        error = (
            f"{aside.parent / aside.name[1:].removesuffix('.writing')}: cannot be written: "
            f"{wrong.strerror}; the older checkpoints are untouched (检查点写入失败，旧检查点完好)"
        )
    except Exception as wrong:  # ours; the other ranks must not wait for this one for ever
        error, bug = f"rank {_rank()[0]}: {type(wrong).__name__}: {wrong}", wrong
    outcomes = gather((error, value))
    errors = [e for e, _ in outcomes if e]
    if errors:
        if _rank()[0] == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(errors[0]) from bug
    return [v for _, v in outcomes]


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: one sentence for each missing, cut or changed file.

    `part` of `parts` checks its share of the files, so that the ranks of a job share the reading.
    """
    try:
        manifest = _manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, entry in list(manifest["files"].items())[part::parts]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(
                f"{path}: has {path.stat().st_size} bytes, was written with {entry['bytes']}"
            )
        elif _describe(path)["xxh3_128"] != entry["xxh3_128"]:
            found.append(f"{path}: its content differs from its hash (文件已损坏)")
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is no checkpoint, it has no manifest.json") from None
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: cannot be read, it is damaged (文件已损坏)") from None
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not of the format {FORMAT}")
    if manifest.get("xxh3_128") != _own_hash(manifest):
        raise CheckpointError(f"{path}: its content differs from its hash (文件已损坏)")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise CheckpointError(f"{path}: names a file outside of the checkpoint")
    return manifest


def read(folder: str | Path) -> State:
    """A checkpoint as a state; tensors are mapped from their files when they are read.

    Raises CheckpointError for a folder that is none, or whose headers do not fit its manifest. The
    content is checked by damage() / newest(). An Averaged folder: its averaged weights.
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
            handle = safe_open(str(folder / name), framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / name}: cannot be read: {error} (文件已损坏)"
            ) from None
        for key in handle.offset_keys():
            part = handle.get_slice(key)
            dtype = {code: dtype for dtype, (code, _) in DTYPES.items()}[part.get_dtype()]
            read_it = _reader(handle, key)
            entries[f"{prefix}/{key}"] = Entry(tuple(part.get_shape()), dtype, read_it)
    try:
        record = json.loads((folder / "state.json").read_text("utf-8"))
        record["model"]["family"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / 'state.json'}: cannot be read (文件已损坏)") from None
    return State(entries, record)


def _reader(handle: Any, key: str) -> Callable[[], torch.Tensor]:
    return lambda: handle.get_tensor(key)


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
    rank, world = _rank()
    complaints: list[str] = []
    for path in gather(found_in(run))[0]:
        wrong = [s for part in gather(damage(path, rank, world)) for s in part]
        if not wrong:
            return path, complaints
        complaints += sorted(set(wrong))
    return None, complaints


def resolve(path: str | Path) -> Path:
    """A verified checkpoint folder from what a user names: a checkpoint, or a run (its newest)."""
    path, average = unmarked(path)  # RUN@ema
    if average:
        return Averaged(resolve(path))
    if (path / "manifest.json").exists():
        wrong = damage(path)
        if wrong:
            raise CheckpointError("\n".join(wrong))
        return path
    good, wrong = newest(path)
    if good is None:
        what = "\n".join(wrong) or f"{path}: holds no checkpoint (没有检查点)"
        raise CheckpointError(what)
    return good


def rotate(run: Path, keep: int, every: int = 0, best: int = 0) -> None:
    """Remove checkpoints that are too old; one rank calls it.

    What stays: the newest `keep`, those at stage borders, those at multiples of `every` steps, the
    `best` ones by validation loss; an ephemeral one only while nothing is newer.
    """
    ordinary, measured, gone = [], [], []
    for number, path in enumerate(found_in(run)):
        try:
            record = json.loads((path / "state.json").read_text("utf-8"))
        except (OSError, ValueError):
            record = {}
        if record.get("ephemeral"):
            gone += [path] if number else []
        elif not record.get("border"):
            ordinary.append((path, record))
            measured += [(record["valid_loss"], path)] if "valid_loss" in record else []
    good = [path for _, path in sorted(measured)[:best]]
    gone += [
        path
        for path, record in ordinary[keep:]
        if path not in good and not (every and record.get("step", 1) % every == 0)
    ]
    for path in gone:
        aside = path.parent / f".{path.name}.deleting"
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
