"""Documents that are nearly the same: candidates by MinHash, joined only when they really are.

    signatures  every shard: 18 keys a document, each band sorted by key      bands/
        |
    candidates  every band (and range of keys): documents that share a key    pairs/, members/
        |
    letters     every shard: the text of the candidates, and of no others     letters/
        |
    compare     every shard: pairs whose sets of n-grams have a Jaccard
        |       similarity of at least dedup.near.jaccard                     joined/
        |
    clusters    pairs joined (union-find); of each cluster the document
                that comes first stays                                        dropped/, why/, kept/

"First" is the order of the documents alone, as among equal ones (dedup.py): sources in their order,
and within them the order of the text. So neither the number of workers nor a kill decides.

The work is cut as datatrove cuts it (signature, buckets, cluster, filter), on the same executor,
but its steps are not used: they link neighbours in a bucket unseen, so that a pair of any
similarity is joined; their clustering holds every document of a bucket in Python dictionaries; and
their signature wants words. Here what is held is one range of keys or one shard at a time, and,
in the end, only the joined pairs. In a band, a document is paired with the 16 before it under the
same key and with the first 16: all pairs of a usual bucket, and a line through a huge one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.dedup import Near
from data_pipeline import minhash
from data_pipeline.blocks import Block, Documents, Stage
from data_pipeline.dedup import (
    U64,
    WHY,
    buckets,
    marks_within,
    numbers_in,
    rows_within,
)
from data_pipeline.kernels import compiled
from data_pipeline.shards import key_range, records, save

KEY = np.dtype([("key", "<u8"), ("row", "<u4")])
PARTNERS = 16
HELD_BYTES = 100_000_000  # sets of n-grams that wait for their next comparison
OPEN_SHARDS = 100  # three files each; a process may often open no more than 1024


def pairs_of(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Candidates among documents sorted by (key, number): each with the PARTNERS before it under
    its key and the first PARTNERS of that key. uint64 [2, pairs], smaller number first, sorted."""
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = keys[1:] != keys[:-1]
    at = np.arange(len(keys))
    start = np.maximum.accumulate(np.where(fresh, at, 0)) if len(keys) else at
    found = [np.empty((2, 0), U64)]
    for far in range(PARTNERS):
        for other in (at - 1 - far, start + far):
            one = at[(other >= start) & (other < at)]
            if len(one):
                two = at[other[one]]
                found.append(np.stack([numbers[two], numbers[one]]))
    return sorted_pairs(np.concatenate(found, axis=1))


def sorted_pairs(pairs: np.ndarray) -> np.ndarray:
    """Pairs in order, each once, uint64 [2, pairs]."""
    pairs = pairs[:, np.lexsort(pairs[::-1])]
    again = np.zeros(pairs.shape[1], dtype=bool)
    again[1:] = (pairs[:, 1:] == pairs[:, :-1]).all(axis=0)
    return pairs[:, ~again]


@compiled
def _join(parent, left, right):  # type: ignore[no-untyped-def]
    """Union-find, in place: the root of a cluster is its lowest."""
    for k in range(len(left)):
        a, b = left[k], right[k]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        parent[max(a, b)] = min(a, b)


@compiled
def _flatten(parent):  # type: ignore[no-untyped-def]
    """The root of each in the place of its parent, which is lower and has its root already."""
    for k in range(len(parent)):
        parent[k] = parent[parent[k]]


@compiled
def _nearest(root, left, right, jaccard, other, best):  # type: ignore[no-untyped-def]
    """For each that goes: its root if it was compared with it, else the most alike; in place."""
    for k in range(len(left)):
        for one, two in ((left[k], right[k]), (right[k], left[k])):
            if root[one] == one or other[one] == root[one]:
                continue
            if two == root[one] or jaccard[k] > best[one]:
                other[one], best[one] = two, jaccard[k]


Joined = tuple[np.ndarray, np.ndarray]
"""Pairs, uint64 [2, pairs], and the Jaccard similarity of each, float32."""


