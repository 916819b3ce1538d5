"""What the kept documents are: counted shard by shard beside their tokens, for the report.

    documents + the index of their tokens --> lengths, sources, other labels, some excerpts
                                          --> how often each token of the vocabulary occurs

Nothing here decides what a corpus is; so the manifest does not hold it, and another report costs
no other stage. Excerpts are drawn by a hash of the id: the same corpus shows the same ones.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson
import xxhash

from data_pipeline import tokenizer
from data_pipeline.blocks import SPLITS, Block, Documents
from data_pipeline.index import Index
from data_pipeline.shards import aside, records, save

EXCERPTS, EXCERPT_CHARACTERS = 4, 400
LABELS_OF_A_FIELD = 40
"""A field with more distinct values than this, or longer ones, is no label: it is not counted."""
SOURCES = 1000
"""So many are told apart, the largest; a record may name its own, down to an address of a page."""
OTHERS = "others 其余"
NO_LABELS = ("id", "text", "source", "scores", "spans", "path", "url", "file", "title", "date")
TOKENS_AT_ONCE = 1 << 22


class Tally(Block):
    """Counts of a shard's kept documents: data/tally/RANK.json, data/used/RANK.npy (int64 [vocab],
    both splits)."""

    name = "tally"
    modules: ClassVar = ("tally", "index")

    def __init__(self, documents: Path, encoded: Path, tokenizer: Path) -> None:
        super().__init__()
        self.documents, self.encoded, self.tokenizer = documents, encoded, tokenizer

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing; write the two files."""
        vocabulary = tokenizer.load(self.tokenizer).vocab_size
        used = np.zeros(vocabulary, np.int64)
        counts = ShardCounts()
        done = 0
        for split in SPLITS:
            name = f"{split}-{rank:05d}"
            index = Index(self.encoded / name)
            for start in range(0, index.tokens, TOKENS_AT_ONCE):
                some = index.slice(start, min(start + TOKENS_AT_ONCE, index.tokens))
                used += np.bincount(some, minlength=vocabulary)
            shard = records(self.documents / f"{name}.jsonl.zst")
            for record, tokens in zip(shard, index.lengths.tolist(), strict=True):
                counts.add(split, record, tokens)
                done += 3 * len(record["text"])
                self.tick(done, rank)
        with aside(self.folder / "data" / "tally" / f"{rank:05d}.json") as file:
            file.write(orjson.dumps(counts.said(), option=orjson.OPT_SORT_KEYS))
        save(self.folder / "data" / "used" / f"{rank:05d}.npy", used)
        self.counts["worked_bytes"] += done
        self.tick(done, rank, final=True)
        yield from ()


class ShardCounts:
    """What is counted of one shard's documents."""

    def __init__(self) -> None:
        self.sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.lengths: dict[str, Counter[int]] = {"characters": Counter(), "tokens": Counter()}
        self.excerpts: list[tuple[int, str, str, str]] = []
        self.too_many: set[str] = set()

    def add(self, split: str, record: dict[str, Any], tokens: int) -> None:
        """Count a document of `tokens` tokens."""
        text, source = record["text"], record.get("source", "")
        row = self.sources[source]
        row.update(documents=1, characters=len(text), tokens=tokens)
        row[f"{split}_documents"] += 1
        bound(self.sources, 2 * SOURCES)
        self.lengths["characters"][len(text).bit_length()] += 1
        self.lengths["tokens"][tokens.bit_length()] += 1
        for name, value in record.items():
            if name not in NO_LABELS and name not in self.too_many:
                self._label(name, str(value) if name == "label" else value, len(text))
        lot = xxhash.xxh3_64_intdigest(record["id"].encode())
        if len(self.excerpts) < EXCERPTS or lot < self.excerpts[-1][0]:
            self.excerpts.append((lot, record["id"], source, text[:EXCERPT_CHARACTERS]))
            self.excerpts = sorted(self.excerpts)[:EXCERPTS]

    def _label(self, name: str, value: Any, characters: int) -> None:
        if not isinstance(value, str) or len(value) > LABELS_OF_A_FIELD:
            return
        self.labels[name][value] += characters
        if len(self.labels[name]) > LABELS_OF_A_FIELD:
            self.too_many.add(name)
            del self.labels[name]

    def said(self) -> dict[str, Any]:
        """As plain data; too_many names the fields that are no labels."""
        return {
            "sources": self.sources,
            "labels": self.labels,
            "too_many": sorted(self.too_many),
            "lengths": {
                what: {str(bits): n for bits, n in counts.items()}
                for what, counts in self.lengths.items()
            },
            "excerpts": self.excerpts,
        }


def bound(sources: dict[str, "Counter[str]"], most: int) -> None:
    """Of more than `most` sources keep the SOURCES largest, in place; the others become one."""
    if len(sources) <= most:
        return
    named = [name for name in sources if name != OTHERS]
    others = sources.get(OTHERS, Counter())
    for name in sorted(named, key=lambda name: (-sources[name]["characters"], name))[SOURCES:]:
        others.update(sources.pop(name))
    sources[OTHERS] = others


def together(folder: Path, tasks: int) -> dict[str, Any]:
    """The counts of all shards of a Tally's data folder as one: sources and labels by size,
    lengths by the number of bits, the excerpts of the lowest lots, `used` int64 [vocab]."""
    sources: defaultdict[str, Counter[str]] = defaultdict(Counter)
    labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
    lengths: defaultdict[str, Counter[int]] = defaultdict(Counter)
    excerpts: list[list[Any]] = []
    too_many: set[str] = set()
    used: np.ndarray | int = 0
    for rank in range(tasks):
        part = orjson.loads((folder / "tally" / f"{rank:05d}.json").read_bytes())
        for totals, found in ((sources, part["sources"]), (labels, part["labels"])):
            for name, counts in found.items():
                totals[name].update(counts)
        bound(sources, 2 * SOURCES)
        for what, counts in part["lengths"].items():
            lengths[what].update({int(bits): n for bits, n in counts.items()})
        too_many.update(part["too_many"])
        excerpts = sorted(excerpts + part["excerpts"])[:EXCERPTS]
        used = used + np.load(folder / "used" / f"{rank:05d}.npy")
    bound(sources, SOURCES + 1)
    return {
        "sources": dict(sorted(sources.items(), key=lambda item: -item[1]["characters"])),
        "labels": {
            name: dict(counts.most_common())
            for name, counts in sorted(labels.items())
            if name not in too_many and 1 < len(counts) <= LABELS_OF_A_FIELD
        },
        "lengths": {what: dict(sorted(counts.items())) for what, counts in lengths.items()},
        "excerpts": [excerpt[1:] for excerpt in excerpts],
        "used": used,
    }
