"""The n-grams beside a model's bits per character are counted in bounded time and memory.

A plain reading of the whole index is the reference; of an index above the bound, one of the
stretches alone.
"""

from collections import Counter

import numpy as np
import pytest

from pretrain import evaluate

VOCAB = 7


class Index:
    """Tokens in memory, read as an index is; remembers how much was read at once."""

    def __init__(self, tokens: int) -> None:
        self.ids = np.random.default_rng(1).integers(0, VOCAB, tokens, dtype=np.uint16)
        self.longest = 0

    def slice(self, begin: int, end: int) -> np.ndarray:
        self.longest = max(self.longest, end - begin)
        return self.ids[begin:end]


def plain(ids: np.ndarray, firsts: list[int]) -> tuple[list[int], dict[int, int]]:
    """(times of each token, times of each pair) of those that begin at `firsts`."""
    single = Counter(int(ids[n]) for n in firsts)
    pairs = Counter(int(ids[n]) * VOCAB + int(ids[n + 1]) for n in firsts if n + 1 < len(ids))
    return [single[token] for token in range(VOCAB)], dict(pairs)


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "STRETCH", 10)
    monkeypatch.setattr(evaluate, "AT_ONCE", 3)
    monkeypatch.setattr(evaluate, "COUNTED", 100)


@pytest.mark.parametrize("tokens", [1, 2, 9, 10, 11, 95, 100])
def test_every_token_is_counted_up_to_the_bound(tokens: int) -> None:
    index = Index(tokens)
    counts = evaluate.count(index, tokens, VOCAB)
    single, pairs = plain(index.ids, list(range(tokens)))
    assert counts.single_V.tolist() == single
    assert dict(zip(counts.pairs.tolist(), counts.times.tolist(), strict=True)) == pairs


@pytest.mark.parametrize("tokens", [101, 137, 5000])
def test_of_more_that_many_evenly_spread(tokens: int) -> None:
    index = Index(tokens)
    spans = evaluate.stretches(tokens)
    assert sum(end - begin for begin, end in spans) == 100
    gaps = np.diff([begin for begin, _ in spans])
    assert gaps.min() == gaps.max() == tokens // 10 and spans[-1][1] > 0.9 * tokens
    counts = evaluate.count(index, tokens, VOCAB)
    single, pairs = plain(index.ids, [n for begin, end in spans for n in range(begin, end)])
    assert counts.single_V.tolist() == single
    assert dict(zip(counts.pairs.tolist(), counts.times.tolist(), strict=True)) == pairs
    assert index.longest == 11


def test_a_pair_that_was_never_seen_has_a_probability() -> None:
    """Held-out text of known pairs alone gives the bigram all the weight; new text still ends."""
    index = Index(100)
    index.ids = np.tile(np.asarray([0, 1], np.uint16), 50)
    counts = evaluate.count(index, 100, VOCAB)
    context, targets = np.asarray([0, 1] * 20), np.asarray([1, 0] * 20)
    weights = evaluate.fit_weights(counts, context, targets)
    assert 0.999 < weights[evaluate._bucket(counts, np.asarray([0]))[0]] < 1
