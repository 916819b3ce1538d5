"""Equal documents: found by a 128-bit hash of their letters and digits, in bounded memory.

    shard 0   (hash, row) sorted by hash --+   hashes are spread evenly, so a bucket, the hashes
    shard 1   (hash, row) sorted by hash --+-> that begin alike, is one slice of every shard's table
    ...                                    |
                                           +-> bucket k: of equal hashes all but the first document
                                               (by shard, then row) are duplicates of that one

Which copy stays depends on the order of the documents alone, never on which worker came first. The
same hash, mixed with a seed, is the document's lot in the draw of the validation split: equal text
falls on one side, and no document's side depends on the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_pipeline import names, repeated_ids
from data_pipeline.blocks import Block, Documents, Stage
from data_pipeline.intake import Rejects
from data_pipeline.shards import Record, key_range, open_table, records, save, shard

DOCUMENTS_PER_BUCKET = 4_000_000  # about 0.4 GB while it is sorted
U64 = np.uint64
WHY = np.dtype([("kept", "<u8"), ("alike", "<u8"), ("jaccard", "<f4")])
"""Why a document goes: the number of the one that stays, of the one that it was compared with, and
how alike it is to that one (not a number: their letters and digits are equal)."""


def buckets(documents: int) -> int:
    """How many buckets (a power of two) keep each below DOCUMENTS_PER_BUCKET."""
    return 1 << max(0, (documents - 1).bit_length() - (DOCUMENTS_PER_BUCKET - 1).bit_length())


@dataclass(frozen=True)
class Findings:
    """What a bucket holds; documents are numbered through all shards."""

    duplicates: np.ndarray
    """Numbers of the documents that stand before under the same hash, sorted, uint64."""
    kept: np.ndarray
    """For each of them the first document under that hash, uint64."""
    lots: np.ndarray
    """The lowest lots among the distinct documents, sorted, uint64."""
    distinct: int
    """Distinct documents."""


def search(tables: Sequence[Path], bucket: int, of: int, seed: int, lowest: int) -> Findings:
    """Compare all documents of one bucket of `of`; also draw the `lowest` lots for validation."""
    high, low, number = (
        np.concatenate(columns) for columns in zip(*_slices(tables, bucket, of), strict=True)
    )
    order = np.lexsort((number, low, high))
    high, low, number = high[order], low[order], number[order]
    again = np.zeros(len(high), dtype=bool)
    again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = lots(high[~again], low[~again], seed)
    drawn = np.sort(np.partition(first, lowest - 1)[:lowest] if 0 < lowest < len(first) else first)
    stays = number[~again][np.cumsum(~again)[again] - 1]
    by_number = np.argsort(number[again])
    return Findings(number[again][by_number], stays[by_number], drawn[:lowest], len(first))


def _slices(
    tables: Sequence[Path], bucket: int, of: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    base = 0
    slices = [(np.empty(0, U64), np.empty(0, U64), np.empty(0, U64))]
    for path in tables:
        table = open_table(path)
        if len(table):
            rows = np.array(table[key_range(table, bucket, of)])
            slices.append((rows["high"], rows["low"], rows["row"].astype(U64) + U64(base)))
        base += len(table)
    return slices


def lots(high: np.ndarray, low: np.ndarray, seed: int) -> np.ndarray:
    """Each document's lot in [0, 2^64): its hash mixed with the seed (splitmix64's finaliser)."""
    return _mix(high ^ _mix(low + _mix(np.array([seed], dtype=U64) + U64(0x9E3779B97F4A7C15))))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def shard_lots(table: np.ndarray, seed: int) -> np.ndarray:
    """The lots of a shard's documents in the order of its rows, uint64."""
    drawn = np.empty(len(table), dtype=U64)
    drawn[table["row"]] = lots(np.array(table["high"]), np.array(table["low"]), seed)
    return drawn


def below(drawn: np.ndarray, limit: int) -> np.ndarray:
    """Which lots lie below a limit in [0, 2^64]: those documents are held out, bool."""
    return np.ones(len(drawn), dtype=bool) if limit >= 1 << 64 else drawn < U64(limit)


