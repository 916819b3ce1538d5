"""Gap sentences: which sentences of a text summarise the rest of it, as T5 PEGASUS chose them.

    text --segments--> pieces of about 32 characters --units--> runs of about 768 characters
         --score each piece against the rest--> the pieces of the target; the others are the source

A piece is moved to the target if the target with it has the longest common subsequence (LCS) with
the source without it; the next one is chosen in the light of the first, and so on. That is 60 to
330 subsequences of hundreds of characters a document. Here they are bits of machine words: a row
of the table of Hyyrö (2004) is V, with a zero bit where the row rises, and the next character of
the source makes of it

    V' = (V + (V & M)) | (V & ~M)          M: where that character stands in the target

A character that the target lacks changes nothing and is left out beforehand: of Han, most are.

The other criterion is PEGASUS' own (Zhang et al. 2020, arXiv 1912.08777): ROUGE-1 F1 of each
sentence against the rest, independently. What both have in common: source and target together are
always the whole unit, so that F1, 2 x overlap / characters of both, ranks as the overlap does, and
every score is a whole number; a tie goes to the piece that stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numba
import numpy as np

LENGTH = 32  # characters below which pieces are merged
SEPARATORS = "\n。"  # tried in turn; ？！； are none
CHARACTERS = 768  # of a unit: 512 tokens of 1.5 characters
FEWEST = 3  # pieces of a unit
UNITS_A_CALL = 1000  # of the kernel: memory does not grow with a book
LARGEST_UNIT = 16_384
"""Characters of a unit that is still picked from. A stretch without 。 stays whole however long it
is; a table of subsequences grows with its square, and the tokens of such a unit are cut off anyway:
T5 PEGASUS reads 384 of a source."""


@dataclass(frozen=True)
class Criterion:
    """How the pieces of the target are chosen."""

    measure: int
    """What a candidate target and source have in common: _LCS or _OVERLAP."""
    sequential: bool
    """Each piece in the light of those before, until the ratio is passed; or all at once."""
    gap_ratio: float
    """sequential: the target's characters, of those that remain, above which it is enough. At once:
    the share of the pieces, rounded down, at least one."""
    counts: Callable[[str], bool] | None = None
    """Which characters are compared; all without it."""


_LCS, _OVERLAP = 0, 1
CRITERIA = {
    "lcs": Criterion(_LCS, sequential=True, gap_ratio=0.25),
    "rouge1": Criterion(_OVERLAP, sequential=False, gap_ratio=0.3, counts=str.isalnum),
}
"""lcs: T5 PEGASUS' train.py; it tests the ratio after adding, so that it is passed, not kept.
rouge1: PEGASUS' Ind-Orig with characters for words, without punctuation and blanks, as there."""


class Unit(NamedTuple):
    """A run of pieces and those among them that are its pseudo-summary."""

    segments: list[str]
    picks: list[int]
    """Numbers of the pieces of the target, rising; none if there is nothing to choose from."""

    @property
    def source(self) -> str:
        """What remains, joined."""
        chosen = set(self.picks)
        return "".join(text for i, text in enumerate(self.segments) if i not in chosen)

    @property
    def target(self) -> str:
        """The pseudo-summary, joined."""
        return "".join(self.segments[i] for i in self.picks)


def segments(text: str, length: int = LENGTH, separators: str = SEPARATORS) -> list[str]:
    """`text` in pieces of less than `length` characters where the separators allow it.

    bert4keras' text_segmentate (snippets.py): split at the first separator, merge what is short,
    split what is still long at the next one. Every piece is stripped at every level, so that blanks
    between pieces are lost; a piece of blanks alone is left as an empty one.
    """
    text = text.strip()
    if not separators or len(text) <= length:
        return [text]
    pieces = text.split(separators[0])
    last = len(pieces) - 1
    out: list[str] = []
    run = ""
    for i, piece in enumerate(pieces):
        if run and piece and len(run) + len(piece) > length - 1:
            out += segments(run, length, separators[1:])
            run = ""
        run += piece if i == last else piece + separators[0]
    return out + segments(run, length, separators[1:]) if run else out


