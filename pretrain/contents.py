"""What stands in a pair of a source and a target, by objective.

    gap sentences    unit of .gaps:   sentences not picked            -> picked ones
    fields           document of .fields: the named source fields     -> the named target fields
    spans            piece of stream: a b <1> e f g <2>               -> <1> c d <2> h
    prefix           piece of stream: a b c                           -> d e f g h

Gap sentences are those that the corpus picked, which side is the longer included (T5 PEGASUS' swap,
by characters, is made there). Spans are drawn as in T5 (random_spans_noise_mask: as many spans as
ratio x length / span, their lengths and the gaps between a random composition, the first gap in
front); the prefix ends anywhere, as UniLM's did in bert4keras. What is drawn is a function of the
sample's key alone.

Legend: D documents, U units, P pairs, X room of a source or target, L tokens of a piece.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.compiled import compiled, fixed
from pretrain.pairs import Sizes
from pretrain.permutation import Ints, Keys
from pretrain.rows import Layout, Tokens, stream_of

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)

Tables = Mapping[str, NDArray]


class Spans:
    """Pairs whose sides are spans of tokens of one document: gap sentences, named fields.

    Args:
        index: the tokens.
        units_D: pairs of each document.
        spans_U: spans of each pair.
        start, stop: [spans] tokens from the start of the document.
        side: [spans] 0: of the source, 1: of the target, 2: of neither.
    """

    def __init__(
        self,
        index: Tokens,
        units_D: NDArray,
        spans_U: NDArray,
        start: NDArray,
        stop: NDArray,
        side: NDArray[np.uint8],
        source_room: int,
        target_room: int,
    ) -> None:
        self.source_room, self.target_room = source_room, target_room
        offsets = np.asarray(index.offsets)
        if len(units_D) != len(offsets) - 1:
            raise ValueError(
                f"data: the side file speaks of {len(units_D)} documents, the index has "
                f"{len(offsets) - 1}; build the corpus again (附属文件与索引不符)"
            )
        self._stream = stream_of(index)
        first_U1 = np.zeros(len(spans_U) + 1, np.int64)
        np.cumsum(spans_U, out=first_U1[1:])
        base_U = np.repeat(offsets[:-1], units_D).astype(np.int64)
        self._tables = first_U1, base_U, fixed(start), fixed(stop), fixed(side)

    @classmethod
    def of_gaps(cls, index: Tokens, tables: Tables, source_room: int, target_room: int) -> "Spans":
        """The pairs of PREFIX.gaps."""
        return cls(
            index, tables["units"], tables["sentences"], tables["starts"], tables["stops"],
            tables["picked"], source_room, target_room,
        )  # fmt: skip

    @classmethod
    def of_fields(
        cls,
        index: Tokens,
        tables: Tables,
        names: Sequence[str],
        source: Sequence[str],
        target: Sequence[str],
        source_room: int,
        target_room: int,
    ) -> "Spans":
        """The pairs of PREFIX.fields: a pair a document, of those of its fields that are named."""
        side_of = np.asarray([0 if n in source else 1 if n in target else 2 for n in names])
        side = side_of.astype(np.uint8)[tables["names"]] if len(names) else tables["names"]
        ones = np.ones(len(tables["spans"]), np.int64)
        return cls(
            index, ones, tables["spans"], tables["starts"], tables["stops"], side,
            source_room, target_room,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._tables[0]) - 1

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Tokens of every source and target, cut to their rooms; 0, 0: there is no such pair."""
        source, target = (np.empty(len(self), np.int32) for _ in range(2))
        first_U1, _, *spans = self._tables
        _span_sizes(
            np.arange(len(self)), first_U1, *spans,
            self.source_room, self.target_room, source, target,
        )  # fmt: skip
        return source, target

    def write(
        self, items: Ints, keys: Keys, source_PX: Ints, target_PX: Ints
    ) -> tuple[Sizes, Sizes]:
        """Write the pairs and say how many tokens each source and target has."""
        source, target = (np.empty(len(items), np.int32) for _ in range(2))
        _write_spans(self._stream, items, *self._tables, source_PX, target_PX, source, target)
        return source, target


