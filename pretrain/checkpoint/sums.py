"""A sum of each logical tensor that its holders can add up, whoever holds which part of it.

    sum = (over i) mix(32-bit word i, i)  mod 2**64

A word that changed, moved or is there twice changes the sum; world size, ZeRO stage and tensor
parallelism do not, for addition does not care who adds. So what stands in an engine after a load is
compared with what stood in the one that saved, without bringing a tensor together.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from pretrain.checkpoint.places import Piece
from pretrain.checkpoint.ranks import EVERYONE, Ranks
from pretrain.compiled import compiled, fixed

WORD = 2**64


@compiled
def _sum(words_W, first):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for i in range(len(words_W)):
        mixed = np.uint64(words_W[i]) + (np.uint64(first) + np.uint64(i)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        total += mixed ^ (mixed >> np.uint64(31))
    return total


def sum_of(values: torch.Tensor, runs: Iterable[tuple[int, int, int]]) -> int:
    """The share of a tensor's sum that runs (logical offset, local offset, length) of flat values
    have."""
    flat = values.detach().cpu().contiguous()
    word = np.uint32 if flat.element_size() > 2 else np.uint16
    words = fixed(flat.view(torch.uint8).numpy().view(word))
    per = len(words) // max(flat.numel(), 1)
    total = 0
    for logical, local, length in runs:
        part = words[local * per : (local + length) * per]
        total += int(_sum(part, int(logical) * per))
    return total % WORD


def added(parts: Iterable[Mapping[str, int]]) -> dict[str, str]:
    """Sums of all tensors, in hexadecimal, from the shares of the ranks."""
    totals: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            totals[key] = (totals.get(key, 0) + value) % WORD
    return {key: f"{value:016x}" for key, value in sorted(totals.items())}


def differing(
    recorded: Mapping[str, Any], pieces: Iterable[Piece], ranks: Ranks = EVERYONE
) -> list[str]:
    """The tensors of an engine's pieces whose sums are not those on record; all ranks call this."""
    shares: dict[str, int] = {}
    for key, values, runs in pieces:
        shares[key] = shares.get(key, 0) + sum_of(values, runs)
    found = added(ranks.gather(shares))
    return sorted(key for key in found if key in recorded and found[key] != recorded[key])
