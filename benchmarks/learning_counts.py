"""Count models that a run is measured against, on the tokens that it consumed and no others.

    batches of a run --trigrams()--> (u, v, w)    --KneserNey--> p(w | u, v)       causal, T5
                     --neighbours()-> (l, w, r)   --TwoSided---> p(w | l, r)       masked

KneserNey is the interpolated modified Kneser-Ney trigram of Chen and Goodman (1998): three
discounts an order, continuation counts below the trigram, a uniform share at the bottom.
TwoSided discounts the counts of (left, w, right) and falls back to the two bigrams at once:
p(w | l) p(w | r) / p(w), each of them Kneser-Ney's, normalised over the vocabulary; a neighbour
that is hidden itself says nothing. Both see what the network sees at that place, no more and no
less; S is what stands before the first token of a piece.

Legend: N events or positions, V vocabulary, K distinct n-grams.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
BIG = 1 << 62


@dataclass(frozen=True)
class Level:
    """The discounted counts of one order: contexts and what follows them, as sorted codes."""

    gram_K: Ints
    """context * size + w, sorted."""
    left_K: Floats
    """What is left of the count after its discount."""
    context_C: Ints
    """Distinct contexts, sorted."""
    total_C: Floats
    """Counts of the context."""
    spare_C: Floats
    """What the discounts took from the context."""

    @classmethod
    def of(cls, gram_K: Ints, count_K: Ints, size: int) -> "Level":
        """Discount sorted, distinct n-grams."""
        one, two, more = discounts(count_K)
        taken_K = np.choose(np.minimum(count_K, 3) - 1, [one, two, more])
        context_C, first_C = np.unique(gram_K // size, return_index=True)
        total_C = np.add.reduceat(count_K, first_C).astype(np.float64)
        spare_C = np.add.reduceat(taken_K, first_C)
        return cls(gram_K, count_K - taken_K, context_C, total_C, spare_C)

    def parts(self, context_N: Ints, gram_N: Ints) -> tuple[Floats, Floats]:
        """(share of the n-gram itself, share that goes to the order below) at each position."""
        at_N, known_N = find(self.context_C, context_N)
        total_N = np.where(known_N, self.total_C[at_N], 1.0)
        lower_N = np.where(known_N, self.spare_C[at_N] / total_N, 1.0)
        at_N, seen_N = find(self.gram_K, gram_N)
        return np.where(seen_N & known_N, self.left_K[at_N], 0.0) / total_N, lower_N


def find(sorted_K: Ints, wanted_N: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Where each wanted code stands, and whether it does."""
    at_N = np.minimum(np.searchsorted(sorted_K, wanted_N), len(sorted_K) - 1)
    return at_N, sorted_K[at_N] == wanted_N


def discounts(count_K: Ints) -> tuple[float, float, float]:
    """D1, D2, D3+ out of how many n-grams were seen once, twice, three and four times."""
    n1, n2, n3, n4 = (max(int((count_K == n).sum()), 1) for n in (1, 2, 3, 4))
    share = n1 / (n1 + 2 * n2)
    found = 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3
    return tuple(min(max(d, 0.0), n) for n, d in enumerate(found, 1))  # type: ignore[return-value]


class KneserNey:
    """p(w | u, v); also p(w | v) and p(w) of the orders below.

    Args:
        u_N, v_N, w_N: events; ids below `size`.
        size: ids, S included.
        vocab: ids that w can be: the uniform share.
    """

    def __init__(self, u_N: Ints, v_N: Ints, w_N: Ints, size: int, vocab: int) -> None:
        assert size**3 < BIG
        self.size, self.vocab, self.events = size, vocab, len(w_N)
        grams, counts = np.unique((u_N * size + v_N) * size + w_N, return_counts=True)
        self.three = Level.of(grams, counts, size)
        grams, counts = np.unique(grams % size**2, return_counts=True)  # distinct u before v w
        self.two = Level.of(grams, counts, size)
        single, counts = np.unique(grams % size, return_counts=True)  # distinct v before w
        self.one = Level.of(single, counts, size)

    def single(self, w_N: Ints) -> Floats:
        """p(w)"""
        own_N, spare_N = self.one.parts(np.zeros_like(w_N), w_N)
        return own_N + spare_N / self.vocab

    def pair(self, v_N: Ints, w_N: Ints) -> Floats:
        """p(w | v)"""
        own_N, spare_N = self.two.parts(v_N, v_N * self.size + w_N)
        return own_N + spare_N * self.single(w_N)

    def __call__(self, u_N: Ints, v_N: Ints, w_N: Ints) -> Floats:
        """p(w | u, v)"""
        context_N = u_N * self.size + v_N
        own_N, spare_N = self.three.parts(context_N, context_N * self.size + w_N)
        return own_N + spare_N * self.pair(v_N, w_N)