def units(
    pieces: Iterable[str], characters: int = CHARACTERS, fewest: int = FEWEST
) -> list[list[str]]:
    """Runs of at most `characters` characters, but of at least `fewest` pieces; fewer at the end
    are dropped. The pieces of unit after unit are the first of `pieces`, none left out."""
    out: list[list[str]] = []
    run: list[str] = []
    size = 0
    for piece in pieces:
        if size + len(piece) > characters and len(run) >= fewest:
            out.append(run)
            run, size = [], 0
        run.append(piece)
        size += len(piece)
    return [*out, run] if len(run) >= fewest else out


def picks(unit: Sequence[str], criterion: str = "lcs", gap_ratio: float | None = None) -> list[int]:
    """The numbers of the pieces of `unit` that make its target, rising.

    If the source came out shorter than the target the two change places. Nothing is picked from
    fewer than two pieces or more than LARGEST_UNIT characters. ValueError: an unknown criterion, a
    ratio outside (0, 1).
    """
    return _picked([unit], criterion, gap_ratio)[0]


def scores(unit: Sequence[str], target: Iterable[int] = (), criterion: str = "lcs") -> list[int]:
    """What each piece would score if it joined `target`, -1 for those in it: a step of `picks`.

    lcs: characters of the longest common subsequence; rouge1: characters in common.
    """
    rule = _rule(criterion, None)
    codes_C, ends_P = _codes([_compared(unit, rule)])
    chosen_P = np.zeros(len(unit), np.bool_)
    chosen_P[list(target)] = True
    ids_C, alphabet = _localise(codes_C)
    scores_P = np.empty(len(unit), np.int64)
    _score(ids_C, alphabet, ends_P, chosen_P, rule.measure, scores_P)
    return scores_P.tolist()  # type: ignore[no-any-return]


def pick(
    document: str | Sequence[str], criterion: str = "lcs", gap_ratio: float | None = None
) -> list[Unit]:
    """The units of a text, or of its pieces, each with its picks. Errors as in `picks`."""
    return pick_batch([document], criterion, gap_ratio)[0]


def pick_batch(
    documents: Iterable[str | Sequence[str]],
    criterion: str = "lcs",
    gap_ratio: float | None = None,
) -> list[list[Unit]]:
    """`pick` of each document, in few calls of the compiled kernel."""
    of_document = [units(segments(d) if isinstance(d, str) else d) for d in documents]
    every = [unit for found in of_document for unit in found]
    picked = [of for some in _groups(every) for of in _picked(some, criterion, gap_ratio)]
    of_unit = map(Unit, every, picked)
    return [[next(of_unit) for _ in found] for found in of_document]


def _groups(every: Sequence[list[str]]) -> Iterator[Sequence[list[str]]]:
    """At least one, so that a wrong criterion is noticed; a book is not one array."""
    yield every[:UNITS_A_CALL]
    for start in range(UNITS_A_CALL, len(every), UNITS_A_CALL):
        yield every[start : start + UNITS_A_CALL]


def _rule(criterion: str, gap_ratio: float | None) -> Criterion:
    if criterion not in CRITERIA:
        raise ValueError(
            f"there is no criterion '{criterion}' for gap sentences; it is one of "
            f"{', '.join(CRITERIA)} (没有这种选句准则)"
        )
    rule = CRITERIA[criterion]
    if gap_ratio is None:
        return rule
    if not 0 < gap_ratio < 1:
        raise ValueError(f"gap_ratio is {gap_ratio}, must lie in (0, 1) (比例须在 0 与 1 之间)")
    return Criterion(rule.measure, rule.sequential, gap_ratio, rule.counts)


def _compared(unit: Sequence[str], rule: Criterion) -> Sequence[str]:
    if rule.counts is None:
        return unit
    return ["".join(filter(rule.counts, piece)) for piece in unit]


def _codes(every: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """The characters of all pieces laid end to end, [C] uint32; 0 and where each ends, [P+1]."""
    pieces = list(chain.from_iterable(every))
    packed = "".join(pieces).encode("utf-32-le", "surrogatepass")
    ends_P = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)), out=ends_P[1:])
    return np.frombuffer(packed, np.uint32), ends_P


