"""Texts as a tree of their characters, in arrays that compiled code walks.

    今天 今天天气    node 1 今 ─ node 2 天 (今天) ─ node 3 天 ─ node 4 气 (今天天气)

A node is a number; what belongs to a text (a frequency, an id) lies in the user's own array at the
node where the text ends. The first step is an array by code point, every other a hash table of
(node, code point).

Suffixes of names: C characters of all texts end to end, E texts, S slots of the hash table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np

_FULL = 0.5  # of the slots at most: steps that lead nowhere are the most common ones
_BITS = 21  # of a code point, and of a node: a slot is node, code point, next node in 63 bits
MOST_NODES = 1 << _BITS


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, and kept on disk for the next process if there is a place to write."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return numba.njit(function)


class Trie:
    """Texts in a tree. Node 0 is the root; `nodes` are there; `arrays` are what `step` reads."""

    def __init__(self) -> None:
        self.nodes = 1
        self._first = np.zeros(0x110000, np.int32)
        self._slot_S = np.zeros(1 << 10, np.int64)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The node after each first code point; the hash table of all other steps."""
        return self._first, self._slot_S

    def copy(self) -> Trie:
        """Another with the same texts, to add to."""
        made = Trie()
        made.nodes = self.nodes
        made._first, made._slot_S = self._first.copy(), self._slot_S.copy()
        return made

    def add(self, texts: Sequence[str]) -> np.ndarray:
        """Put texts, none of them empty, into the tree; the nodes where they end [E].

        OverflowError beyond MOST_NODES different beginnings of texts.
        """
        node_E = np.empty(len(texts), np.int32)
        for e in range(0, len(texts), _AT_ONCE):
            some = texts[e : e + _AT_ONCE]
            codes_C = codes("".join(some))
            if self.nodes + len(codes_C) > MOST_NODES:
                raise OverflowError(f"more than {MOST_NODES} beginnings of words")
            while len(self._slot_S) * _FULL < self.nodes + len(codes_C):
                larger_S = np.zeros(2 * len(self._slot_S), np.int64)
                _move(self._slot_S, larger_S)
                self._slot_S = larger_S
            end_E = np.fromiter(map(len, some), np.int64, len(some)).cumsum()
            found_E = node_E[e : e + _AT_ONCE]
            self.nodes = int(_add(codes_C, end_E, found_E, self.nodes, *self.arrays))
        return node_E

    def find(self, text: str) -> int:
        """The node where a text ends, 0 if nothing in the tree begins with it."""
        codes_C = codes(text)
        return int(walk(codes_C, 0, len(codes_C), *self.arrays))


_AT_ONCE = 10_000  # texts: the table grows by what they need at most


def codes(text: str) -> np.ndarray:
    """The code points of a text; surrogates that stand alone as they are."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@compiled
def step(node, code, slot_S):  # type: ignore[no-untyped-def]
    """The node that follows `node`, which is not the root, by a code point; 0 if there is none."""
    key = (np.int64(node) << _BITS) | np.int64(code)
    slot = _slot(key, len(slot_S))
    while slot_S[slot]:
        if slot_S[slot] >> _BITS == key:
            return np.int32(slot_S[slot] & (MOST_NODES - 1))
        slot = (slot + 1) & (len(slot_S) - 1)
    return np.int32(0)


@compiled
def walk(codes_C, start, end, first, slot_S):  # type: ignore[no-untyped-def]
    """The node where the characters [start, end) end, 0 if nothing begins with them."""
    if start == end:
        return np.int32(0)
    node = first[codes_C[start]]
    c = start + 1
    while node and c < end:
        node = step(node, codes_C[c], slot_S)
        c += 1
    return node


@compiled
def _slot(key, slots):  # type: ignore[no-untyped-def]
    mixed = key * np.int64(-7046029254386353131)  # 2 ** 64 over the golden ratio
    return (mixed >> 24) & (slots - 1)


@compiled
def _add(codes_C, end_E, node_E, nodes, first, slot_S):  # type: ignore[no-untyped-def]
    c = 0
    for e in range(len(end_E)):
        node = np.int32(0)
        while c < end_E[e]:
            code = codes_C[c]
            c += 1
            found = step(node, code, slot_S) if node else first[code]
            if not found:
                found = np.int32(nodes)
                nodes += 1
                if node:
                    key = (np.int64(node) << _BITS) | np.int64(code)
                    _put((key << _BITS) | np.int64(found), slot_S)
                else:
                    first[code] = found
            node = found
        node_E[e] = node
    return nodes


@compiled
def _put(entry, slot_S):  # type: ignore[no-untyped-def]
    slot = _slot(entry >> _BITS, len(slot_S))
    while slot_S[slot]:
        slot = (slot + 1) & (len(slot_S) - 1)
    slot_S[slot] = entry


@compiled
def _move(slot_S, larger_S):  # type: ignore[no-untyped-def]
    for entry in slot_S:
        if entry:
            _put(entry, larger_S)
