"""RoFormers at other lengths: log n against the plain scale, and a run through a curriculum.

    python -m benchmarks.learning_lengths log_n --plain RUN RUN --log-n RUN RUN
    python -m benchmarks.learning_lengths log_n --plain RUN --at-test 64
    python -m benchmarks.learning_lengths curriculum RUN

log_n: models trained at 64, measured at 64 to 512 on the same hidden words of the same rows; with
--at-test the other arm is the same weights, their scores stretched by log n / log 64. The
difference of two arms is paired by row: its standard error is that of a ratio (sum of differences
over sum of positions), over the rows, and for all seeds together over (seed, row).
curriculum: the checkpoint at the border of each stage, at its own length and at every other one,
on as many tokens; what `launch evaluate --task mlm` says, a column a length.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.load import load
from configs.run import RunConfig
from pretrain.checkpoint import read, resolve
from pretrain.corpora import open_corpora
from pretrain.generate import load_model
from pretrain.state import State

Floats = NDArray[np.float64]
LENGTHS = (64, 128, 256, 512)
MICRO = 8


@torch.no_grad()
def hits(
    run: Path, length: int, tokens: int, checkpoint: Path | None = None, log_n: int | None = None
) -> tuple[Floats, ...]:
    """(hidden positions guessed right, hidden positions, nats) of each measured row [R].

    log_n: replaces the option that the model was trained with.
    """
    config = load(run / "config.yaml", RunConfig)
    data = replace(config.data, seq_len=length)
    corpora = open_corpora(data, config.objective, 0, config.model.vocab)
    state = read(resolve(checkpoint or run))
    if log_n is not None:
        changed = state.record | {"model": state.record["model"] | {"log_n": log_n}}
        state = State(state.entries, changed)
    model: Any = load_model(state)
    found: list[tuple[Floats, ...]] = []
    for batch in corpora.validation(max(tokens // length, 1), 0, 1, MICRO):
        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.document_ids_BT)
        mask_BT = batch.loss_mask_BT
        row_N = mask_BT.nonzero()[:, 0].numpy()
        logits_NV = model.logits(hidden_BTD[mask_BT])[:, : corpora.tokenizer.vocab_size]
        targets_N = batch.targets_BT[mask_BT]
        right_N = (logits_NV.argmax(-1) == targets_N).double().numpy()
        nats_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
        sums = (right_N, np.ones_like(right_N), nats_N.double().numpy())
        found.append(tuple(np.bincount(row_N, part, batch.rows) for part in sums))
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def ratio(sums_R: Floats, counts_R: Floats) -> tuple[float, float]:
    """Sum over sum, and its standard error over the rows (linearised)."""
    value = sums_R.sum() / counts_R.sum()
    residual_R = sums_R - value * counts_R
    rows = len(residual_R)
    spread = np.sqrt((residual_R**2).sum() * rows / max(rows - 1, 1))
    return float(value), float(spread / counts_R.sum())


def log_n(
    plain: Sequence[Path], stretched: Sequence[Path], tokens: int, at_test: int | None
) -> list[dict[str, Any]]:
    """A line a length and pair of runs, and one for all of them together."""
    found = []
    print(f"{'length':>6} {'pair':>5} {'plain %':>9} {'log n %':>9} {'difference':>12} {'s.e.':>7}")
    for length in LENGTHS:
        pairs = []
        for number, arms in enumerate(zip(plain, stretched, strict=True), 1):
            one, count, _ = hits(arms[0], length, tokens)
            other, _, _ = hits(arms[1], length, tokens, log_n=at_test)
            pairs.append((one, other, count))
            found.append(line(length, str(number), *pairs[-1]))
        if len(pairs) > 1:
            joined = [np.concatenate(column) for column in zip(*pairs, strict=True)]
            found.append(line(length, "all", *joined))
    return found


def line(
    length: int, pair: str, plain_R: Floats, other_R: Floats, count_R: Floats
) -> dict[str, Any]:
    """Print and return one line, in per cent."""
    a, b = (100 * ratio(part, count_R)[0] for part in (plain_R, other_R))
    difference, error = (100 * x for x in ratio(other_R - plain_R, count_R))
    print(f"{length:>6} {pair:>5} {a:9.2f} {b:9.2f} {difference:+12.2f} {error:7.2f}", flush=True)
    names = ("length", "pair", "plain", "log_n", "difference", "error", "positions")
    values = (length, pair, a, b, difference, error, int(count_R.sum()))
    return dict(zip(names, values, strict=True))


def curriculum(run: Path, lengths: Sequence[int], tokens: int) -> list[dict[str, Any]]:
    """The accuracy and the loss at every length after every stage."""
    ends: dict[int, Path] = {}
    for path in sorted((run / "checkpoints").glob("stage-*")):
        ends[int(path.name.split("-")[1])] = path
    found = []
    print(f"{'stage':>5} " + " ".join(f"{f'{n}: %, nats':>15}" for n in lengths))
    for stage, path in ends.items():
        cells = []
        for length in lengths:
            right, count, nats = hits(run, length, tokens, path)
            (share, error), (loss, _) = ratio(right, count), ratio(nats, count)
            cells.append(f"{100 * share:7.2f} {loss:7.4f}")
            names = ("stage", "length", "accuracy", "error", "nats")
            values = (stage, length, 100 * share, 100 * error, loss)
            found.append(dict(zip(names, values, strict=True)))
        print(f"{stage:>5} " + " ".join(cells), flush=True)
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=65536, help="measured at each length")
    parser.add_argument("--json", type=Path, help="write the table there too")
    verbs = parser.add_subparsers(dest="verb", required=True)
    paired = verbs.add_parser("log_n")
    paired.add_argument("--plain", type=Path, nargs="+", required=True, help="a run a seed")
    other = paired.add_mutually_exclusive_group(required=True)
    other.add_argument("--log-n", type=Path, nargs="+", help="runs of the same seeds")
    other.add_argument("--at-test", type=int, metavar="N", help="model.log_n of the same weights")
    staged = verbs.add_parser("curriculum")
    staged.add_argument("run", type=Path)
    staged.add_argument("--lengths", default="16,32,64,192")
    words = parser.parse_args()
    if words.verb == "log_n":
        found = log_n(words.plain, words.log_n or words.plain, words.tokens, words.at_test)
    else:
        lengths = [int(length) for length in words.lengths.split(",")]
        found = curriculum(words.run, lengths, words.tokens)
    if words.json:
        words.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
