"""Names and shapes -> the place of every byte of a checkpoint's tensor files.

    key "optim/exp_avg/NAME" -> exp_avg-00000.safetensors, whole tensors, <= 512 MB a file

Header and offsets follow from names and shapes alone, so every rank knows every byte's place
without asking.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

FORMAT = "bajie-checkpoint-1"
FILE_BYTES = 512 * 10**6
NAME = re.compile(r"stage-(\d+)-step-(\d+)$")
DTYPES = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "int64": ("I64", 8)}

Piece = tuple[str, torch.Tensor, Iterable[tuple[int, int, int]]]
"""(key, flat local values, runs of (logical offset, local offset, length))."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which file and why."""


class StorageError(CheckpointError):
    """The file system failed, or another job holds the run: nobody's mistake; begun again it may
    pass."""


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


def slots_of(path: Path) -> dict[str, Slot]:
    """Where each tensor of a safetensors file lies, by name: what its header says.

    Raises ValueError for a header that is none, or that does not fit the file.
    """
    codes = {code: dtype for dtype, (code, _) in DTYPES.items()}
    whole = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= whole - 8:
            raise ValueError(f"its header would have {length} of {whole} bytes")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            found = {
                name: Slot(
                    path.name,
                    8 + length + entry["data_offsets"][0],
                    tuple(entry["shape"]),
                    codes[entry["dtype"]],
                )
                for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError("its header is none of safetensors") from None
    for name, slot in found.items():
        start, end = entries[name]["data_offsets"]
        if end - start != prod(slot.shape) * DTYPES[slot.dtype][1] or 8 + length + end > whole:
            raise ValueError(f"{name} is said to lie where it cannot, bytes {start} to {end}")
    return found


def aside_of(folder: Path) -> Path:
    """Where a checkpoint is written before it is one."""
    return folder.parent / f".{folder.name}.writing"


def whole_name(aside: Path) -> Path:
    """The checkpoint that is being written aside."""
    return aside.parent / aside.name[1:].removesuffix(".writing")
