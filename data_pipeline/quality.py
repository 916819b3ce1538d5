"""Bounds on scores, applied to their columns: no document is read for it.

    cleaned.data/scores/SHARD.npy --outside [lowest, highest]--> numbers/SCORE/SHARD.npy
                                                                 rejects/quality:SCORE/ (divide)

Another bound costs this pass over columns (100 bytes a document) and the division, no cleaning.
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.quality import Quality
from data_pipeline.blocks import Block, Documents
from data_pipeline.scores import stored
from data_pipeline.shards import save


def outside(table: np.ndarray, rules: Quality) -> dict[str, np.ndarray]:
    """Score -> the rows that it puts out, int64; a row goes by the first of its scores."""
    stay, gone = np.ones(len(table), dtype=bool), {}
    for name, (low, high) in rules.rules().items():
        column = np.asarray(table[name])
        right = np.ones(len(table), dtype=bool)
        # Bounds are compared as float32, as scores are: 0.1 is kept by [0.1, null].
        if low is not None:
            right &= column >= np.float32(low)
        if high is not None:
            right &= column <= np.float32(high)
        gone[name] = np.flatnonzero(stay & ~right)
        stay &= right
    return gone


class FindPoor(Block):
    """Which documents of a shard have a score outside its bounds."""

    name = "quality"
    modules: ClassVar = ("quality", "scores")

    def __init__(self, cleaned: Path, sizes: list[int], rules: Quality) -> None:
        super().__init__(rules=rules.rules())
        self.cleaned, self.sizes, self.rules = cleaned, sizes, rules

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write SCORE/ (numbers of documents)."""
        first = np.uint64(sum(self.sizes[:rank]))
        for name, rows in outside(stored(self.cleaned, rank), self.rules).items():
            numbers = first + rows.astype(np.uint64)
            save(self.folder / "data" / "numbers" / name / f"{rank:05d}.npy", numbers)
            self.counts[f"poor/{name}"] += len(rows)
        yield from ()
