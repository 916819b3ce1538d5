"""Steps that went wrong: spikes and numbers that are not finite, found, kept on file, passed over.

    lines of metrics, every log_every_steps --Spikes.judge()--> Fault(step, what)
                                                                  | dump(): RUN/faults/step-N.json
       newest checkpoint (all its steps were judged) <--rewind----+
       record: skips += the samples of that step; rewinds += [step, why]
                                                                  | skipping(corpora, skips)
       the same steps again, of other samples  <------------------+

What decides is read where the losses are read anyway, so no step waits for the device. All ranks
hear rank 0's verdict. Skips are ranges of the sample stream (pretrain/order.py): they renumber what
follows, on any number of devices alike.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.faults import Faults
from configs.load import ConfigError
from pretrain.batches import read_rows
from pretrain.checkpoint import gather
from pretrain.corpora import Corpora
from pretrain.order import Order, normalised, skip_samples, stream_places

FLOOR = 0.01
"""Least deviation, as a share of the median: a run that hardly moves is not judged by its noise."""
WATCHED = {"loss": "the loss (损失)", "grad_norm": "the gradient norm (梯度范数)"}


@dataclass(frozen=True)
class Fault:
    """A step that went wrong."""

    step: int
    """Its number, counted from 1; its update is the last one that is lost."""
    what: str
    """What was seen, in words and numbers."""


class Spikes:
    """Steps out of line with those before them: robust z over a window.

    z = (x - median) / max(1.4826 x median |x - median|, 1 % of the median), of the loss and of the
    gradient norm; only upwards. Median and deviation do not follow the outlier that they judge. A
    stage is judged by its own steps: a grown model, longer rows, another mixture have other levels.
    """

    def __init__(self, section: Faults, run: Path, step: int) -> None:
        self.section = section
        self._seen: list[dict[str, float]] = []
        self._stage: int | None = None
        if section.spike_z:
            for line in _before(run / "metrics.jsonl", step, 2 * section.window_steps):
                self._first([line])

    def judge(self, lines: Sequence[Mapping[str, Any]]) -> Fault | None:
        """The first spike among the lines of the last steps; every rank calls this."""
        if not self.section.spike_z:
            return None
        return gather(self._first(lines))[0]

    def _first(self, lines: Sequence[Mapping[str, Any]]) -> Fault | None:
        found = None
        for line in lines:
            if not WATCHED.keys() <= line.keys():
                continue  # step 0: validated before any training
            if line.get("stage") != self._stage:
                self._stage = line.get("stage")
                self._seen.clear()
            fault = self._judged(line)
            found = found or fault
            if found and self.section.do == "rewind":
                break
            if not fault:  # a spike is no measure of those that follow
                self._seen.append({name: line[name] for name in WATCHED})
        del self._seen[: -self.section.window_steps]
        return found

    def _judged(self, line: Mapping[str, Any]) -> Fault | None:
        if len(self._seen) < self.section.window_steps // 4:
            return None
        for name, words in WATCHED.items():
            middle = statistics.median(row[name] for row in self._seen)
            spread = statistics.median(abs(row[name] - middle) for row in self._seen)
            z = (line[name] - middle) / max(1.4826 * spread, FLOOR * abs(middle), 1e-12)
            if z > self.section.spike_z:
                return Fault(
                    line["step"],
                    f"{words} is {line[name]:.4g}, {z:.1f} robust deviations above the median "
                    f"{middle:.4g} of {len(self._seen)} steps",
                )
        return None


def _before(metrics: Path, step: int, most: int) -> list[dict[str, Any]]:
    """What a run has on record of its last steps up to `step`."""
    rows = []
    if metrics.exists():
        for text in metrics.read_text("utf-8").split("\n"):
            try:
                line = json.loads(text)
                row = {name: float(line[name]) for name in WATCHED}
                if line["step"] <= step:
                    rows.append(row | {key: line.get(key) for key in ("step", "stage")})
            except (ValueError, KeyError, TypeError):
                continue
    return rows[-most:]


def dump(run: Path, corpora: Corpora, fault: Fault, first: int, count: int) -> Path:
    """Write the samples [first, first + count) of a step with their texts; one rank calls this.

    Returns RUN/faults/step-N.json: what was seen, and for each sample its number, its place in the
    stream, its corpus, its row and its text.
    """
    samples = np.arange(first, first + count, dtype=np.int64)
    _, dataset, rows = corpora.order.locate(samples)
    places = stream_places(samples, corpora.order.skips)
    keys = corpora.keys(samples)
    found = []
    for n in range(count):
        at = slice(n, n + 1)
        batch = read_rows(corpora.train, dataset[at], rows[at], keys[at])
        sides = {"text": batch.tokens_BT, "encoder_text": batch.encoder_tokens_BT}
        found.append(
            {
                "sample": int(samples[n]),
                "place": int(places[n]),
                "corpus": corpora.record[int(dataset[n])]["corpus"],
                "row": int(rows[n]),
            }
            | {
                name: _text(corpora.tokenizer, tokens.reshape(-1).numpy())
                for name, tokens in sides.items()
                if tokens is not None
            }
        )
    folder = run / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{fault.step:08d}.json"
    told = {"step": fault.step, "what": fault.what, "samples": found}
    path.write_text(json.dumps(told, ensure_ascii=False, indent=1), "utf-8")
    return path


def _text(tokenizer: Any, tokens: np.ndarray) -> str:
    return str(tokenizer.decode(tokens[(tokens >= 0) & (tokens < tokenizer.vocab_size)]))


def passed_over(
    record: Mapping[str, Any], fault: Fault, first: int, count: int, most: int
) -> dict[str, Any]:
    """A state's record from which the samples [first, first + count) will not be met again.

    Raises ValueError once a run has rewound `most` times.
    """
    rewinds = [*record.get("rewinds", [])]
    if len(rewinds) >= most:
        raise ValueError(
            f"step {fault.step}: {fault.what}; the run has rewound {len(rewinds)} times already "
            "(faults.most_rewinds) and ends: lower optimizer.lr or optimizer.clip_norm, or raise "
            "faults.spike_z (多次回退后仍不稳定)"
        )
    skips = skip_samples(_ranges(record), first, count)
    rewinds.append({"step": fault.step, "what": fault.what})
    return {**record, "skips": [list(pair) for pair in skips], "rewinds": rewinds}


def with_skips(record: Mapping[str, Any], wanted: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """A state's record with the ranges that the page asks to pass over (data.skips) as well.

    Raises ConfigError if one of them would renumber samples that were trained on already.
    """
    skips, samples = _ranges(record), int(record["samples"])
    merged = normalised([*skips, *wanted])
    last = np.asarray([samples - 1])
    if samples and stream_places(last, merged) != stream_places(last, skips):
        raise ConfigError(
            f"data.skips: {[list(pair) for pair in wanted]} holds places before "
            f"{int(stream_places(last, skips)[0]) + 1}, which the run has trained on already; give "
            "later ones, or start anew in another run.out (跳过的样本已经训练过)"
        )
    return {**record, "skips": [list(pair) for pair in merged]}


def skipping(corpora: Corpora, record: Mapping[str, Any]) -> Corpora:
    """The corpora in the order of a run that passes over the skips of its record."""
    order = corpora.order
    stages = [
        (int(first), mixture.datasets)
        for first, mixture in zip(order.first, order.mixtures, strict=True)
    ]
    return dataclasses.replace(corpora, order=Order(order.seed, stages, _ranges(record)))


def _ranges(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    return [(int(first), int(end)) for first, end in record.get("skips", [])]