def _picked(
    every: Sequence[Sequence[str]], criterion: str, gap_ratio: float | None
) -> list[list[int]]:
    rule = _rule(criterion, gap_ratio)
    codes_C, ends_P = _codes([_compared(unit, rule) for unit in every])
    first_U = np.zeros(len(every) + 1, np.int64)
    np.cumsum([len(unit) for unit in every], out=first_U[1:])
    chosen_P = np.zeros(len(ends_P) - 1, np.bool_)
    _choose(
        codes_C, ends_P, first_U, rule.measure, rule.sequential, rule.gap_ratio,
        LARGEST_UNIT, chosen_P,
    )  # fmt: skip
    where = np.flatnonzero(chosen_P)
    unit_of = np.searchsorted(first_U, where, side="right") - 1
    out: list[list[int]] = [[] for _ in every]
    for unit, number in zip(unit_of.tolist(), (where - first_U[unit_of]).tolist(), strict=True):
        out[unit].append(number)
    return out


# ---- the kernel. C characters, P pieces, U units, W words of 64 bits, K distinct characters


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, and kept on disk for the next process if there is a place to write."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return numba.njit(function)


_ONE, _ALL = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
_PAIRS, _FOURS = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
_BYTES, _SUM = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)
_TWO, _FOUR, _TOP = np.uint64(2), np.uint64(4), np.uint64(56)
_SPREAD = np.uint32(0x9E3779B1)


@_compiled
def _zeros(word):  # type: ignore[no-untyped-def]
    """How many bits of a word are not set."""
    x = ~word
    x -= (x >> _ONE) & _PAIRS
    x = (x & _FOURS) + ((x >> _TWO) & _FOURS)
    x = (x + (x >> _FOUR)) & _BYTES
    return np.int64((x * _SUM) >> _TOP)


@_compiled
def _localise(codes_C):  # type: ignore[no-untyped-def]
    """Characters numbered 0 to K - 1 as they appear, [C] int32, and K: tables stay small."""
    bits = 4
    while (1 << bits) < 2 * len(codes_C):
        bits += 1
    shift, last = np.uint32(32 - bits), (1 << bits) - 1
    slot_code = np.empty(1 << bits, np.uint32)
    slot_id = np.full(1 << bits, -1, np.int32)
    ids_C = np.empty(len(codes_C), np.int32)
    known = 0
    for c in range(len(codes_C)):
        code = codes_C[c]
        slot = np.int64(np.uint32(code * _SPREAD) >> shift)
        while slot_id[slot] >= 0 and slot_code[slot] != code:
            slot = (slot + 1) & last
        if slot_id[slot] < 0:
            slot_code[slot] = code
            slot_id[slot] = known
            known += 1
        ids_C[c] = slot_id[slot]
    return ids_C, known


@_compiled
def _choose(codes_C, ends_P, first_U, measure, sequential, ratio, largest, chosen_P):  # type: ignore[no-untyped-def]
    """Mark the pieces of each unit's target in `chosen_P`."""
    for unit in range(len(first_U) - 1):
        first, stop = first_U[unit], first_U[unit + 1]
        start, end = ends_P[first], ends_P[stop]
        if stop - first < 2 or end - start > largest:
            continue
        ids_C, alphabet = _localise(codes_C[start:end])
        ends = ends_P[first : stop + 1] - start
        chosen = chosen_P[first:stop]
        if sequential:
            _one_by_one(ids_C, alphabet, ends, measure, ratio, chosen)
        else:
            _at_once(ids_C, alphabet, ends, measure, ratio, chosen)


@_compiled
def _one_by_one(ids_C, alphabet, ends_P, measure, ratio, chosen_P):  # type: ignore[no-untyped-def]
    """The greedy choice: until one piece remains or target / source > ratio; then the shorter of
    the two is the target."""
    scores_P = np.empty(len(chosen_P), np.int64)
    source, target = len(ids_C), 0
    left = len(chosen_P)
    while True:
        _score(ids_C, alphabet, ends_P, chosen_P, measure, scores_P)
        best = np.argmax(scores_P)  # the first of equals
        chosen_P[best] = True
        size = ends_P[best + 1] - ends_P[best]
        source -= size
        target += size
        left -= 1
        if left == 1 or source == 0 or target / source > ratio:
            break
    if source < target:
        chosen_P[:] = ~chosen_P


@_compiled
def _at_once(ids_C, alphabet, ends_P, measure, ratio, chosen_P):  # type: ignore[no-untyped-def]
    """The best pieces by their scores alone: ratio x pieces of them, rounded down, at least one."""
    scores_P = np.empty(len(chosen_P), np.int64)
    _score(ids_C, alphabet, ends_P, chosen_P, measure, scores_P)
    wanted = max(1, int(np.float32(len(chosen_P)) * np.float32(ratio)))
    for _ in range(wanted):
        best = np.argmax(scores_P)
        chosen_P[best] = True
        scores_P[best] = -1


