"""The corpora of a run, opened and checked: they must hold what the run was started on.

    corpus folders --manifest.json, tokenizer/, train.*, valid.*--> rows (pretrain/reading.py)
    stages: a Corpora for each, its own rows, one order for the run; stages that read the same share
    sample numbers --order (pretrain/order.py)--> rows --batches (pretrain/batches.py)--> Batch

What an objective draws at random in a row (masks, spans) is keyed by the run's seed and the
sample's place in the stream alone, in a measured row by its number. A corpus that changed since the
run began would silently change every later sample, so its content, side files included, is hashed
(up to CONTENT_BYTES; beyond that its sizes are compared) and the run refuses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.load import ConfigError, to_dict
from configs.objectives import Objective, packing_of
from configs.run import CorpusShare, Data
from data_pipeline import index as corpus_index
from data_pipeline import tokenizer as corpus_tokenizer
from pretrain.batches import Batch, Rows, read_rows, step_samples
from pretrain.manifests import (
    Side,
    check_alike,
    check_sides,
    check_vocab,
    manifest_of,
    needs,
)
from pretrain.order import Dataset, Order, dataset_key, stream_places
from pretrain.permutation import Keys, keyed
from pretrain.reading import open_rows

CONTENT_BYTES = 8 * 10**9
"""Up to here the content of a corpus is hashed at every start (1-2 GB/s)."""
_DRAWS, _MEASURED = 0x447261777320, 0x4D65617375726564
"""What the keys of drawn things are apart by: samples of the run, measured rows."""


@dataclass(frozen=True)
class Corpora:
    """Everything of a run that reads tokens."""

    train: tuple[Rows, ...]
    valid: tuple[Rows, ...]
    order: Order
    tokenizer: Any
    tokenizer_folder: Path
    record: list[dict[str, Any]]
    """One entry a corpus: folder, weight, fingerprint, rows, what is made of them, and the sample
    of the run at which that begins."""
    whole_record: list[dict[str, Any]]
    """The same of all stages, in their order, kept in every checkpoint."""

    def step(
        self, first: int, count: int, data_rank: int, data_size: int, micro: int
    ) -> tuple[list[Batch], list[int]]:
        """This rank's micro-batches of samples [first, first + count), and their first samples."""
        parts = step_samples(first, count, data_rank, data_size, micro)
        batches = []
        for samples in parts:
            _, dataset, rows = self.order.locate(samples)
            batch = read_rows(self.train, dataset, rows, self.keys(samples))
            batches.append(self._told_apart(batch, dataset))
        return batches, [int(samples[0]) if len(samples) else first + count for samples in parts]

    def said(self) -> list[str]:
        """A sentence for each corpus whose rows are packed or padded: how full, what was cut."""
        found = []
        for record, rows in zip(self.record, self.train, strict=True):
            about = rows.about()
            if "filled" not in about:
                continue
            what = f"{about['rows']:,} rows ({about['packing']}), {about['filled']:.1%} filled"
            if "pairs" in about:
                what += f", {about['pairs']:,} pairs"
            else:
                what += f", {about['documents_cut']:,} of {about['documents']:,} documents cut"
            found.append(f"{record['corpus']}: {what} (行的填充率)")
        return found

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that documents have, in the order of their numbers; none where none is asked
        for."""
        return tuple(getattr(self.train[0], "labels", ()))

    @property
    def segments(self) -> int:
        """How many kinds of tokens a document has: two where two of its fields are read."""
        return max(getattr(rows, "segments", 1) for rows in self.train)

    def keys(self, samples: np.ndarray) -> Keys:
        """What seeds the draws in each of some samples of the run."""
        places = stream_places(samples, self.order.skips)
        return keyed(self.order.seed, _DRAWS, places.astype(np.uint64))

    def measured(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(dataset, row) of `count` validation rows, spread evenly; always the same ones."""
        sizes = [len(rows) for rows in self.valid]
        chosen = np.unique(np.linspace(0, sum(sizes) - 1, min(count, sum(sizes))).astype(np.int64))
        ends = np.cumsum(sizes)
        dataset = np.searchsorted(ends, chosen, side="right")
        return dataset.astype(np.int32), chosen - (ends - sizes)[dataset]

    def validation(self, count: int, data_rank: int, data_size: int, micro: int) -> Iterator[Batch]:
        """This rank's share of the measured rows, in micro-batches; equally many on every rank."""
        dataset, rows = self.measured(count)
        for part in step_samples(0, len(rows), data_rank, data_size, micro):
            yield self._measured_batch(dataset[part], rows[part])

    def _measured_batch(self, dataset: np.ndarray, rows: np.ndarray) -> Batch:
        keys = keyed(_MEASURED, dataset.astype(np.uint64), rows.astype(np.uint64))
        return self._told_apart(read_rows(self.valid, dataset, rows, keys), dataset)

    def _told_apart(self, batch: Batch, dataset: np.ndarray) -> Batch:
        """With the corpus of each row, where there are several."""
        if len(self.train) == 1:
            return batch
        return replace(batch, sources_B=torch.from_numpy(dataset.astype(np.int64)))

    @property
    def sources(self) -> list[str]:
        """The corpora of the mixture, in their order."""
        return [entry["corpus"] for entry in self.record]

    def measured_characters(self, count: int) -> int:
        """Characters of the text that the measured targets spell (ends of documents and sentinels
        left out)."""
        words, total = self.tokenizer, 0
        dataset, rows = self.measured(count)
        for at in range(len(rows)):
            batch = self._measured_batch(dataset[at : at + 1], rows[at : at + 1])
            targets = batch.targets_BT[batch.loss_mask_BT].numpy()
            text = targets[(targets != words.eod_id) & (targets < words.vocab_size)]
            total += len(words.decode(text))
        return total


