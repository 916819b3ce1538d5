"""Samples a second of CPU: what order and batches cost beside a training step, by objective.

    python -m benchmarks.loader [--tokens 100_000_000] [--seq-len 512] [--rows 64]

One thread; the clock is this process' CPU time, so that a busy machine tells the same; the last
line is the wall clock through the prefetcher's thread. The index, marks and gap sentences are
made up (documents of 680 tokens on average, words of 1.7, sentences of 16) and lie in mapped files
in a temporary folder, as a corpus' do. A mixture of three corpora, 7 : 2 : 1.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.batches import Prefetcher, Rows, read_rows
from pretrain.contents import Corrupted, Spans, longest_row
from pretrain.masking import Controls, MaskedRows
from pretrain.order import Dataset, Mixture
from pretrain.pairs import PairRows
from pretrain.permutation import keyed
from pretrain.rows import CausalRows, Layout

IDS = Controls(eod=7, pad=5, mask=6, bos=1, vocab=30_000)
SECONDS = 2.0


class MappedIndex:
    """The flat tokens of a mapped file, and where its documents begin."""

    def __init__(self, folder: Path, tokens: int) -> None:
        rng = np.random.default_rng(0)
        sizes = np.maximum(rng.lognormal(6.0, 1.0, tokens // 680), 20).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.tokens = int(self.offsets[-1])
        ids = rng.integers(8, IDS.vocab, self.tokens, np.uint16)
        ids[self.offsets[1:] - 1] = IDS.eod
        ids.tofile(folder / "tokens")
        marks = (rng.random(self.tokens, np.float32) < 0.6).astype(np.uint8)
        marks |= (rng.random(self.tokens, np.float32) < 1 / 16) * np.uint8(3)
        marks.tofile(folder / "marks")
        self.ids = np.memmap(folder / "tokens", np.uint16, "r")
        self.marks = np.memmap(folder / "marks", np.uint8, "r")

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop)."""
        return self.ids[start:stop]

    def gaps(self) -> dict[str, np.ndarray]:
        """Units of some 450 tokens (768 characters) in sentences of 16, a quarter picked."""
        sizes = np.diff(self.offsets) - 1
        units = -(-sizes // 450)
        at = np.arange(units.sum()) - np.repeat(np.cumsum(units) - units, units)
        start = at * 450
        stop = np.minimum(start + 450, np.repeat(sizes, units))
        sentences = -(-(stop - start) // 16)
        number = np.arange(sentences.sum()) - np.repeat(np.cumsum(sentences) - sentences, sentences)
        starts = np.repeat(start, sentences) + 16 * number
        picked = np.random.default_rng(2).random(len(starts)) < 0.25
        return {
            "units": units.astype(np.uint32),
            "sentences": sentences.astype(np.uint32),
            "starts": starts.astype(np.uint32),
            "stops": np.minimum(starts + 16, np.repeat(stop, sentences)).astype(np.uint32),
            "picked": picked.astype(np.uint8),
        }


def rate(per_call: int, call: Callable[[int], object], clock: Callable[[], float]) -> float:
    """Items per second of call(0), call(1), ..."""
    for turn in range(20):
        call(turn)
    start, begin = time.perf_counter(), clock()
    while time.perf_counter() - start < SECONDS:
        turn += 1
        call(turn)
    return (turn - 19) * per_call / (clock() - begin)


def kinds(index: MappedIndex, seq_len: int) -> dict[str, Callable[[], Rows]]:
    """How the rows of each objective are opened."""

    def masked(**how: Any) -> Callable[[], Rows]:
        return lambda: MaskedRows(index, seq_len, IDS, index.marks, **how)

    def gaps(packing: Any, source: int, target: int) -> Rows:
        contents = Spans.of_gaps(index, index.gaps(), 382, 126)
        return PairRows(index, contents, source, target, IDS, packing)

    def spans() -> Rows:
        room = longest_row(seq_len - 2, 127, 0.15, 3.0)
        layout = Layout(index, "windows", room)
        contents = Corrupted(index, layout, 0.15, 3.0, np.arange(30_100, 30_000, -1), IDS.eod)
        return PairRows(index, contents, seq_len, 128, IDS, "windows")

    return {
        "causal": lambda: CausalRows(index, seq_len, IDS.eod, IDS.pad),
        "causal, packed": lambda: CausalRows(index, seq_len, IDS.eod, IDS.pad, packing="best_fit"),
        "masked, tokens": masked(masking="token"),
        "masked, words": masked(masking="word"),
        "masked, tokens of words": masked(masking="word_token"),
        "masked, words, packed": masked(packing="best_fit"),
        "gap sentences, 384 + 128": lambda: gaps("documents", 384, 128),
        "gap sentences, packed in 2048 + 512": lambda: gaps("best_fit", 2048, 512),
        "span corruption": spans,
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index = MappedIndex(Path(folder), words.tokens)
        print(f"{index.tokens:,} tokens, {len(index.offsets) - 1:,} documents")
        print(f"{'':38}{'samples/s':>12}{'opened in s':>13}{'filled':>9}{'an epoch':>12}")
        for name, opened in kinds(index, words.seq_len).items():
            opened()  # kernels are compiled once for all runs
            begin = time.process_time()
            rows = opened()
            spent = time.process_time() - begin
            number, call, locate = len(rows), *_calls(rows, words.rows)
            if name == "causal":
                found = rate(words.rows, locate, time.process_time)
                print(f"{'order alone':38}{found:12,.0f}")
            about = getattr(rows, "layout", rows).about()
            filled = f"{about['filled']:.2%}" if "filled" in about else ""
            found = rate(words.rows, call, time.process_time)
            print(f"{name:38}{found:12,.0f}{spent:13.2f}{filled:>9}{number:12,}", flush=True)
        _, call, _ = 0, *_calls(kinds(index, words.seq_len)["causal"](), words.rows)
        with Prefetcher(map(call, range(10**9)), depth=4) as ahead:
            found = rate(words.rows, lambda _: next(ahead), time.perf_counter)
        print(f"{'causal, prefetched, wall clock':38}{found:12,.0f}")


def _calls(rows: Rows, micro: int) -> tuple[Callable[[int], object], Callable[[int], Any]]:
    """(a batch of order and rows, order alone) of turn 0, 1, 2 ..."""
    mixture = Mixture(0, [Dataset(len(rows), w, k) for k, w in enumerate((7, 2, 1))])

    def locate(turn: int) -> tuple[np.ndarray, np.ndarray]:
        return mixture.locate(np.arange(turn * micro, (turn + 1) * micro))

    def batch(turn: int) -> object:
        places = np.arange(turn * micro, (turn + 1) * micro)
        keys = keyed(0, 1, places.astype(np.uint64))
        return read_rows([rows] * 3, *mixture.locate(places), keys)

    return batch, locate


if __name__ == "__main__":
    main()
