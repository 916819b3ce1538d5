"""Documents cut into pieces, and pieces packed into rows: plans made once, when a run starts.

    documents --cut()--> pieces of at most a row --best_fit()--> rows: [piece, piece, ..]
                         (start, length)                          first [rows + 1], piece [pieces]
    pairs (source length, target length) -------best_fit_pairs()--> the same

A plan is a pure function of the index, its marks and the length of a row, made anew at each start
(three million pieces a second) and kept nowhere; it takes 28 bytes a piece. Best fit decreasing
(Ding et al. 2024, Fewer Truncations Improve Language Modeling): the longest piece first, each into
the fullest row that still has room, so that almost nothing is padding and no document shorter than
a row is ever cut.

Legend: P pieces or pairs, R rows, R1 rows and one.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.compiled import compiled, fixed
from pretrain.permutation import Ints

PROBES = 64
"""Rows that a pair is tried in before it gets a new one; a row that failed as often is full."""
SENTENCE = np.uint8(2)
"""The mark of a token that begins a sentence (data_pipeline/sidefile.py)."""


class Pieces(NamedTuple):
    """Stretches of the stream of tokens."""

    start_P: Ints
    """First token of each."""
    length_P: NDArray[np.int32]
    """Its tokens."""


class Plan(NamedTuple):
    """Which pieces stand in which row."""

    first_R1: Ints
    """Where the pieces of each row begin in item_P, and the end."""
    item_P: Ints
    """Numbers of pieces (or pairs), row after row; each exactly once."""

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return len(self.first_R1) - 1

    def of(self, rows: Ints) -> tuple[Ints, Ints]:
        """The pieces of some rows: (first [rows + 1] into the second, item [pieces])."""
        counts = self.first_R1[rows + 1] - self.first_R1[rows]
        first = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=first[1:])
        at = np.arange(first[-1]) + np.repeat(self.first_R1[rows] - first[:-1], counts)
        return first, self.item_P[at]


def one_each(items: Ints) -> Plan:
    """A row for each item."""
    return Plan(np.arange(len(items) + 1), np.asarray(items, np.int64))


def cut(
    offsets: Ints, room: int, end_tokens: int, marks: NDArray[np.uint8] | None = None
) -> Pieces:
    """Each document cut into pieces of at most `room` tokens, in their order.

    `offsets` [documents + 1]: where they begin in the stream; the last `end_tokens` tokens of each
    are left out. With `marks` a cut falls before a sentence where one begins within the room.
    """
    sentences = marks is not None
    table = fixed(marks if marks is not None else np.empty(0, np.uint8))
    offsets = np.ascontiguousarray(offsets, np.int64)
    most = int((np.maximum(np.diff(offsets), 0) // room + 1).sum())
    while True:  # cuts before sentences leave shorter pieces, and more of them
        start, length = np.empty(most, np.int64), np.empty(most, np.int32)
        number = _cut(offsets, room, end_tokens, sentences, table, start, length)
        if number <= most:
            return Pieces(start[:number].copy(), length[:number].copy())
        most = number


def best_fit(length_P: NDArray[np.int32], room: int) -> Plan:
    """Pieces packed into rows of `room` tokens; none may be longer."""
    return best_fit_pairs(length_P, np.zeros(len(length_P), np.int32), room, 1)


def best_fit_pairs(
    source_P: NDArray[np.int32], target_P: NDArray[np.int32], source_room: int, target_room: int
) -> Plan:
    """Pairs packed into rows that have room for sources and for targets; none may be larger.

    The pair that takes the largest share of either room comes first; each goes where the least is
    left of the scarcer room, among the fullest rows one that has enough of the other.
    """
    source_P, target_P = (np.ascontiguousarray(x, np.int32) for x in (source_P, target_P))
    assert not len(source_P) or int(source_P.max()) <= source_room
    assert not len(target_P) or int(target_P.max()) <= target_room
    share_P = np.maximum(source_P / source_room, target_P / target_room)
    by_share = np.argsort(np.rint((1 - share_P) * 65535).astype(np.uint16), kind="stable")
    row_P = np.empty(len(source_P), np.int64)
    scarce, other = (source_P, source_room), (target_P, target_room)
    if int(source_P.sum()) / source_room < int(target_P.sum()) / target_room:
        scarce, other = other, scarce
    rows = _best_fit(scarce[0], other[0], by_share, scarce[1], other[1], row_P)
    first, item = np.zeros(rows + 1, np.int64), np.empty(len(row_P), np.int64)
    _lay_out(row_P, first, item)
    return Plan(first, item)


# ---- the kernels


@compiled
def _cut(offset_D1, room, end_tokens, sentences, mark_T, start_P, length_P):  # type: ignore[no-untyped-def]
    """Pieces found; those that start_P has no place for are counted only."""
    number = 0
    for d in range(len(offset_D1) - 1):
        at, stop = offset_D1[d], offset_D1[d + 1] - end_tokens
        while at < stop:
            end = min(at + room, stop)
            if sentences and end < stop:
                before = end
                while before > at and not mark_T[before] & SENTENCE:
                    before -= 1
                if before > at:
                    end = before
            if number < len(start_P):
                start_P[number] = at
                length_P[number] = end - at
            number += 1
            at = end
    return number


@compiled
def _best_fit(scarce_P, other_P, order_P, scarce_room, other_room, row_P):  # type: ignore[no-untyped-def]
    """Rows used. Rows with the same room left are a stack: newest_L its top, below_R the next."""
    leaves = 1
    while leaves < scarce_room + 1:
        leaves *= 2
    any_rows = np.zeros(2 * leaves, np.bool_)  # a tree: is there a row with so much room left?
    newest_L = np.full(scarce_room + 1, -1, np.int64)
    below_R = np.empty(len(order_P), np.int64)
    other_left_R = np.empty(len(order_P), np.int64)
    failed_R = np.zeros(len(order_P), np.int32)
    rows = 0
    for i in range(len(order_P)):
        pair = order_P[i]
        need, other = np.int64(scarce_P[pair]), np.int64(other_P[pair])
        left, row = _at_least(any_rows, leaves, need), np.int64(-1)
        for _ in range(PROBES):
            if left < 0:
                break
            row = newest_L[left]
            fits = other_left_R[row] >= other
            failed_R[row] += not fits
            if fits or failed_R[row] == PROBES:
                newest_L[left] = below_R[row]
                if newest_L[left] < 0:
                    _note(any_rows, leaves, left, False)
            if fits:
                break
            row = np.int64(-1)
            left = _at_least(any_rows, leaves, left + 1)
        if row < 0:
            row, left = np.int64(rows), np.int64(scarce_room)
            other_left_R[row] = other_room
            rows += 1
        row_P[pair] = row
        other_left_R[row] -= other
        left -= need
        if left > 0 and other_left_R[row] > 0:
            below_R[row] = newest_L[left]
            newest_L[left] = row
            if below_R[row] < 0:
                _note(any_rows, leaves, left, True)
    return rows


@compiled
def _lay_out(row_P, first_R1, item_P):  # type: ignore[no-untyped-def]
    """Pieces row after row, in a row by their numbers."""
    for p in range(len(row_P)):
        first_R1[row_P[p] + 1] += 1
    for r in range(len(first_R1) - 1):
        first_R1[r + 1] += first_R1[r]
    next_R = first_R1[:-1].copy()
    for p in range(len(row_P)):
        item_P[next_R[row_P[p]]] = p
        next_R[row_P[p]] += 1


@compiled
def _at_least(any_rows, leaves, need):  # type: ignore[no-untyped-def]
    """The smallest leaf from `need` on that is true, -1 if there is none."""
    node = leaves + need
    if node >= 2 * leaves:
        return np.int64(-1)
    if any_rows[node]:
        return np.int64(need)
    while node > 1:
        if node % 2 == 0 and any_rows[node + 1]:
            node += 1
            while node < leaves:
                node = 2 * node if any_rows[2 * node] else 2 * node + 1
            return np.int64(node - leaves)
        node //= 2
    return np.int64(-1)


@compiled
def _note(any_rows, leaves, leaf, value):  # type: ignore[no-untyped-def]
    node = leaves + leaf
    any_rows[node] = value
    while node > 1:
        node //= 2
        now = any_rows[2 * node] or any_rows[2 * node + 1]
        if any_rows[node] == now:
            return
        any_rows[node] = now