class TwoSided:
    """p(w | left, right), falling back to p(w | left) p(w | right) / p(w) ** power.

    `hidden` is the id that says nothing as a neighbour ([MASK]).
    """

    def __init__(
        self, left_N: Ints, w_N: Ints, right_N: Ints, size: int, vocab: int, hidden: int
    ) -> None:
        self.size, self.vocab, self.hidden = size, vocab, hidden
        grams, counts = np.unique((left_N * size + right_N) * size + w_N, return_counts=True)
        self.both = Level.of(grams, counts, size)
        # Bigrams by their plain counts are the ones to fall back to: (left, right) is no prefix.
        self.after = self._bigrams(left_N, w_N)
        self.before = self._bigrams(right_N, w_N)
        often_V = np.bincount(w_N, minlength=vocab)[:vocab] + 0.5
        self.alone_V: Floats = often_V / often_V.sum()

    def _bigrams(self, side_N: Ints, w_N: Ints) -> Level:
        return Level.of(*np.unique(side_N * self.size + w_N, return_counts=True), self.size)

    def rows(self, left_N: Ints, right_N: Ints, power: float = 1.0) -> Floats:
        """[N, V]: the distribution at each position, between the neighbours that are shown."""
        every_V = np.arange(self.vocab)

        def side(level: Level, shown_N: Ints) -> Floats:
            context_NV = np.repeat(shown_N, self.vocab)
            gram_NV = context_NV * self.size + np.tile(every_V, len(shown_N))
            own_NV, spare_NV = level.parts(context_NV, gram_NV)
            flat = own_NV + spare_NV * np.tile(self.alone_V, len(shown_N))
            found_NV = flat.reshape(-1, self.vocab)
            found_NV[shown_N == self.hidden] = self.alone_V**power
            return found_NV

        below_NV = side(self.after, left_N) * side(self.before, right_N) / self.alone_V**power
        below_NV /= below_NV.sum(1, keepdims=True)
        context_N = left_N * self.size + right_N
        context_N[(left_N == self.hidden) | (right_N == self.hidden)] = -1  # never seen
        context_NV = np.repeat(context_N, self.vocab)
        gram_NV = context_NV * self.size + np.tile(every_V, len(left_N))
        own_NV, spare_NV = self.both.parts(context_NV, gram_NV)
        return own_NV.reshape(-1, self.vocab) + spare_NV.reshape(-1, self.vocab) * below_NV


def shown(prior_NV: Floats, shown_N: Ints, w_N: Ints, hidden: int, lowest: int = 1) -> Floats:
    """p(w | what is shown at the place itself too) by Bayes' rule with the published rates.

    Of the places that count 8 of 10 show [MASK] (`hidden`), 1 shows w, 1 shows any id from
    `lowest` on: what is shown is w or noise, and a network learns that as well.
    """
    at_N, other = np.arange(len(w_N)), 1 / (prior_NV.shape[1] - lowest)
    prior_N = prior_NV[at_N, w_N]
    evidence_N = prior_NV[at_N, np.where(shown_N == hidden, w_N, shown_N)] + other
    seen_N = prior_N * ((shown_N == w_N) + other) / evidence_N
    return np.where(shown_N == hidden, prior_N, seen_N)


# ---------------------------------------------------------------- events of a run's batches


def trigrams(
    tokens_BT: Ints, targets_BT: Ints, counts_BT: NDArray[np.bool_], documents_BT: Ints, start: int
) -> tuple[Ints, Ints, Ints]:
    """(u, v, w) of every position that counts: two inputs and the target."""
    before_BT = np.full_like(tokens_BT, start)
    same_BT = documents_BT[:, 1:] == documents_BT[:, :-1]
    before_BT[:, 1:] = np.where(same_BT, tokens_BT[:, :-1], start)
    return before_BT[counts_BT], tokens_BT[counts_BT], targets_BT[counts_BT]


def text_trigrams(tokens_BT: Ints, documents_BT: Ints, start: int) -> tuple[Ints, Ints, Ints]:
    """(u, v, w) of a text that is only read: an encoder's row."""
    targets_BT = np.roll(tokens_BT, -1, 1)
    counts_BT = np.zeros(tokens_BT.shape, bool)
    same_BT = documents_BT[:, 1:] == documents_BT[:, :-1]
    counts_BT[:, :-1] = same_BT & (documents_BT[:, 1:] >= 0)
    return trigrams(tokens_BT, targets_BT, counts_BT, documents_BT, start)


def neighbours(
    tokens_BT: Ints, documents_BT: Ints, start: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens [B, T] to the left and to the right of each; S outside the document."""
    left_BT, right_BT = np.full_like(tokens_BT, start), np.full_like(tokens_BT, start)
    same_BT = documents_BT[:, 1:] == documents_BT[:, :-1]
    left_BT[:, 1:] = np.where(same_BT, tokens_BT[:, :-1], start)
    right_BT[:, :-1] = np.where(same_BT, tokens_BT[:, 1:], start)
    return left_BT, right_BT