def numbers_in(files: Sequence[Path]) -> np.ndarray:
    """All numbers of sorted files in one array, sorted, uint64: 8 bytes a document."""
    return np.sort(np.concatenate([np.empty(0, U64), *(np.load(path) for path in files)]))


def marks_within(numbers: np.ndarray, first: int, count: int) -> np.ndarray:
    """Which of the `count` documents from number `first` on are among sorted numbers, bool."""
    marks = np.zeros(count, dtype=bool)
    start, stop = np.searchsorted(numbers, np.array([first, first + count], dtype=U64))
    marks[numbers[start:stop] - U64(first)] = True
    return marks


def rows_within(duplicates: Sequence[Path], first: int, count: int) -> np.ndarray:
    """Which of the `count` documents from number `first` on are duplicates, bool."""
    marks = np.zeros(count, dtype=bool)
    for path in duplicates:
        marks |= marks_within(np.load(path, mmap_mode="r"), first, count)
    return marks


def reasons_within(gone: dict[str, list[Path]], first: int, count: int) -> list[str]:
    """Why each of the `count` documents from number `first` on must go, or ""; of several reasons
    the first one."""
    reasons = [""] * count
    for reason, files in gone.items():
        for row in np.flatnonzero(rows_within(files, first, count)).tolist():
            reasons[row] = reasons[row] or reason
    return reasons


def why_within(beside: Sequence[tuple[Path, Path]], first: int, count: int) -> dict[int, Any]:
    """Row -> WHY, for those of the `count` documents from number `first` on that stand in one of
    the pairs of files (numbers, sorted; their WHY)."""
    found: dict[int, Any] = {}
    for path, other in beside:
        numbers = np.load(path, mmap_mode="r")
        start, stop = np.searchsorted(numbers, np.array([first, first + count], dtype=U64))
        if start < stop:
            rows = (numbers[start:stop] - U64(first)).tolist()
            found |= zip(rows, np.load(other, mmap_mode="r")[start:stop], strict=True)
    return found


def sizes_of(cleaned: Stage) -> list[int]:
    """How many documents each shard of the cleaned ones has."""
    tables = (cleaned.data / "hashes" / f"{rank:05d}.npy" for rank in range(cleaned.tasks))
    return [len(open_table(table)) for table in tables]


def limit_of_the_rest(
    tables: Sequence[Path], gone: Sequence[Path], seed: int, wanted: int
) -> tuple[int, int]:
    """The limit below which `wanted` of the documents that are not gone have their lots, and how
    many those documents are."""
    lowest, first, left = np.empty(0, U64), 0, 0
    numbers = numbers_in(gone)
    for path in tables:
        table = open_table(path)
        stay = shard_lots(table, seed)[~marks_within(numbers, first, len(table))]
        first, left = first + len(table), left + len(stay)
        lowest = np.unique(np.concatenate([lowest, stay]))[:wanted]  # equal text, equal lots
    return (int(lowest[-1]) + 1 if len(lowest) else 0), left


# ---- blocks