class Corrupted:
    """Pairs out of pieces of the stream: T5's span corruption."""

    def __init__(
        self,
        index: Tokens,
        layout: Layout,
        ratio: float,
        span: float,
        sentinels: Ints,
        eod_id: int,
    ) -> None:
        self.layout, self.ratio, self.span = layout, ratio, span
        self._stream, self._sentinels = stream_of(index), np.asarray(sentinels, np.int64)
        noise, spans = noise_of(layout.room, ratio, span)
        assert spans <= len(sentinels)
        self.source_room, self.target_room = layout.room - noise + spans, noise + spans
        self.eod_id = eod_id

    def __len__(self) -> int:
        return self.layout.rows

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Tokens of every source and target."""
        _, _, length = self.layout.of(np.arange(len(self)))
        table = np.asarray(
            [(n - a + b, a + b) if n > 1 else (0, 0) for n in range(self.layout.room + 1)
             for a, b in [noise_of(n, self.ratio, self.span)]], np.int32
        )  # fmt: skip
        return table[length, 0], table[length, 1]

    def write(
        self, items: Ints, keys: Keys, source_PX: Ints, target_PX: Ints
    ) -> tuple[Sizes, Sizes]:
        """Write the pairs and say how many tokens each source and target has."""
        source, target = (np.empty(len(items), np.int32) for _ in range(2))
        _, start, length = self.layout.of(items)
        _corrupt(
            self._stream, start, length, keys, self.ratio, self.span, self._sentinels,
            source_PX, target_PX, source, target,
        )  # fmt: skip
        return source, target


class Prefixed:
    """Pairs out of pieces of the stream: a head, and what follows it."""

    def __init__(self, index: Tokens, layout: Layout) -> None:
        self.layout, self._stream = layout, stream_of(index)
        self.source_room = self.target_room = max(layout.room - 1, 1)

    def __len__(self) -> int:
        return self.layout.rows

    def sizes(self) -> tuple[Sizes, Sizes]:
        """A token at least on each side; pieces of one token are no pair."""
        _, _, length = self.layout.of(np.arange(len(self)))
        side = np.where(length > 1, length - 1, 0).astype(np.int32)
        return side, side  # what it may need: where the head ends is drawn anew each time

    def write(
        self, items: Ints, keys: Keys, source_PX: Ints, target_PX: Ints
    ) -> tuple[Sizes, Sizes]:
        """Write the pairs and say how many tokens each source and target has."""
        source, target = (np.empty(len(items), np.int32) for _ in range(2))
        _, start, length = self.layout.of(items)
        _split(self._stream, start, length, keys, source_PX, target_PX, source, target)
        return source, target


def noise_of(length: int, ratio: float, span: float) -> tuple[int, int]:
    """Tokens that T5 cuts out of a row of `length`, and in how many spans."""
    noise = min(max(round(length * ratio), 1), max(length - 1, 0))
    spans = min(max(round(noise / span), 1), noise, length - noise) if noise else 0
    return noise, spans


def longest_row(source_room: int, target_room: int, ratio: float, span: float) -> int:
    """The longest row whose corrupted source and target have room; 0 if none has."""
    length = 0
    while True:
        noise, spans = noise_of(length + 1, ratio, span)
        if length + 1 - noise + spans > source_room or noise + spans > target_room:
            return length
        length += 1


# ---- the kernels


@compiled
def _span_sizes(  # type: ignore[no-untyped-def]
    item_P, first_U1, start, stop, side, source_room, target_room, source_P, target_P,
):  # fmt: skip
    for p in range(len(item_P)):
        source = target = 0
        for i in range(first_U1[item_P[p]], first_U1[item_P[p] + 1]):
            size = np.int64(stop[i]) - np.int64(start[i])
            if side[i] == 0:
                source += size
            elif side[i] == 1:
                target += size
        if source == 0 or target == 0:
            source = target = 0
        source_P[p], target_P[p] = min(source, source_room), min(target, target_room)


@compiled
def _write_spans(  # type: ignore[no-untyped-def]
    stream, item_P, first_U1, base_U, start, stop, side, source_PX, target_PX, source_P, target_P,
):  # fmt: skip
    for p in range(len(item_P)):
        unit = item_P[p]
        s = t = 0
        for i in range(first_U1[unit], first_U1[unit + 1]):
            begin = base_U[unit] + np.int64(start[i])
            size = np.int64(stop[i]) - np.int64(start[i])
            if side[i] == 0:
                for k in range(min(size, source_PX.shape[1] - s)):
                    source_PX[p, s + k] = stream[begin + k]
                s = min(s + size, source_PX.shape[1])
            elif side[i] == 1:
                for k in range(min(size, target_PX.shape[1] - t)):
                    target_PX[p, t + k] = stream[begin + k]
                t = min(t + size, target_PX.shape[1])
        source_P[p], target_P[p] = s, t


@compiled
def _draw(key, number):  # type: ignore[no-untyped-def]
    """The `number`-th 64 random bits of a key (splitmix64)."""
    x = key + _GOLDEN * np.uint64(number + 1)
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@compiled
def _compose(key, number, total, parts, size_X):  # type: ignore[no-untyped-def]
    """`total` as a random sum of `parts` whole numbers of at least 1: into size_X. The draws from
    `number` on; which of the total - 1 borders are drawn is uniform (selection sampling)."""
    part, wanted, size = 0, parts - 1, 1
    for i in range(total - 1):
        left = total - 1 - i
        if np.int64(_draw(key, number + i) % np.uint64(left)) < wanted:
            size_X[part] = size
            part, wanted, size = part + 1, wanted - 1, 1
        else:
            size += 1
    size_X[part] = size


@compiled
def _corrupt(  # type: ignore[no-untyped-def]
    stream, start_P, length_P, key_P, ratio, span, sentinels, source_PX, target_PX, source_P,
    target_P,
):  # fmt: skip
    gap_X, noise_X = np.empty(len(sentinels), np.int64), np.empty(len(sentinels), np.int64)
    for p in range(len(start_P)):
        length = np.int64(length_P[p])
        noise = min(max(np.int64(np.rint(length * ratio)), 1), length - 1)
        spans = min(max(np.int64(np.rint(noise / span)), 1), min(noise, length - noise))
        _compose(key_P[p], 0, noise, spans, noise_X)
        _compose(key_P[p], length, length - noise, spans, gap_X)
        s, t, at = 0, 0, start_P[p]
        for k in range(spans):
            for i in range(gap_X[k]):
                source_PX[p, s + i] = stream[at + i]
            s, at = s + gap_X[k] + 1, at + gap_X[k]
            source_PX[p, s - 1] = target_PX[p, t] = sentinels[k]
            for i in range(noise_X[k]):
                target_PX[p, t + 1 + i] = stream[at + i]
            t, at = t + noise_X[k] + 1, at + noise_X[k]
        source_P[p], target_P[p] = s, t


@compiled
def _split(  # type: ignore[no-untyped-def]
    stream, start_P, length_P, key_P, source_PX, target_PX, source_P, target_P,
):  # fmt: skip
    for p in range(len(start_P)):
        length = np.int64(length_P[p])
        head = 1 + np.int64(_draw(key_P[p], 0) % np.uint64(length - 1))
        for i in range(head):
            source_PX[p, i] = stream[start_P[p] + i]
        for i in range(length - head):
            target_PX[p, i] = stream[start_P[p] + head + i]
        source_P[p], target_P[p] = head, length - head