@dataclass(frozen=True)
class Reading:
    """What a stretch of a run reads."""

    data: Data
    objective: Objective
    first: int = 0
    """The sample of the run at which it begins."""


def open_corpora(data: Data, objective: Objective, seed: int, vocab: int) -> Corpora:
    """Open the corpora of one section. Raises ConfigError as open_stages()."""
    return open_stages([Reading(data, objective)], seed, vocab)[0]


def open_measured(corpus: str | Path, seq_len: int, objective: Objective, vocab: int) -> Corpora:
    """Open the one corpus that `evaluate --data` names. Raises ConfigError as open_stages(), with
    the word of the command for the key of a page."""
    try:
        return open_corpora(Data((CorpusShare(str(corpus)),), seq_len), objective, 0, vocab)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.train: ", "--data: ")) from None


def open_stages(readings: Sequence[Reading], seed: int, vocab: int) -> list[Corpora]:
    """Open the corpora of each stage of a run; stages that read alike share one Corpora.

    Raises ConfigError for a folder that is no corpus, files that do not fit their manifest,
    tokenizers that differ, a vocabulary larger than the model's, or one that lacks what the
    objective reads.
    """
    stretches: list[Reading] = []
    numbers = []
    for reading in readings:
        last = stretches[-1] if stretches else None
        if last is None or (last.data, last.objective) != (reading.data, reading.objective):
            stretches.append(reading)
        numbers.append(len(stretches) - 1)
    checked: set[tuple[Path, tuple[Side, ...]]] = set()
    opened = [_open(reading, vocab, checked) for reading in stretches]
    prints = {part.tokenizer.fingerprint: part.tokenizer_folder for part in opened}
    check_alike(prints)
    order = Order(seed, [(r.first, p.datasets) for r, p in zip(stretches, opened, strict=True)])
    whole = [entry for part in opened for entry in part.record]
    made = [
        Corpora(p.train, p.valid, order, p.tokenizer, p.tokenizer_folder, p.record, whole)
        for p in opened
    ]
    return [made[number] for number in numbers]


@dataclass(frozen=True)
class _Opened:
    """The corpora of one stretch, before the run's order is known."""

    train: tuple[Rows, ...]
    valid: tuple[Rows, ...]
    datasets: list[Dataset]
    tokenizer: Any
    tokenizer_folder: Path
    record: list[dict[str, Any]]


def _open(reading: Reading, vocab: int, checked: set[tuple[Path, tuple[Side, ...]]]) -> _Opened:
    """Open the corpora of a stretch; what was `checked` for another is not read again."""
    data, objective = reading.data, reading.objective
    folders = [Path(share.corpus) for share in data.train]
    sides = needs(objective, data)
    manifests = [manifest_of(folder) for folder in folders]
    prints = {m["tokenizer"]["fingerprint"]: f for m, f in zip(manifests, folders, strict=True)}
    check_alike(prints)
    tokenizer = corpus_tokenizer.load(folders[0] / "tokenizer")
    check_vocab(folders[0], tokenizer.vocab_size, vocab)
    for folder, manifest in zip(folders, manifests, strict=True):
        check_sides(folder, manifest, sides)
        if (what := (folder, tuple(sides))) not in checked:
            _check_content(folder, manifest, sides)
            checked.add(what)

    def rows(split: str) -> tuple[Rows, ...]:
        return tuple(open_rows(f / split, data, objective, tokenizer, vocab) for f in folders)

    train = rows("train")
    keys = [dataset_key(m["splits"]["train"]["fingerprint"]) for m in manifests]
    datasets = [
        Dataset(len(r), share.weight, key)
        for r, share, key in zip(train, data.train, keys, strict=True)
    ]
    learnt = to_dict(objective) | {
        "packing": packing_of(objective, data.packing), "target_len": data.target_len
    }  # fmt: skip
    if len({getattr(part, "labels", ()) for part in train}) > 1:
        raise ConfigError(
            f"data.train: the labels of {', '.join(map(str, folders))} differ; build them as one "
            "corpus (标签表不一致)"
        )
    if labels := getattr(train[0], "labels", ()):
        learnt |= {"labels": list(labels)}
    record = [
        {
            "corpus": str(folder),
            "weight": share.weight,
            "fingerprint": manifest["splits"]["train"]["fingerprint"],
            "rows": len(r),
            "objective": learnt,
            "first": reading.first,
        }
        for folder, share, manifest, r in zip(folders, data.train, manifests, train, strict=True)
    ]
    return _Opened(train, rows("valid"), datasets, tokenizer, folders[0] / "tokenizer", record)


