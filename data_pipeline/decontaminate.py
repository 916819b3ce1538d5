"""Text of evaluation sets, found in the documents of a corpus.

    evaluation file --fields of an item--> letters --13 in a row--> sorted hashes and their items
    document ----------------------------> letters --13 in a row--> looked up; found: it goes

13 letters in a row are what GPT-3 took for contamination (Brown et al. 2020, appendix C: 13 words);
for Chinese, characters without punctuation and blanks. At least 7 of them must be Han, since 13
letters in a row may be one English word, and 13 digits a telephone number. An item with fewer than
13 letters cannot be found; how many there are is counted. What was hit is written down: the item,
the document, the letters they share.

    document by document --> what each shares --> matches/
    all of them --how many documents share it--> a leak: it goes --> numbers/
                                             +-> a common phrase: it stays, and is listed
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from configs.corpus import CorpusConfig
from configs.dedup import Evaluation
from data_pipeline import minhash
from data_pipeline.blocks import Block, Documents, Stage
from data_pipeline.clean import folded
from data_pipeline.dedup import U64, numbers_in
from data_pipeline.ingest import first_place
from data_pipeline.kernels import compiled
from data_pipeline.kinds import HAN
from data_pipeline.shards import CorpusError, records, save, shard

SAID = ("items", "short_items", "hit_documents")
HITS_SHOWN = 10  # items named for one document; all are counted
FILTER_BITS = 25  # 4 MB: most n-grams of a document meet a zero there


def evaluation_file(part: Evaluation) -> Path:
    """The file of an evaluation set. CorpusError if there is none."""
    path = first_place(part.path)
    if path is None or not path.is_file():
        raise CorpusError(
            f"decontaminate: {part.name}: there is no file '{part.path}' (找不到评测集)"
        )
    return path


def files(config: CorpusConfig) -> list[Path]:
    """The files of all evaluation sets, whose contents key the build."""
    return [evaluation_file(part) for part in config.decontaminate]


def refuse(config: CorpusConfig) -> None:
    """Raise now what the search would raise for a file that is none of evaluation items."""
    for part in config.decontaminate:
        for _ in items(part):
            pass


def said(sets: tuple[Evaluation, ...], counts: "Counter[str]") -> dict[str, dict[str, int]]:
    """For the manifest: items, those too short to be found, documents that hold some."""
    found = {}
    for part in sets:
        numbers = {what: counts[f"{what}/{part.name}"] for what in (*SAID, "spared_documents")}
        found[part.name] = {what: n for what, n in numbers.items() if n or what in SAID}
    return found


def items(part: Evaluation) -> Iterator[tuple[str, list[str]]]:
    """(id, texts of its fields) of each item: JSON, one value or several after each other, in which
    the named fields may lie at any depth; .tsv, whose fields are numbers of columns from 1; else
    text, a line each. An id is the item's `id`, else its number from 0."""
    path, fields = evaluation_file(part), tuple(map(str, part.fields))
    found: Iterator[tuple[str | None, list[str]]]
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix in (".json", ".jsonl"):
            found = _of_json(text, fields)
        else:
            found = _of_lines(text, fields)
        nothing = True
        for number, (name, words) in enumerate(found):
            nothing = False
            yield (str(number) if name is None else name), words
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorpusError(
            f"decontaminate: {part.name}: {path} cannot be read: {error} (评测集无法读取)"
        ) from None
    if nothing:
        raise CorpusError(
            f"decontaminate: {part.name}: {path} has no field of {list(fields)}; correct "
            "fields (评测集中没有这些字段)"
        )


def _of_lines(text: str, fields: tuple[str, ...]) -> Iterator[tuple[None, list[str]]]:
    for line in text.split("\n"):
        cells = line.rstrip("\r").split("\t") if fields else [line]
        chosen = [cells[int(n) - 1] for n in fields if int(n) <= len(cells)] if fields else cells
        if any(chosen):
            yield None, chosen


def _of_json(text: str, fields: tuple[str, ...]) -> Iterator[tuple[str | None, list[str]]]:
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        value, at = decoder.raw_decode(text, at)
        yield from _within(value, fields, None)


def _within(
    value: Any, fields: tuple[str, ...], name: str | None
) -> Iterator[tuple[str | None, list[str]]]:
    """Every object that holds one of the fields is an item."""
    if isinstance(value, list):
        for part in value:
            yield from _within(part, fields, name)
    elif isinstance(value, dict):
        name = str(value["id"]) if "id" in value else name
        texts = [text for field in fields for text in _strings(value.get(field))]
        if texts:
            yield name, texts
        for field, part in value.items():
            if field not in fields:
                yield from _within(part, fields, name)


