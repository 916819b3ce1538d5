"""Ids that a source gives to more than one document: counted, never a reason to drop one.

    reading  --(source, id)--> 64-bit hash, sorted --> read_ids/RANK.npy
    duplicates, bucket by bucket, sorts the hashes of all shards: equal ones are one id again

Such documents are kept apart, since their texts decide whether they are the same; but an id that
should name one document and names two is a mistake of whoever made the source, and they want to
know. Ids that are made here (of files without any) are not looked at. Of a thousand million ids
0.03 pairs share a hash by chance.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.shards import key_range, open_table, save

ROW = np.dtype([("hash", "<u8"), ("source", "<u4")])
"""An id: of itself and its source; the number of the source."""


class Ids:
    """The ids that the documents of one shard brought with them: 12 bytes of each."""

    def __init__(self) -> None:
        self._hashes: list[int] = []
        self._sources: list[int] = []

    def add(self, source: int, name: str) -> None:
        """Note an id of the source of that number."""
        # Half a character (JSON's \ud800) may stand in an id, though in no text.
        words = name.encode("utf-8", "surrogatepass")
        self._hashes.append(xxhash.xxh3_64_intdigest(words, seed=source))
        self._sources.append(source)

    def __len__(self) -> int:
        return len(self._hashes)

    def save(self, path: Path) -> None:
        """Write them sorted by their hashes."""
        table = np.empty(len(self), ROW)
        table["hash"], table["source"] = self._hashes, self._sources
        table.sort(order=("hash", "source"))
        save(path, table)


def again(tables: Sequence[Path], bucket: int, of: int) -> "Counter[int]":
    """How many documents of each source, by its number, have an id that stood before; of the ids
    whose hashes lie in one bucket of `of`."""
    some = [np.empty(0, ROW)]
    for path in tables:
        if len(table := open_table(path)):
            some.append(np.array(table[key_range(table, bucket, of)]))
    rows = np.sort(np.concatenate(some), order=("hash", "source"))
    return Counter(rows[1:]["source"][rows[1:] == rows[:-1]].tolist())


def said(sources: Sequence[str], counts: "Counter[str]") -> str:
    """For the terminal: a line for each source that has some, or nothing."""
    return "\n".join(
        f"source '{name}': {n:,} of {counts[f'read/{name}']:,} documents have an id that stood "
        "before in it; they are documents of their own all the same (重复的 id)"
        for name in sources
        if (n := counts[f"repeated_ids/{name}"])
    )