def clusters(parts: Callable[[], Iterable[Joined]]) -> tuple[np.ndarray, ...]:
    """Join pairs, of which `parts` gives a shard's at a time. Returns the numbers of the documents
    that go (sorted), for each of them why (dedup.WHY), the numbers of those that stay (sorted), and
    how many each of these stands for besides itself. What is held: 28 bytes a document that is in a
    pair (60 while the answer is made), and one shard's pairs."""
    numbers, waiting, held = np.empty(0, U64), list[np.ndarray](), 0
    for pairs, _ in parts():
        waiting.append(np.unique(pairs))
        held += len(waiting[-1])
        if held > len(numbers):
            numbers, waiting, held = np.unique(np.concatenate([numbers, *waiting])), [], 0
    numbers = np.unique(np.concatenate([numbers, *waiting]))
    root = np.arange(len(numbers), dtype=np.int64)
    for pairs, _ in parts():
        _join(root, *np.searchsorted(numbers, pairs))
    _flatten(root)
    other, best = np.full(len(root), -1, dtype=np.int64), np.zeros(len(root), dtype=np.float32)
    for pairs, jaccard in parts():
        _nearest(root, *np.searchsorted(numbers, pairs), jaccard, other, best)
    goes = root != np.arange(len(numbers))
    why = np.empty(int(goes.sum()), dtype=WHY)
    why["kept"], why["alike"] = numbers[root[goes]], numbers[other[goes]]
    why["jaccard"] = best[goes]
    stays, sizes = np.unique(root[goes], return_counts=True)
    return numbers[goes], why, numbers[stays], sizes.astype(U64)


# ---- blocks