class FindDuplicates(Block):
    """One bucket of hashes a task: which documents stood before, and the lowest lots; and how many
    documents of each source that was read, by its name, have an id that stood before in it."""

    name = "duplicates"
    modules: ClassVar = ("dedup", "repeated_ids")

    def __init__(
        self, tables: list[Path], seed: int, lowest: int, ids: list[Path], sources: list[str]
    ) -> None:
        super().__init__(seed=seed, lowest=lowest, sources=sources)
        self.tables, self.seed, self.lowest = tables, seed, lowest
        self.ids, self.sources = ids, sources

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write data/duplicates/, data/why/ and data/lots/."""
        found = search(self.tables, rank, world_size, self.seed, self.lowest)
        why = np.empty(len(found.kept), dtype=WHY)
        why["kept"] = why["alike"] = found.kept
        why["jaccard"] = np.nan
        save(self.folder / "data" / "duplicates" / f"{rank:05d}.npy", found.duplicates)
        save(self.folder / "data" / "why" / f"{rank:05d}.npy", why)
        save(self.folder / "data" / "lots" / f"{rank:05d}.npy", found.lots)
        self.counts["distinct_documents"] += found.distinct
        self.counts["duplicate_documents"] += len(found.duplicates)
        for source, number in repeated_ids.again(self.ids, rank, world_size).items():
            self.counts[f"repeated_ids/{self.sources[source]}"] += number
        yield from ()


class Divide(Block):
    """A shard's documents into train and valid; what was found twice, or in an evaluation set, goes
    to rejects/REASON/, with the id of the document that stays (`kept`), how alike it is to that one
    (`jaccard`), or to a third one (`alike`) by which the two came into one cluster."""

    name = "divide"
    modules: ClassVar = ("dedup", "names", "intake")

    def __init__(
        self,
        cleaned: Path,
        sizes: list[int],
        gone: dict[str, list[Path]],
        why: list[tuple[Path, Path]],
        kept: Path | None,
        seed: int,
        below: int,
    ) -> None:
        super().__init__(gone=list(gone), near=kept is not None, seed=seed, below=str(below))
        self.cleaned, self.sizes, self.gone, self.kept = cleaned, sizes, gone, kept
        self.why, self.seed, self.below = why, seed, below

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write data/documents/train-*.jsonl.zst and valid-*."""
        reasons = reasons_within(self.gone, sum(self.sizes[:rank]), self.sizes[rank])
        copies, why = self._copies(rank), self._why(rank)
        table = open_table(self.cleaned / "hashes" / f"{rank:05d}.npy")
        held_out = below(shard_lots(table, self.seed), self.below)
        folder, file = self.folder / "data", f"{rank:05d}.jsonl.zst"
        done = 0
        with (
            shard(folder / "documents" / f"train-{file}") as train,
            shard(folder / "documents" / f"valid-{file}") as valid,
            Rejects(folder / "rejects", rank) as rejects,
        ):
            for row, record in enumerate(records(self.cleaned / "documents" / file)):
                size = len(record["text"].encode())
                done += size
                self.tick(done, rank)
                if reason := reasons[row]:
                    rejects.add(reason, _explained(record, why.get(row)))
                    self.counts[f"rejected/{reason}"] += 1
                    self.counts[f"rejected_characters/{reason}"] += len(record["text"])
                    continue
                if copies is not None:
                    text = record.pop("text")
                    record |= {"near_duplicates": int(copies[row]), "text": text}
                split, add = ("valid", valid) if held_out[row] else ("train", train)
                add(record)
                self.counts[f"{split}_documents"] += 1
                self.counts[f"{split}_characters"] += len(record["text"])
                self.counts[f"{split}_bytes"] += size
        self.counts["worked_bytes"] += done
        self.tick(done, rank, final=True)
        yield from ()

    def _why(self, rank: int) -> dict[int, Record]:
        """Row -> what its reject says of the document that stays."""
        found = why_within(self.why, sum(self.sizes[:rank]), self.sizes[rank])
        numbers = [int(why[which]) for why in found.values() for which in ("kept", "alike")]
        ids = names.named(self.cleaned / "ids", self.sizes, np.array(numbers, dtype=np.int64))
        said: dict[int, Record] = {}
        for row, why in found.items():
            said[row] = {"kept": ids[int(why["kept"])]}
            if why["alike"] != why["kept"]:
                said[row]["alike"] = ids[int(why["alike"])]
            if not np.isnan(why["jaccard"]):
                said[row]["jaccard"] = round(float(why["jaccard"]), 4)
        return said

    def _copies(self, rank: int) -> np.ndarray | None:
        """How many documents went in favour of each of a shard's, if that was looked for."""
        if self.kept is None:
            return None
        first, copies = sum(self.sizes[:rank]), np.zeros(self.sizes[rank], dtype=U64)
        numbers, sizes = np.load(self.kept, mmap_mode="r")
        borders = np.array([first, first + len(copies)], dtype=U64)
        mine = slice(*np.searchsorted(numbers, borders))
        copies[numbers[mine] - U64(first)] = sizes[mine]
        return copies


def _explained(record: Record, why: Record | None) -> Record:
    """A record with what is said of it before its text."""
    if why is None:
        return record
    return (
        {name: value for name, value in record.items() if name != "text"}
        | why
        | {"text": record["text"]}
    )