def _strings(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


# ---- the index of an evaluation set


@dataclass(frozen=True)
class Grams:
    """All n-grams of an evaluation set."""

    n: int
    hashes: np.ndarray
    """Sorted, each once, uint64."""
    item: np.ndarray
    """The first item that has it, int64."""
    of_item: np.ndarray
    """How many of them each item is the first to have, int64 [items]."""
    names: list[str]
    """The items' ids."""
    short: int
    """Items of fewer than n letters, or without enough Han in a row: they cannot be found."""

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of a text's hashes are the set's, and the number of each in it."""
        if not len(self.hashes):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        place = np.searchsorted(self.hashes, hashes)
        place[place == len(self.hashes)] = 0
        right = self.hashes[place] == hashes
        return np.flatnonzero(right), place[right]


class Filter:
    """All sets with n-grams of one length: most documents, and most of a document, end here."""

    def __init__(self, sets: list[Grams]) -> None:
        self.n = sets[0].n
        every = np.unique(np.concatenate([grams.hashes for grams in sets]))
        self.bits = np.zeros(1 << (FILTER_BITS - 3), dtype=np.uint8)
        high = every >> U64(64 - FILTER_BITS)
        np.bitwise_or.at(
            self.bits, high >> U64(3), np.left_shift(1, high & U64(7)).astype(np.uint8)
        )

    def passing(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in a text's letters n-grams stand that may be of a set, and their hashes."""
        if len(codes) < self.n:
            return np.empty(0, np.int64), np.empty(0, U64)
        hashes = minhash.gram_hashes(codes, self.n)
        places = _marked(hashes, self.bits)
        return places, hashes[places]


@compiled
def _marked(hashes, bits):  # type: ignore[no-untyped-def]
    """Places of the hashes whose bit is set."""
    out = np.empty(len(hashes), np.int64)
    n = 0
    for k in range(len(hashes)):
        high = hashes[k] >> np.uint64(64 - FILTER_BITS)
        out[n] = k
        n += (bits[high >> np.uint64(3)] >> (high & np.uint64(7))) & 1
    return out[:n].copy()


@lru_cache(maxsize=64)
def grams(part: Evaluation, contents: str = "") -> Grams:
    """Read an evaluation set; `contents` is the hash of its file, so that a changed one is read
    again."""
    n, names, short = part.characters, list[str](), 0
    hashes, owners = [np.empty(0, U64)], [np.empty(0, np.int64)]
    for number, (name, texts) in enumerate(items(part)):
        names.append(name)
        before = len(hashes)
        for codes in (minhash.letters(folded(text)) for text in texts):
            if len(codes) >= n:
                hashes.append(minhash.gram_hashes(codes, n)[_has_han(codes, n)])
                owners.append(np.full(len(hashes[-1]), number))
        short += not any(map(len, hashes[before:]))
    every, first = np.unique(np.concatenate(hashes), return_index=True)
    item = np.concatenate(owners)[first]
    return Grams(n, every, item, np.bincount(item, minlength=len(names)), names, short)


def _has_han(codes: np.ndarray, n: int) -> np.ndarray:
    """Which n-grams of letters are Han for more than half."""
    total = np.concatenate([[0], np.cumsum(minhash.kinds()[codes] == HAN)])
    return total[n:] - total[:-n] > n // 2


# ---- block


class FindMatches(Block):
    """Which of a shard's documents hold text of an evaluation set, and which item."""

    name = "matches"
    modules: ClassVar = ("decontaminate", "minhash", "hanzi", "clean", "ingest", "kinds")

    def __init__(
        self,
        cleaned: Path,
        sizes: list[int],
        sets: tuple[Evaluation, ...],
        contents: list[str],
    ) -> None:
        super().__init__(sets=[[part.name, part.fields, part.characters] for part in sets])
        self.cleaned, self.sizes, self.sets, self.contents = cleaned, sizes, sets, contents

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write matches/, in which `number` is the document's, `grams` are the
        numbers in Grams of what it shares."""
        first, done = sum(self.sizes[:rank]), 0
        indexes = list(map(grams, self.sets, self.contents))
        lengths = sorted({index.n for index in indexes})
        filters = [Filter([index for index in indexes if index.n == n]) for n in lengths]
        with shard(self.folder / "data" / "matches" / f"{rank:05d}.jsonl.zst") as add:
            for row, record in enumerate(records(self.cleaned / f"{rank:05d}.jsonl.zst")):
                codes = minhash.letters(record["text"])
                for name, hit in self._hits(codes, filters, indexes):
                    add({"set": name, "document": record["id"], "number": first + row, **hit})
                done += len(record["text"].encode())
                self.tick(done, rank)
        if rank == 0:
            for part, index in zip(self.sets, indexes, strict=True):
                self.counts[f"items/{part.name}"] += len(index.names)
                self.counts[f"short_items/{part.name}"] += index.short
        self.counts["worked_bytes"] += done
        self.tick(done, rank, final=True)
        yield from ()

    def _hits(
        self, codes: np.ndarray, filters: list[Filter], indexes: list[Grams]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """What a document shares with each set."""
        for lens in filters:
            places, hashes = lens.passing(codes)
            if not len(places):
                continue
            for part, index in zip(self.sets, indexes, strict=True):
                if index.n == lens.n:
                    right, found = index.find(hashes)
                    if len(right):
                        yield part.name, _hit(index, codes, places[right], found)


def _hit(index: Grams, codes: np.ndarray, places: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """What a document shares with one set."""
    distinct = dict.fromkeys(index.item[found].tolist())
    shared = codes[places[0] : places[0] + index.n].astype("<u4").tobytes().decode("utf-32-le")
    return {
        "items": [index.names[number] for number in list(distinct)[:HITS_SHOWN]],
        "items_hit": len(distinct),
        "n_grams_hit": len(places),
        "shared": shared,
        "grams": np.unique(found).tolist(),
    }


class SpareCommon(Block):
    """Of the documents that FindMatches found those that go; which share but common phrases stay.
    One task: only of the sets' n-grams something is held in memory."""

    name = "contaminated"
    modules: ClassVar = FindMatches.modules

    def __init__(
        self, matched: Stage, sets: tuple[Evaluation, ...], contents: list[str], copies: list[Path]
    ) -> None:
        super().__init__(most=[[part.name, part.max_documents] for part in sets])
        self.matched, self.sets, self.contents, self.copies = matched, sets, contents, copies

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write numbers/NAME/ (of documents) and hits/, where what stays is
        `common`."""
        sets = {part.name: part for part in self.sets}
        indexes = dict(zip(sets, map(grams, self.sets, self.contents), strict=True))
        often = self._documents_of(indexes)
        for task in range(self.matched.tasks):
            found: dict[str, list[int]] = {name: [] for name in sets}
            with shard(self.folder / "data" / "hits" / f"{task:05d}.jsonl.zst") as add:
                for hit in self._matches(task):
                    name, number, shared = hit["set"], hit.pop("number"), hit.pop("grams")
                    most = sets[name].max_documents
                    common = most is not None and int(often[name][shared].min()) > most
                    if common and not _half(indexes[name], shared):
                        self.counts[f"spared_documents/{name}"] += 1
                        add({**hit, "common": True})
                        continue
                    found[name].append(number)
                    add(hit)
                    self.counts[f"hit_documents/{name}"] += 1
            for name, numbers in found.items():
                path = self.folder / "data" / "numbers" / name / f"{task:05d}.npy"
                save(path, np.array(numbers, dtype=U64))
        for what, number in self.matched.counts.items():
            if what.partition("/")[0] in SAID:
                self.counts[what] += number
        yield from ()

    def _documents_of(self, indexes: dict[str, Grams]) -> dict[str, np.ndarray]:
        """How many documents have each n-gram of each set; of equal documents one counts, and none
        that holds half of an item: what is copied with its item is no common phrase."""
        often = {name: np.zeros(len(index.hashes), np.int64) for name, index in indexes.items()}
        copies = numbers_in(self.copies)
        for task in range(self.matched.tasks):
            for hit in self._matches(task):
                name, shared = hit["set"], hit["grams"]
                place = np.searchsorted(copies, U64(hit["number"]))
                copy = place < len(copies) and copies[place] == hit["number"]
                if not copy and not _half(indexes[name], shared):
                    often[name][shared] += 1
        return often

    def _matches(self, task: int) -> Iterator[dict[str, Any]]:
        return records(self.matched.data / "matches" / f"{task:05d}.jsonl.zst")


def _half(index: Grams, shared: list[int]) -> bool:
    """Whether half of an item is among what a document shares."""
    items, times = np.unique(index.item[shared], return_counts=True)
    return bool((2 * times >= index.of_item[items]).any())
