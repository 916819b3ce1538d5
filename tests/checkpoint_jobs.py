"""Jobs and helpers of the checkpoint tests: a state cut at random over the ranks of a world."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pretrain import checkpoint
from pretrain.checkpoint import reading
from pretrain.state import State
from tests.growing import trained


def shapes(state: State) -> dict[str, tuple[tuple[int, ...], str]]:
    """What layout() wants."""
    return {key: (entry.shape, entry.dtype) for key, entry in state.entries.items()}


def pieces(state: State, rank: int, world: int, seed: int) -> Iterator[checkpoint.Piece]:
    """This rank's part of a state cut at random places, several runs to a piece, in any order."""
    draw = random.Random(seed)
    mine: list[checkpoint.Piece] = []
    for key in state.entries:
        flat = state.read(key).reshape(-1)
        cuts = sorted({0, flat.numel(), *(draw.randrange(flat.numel() + 1) for _ in range(5))})
        runs = list(itertools.pairwise(cuts))
        owners = [draw.randrange(world) for _ in runs]
        own = [run for run, owner in zip(runs, owners, strict=True) if owner == rank]
        if not own:
            continue
        local = torch.cat([flat[a:b] for a, b in own])
        starts = [sum(b - a for a, b in own[:i]) for i in range(len(own))]
        mine.append((key, local, [(a, s, b - a) for (a, b), s in zip(own, starts, strict=True)]))
    draw.shuffle(mine)
    yield from mine


def save_cut(folder: str, seed: int, fail_on: int | None = None) -> list[str]:
    """Save trained() from all ranks; rank `fail_on` runs out of room. Returns its complaints."""
    state = trained()
    rank, world = dist.get_rank(), dist.get_world_size()

    def broken() -> Iterator[checkpoint.Piece]:
        yield from list(pieces(state, rank, world, seed))[:3]
        raise OSError(28, "No space left on device")

    parts = broken() if rank == fail_on else pieces(state, rank, world, seed)
    try:
        checkpoint.save(Path(folder), shapes(state), parts, state.record)
    except checkpoint.CheckpointError as error:
        return [str(error)]
    return []


def write_and_look(run: str) -> dict[str, Any]:
    """Write a whole state by all ranks, then verify it together."""
    run_folder = Path(run)
    checkpoint.write_state(run_folder / "checkpoints" / checkpoint.checkpoint_name(0, 4), trained())
    good, wrong = checkpoint.newest(run_folder)
    return {"good": str(good), "wrong": wrong}


def resolve(folder: str) -> tuple[str, int]:
    """What resolve() says of a checkpoint on this rank, and how many files this rank hashed."""
    honest, hashed = reading.describe, []

    def describe(path: Path) -> dict[str, Any]:
        hashed.append(path)
        return honest(path)

    with mock.patch.object(reading, "describe", describe):
        try:
            return str(checkpoint.resolve(folder)), len(hashed)
        except checkpoint.CheckpointError as error:
            return str(error), len(hashed)
