"""Rows for tests: an index in memory, and batches out of windows written down."""

from collections.abc import Sequence

import numpy as np

from pretrain.batches import Batch, read_rows
from pretrain.rows import CausalRows

EOD, PAD = 7, 5


class ArrayIndex:
    """What rows ask of an index, over an array in memory; every EOD ends a document."""

    def __init__(self, ids: np.ndarray, offsets: Sequence[int] | None = None) -> None:
        self.ids = ids
        self.tokens = len(ids)
        ends = np.flatnonzero(ids == EOD) + 1 if offsets is None else np.asarray(offsets[1:])
        self.offsets = np.concatenate([[0], ends]).astype(np.int64)

    def slice(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def an_index(tokens: int, seed: int = 0) -> ArrayIndex:
    """Random tokens from 8 to 89, a document every seven or so."""
    ids = np.random.default_rng(seed).integers(8, 90, tokens).astype(np.uint16)
    ids[np.random.default_rng(seed + 1).random(tokens) < 0.15] = EOD
    ids[-1] = EOD
    return ArrayIndex(ids)


def causal_batch(windows: np.ndarray, eod: int, boundaries: bool) -> Batch:
    """The causal batch of windows [B, T + 1]."""
    length = windows.shape[1] - 1
    sources = [CausalRows(ArrayIndex(row), length, eod, PAD, boundaries) for row in windows]
    return read_rows(sources, np.arange(len(windows)), np.zeros(len(windows), np.int64))


def empty_batch(length: int, pad: int, boundaries: bool) -> Batch:
    """What a rank runs that has nothing left."""
    some = ArrayIndex(np.zeros(length + 1, np.int64), [0, length + 1])
    return CausalRows(some, length, EOD, pad, boundaries).batch(np.empty(0, np.int64))
