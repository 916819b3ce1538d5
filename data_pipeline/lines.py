"""Lines that stand in many documents, boilerplate: counted over the whole corpus, then taken out.

    count    every shard: (hash of a line's letters, documents with it, the first)    tables/
      |
    common   a range of hashes a task: lines of more than max_documents documents     common/
      |
    trim     every shard: documents without those lines, judged again; hashes, scores and ids made
             anew where a text changed: from here on these are the cleaned documents  documents/ ...
                                              rejects/lines/  the lines, the most frequent first
                                              rejects/trimmed:REASON/  what is too little without

A line is compared by its letters and digits in simplified form, so that punctuation, blanks and
script do not matter. Documents with named fields are counted but never changed. A shard's lines
are held at a time (some 60 bytes each while they are sorted), or a range of hashes; never all.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.cleaning import Cleaning
from configs.corpus import CorpusConfig
from configs.dedup import Lines
from data_pipeline import clean, hanzi, minhash, scores
from data_pipeline.blocks import Block, Document, Documents, Stage
from data_pipeline.dedup import U64, buckets, sizes_of
from data_pipeline.intake import COLUMNS, Rejects, Store
from data_pipeline.kernels import compiled
from data_pipeline.shards import key_range, open_table, records, save

LINE = np.dtype([("hash", "<u8"), ("first", "<u8"), ("documents", "<u4")])
"""A line: its hash, the first document with it (in a shard's table: its row), how many have it."""
LINES_SHOWN = 1000  # of a shard, in rejects/lines
CHANGED_BY_TRIM = ("documents", "characters", "bytes")


def of(text: str, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lines of a text with at least so many letters and digits: where each starts and stops,
    int64, and the hash of its letters, uint64."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return _lines(codes, minhash.kinds(), hanzi.forms(), least)


@compiled
def _lines(codes, kinds, forms, least):  # type: ignore[no-untyped-def]
    """Polynomial hash (Karp and Rabin 1987) modulo 2^64 of a line's letters, mixed."""
    most = 1
    for code in codes:
        most += code == 10
    starts, stops = np.empty(most, np.int64), np.empty(most, np.int64)
    hashes = np.empty(most, np.uint64)
    n, start, letters, rolling = 0, 0, 0, np.uint64(0)
    for at in range(len(codes) + 1):
        if at < len(codes) and codes[at] != 10:
            code = codes[at]
            if kinds[code] <= 2:  # kinds.DIGIT
                letters += 1
                rolling = rolling * np.uint64(0x9E3779B97F4A7C15) + np.uint64(forms[code] + 1)
            continue
        if letters >= least:
            x = (rolling ^ (rolling >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            starts[n], stops[n], hashes[n] = start, at, x ^ (x >> np.uint64(31))
            n += 1
        start, letters, rolling = at + 1, 0, np.uint64(0)
    return starts[:n], stops[:n], hashes[:n]


def together(hashes: np.ndarray, numbers: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Lines by hash, LINE: entries of one hash and one number count once, of several numbers add
    up; the lowest number is the first document."""
    order = np.lexsort((numbers, hashes))
    hashes, numbers, documents = hashes[order], numbers[order], documents[order]
    fresh, again = np.ones(len(hashes), dtype=bool), np.zeros(len(hashes), dtype=bool)
    fresh[1:] = hashes[1:] != hashes[:-1]
    again[1:] = ~fresh[1:] & (numbers[1:] == numbers[:-1])
    starts = np.flatnonzero(fresh)
    found = np.empty(len(starts), dtype=LINE)
    found["hash"], found["first"] = hashes[starts], numbers[starts]
    if len(starts):
        found["documents"] = np.add.reduceat(np.where(again, 0, documents), starts)
    return found


# ---- blocks


class CountLines(Block):
    """The lines of a shard, and in how many of its documents each stands."""

    name = "lines"
    modules: ClassVar = ("lines", "minhash", "clean", "hanzi", "kinds")

    def __init__(self, cleaned: Path, least: int) -> None:
        super().__init__(least=least)
        self.cleaned, self.least = cleaned, least

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write tables/."""
        hashes, done = list[np.ndarray](), 0
        for record in records(self.cleaned / f"{rank:05d}.jsonl.zst"):
            hashes.append(of(record["text"], self.least)[2])
            done += len(record["text"].encode())
            self.tick(done, rank)
        every = np.concatenate([np.empty(0, U64), *hashes])
        row_of = np.repeat(np.arange(len(hashes), dtype=np.uint32), list(map(len, hashes)))
        table = together(every, row_of, np.ones(len(every), dtype=np.uint32))
        save(self.folder / "data" / "tables" / f"{rank:05d}.npy", table)
        self.counts["distinct_lines"] += len(table)
        self.counts["worked_bytes"] += done
        self.tick(done, rank, final=True)
        yield from ()


class FindCommon(Block):
    """A range of hashes a task: the lines of more than `most` documents of all shards."""

    name = "common"
    modules: ClassVar = ("lines", "dedup")

    def __init__(self, tables: list[Path], sizes: list[int], most: int) -> None:
        super().__init__(most=most)
        self.tables, self.sizes, self.most = tables, sizes, most

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write common/, LINE, sorted by hash."""
        slices, base = [np.empty(0, LINE)], 0
        for path, size in zip(self.tables, self.sizes, strict=True):
            table = open_table(path)
            rows = np.array(table[key_range(table, rank, world_size)])
            rows["first"] += U64(base)
            slices.append(rows)
            base += size
        every = np.concatenate(slices)
        found = together(every["hash"], every["first"], every["documents"])
        found = found[found["documents"] > self.most]
        save(self.folder / "data" / "common" / f"{rank:05d}.npy", found)
        self.counts["common_lines"] += len(found)
        yield from ()


class Trim(Block):
    """A shard's documents without the common lines; what is not enough then is refused."""

    name = "trim"
    modules: ClassVar = ("lines", "minhash", "scores", "clean", "hanzi", "kinds")

    def __init__(
        self,
        cleaned: Path,
        sizes: list[int],
        tables: list[Path],
        common: list[Path],
        rules: Lines,
        judge: Cleaning,
    ) -> None:
        super().__init__(rules=rules, judge=judge)
        self.cleaned, self.sizes, self.tables, self.common = cleaned, sizes, tables, common
        self.rules, self.judge = rules, judge

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield the documents, as Clean does."""
        base, file, done = sum(self.sizes[:rank]), f"{rank:05d}.jsonl.zst", 0
        self._keep_rejects(file)
        common = common_in(open_table(self.tables[rank]), self.common)
        digests = _digests(open_table(self.cleaned / "hashes" / f"{rank:05d}.npy"))
        rows = scores.stored(self.cleaned, rank)
        shown: dict[int, tuple[int, dict[str, Any]]] = {}
        with Rejects(self.folder / "data" / "rejects", rank) as rejects:
            for row, record in enumerate(records(self.cleaned / "documents" / file)):
                text = record.pop("text")
                document = Document(text, record.pop("id"), metadata=record)
                done += len(text.encode())
                self.tick(done, rank)
                document.metadata |= {"digest": digests[row], COLUMNS: _plain(rows[row])}
                gone = [] if "spans" in record else self._common(text, common)
                for start, stop, place in gone:
                    if common["first"][place] == base + row:
                        number = int(common["documents"][place])
                        line = {"id": document.id, "documents": number, "text": text[start:stop]}
                        shown[place] = number, line
                if self.rules.keep_first:
                    gone = [g for g in gone if common["first"][g[2]] != base + row]
                if not gone or self._without(document, gone, rejects):
                    yield document
            for _, line in sorted(shown.values(), key=lambda pair: -pair[0])[:LINES_SHOWN]:
                rejects.add("lines", line)
        self.counts["worked_bytes"] += done
        self.tick(done, rank, final=True)

    def _common(self, text: str, common: np.ndarray) -> list[tuple[int, int, int]]:
        """Where common lines start and stop, and their places among the common ones."""
        if not len(common):
            return []
        starts, stops, hashes = of(text, self.rules.min_characters)
        places = np.minimum(np.searchsorted(common["hash"], hashes), len(common) - 1)
        there = common["hash"][places] == hashes
        return list(zip(*(a[there].tolist() for a in (starts, stops, places)), strict=True))

    def _without(
        self, document: Document, gone: list[tuple[int, int, int]], rejects: Rejects
    ) -> bool:
        """Take the lines out of a document; False if it is refused then."""
        before, kept, at = document.text, [], 0
        for start, stop, _ in gone:
            kept.append(before[at:start])
            at = stop + 1
        page = clean.normalise("".join([*kept, before[at:]]))
        self.counts["lines/lines"] += len(gone)
        self.counts["lines/documents"] += 1
        self.counts["lines/characters"] += sum(stop - start for start, stop, _ in gone)
        self.counts["changed/boilerplate"] += sum(stop - start for start, stop, _ in gone)
        verdict = clean.judge(page, self.judge)
        if isinstance(verdict, tuple):
            reason = f"trimmed:{verdict[1]}"
            self.counts[f"rejected/{reason}"] += 1
            self.counts[f"rejected_characters/{reason}"] += len(page.text)
            fields = {k: v for k, v in document.metadata.items() if k not in ("digest", COLUMNS)}
            rejects.add(reason, {"id": document.id, **fields, "text": before})
            return False
        document.text = page.text
        document.metadata["digest"] = clean.digest(page)
        row = document.metadata[COLUMNS] = scores.scores(page)
        if "scores" in document.metadata:
            document.metadata["scores"] = scores.as_fields(row)
        return True

    def _keep_rejects(self, file: str) -> None:
        """What Clean refused stays to be looked at: this stage stands for that one."""
        for path in sorted((self.cleaned / "rejects").glob(f"*/{file}")):
            target = self.folder / "data" / "rejects" / path.parent.name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(path, target)
            except OSError:  # a file system without links
                shutil.copyfile(path, target)


def common_in(table: np.ndarray, common: list[Path]) -> np.ndarray:
    """Which of a shard's lines are common, LINE over the whole corpus, sorted by hash."""
    found = [np.empty(0, LINE)]
    for bucket, path in enumerate(common):
        mine = np.array(table[key_range(table, bucket, len(common))]["hash"])
        lines = np.load(path, mmap_mode="r")
        if len(mine) and len(lines):
            places = np.minimum(np.searchsorted(lines["hash"], mine), len(lines) - 1)
            found.append(np.array(lines[places[lines["hash"][places] == mine]]))
    return np.concatenate(found)


def _digests(table: np.ndarray) -> list[bytes]:
    """The hashes of a shard's documents in the order of its rows."""
    halves = np.empty((len(table), 2), dtype=">u8")
    halves[table["row"], 0], halves[table["row"], 1] = table["high"], table["low"]
    return [bytes(pair) for pair in halves]


def _plain(row: Any) -> np.ndarray:
    return np.array(row.tolist(), dtype=np.float32)


# ---- the stages


def trimmed(
    config: CorpusConfig, stage: Callable[..., Stage], cleaned: Stage
) -> tuple[Stage, list[Stage]]:
    """The stages above, if they are asked for; stage(name, blocks, tasks, inputs, bytes) runs one.
    Returns what stands for `cleaned` from here on, counts and all, and the stages before it,
    `cleaned` among them."""
    rules = config.dedup.lines
    if rules is None:
        return cleaned, []
    size, tasks, sizes = cleaned.counts["bytes"], cleaned.tasks, sizes_of(cleaned)
    count: list[Block] = [CountLines(cleaned.data / "documents", rules.min_characters)]
    counted = stage("lines", count, tasks, [cleaned.key], size)
    tables = [counted.data / "tables" / f"{rank:05d}.npy" for rank in range(tasks)]
    find: list[Block] = [FindCommon(tables, sizes, rules.max_documents)]
    ranges = buckets(counted.counts["distinct_lines"])
    found = stage("common", find, ranges, [counted.key], 0)
    common = [found.data / "common" / f"{rank:05d}.npy" for rank in range(ranges)]
    trim: list[Block] = [Trim(cleaned.data, sizes, tables, common, rules, config.clean), Store()]
    done = stage("trim", trim, tasks, [cleaned.key, found.key], size)
    before = Counter(
        {
            name: number
            for name, number in cleaned.counts.items()
            if name not in (*CHANGED_BY_TRIM, "worked_bytes", "cpu_s", "elapsed_s", "peak_rss_mb")
        }
    )
    counts = done.counts + before
    counts["lines/distinct"] = found.counts["common_lines"]
    return replace(done, counts=counts), [cleaned, counted, found]


def shown(folder: Path) -> Iterator[dict[str, Any]]:
    """The common lines of a corpus folder, a shard's after another's."""
    for path in sorted((folder / "rejects" / "lines").glob("*.jsonl.zst")):
        yield from records(path)
