"""Foreign files as named tensors: safetensors, and pickles of torch's through weights_only=True."""

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pretrain.convert.rules import ConversionError, Foreign

SHARD_BYTES = 4 * 10**9


def read(folder: Path) -> Foreign:
    """The tensors of a folder's *.safetensors or pytorch_model*.bin, read when asked for."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        try:
            handle = safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{path}: cannot be read: {error} (文件已损坏)") from None
        for name in handle.offset_keys():
            found[name] = _tensor(handle, name)
    if not files:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            for name, tensor in pickled(path).items():
                found[name] = lambda tensor=tensor: tensor  # type: ignore[misc]
    if not found:
        raise ConversionError(
            f"{folder}: has neither *.safetensors nor pytorch_model*.bin (没有权重文件)"
        )
    return found


def _tensor(handle: Any, name: str) -> Callable[[], torch.Tensor]:
    return lambda: handle.get_tensor(name)


def pickled(path: Path) -> dict[str, Any]:
    """What a pickle of torch's holds: tensors and plain values. Objects of other classes (a
    framework's own arguments) become `Stub`s by name: nothing of theirs is imported or run. A file
    from before torch 1.6 is no zip: it cannot be mapped, nor asked for its classes, so that one of
    tensors alone is read, whole."""
    try:
        mapped = zipfile.is_zipfile(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
        stubs: list[Any] = [(type("Stub", (Stub,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(stubs):
            page = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises almost anything
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(
            f"{path}: cannot be read as tensors alone ({reason}) (文件无法安全读取)"
        ) from None
    if not isinstance(page, dict):
        raise ConversionError(
            f"{path}: holds a {type(page).__name__}, must be a dict of tensors (须为张量字典)"
        )
    return page


class Stub:
    """An object of a class that is not ours to import: it takes anything and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def write(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """model.safetensors, or several of at most 4 GB with the index that transformers reads."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(parts[0], folder / f"part-{len(names):05d}", metadata={"format": "pt"})
        names.append(list(parts[0]))
        parts[0] = {}

    for name, tensor in tensors:
        tensor = tensor.to(dtype)
        if parts[0] and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        parts[0][name] = tensor.clone()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(names) == 1:
        (folder / "part-00000").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, part in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{number:05d}").rename(folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