class Sign(Block):
    """The keys of a shard's documents: bands/RANK.npy, [bands, documents], sorted in each band."""

    name = "signatures"
    modules: ClassVar = ("minhash", "hanzi", "near", "clean", "kinds")

    def __init__(self, cleaned: Path, rules: Near) -> None:
        super().__init__(ngram=rules.ngram, bands=rules.bands, rows=rules.rows)
        self.cleaned, self.rules = cleaned, rules

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing."""
        rules, done = self.rules, 0
        keys, rows = [], []
        for row, record in enumerate(records(self.cleaned / f"{rank:05d}.jsonl.zst")):
            signed = minhash.signature(record["text"], rules.ngram, rules.bands * rules.rows)
            if signed is not None:
                keys.append(minhash.band_keys(signed, rules.bands))
                rows.append(row)
            done += len(record["text"].encode())
            self.tick(done, rank)
        table = np.empty((rules.bands, len(keys)), dtype=KEY)
        by_band = np.array(keys, dtype=U64).reshape(-1, rules.bands).T
        order = np.argsort(by_band, axis=1, kind="stable")  # equal keys stay in order of rows
        table["key"] = np.take_along_axis(by_band, order, axis=1)
        table["row"] = np.array(rows, dtype=np.uint32)[order]
        save(self.folder / "data" / "bands" / f"{rank:05d}.npy", table)
        self.counts["worked_bytes"] += done
        self.tick(done, rank, final=True)
        yield from ()


class FindCandidates(Block):
    """One band, or a range of its keys, a task: which documents share a key."""

    name = "candidates"
    modules: ClassVar = ("near", "dedup")

    def __init__(self, tables: list[Path], sizes: list[int], gone: list[Path], bands: int) -> None:
        super().__init__(bands=bands)
        self.tables, self.sizes, self.gone, self.bands = tables, sizes, gone, bands

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing."""
        band, bucket = rank % self.bands, rank // self.bands
        keys, numbers = [np.empty(0, U64)], [np.empty(0, U64)]
        gone, first = numbers_in(self.gone), 0
        for path, count in zip(self.tables, self.sizes, strict=True):
            table = np.load(path, mmap_mode="r")[band]
            rows = np.array(table[key_range(table, bucket, world_size // self.bands)])
            rows = rows[~marks_within(gone, first, count)[rows["row"]]]
            keys.append(rows["key"])
            numbers.append(rows["row"].astype(U64) + U64(first))
            first += count
        key, number = np.concatenate(keys), np.concatenate(numbers)
        order = np.lexsort((number, key))
        pairs = pairs_of(key[order], number[order])
        save(self.folder / "data" / "pairs" / f"{rank:05d}.npy", pairs)
        save(self.folder / "data" / "members" / f"{rank:05d}.npy", np.unique(pairs))
        yield from ()


class GatherLetters(Block):
    """The letters of a shard's candidates, one after the other, and where each ends."""

    name = "letters"
    modules: ClassVar = ("near", "minhash", "hanzi", "dedup", "clean", "kinds")

    def __init__(self, cleaned: Path, sizes: list[int], members: list[Path]) -> None:
        super().__init__()
        self.cleaned, self.sizes, self.members = cleaned, sizes, members

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write letters/, ends/ and rows/."""
        wanted = rows_within(self.members, sum(self.sizes[:rank]), self.sizes[rank])
        texts, ends, done = [np.empty(0, np.uint32)], [0], 0
        for row, record in enumerate(records(self.cleaned / f"{rank:05d}.jsonl.zst")):
            if wanted[row]:
                texts.append(minhash.letters(record["text"]))
                ends.append(ends[-1] + len(texts[-1]))
            done += len(record["text"].encode())
            self.tick(done, rank)
        folder, file = self.folder / "data", f"{rank:05d}.npy"
        save(folder / "letters" / file, np.concatenate(texts))
        save(folder / "ends" / file, np.array(ends, dtype=np.int64))
        save(folder / "rows" / file, np.flatnonzero(wanted))
        self.counts["worked_bytes"] += done
        self.counts["candidate_documents"] += len(ends) - 1
        self.tick(done, rank, final=True)
        yield from ()


class Sets:
    """Sets of n-grams of candidates, by number; some wait in memory for their next comparison."""

    def __init__(self, letters: Path, sizes: Sequence[int], n: int) -> None:
        self.n, self.held, self.bytes = n, dict[int, np.ndarray](), 0
        self.firsts = np.concatenate([[0], np.cumsum(sizes)])
        self.letters, self.open = letters, dict[int, tuple[np.ndarray, ...]]()

    def __getitem__(self, number: int) -> np.ndarray:
        if number not in self.held:
            shard = int(np.searchsorted(self.firsts, number, side="right")) - 1
            if shard not in self.open:
                if len(self.open) == OPEN_SHARDS:
                    self.open.clear()
                self.open[shard] = tuple(
                    np.load(self.letters / what / f"{shard:05d}.npy", mmap_mode="r")
                    for what in ("letters", "ends", "rows")
                )
            text, ends, rows = self.open[shard]
            at = int(np.searchsorted(rows, number - self.firsts[shard]))
            found = minhash.gram_set(np.array(text[ends[at] : ends[at + 1]]), self.n)
            if self.bytes + found.nbytes > HELD_BYTES:
                self.held.clear()
                self.bytes = 0
            self.held[number] = found
            self.bytes += found.nbytes
        return self.held[number]


class Compare(Block):
    """The candidate pairs whose first document is in a shard: which of them are alike enough."""

    name = "compare"
    modules: ClassVar = ("near", "minhash", "dedup")

    def __init__(self, pairs: list[Path], letters: Path, sizes: list[int], rules: Near) -> None:
        super().__init__(ngram=rules.ngram, jaccard=rules.jaccard)
        self.pairs, self.letters, self.sizes, self.rules = pairs, letters, sizes, rules

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write joined/, uint64 [2, pairs], and alike/, float32."""
        first = sum(self.sizes[:rank])
        borders = np.array([first, first + self.sizes[rank]], dtype=U64)
        found = [np.empty((2, 0), U64)]
        for path in self.pairs:
            table = np.load(path, mmap_mode="r")
            found.append(np.array(table[:, slice(*np.searchsorted(table[0], borders))]))
        pairs = sorted_pairs(np.concatenate(found, axis=1))
        sets = Sets(self.letters, self.sizes, self.rules.ngram)
        alike = np.fromiter(_alike(pairs, sets), dtype=np.float64, count=pairs.shape[1])
        joined = alike >= self.rules.jaccard
        save(self.folder / "data" / "joined" / f"{rank:05d}.npy", pairs[:, joined])
        save(self.folder / "data" / "alike" / f"{rank:05d}.npy", alike[joined].astype(np.float32))
        self.counts["candidate_pairs"] += pairs.shape[1]
        self.counts["joined_pairs"] += int(joined.sum())
        yield from ()


def _alike(pairs: np.ndarray, sets: Sets) -> Iterator[float]:
    for at in range(0, pairs.shape[1], 1 << 16):  # Python's own numbers take 5 times the memory
        for one, two in pairs[:, at : at + (1 << 16)].T.tolist():
            yield minhash.jaccard(sets[one], sets[two])


class Cluster(Block):
    """Joined pairs into clusters; of each, the first document stays."""

    name = "clusters"
    modules: ClassVar = ("near", "dedup")

    def __init__(self, compared: Path, tasks: int) -> None:
        super().__init__()
        self.compared, self.tasks = compared, tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write dropped/ (numbers), why/ (dedup.WHY of each), kept/ (numbers, and
        how many went)."""
        goes, why, stays, sizes = clusters(self._parts)
        save(self.folder / "data" / "dropped" / "00000.npy", goes)
        save(self.folder / "data" / "why" / "00000.npy", why)
        save(self.folder / "data" / "kept" / "00000.npy", np.stack([stays, sizes]))
        self.counts["near_clusters"] += len(stays)
        self.counts["near_duplicate_documents"] += len(goes)
        yield from ()

    def _parts(self) -> Iterator[Joined]:
        for rank in range(self.tasks):
            file = f"{rank:05d}.npy"
            pairs = np.load(self.compared / "joined" / file)
            yield pairs, np.load(self.compared / "alike" / file)


# ---- the stages


def search(
    stage: Callable[..., Stage],
    cleaned: Stage,
    sizes: list[int],
    gone: list[Path],
    gone_key: str,
    rules: Near,
) -> list[Stage]:
    """The five stages above over the documents that are not in the files `gone`; stage(name,
    blocks, tasks, inputs, bytes) runs one. The last one's data holds dropped/ and kept/."""
    documents, size = cleaned.data / "documents", cleaned.counts["bytes"]
    tasks, of = len(sizes), buckets(cleaned.counts["documents"])
    sign: Block = Sign(documents, rules)
    signed = stage("signatures", [sign], tasks, [cleaned.key], size)
    tables = [signed.data / "bands" / f"{rank:05d}.npy" for rank in range(tasks)]
    find = FindCandidates(tables, sizes, gone, rules.bands)
    found = stage("candidates", [find], rules.bands * of, [signed.key, gone_key], 0)
    members = sorted((found.data / "members").glob("*.npy"))
    gather = GatherLetters(documents, sizes, members)
    gathered = stage("letters", [gather], tasks, [cleaned.key, found.key], size)
    pairs = sorted((found.data / "pairs").glob("*.npy"))
    compare = Compare(pairs, gathered.data, sizes, rules)
    compared = stage("compare", [compare], tasks, [found.key, gathered.key], 0)
    clustered = stage("clusters", [Cluster(compared.data, tasks)], 1, [compared.key], 0)
    return [signed, found, gathered, compared, clustered]


def said(counts: "Counter[str]") -> dict[str, int]:
    """For the manifest: how many were compared, how many joined."""
    names = ("candidate_documents", "candidate_pairs", "joined_pairs", "near_clusters")
    return {name: counts[name] for name in names}
