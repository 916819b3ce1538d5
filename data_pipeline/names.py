"""The ids of documents by number, on the disk: so that a reject can name the document that stays.

    ids/00042.npy        the ids of a shard's documents, one after the other, UTF-8
    ids/00042.ends.npy   where each ends

Documents are numbered through all shards. Numbers are looked up shard by shard, so that one shard's
table is open at a time.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.shards import save


def keep(folder: Path, rank: int, names: Sequence[str]) -> None:
    """Write the ids of a shard's documents, in order."""
    words = [name.encode() for name in names]
    ends = np.cumsum([0, *map(len, words)], dtype=np.int64)
    save(folder / f"{rank:05d}.npy", np.frombuffer(b"".join(words), dtype=np.uint8))
    save(folder / f"{rank:05d}.ends.npy", ends)


def named(folder: Path, sizes: Sequence[int], numbers: np.ndarray) -> dict[int, str]:
    """The ids of documents by number (of any order, some of them twice)."""
    firsts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    wanted = np.unique(np.asarray(numbers, dtype=np.int64))
    found: dict[int, str] = {}
    for rank in np.unique(np.searchsorted(firsts, wanted, side="right") - 1).tolist():
        start, stop = np.searchsorted(wanted, firsts[rank : rank + 2])
        words = np.load(folder / f"{rank:05d}.npy", mmap_mode="r")
        ends = np.load(folder / f"{rank:05d}.ends.npy", mmap_mode="r")
        for number in wanted[start:stop].tolist():
            row = number - int(firsts[rank])
            found[number] = bytes(words[ends[row] : ends[row + 1]]).decode()
    return found
