"""DeepSpeed's own checkpoints, ZeRO 1, 2 and 3: partitions of ranks -> whole tensors.

    FOLDER/latest -> FOLDER/global_step100/
        mp_rank_00_model_states.pt | zero_pp_rank_0_mp_rank_00_model_states.pt   names, shapes
        *_zero_pp_rank_R_mp_rank_00_optim_states.pt      fp32 masters and moments, flat, by rank

    ZeRO 1, 2   a group's partitions end to end are its tensors end to end (and padding)
    ZeRO 3      each tensor is cut into as many equal parts as there are ranks, the last one padded;
                a rank's group is its parts end to end

Keys as in our own state: weights/NAME, optim/exp_avg/NAME ... with the names of the model that
DeepSpeed trained. DeepSpeed is not imported: the files are read as tensors alone. Tied parameters
have every name of theirs. Tensor parallelism (several mp_rank) is refused.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.convert.files import Stub, pickled
from pretrain.convert.rules import ConversionError

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
MASTERS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}


def folder_of(path: Path) -> Path | None:
    """The folder of one step of DeepSpeed's, of a path that is or holds one; None: neither."""
    path = Path(path)
    latest = path / "latest"
    if latest.is_file() and not (path / "manifest.json").exists():
        path = path / latest.read_text("utf-8").strip()
    return path if path.is_dir() and any(path.glob("*_optim_states.pt")) else None


def read(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Whole tensors of a step's folder, float32, put together when asked for.

    Raises ConversionError for a rank's file that is missing, tensor parallelism, or numbers that
    do not add up.
    """
    parts = _parts(folder)
    shards = [pickled(path)["optimizer_state_dict"] for path in parts]
    stage = _number(shards[0].get("zero_stage", 0))
    count = shards[0].get("partition_count", len(shards))
    count = max(map(_number, count)) if isinstance(count, list) else _number(count)
    if stage not in (1, 2, 3) or count != len(parts):
        raise ConversionError(
            f"{folder}: is of ZeRO stage {stage} and {count} ranks, {len(parts)} files of ranks "
            "are there; stages 1 to 3 with every rank's file are read (分片文件不全)"
        )
    groups, tied = _groups(folder)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for kind, flats in _kinds(shards, stage, len(groups), folder):
        place = _whole if stage == 3 else _end_to_end
        for name, read_it in place(kind, flats, groups, folder):
            found[f"{kind}/{name}"] = read_it
        for name, other in tied.items():
            if f"{kind}/{other}" in found:
                found[f"{kind}/{name}"] = found[f"{kind}/{other}"]
    return found


def _number(value: Any) -> int:
    """A plain number, or the one that an enumeration of DeepSpeed's stands for."""
    return int(value.arguments[0] if isinstance(value, Stub) else value)


def _parts(folder: Path) -> list[Path]:
    ranks: dict[int, Path] = {}
    for path in folder.glob("*_optim_states.pt"):
        if (match := RANK.search(path.name)) is None:
            continue
        if int(match[2]):
            raise ConversionError(
                f"{folder}: has several mp_rank; join its tensor-parallel parts first (张量并行)"
            )
        ranks[int(match[1])] = path
    if not ranks or sorted(ranks) != list(range(len(ranks))):
        raise ConversionError(
            f"{folder}: has the files of ranks {sorted(ranks)} only (分片文件不全)"
        )
    return [ranks[rank] for rank in range(len(ranks))]


def _groups(folder: Path) -> tuple[list[dict[str, tuple[int, ...]]], dict[str, str]]:
    """Names and shapes of each parameter group, and the tied names."""
    states = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not states:
        raise ConversionError(f"{folder}: has no *_model_states.pt (缺少模型文件)")
    page = pickled(states[0])
    shapes = [{n: tuple(s) for n, s in group.items()} for group in page["param_shapes"]]
    tied = page.get("shared_params") or {}
    pairs = tied.items() if isinstance(tied, dict) else tied
    return shapes, {name: other for name, other in pairs if name != other}


def _kinds(
    shards: list[dict[str, Any]], stage: int, groups: int, folder: Path
) -> Iterator[tuple[str, list[list[torch.Tensor]]]]:
    """(kind, flat tensors [rank][group]) of masters and each moment."""
    key = MASTERS.get(stage, "fp32_flat_groups")
    yield "weights", [list(shard[key]) for shard in shards]
    moments: dict[str, list[list[torch.Tensor]]] = {}
    for rank, shard in enumerate(shards):
        inner = shard.get("base_optimizer_state") or shard.get("optimizer_state_dict") or {}
        states = inner.get("state", inner) if isinstance(inner, dict) else dict(enumerate(inner))
        for number in range(groups if stage < 3 else len(shard[key])):
            for slot, values in (states.get(number) or {}).items():
                if isinstance(values, torch.Tensor) and values.numel() > 1:
                    held = moments.setdefault(f"optim/{slot}", [[] for _ in shards])
                    held[rank].append(values)
    for kind, flats in moments.items():
        if len({len(flat) for flat in flats}) > 1:
            raise ConversionError(
                f"{folder}: the ranks hold different numbers of {kind} (各 rank 不一致)"
            )
        yield kind, flats


def _end_to_end(
    kind: str,
    flats: list[list[torch.Tensor]],
    groups: list[dict[str, tuple[int, ...]]],
    folder: Path,
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """ZeRO 1, 2: a group's partitions end to end."""
    for number, group in enumerate(groups):
        parts = [rank[number].reshape(-1) for rank in flats]
        room, start = sum(part.numel() for part in parts), 0
        for name, size in group.items():
            length = int(torch.Size(size).numel())
            yield name, _cut(parts, start, length, size)
            start += length
        # partitions are aligned: a little padding is right, a lot or none is another model
        if not start <= room <= start + 4 * len(parts) * 1024:
            raise ConversionError(
                f"{folder}: group {number} of {kind} holds {room} values, its tensors are {start} "
                "(检查点内容不符)"
            )


def _cut(
    parts: list[torch.Tensor], start: int, length: int, size: tuple[int, ...]
) -> Callable[[], torch.Tensor]:
    def read_it() -> torch.Tensor:
        found, at = [], 0
        for part in parts:
            first, end = max(start - at, 0), min(start + length - at, part.numel())
            if first < end:
                found.append(part[first:end])
            at += part.numel()
        return torch.cat(found).float().reshape(size)

    return read_it


def _whole(
    kind: str,
    flats: list[list[torch.Tensor]],
    groups: list[dict[str, tuple[int, ...]]],
    folder: Path,
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """ZeRO 3: equal parts of each tensor on every rank, groups end to end."""
    ranks = [torch.cat([part.reshape(-1) for part in rank]) for rank in flats]
    start = 0
    for group in groups:
        for name, size in group.items():
            length = int(torch.Size(size).numel())
            part = -(-length // len(ranks))
            yield name, _joined([rank[start : start + part] for rank in ranks], length, size)
            start += part
    if any(rank.numel() != start for rank in ranks):
        raise ConversionError(
            f"{folder}: a rank of {kind} holds {ranks[0].numel()} values, its parts are {start} "
            "(检查点内容不符)"
        )


def _joined(
    parts: list[torch.Tensor], length: int, size: tuple[int, ...]
) -> Callable[[], torch.Tensor]:
    return lambda: torch.cat(parts)[:length].float().reshape(size)