@_compiled
def _score(ids_C, alphabet, ends_P, chosen_P, measure, scores_P):  # type: ignore[no-untyped-def]
    """Into `scores_P`: each piece with the target against the source without it; -1 in the target.
    Empty pieces score alike: the first of them is measured."""
    most = (len(ids_C) + 63) >> 6
    masks_KW = np.zeros(alphabet * most, np.uint64)
    state_W = np.empty(most, np.uint64)
    count_K = np.zeros(alphabet, np.int32)
    kept_C = np.empty(len(ids_C) + 1, np.int32)
    target = 0
    for piece in range(len(chosen_P)):
        if chosen_P[piece]:
            target += ends_P[piece + 1] - ends_P[piece]
            for c in range(ends_P[piece], ends_P[piece + 1]):
                count_K[ids_C[c]] += 1
    empty = -1
    for piece in range(len(chosen_P)):
        size = ends_P[piece + 1] - ends_P[piece]
        if chosen_P[piece]:
            scores_P[piece] = -1
        elif size == 0 and empty >= 0:
            scores_P[piece] = empty
        else:
            for c in range(ends_P[piece], ends_P[piece + 1]):
                count_K[ids_C[c]] += 1
            if measure == _LCS:
                words = (target + size + 63) >> 6
                scores_P[piece] = _subsequence(
                    ids_C, ends_P, chosen_P, piece, count_K, masks_KW, words, state_W, kept_C
                )
            else:
                scores_P[piece] = _overlap(ids_C, ends_P, chosen_P, piece, count_K, kept_C)
            for c in range(ends_P[piece], ends_P[piece + 1]):
                count_K[ids_C[c]] -= 1
            if size == 0:
                empty = scores_P[piece]


@_compiled
def _overlap(ids_C, ends_P, chosen_P, piece, count_K, left_K):  # type: ignore[no-untyped-def]
    """Characters in common, each as often as it stands in both; `count_K` counts the target's."""
    left_K[: len(count_K)] = count_K
    common = 0
    for other in range(len(chosen_P)):
        if not chosen_P[other] and other != piece:
            for c in range(ends_P[other], ends_P[other + 1]):
                if left_K[ids_C[c]] > 0:
                    left_K[ids_C[c]] -= 1
                    common += 1
    return common


@_compiled
def _subsequence(  # type: ignore[no-untyped-def]
    ids_C, ends_P, chosen_P, piece, count_K, masks_KW, words, state_W, kept_C
):
    """Length of the longest common subsequence of the target with `piece` and the source without.

    `count_K` is above 0 for what the target holds; `masks_KW` is all zeros before and after.
    """
    place = 0
    kept = 0
    for other in range(len(chosen_P)):
        if chosen_P[other] or other == piece:
            for c in range(ends_P[other], ends_P[other + 1]):
                masks_KW[ids_C[c] * words + (place >> 6)] |= _ONE << np.uint64(place & 63)
                place += 1
        else:
            for c in range(ends_P[other], ends_P[other + 1]):
                kept_C[kept] = ids_C[c]  # overwritten by the next if the target lacks it
                kept += count_K[ids_C[c]] > 0
    common = 0
    if words == 1:
        row = _ALL
        for c in range(kept):
            mask = masks_KW[kept_C[c]]
            row = (row + (row & mask)) | (row & ~mask)
        common = _zeros(row)
    else:
        state_W[:words] = _ALL
        for c in range(kept):
            at = kept_C[c] * words
            carry = np.uint64(0)
            for w in range(words):
                row, mask = state_W[w], masks_KW[at + w]
                both = row + (row & mask)
                total = both + carry
                carry = np.uint64(both < row) | np.uint64(total < both)
                state_W[w] = total | (row & ~mask)
        for w in range(words):
            common += _zeros(state_W[w])
    for other in range(len(chosen_P)):
        if chosen_P[other] or other == piece:
            for c in range(ends_P[other], ends_P[other + 1]):
                masks_KW[ids_C[c] * words : (ids_C[c] + 1) * words] = np.uint64(0)
    return common
