"""Samples per second of order and batches: what the loader costs beside a training step.

    python benchmarks/loader.py [--tokens 200_000_000] [--seq-len 512] [--rows 64]

One thread. The index is a uint16 file made in a temporary folder and mapped, as a corpus' .bin is.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pretrain.batches import Prefetcher, read_rows
from pretrain.order import Dataset, Mixture
from pretrain.rows import CausalRows

EOD = 7


class MappedTokens:
    """The flat tokens of a mapped file."""

    def __init__(self, path: Path) -> None:
        self.ids = np.memmap(path, np.uint16, "r")
        self.tokens = len(self.ids)

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop)."""
        return self.ids[start:stop]


def rate(per_call: int, call: Callable[[int], object], seconds: float = 2.0) -> float:
    """Items per second of call(0), call(1), ..."""
    call(0)
    start, turn = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        turn += 1
        call(turn)
    return turn * per_call / (time.perf_counter() - start)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    words = parser.parse_args()
    rows = words.rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        ids = np.random.default_rng(0).integers(8, 30000, words.tokens, np.uint16)
        ids[:: 4 * words.seq_len // 3] = EOD
        ids.tofile(path)
        del ids
        sources = [CausalRows(MappedTokens(path), words.seq_len, EOD, 5, True)] * 3
        mixture = Mixture(0, [Dataset(len(sources[0]), w, k) for k, w in enumerate((7, 2, 1))])

        def locate(turn: int) -> tuple[np.ndarray, np.ndarray]:
            return mixture.locate(np.arange(turn * rows, (turn + 1) * rows))

        def batch(turn: int) -> object:
            return read_rows(sources, *locate(turn))

        found = {
            "order, samples_per_s": rate(rows, locate),
            "order + batches, samples_per_s": rate(rows, batch),
        }
        with Prefetcher(map(batch, range(10**9)), depth=4) as ahead:
            found["through the prefetcher, samples_per_s"] = rate(rows, lambda _: next(ahead))
    line = {name: round(value) for name, value in found.items()}
    print(json.dumps(line | {"seq_len": words.seq_len, "rows_a_batch": rows}))


if __name__ == "__main__":
    main()
