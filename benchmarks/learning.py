"""What a run has learnt, beside counts of the very tokens that it consumed.

    python -m benchmarks.learning RUN [--steps 250,500,1000] [--json FILE]

    RUN/config.yaml --corpora.step()--> the batches of steps 1 to n, again --> count model
    RUN/metrics.jsonl: validation loss at step n            the same measured positions <--+

The order of a run is a function, so its batches are made again, as they were. At each step n the
count models (learning_counts.py) know exactly the rows of steps 1 to n, each once; they are asked
about the positions that the run's own validation measures, with the context that the model sees.
causal: Kneser-Ney's trigram; masked: the two-sided model; sources and targets: the trigram of
both, about the targets. Nats a token, and the share of the tokens that each guesses right.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning_counts import (
    Ints,
    KneserNey,
    TwoSided,
    neighbours,
    shown,
    text_trigrams,
    trigrams,
)
from configs.load import load
from configs.objectives import Masked
from configs.run import RunConfig, step_samples
from pretrain.batches import Batch
from pretrain.corpora import Corpora, open_corpora

AT_ONCE = 400
"""Positions whose whole distribution is in memory."""


def consumed(config: RunConfig, corpora: Corpora, steps: int) -> Iterator[Batch]:
    """The batches of the first steps, each row once however often the run has met it."""
    samples = np.arange(steps * step_samples(config))
    _, dataset, rows = corpora.order.locate(samples)
    _, first = np.unique(np.stack([dataset, rows]), axis=1, return_index=True)
    new = np.zeros(len(samples), bool)
    new[first] = True
    for number in np.flatnonzero(new).reshape(-1, 1) if len(first) < len(samples) else [None]:
        if number is not None:
            yield from corpora.step(int(number[0]), 1, 0, 1, 1)[0]
            continue
        for at in range(0, len(samples), 256):
            yield from corpora.step(at, min(256, len(samples) - at), 0, 1, 256)[0]


def measured(config: RunConfig, corpora: Corpora) -> list[Batch]:
    """The batches of the run's own validation."""
    return list(corpora.validation(config.run.validate_samples, 0, 1, 64))


def documents(batch: Batch, side: str = "") -> Ints:
    """Which document each position belongs to."""
    ids = getattr(batch, f"{side}document_ids_BT")
    tokens = getattr(batch, f"{side}tokens_BT")
    return np.zeros(tokens.shape, np.int64) if ids is None else ids.numpy()


def joined(parts: Sequence[Sequence[Ints]]) -> list[Ints]:
    """Columns of several batches as one."""
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def trigram_events(batches: Iterator[Batch], vocab: int, *, read: bool) -> list[Ints]:
    """(u, v, w) of what is predicted; with `read`, of the encoders' rows too."""
    found = []
    for batch in batches:
        inputs, targets = batch.tokens_BT.numpy(), batch.targets_BT.numpy()
        found.append(trigrams(inputs, targets, batch.loss_mask_BT.numpy(), documents(batch), vocab))
        if read and batch.encoder_tokens_BT is not None:
            source = batch.encoder_tokens_BT.numpy()
            found.append(text_trigrams(source, documents(batch, "encoder_"), vocab))
    return joined(found)


def against_trigram(config: RunConfig, corpora: Corpora, steps: int) -> dict[str, float]:
    """Kneser-Ney's trigram of the consumed tokens, about the measured targets."""
    vocab = config.model.vocab
    u_N, v_N, w_N = trigram_events(consumed(config, corpora, steps), vocab, read=True)
    model = KneserNey(u_N, v_N, w_N, vocab + 1, vocab)
    u_N, v_N, w_N = trigram_events(iter(measured(config, corpora)), vocab, read=False)
    return {
        "tokens": model.events,
        "trigram": float(-np.log(model(u_N, v_N, w_N)).mean()),
        "bigram": float(-np.log(model.pair(v_N, w_N)).mean()),
        "unigram": float(-np.log(model.single(w_N)).mean()),
        "positions": len(w_N),
    }


def against_neighbours(config: RunConfig, corpora: Corpora, steps: int) -> dict[str, float]:
    """The two-sided model of the consumed tokens, about the masked positions as they are shown.

    The power of p(w) in its fallback is the best of three on the measured positions themselves,
    which favours the counts.
    """
    vocab, hidden = corpora.tokenizer.vocab_size, int(corpora.tokenizer.mask_id)
    events = []
    for batch in consumed(config, corpora, steps):
        words, ids = batch.targets_BT.numpy(), documents(batch)
        real = ids >= 0
        left, right = neighbours(words, ids, vocab)
        events.append([left[real], words[real], right[real]])
    left_N, w_N, right_N = joined(events)
    model = TwoSided(left_N, w_N, right_N, vocab + 1, vocab, hidden)
    asked = []
    for batch in measured(config, corpora):
        inputs, mask = batch.tokens_BT.numpy(), batch.loss_mask_BT.numpy()
        left, right = neighbours(inputs, documents(batch), vocab)
        asked.append([left[mask], inputs[mask], batch.targets_BT.numpy()[mask], right[mask]])
    left_P, shown_P, w_P, right_P = joined(asked)
    best: dict[str, float] = {}
    for power in (0.8, 1.0, 1.2):
        nats, right_ones = 0.0, 0
        for at in range(0, len(w_P), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            prior_NV = model.rows(left_P[part], right_P[part], power)
            nats -= float(np.log(shown(prior_NV, shown_P[part], w_P[part], hidden)).sum())
            right_ones += int((prior_NV.argmax(1) == w_P[part]).sum())
        found = {"two_sided": nats / len(w_P), "power": power, "guessed": right_ones / len(w_P)}
        best = min(best or found, found, key=lambda one: one["two_sided"])
    alone = -np.log(model.alone_V[w_P]).mean()
    return {"tokens": len(w_N), **best, "unigram": float(alone), "positions": len(w_P)}


def curve(run: Path, steps: Sequence[int]) -> list[dict[str, Any]]:
    """One line a validation of the run: its loss, and the counts' on the tokens until then."""
    config = load(run / "config.yaml", RunConfig)
    vocab, seed = config.model.vocab, config.run.seed
    corpora = open_corpora(config.data, config.objective, seed, vocab)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["valid_loss"] for line in lines if "valid_loss" in line}
    counted = against_neighbours if isinstance(config.objective, Masked) else against_trigram
    found = []
    for step in steps or sorted(losses):
        if step:
            begin = time.perf_counter()
            line = {"step": step, "model": losses[step], **counted(config, corpora, step)}
            found.append(line | {"seconds": round(time.perf_counter() - begin, 1)})
            show(found[-1], first=len(found) == 1)
    return found


def show(line: dict[str, Any], *, first: bool) -> None:
    """A line of the table."""
    if first:
        print(" ".join(f"{name:>10}" for name in line))
    print(" ".join(f"{v:10.4f}" if isinstance(v, float) else f"{v:10,}" for v in line.values()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", default="", help="some of the run's validations; default: all")
    parser.add_argument("--json", type=Path, help="write the table there too")
    words = parser.parse_args()
    found = curve(words.run, [int(step) for step in words.steps.split(",") if step])
    if words.json:
        words.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