def trained_length(record: Mapping[str, Any]) -> int | None:
    """Tokens of the rows that a checkpoint was last trained on; None if its record does not say."""
    page = record.get("config", {})
    parts = [page, *page.get("stages", [])[: int(record.get("stage", 0)) + 1]]
    given = [part["data"]["seq_len"] for part in parts if "seq_len" in part.get("data", {})]
    return int(given[-1]) if given else None


def trained_objective(record: Mapping[str, Any]) -> dict[str, Any]:
    """The section `objective` that a checkpoint was last trained by; empty if its record does not
    say."""
    page = record.get("config", {})
    found = dict(page.get("objective", {}))
    for stage in page.get("stages", [])[: int(record.get("stage", 0)) + 1]:
        changes = stage.get("objective", {})
        same = changes.get("name", found.get("name")) == found.get("name")
        found = {**(found if same else {}), **changes}
    return found


def check_learnt(record: Mapping[str, Any], corpus: str | Path, fingerprint: str) -> None:
    """ConfigError for a corpus that another tokenizer encoded than the one a checkpoint learnt."""
    if (learnt := record.get("tokenizer")) not in (None, fingerprint):
        raise ConfigError(
            f"--data: {corpus} was encoded by the tokenizer {fingerprint}, the checkpoint learnt "
            f"that of {learnt}; encode the text by the checkpoint's tokenizer (分词器不一致)"
        )


def changes(
    before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], samples: int = 1
) -> list[str]:
    """What differs between the corpora that a run was started on and those that it finds, of what
    it has read in `samples` samples; later stages may change."""
    before, now = ([e for e in s if e.get("first", 0) < max(samples, 1)] for s in (before, now))
    if [e.get("first", 0) for e in before] != [e.get("first", 0) for e in now]:
        have, were = ([entry.get("first", 0) for entry in entries] for entries in (now, before))
        said = f"data.train: names corpora that begin at samples {have}, the run was started on "
        said += (
            f"ones at {were}; restore the corpora and the stages' steps and batches (语料已改变)"
        )
        return [said]
    found = []
    for old, new in zip(before, now, strict=True):
        if old["fingerprint"] != new["fingerprint"]:
            found.append(
                f"data.train: the corpus {new['corpus']} has changed since the run started "
                f"({old['fingerprint']} then, {new['fingerprint']} now); restore it, or start a "
                "new run.out with init.from (语料已改变)"
            )
        elif (old["rows"] or new["rows"], old["weight"]) != (new["rows"], new["weight"]):
            found.append(
                f"data.train: {new['corpus']} gives {new['rows']} rows with weight "
                f"{new['weight']}, the run was started with {old['rows']} and {old['weight']}; "
                "restore data.seq_len and the weights"
            )
        elif differ := _differ(old.get("objective", new["objective"]), new["objective"]):
            found.append(
                f"objective, data: {', '.join(differ)} of {new['corpus']} differ from what the run "
                "was started with; restore them, or start a new run.out with init.from "
                "(训练目标已改变)"
            )
    return found


def _differ(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys of the objective that differ; rows that were extended say nothing of their targets."""
    keys = then.keys() | now.keys() - ({"target_len"} - then.keys())
    return sorted(key for key in keys if then.get(key) != now.get(key))


def _check_content(folder: Path, manifest: dict[str, Any], sides: Sequence[Side]) -> None:
    paths = [folder / f"{s}{end}" for s in ("train", "valid") for end in (".bin", ".idx")]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(f"data.train: {', '.join(missing)} is missing (文件缺失)")
    for split in ("train", "valid"):
        tokens = corpus_index.Index(folder / split).tokens
        if tokens != manifest["splits"][split]["tokens"]:
            raise ConfigError(
                f"{folder / split}.bin/.idx: holds {tokens} tokens, the manifest says "
                f"{manifest['splits'][split]['tokens']}; build the corpus again (语料与清单不符)"
            )
    beside = [(side, split) for side in sides for split in ("train", "valid")]
    paths += [side.layout.path(folder / split) for side, split in beside]
    if sum(path.stat().st_size for path in paths) > CONTENT_BYTES:
        return
    for split in ("train", "valid"):
        known = manifest["splits"][split]
        have = corpus_index.fingerprint(folder / split)
        _check_same(f"{folder / split}.bin/.idx", have, known["fingerprint"])
    for side, split in beside:
        have = side.layout.fingerprint(folder / split)
        want = manifest["splits"][split][side.entry]["fingerprint"]
        _check_same(str(side.layout.path(folder / split)), have, want)


def _check_same(what: str, have: str, want: str) -> None:
    if have != want:
        raise ConfigError(
            f"{what}: the content has the fingerprint {have}, the manifest says {want}; build the "
            "corpus again (语料内容与清单不符)"
        )
