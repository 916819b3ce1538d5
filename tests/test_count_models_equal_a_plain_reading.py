"""Promise: the count models that runs are measured against (benchmarks/learning_counts.py) are
what their papers say: a slow reading of the formulas agrees, and they are distributions."""

from collections import Counter

import numpy as np
import pytest

from benchmarks.learning_counts import KneserNey, TwoSided, discounts, neighbours, shown, trigrams

V = 12
S = V


def stream(seed: int = 3, length: int = 400) -> np.ndarray:
    """Tokens that follow one another unevenly."""
    rng = np.random.default_rng(seed)
    found = [0]
    for _ in range(length - 1):
        found.append(int((found[-1] * 3 + rng.geometric(0.4)) % V))
    return np.asarray(found)


def events(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(u, v, w), S before the first token."""
    padded = np.concatenate([[S], tokens])
    return padded[:-2], padded[1:-1], padded[2:]


def plain_kneser_ney(tokens: np.ndarray):  # type: ignore[no-untyped-def]
    """Chen and Goodman's interpolated modified Kneser-Ney, term by term."""
    three = Counter(zip(*(part.tolist() for part in events(tokens)), strict=True))
    two = Counter((v, w) for _, v, w in three)
    one = Counter((w,) for _, w in two)

    def discount(counts: Counter) -> list[float]:  # type: ignore[type-arg]
        n = [sum(c == k for c in counts.values()) or 1 for k in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        raw = [1 - 2 * y * n[1] / n[0], 2 - 3 * y * n[2] / n[1], 3 - 4 * y * n[3] / n[2]]
        return [min(max(d, 0), k) for k, d in enumerate(raw, 1)]

    def share(counts: Counter, context: tuple, w: int, lower: float) -> float:  # type: ignore[type-arg]
        d = discount(counts)
        behind = [c for gram, c in counts.items() if gram[:-1] == context]
        if not behind:
            return lower
        count = counts[(*context, w)]
        own = max(count - d[min(count, 3) - 1], 0) if count else 0
        taken = sum(d[min(c, 3) - 1] for c in behind)
        return (own + taken * lower) / sum(behind)

    def probability(u: int, v: int, w: int) -> float:
        single = share(one, (), w, 1 / V)
        return share(three, (u, v), w, share(two, (v,), w, single))

    return probability


def test_the_trigram_is_chens_and_goodmans() -> None:
    tokens = stream()
    model, plain = KneserNey(*events(tokens), V + 1, V), plain_kneser_ney(tokens)
    rng = np.random.default_rng(1)
    u, v = rng.integers(0, V + 1, 60), rng.integers(0, V, 60)
    w = rng.integers(0, V, 60)
    ours = model(u, v, w)
    theirs = [plain(*(int(i) for i in one)) for one in zip(u, v, w, strict=True)]
    # Both add fewer than twenty numbers below 1 in double precision.
    assert np.allclose(ours, theirs, rtol=1e-13, atol=0)
    other = plain_kneser_ney(stream(seed=4))  # the comparison can fail
    assert not np.allclose(ours[:9], [other(*map(int, o)) for o in zip(u, v, w, strict=True)][:9])


@pytest.mark.parametrize("context", [(0, 3), (S, 0), (5, 5), (11, 2)])
def test_the_trigram_sums_to_one(context: tuple[int, int]) -> None:
    model = KneserNey(*events(stream()), V + 1, V)
    u, v = (np.full(V, part) for part in context)
    assert model(u, v, np.arange(V)).sum() == pytest.approx(1, abs=1e-12)


def test_discounts_are_the_papers() -> None:
    # n1..n4 = 4, 2, 1, 1: Y = 1/2, D1 = 1/2, D2 = 2 - 3/2 x 1/2, D3 = 3 - 4/2 x 1.
    assert discounts(np.asarray([1, 1, 1, 1, 2, 2, 3, 4])) == (0.5, 1.25, 1.0)


def two_sided(hidden: int = 9) -> tuple[TwoSided, np.ndarray, np.ndarray, np.ndarray]:
    tokens = stream(length=600)
    padded = np.concatenate([[S], tokens, [S]])
    left, w, right = padded[:-2], padded[1:-1], padded[2:]
    return TwoSided(left, w, right, V + 1, V, hidden), left, w, right


def test_the_two_sided_model_is_counts_with_a_fallback() -> None:
    model, left, w, right = two_sided()
    triples = Counter(zip(left.tolist(), w.tolist(), right.tolist(), strict=True))
    d = discounts(np.asarray(sorted(triples.values())))
    alone = (np.bincount(w, minlength=V) + 0.5) / (np.bincount(w, minlength=V) + 0.5).sum()

    def side(pairs: Counter, shown_there: int) -> np.ndarray:  # type: ignore[type-arg]
        cut = discounts(np.asarray(list(pairs.values())))
        behind = np.asarray([pairs[shown_there, x] for x in range(V)], float)
        taken = np.asarray([cut[min(int(c), 3) - 1] if c else 0 for c in behind])
        if not behind.sum():
            return alone
        return (behind - taken + taken.sum() * alone) / behind.sum()

    after = Counter(zip(left.tolist(), w.tolist(), strict=True))
    before = Counter(zip(right.tolist(), w.tolist(), strict=True))
    for a, b in [(0, 3), (3, 0), (S, 1), (7, 7)]:
        below = side(after, a) * side(before, b) / alone
        below /= below.sum()
        count = np.asarray([triples[a, x, b] for x in range(V)], float)
        taken = np.asarray([d[min(int(c), 3) - 1] if c else 0 for c in count])
        want = (count - taken + taken.sum() * below) / count.sum() if count.sum() else below
        assert np.allclose(model.rows(np.asarray([a]), np.asarray([b]))[0], want, rtol=1e-12)


def test_a_hidden_neighbour_says_nothing() -> None:
    model, *_ = two_sided(hidden=9)
    both, none = model.rows(np.asarray([4, 9]), np.asarray([9, 9]))
    alone, four = model.alone_V, model.after.context_C.tolist().index(4)
    assert np.allclose(none, alone, rtol=1e-12)
    assert both.sum() == pytest.approx(1, abs=1e-12)
    assert not np.allclose(both, alone)
    assert model.after.total_C[four] > 0


def test_what_a_place_shows_counts_by_bayes_rule() -> None:
    prior = np.asarray([[0.1, 0.2, 0.3, 0.4]])
    hidden, w = 9, np.asarray([2])
    assert shown(prior, np.asarray([hidden]), w, hidden)[0] == 0.3
    for seen in (2, 3):  # P(shown | w): .1 if it is w, and .1 / 3 for any of the three
        joint = [prior[0, x] * (0.1 * (x == seen) + 0.1 / 3) for x in range(4)]
        assert shown(prior, np.asarray([seen]), w, hidden)[0] == pytest.approx(
            joint[2] / sum(joint)
        )


def test_events_stay_inside_documents() -> None:
    tokens = np.asarray([[1, 2, 3, 4, 5, 6]])
    documents = np.asarray([[0, 0, 0, 1, 1, -1]])
    counts = np.asarray([[True, True, False, True, True, False]])
    found = trigrams(tokens, tokens + 1, counts, documents, S)
    assert [part.tolist() for part in found] == [[S, 1, S, 4], [1, 2, 4, 5], [2, 3, 5, 6]]
    left, right = neighbours(tokens, documents, S)
    assert left.tolist() == [[S, 1, 2, S, 4, S]]
    assert right.tolist() == [[2, 3, S, 5, S, S]]
