"""Words and sentences of Chinese text: jieba 0.42.1's words at the speed of compiled code.

The published models were trained on the words of jieba 0.42.1, so that is the segmentation of
record; but jieba is Python (1 MB/s). rjieba is compiled and holds the same dictionary; it equals
jieba in the likeliest path through it, not in the rest: its HMM table is rounded to six digits
(常|在 becomes 常在), `2-3` and `x_1` stay whole, the CJK extensions count as Han. So it is asked
for the path alone, and jieba's own rules, compiled here, do the rest:

    text     我用x_1测试C++，㐂好
    masked   我用___测试C++，，好           the characters on which the two differ, one for one
    path     我 用 _ _ _ 测试 C++ ， ， 好    rjieba, HMM off
    words    我用 x _ 1 测试 C++ ， 㐂 好     what the path left as single characters, joined

Why a mask keeps the path: jieba cuts text into blocks of Han, ASCII letters, digits and `+#&._%-`,
and a block along its likeliest path. An ASCII character that is part of no dictionary word is a
step of frequency 1 whichever it is: `_` in its place changes nothing, not even the rounding of a
sum. 70 words of the dictionary have such characters (`C++`, `T恤`): where they occur nothing is
masked. Outside the blocks both give every character alone, and `\\r\\n` together.

Suffixes of names: C characters, W words of the path, S the HMM's states B E M S, H Han characters,
E entries of the dictionary, G guesses.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import rjieba

with warnings.catch_warnings():  # jieba's sources hold escapes that Python >= 3.12 complains about
    warnings.simplefilter("ignore")
    from jieba import finalseg

SEGMENTATION = "jieba-0.42.1"
"""The name of these words in a tokenizer's file: a change that moves a single border changes it."""

MIXED_WORDS = frozenset(
    word
    for line in (
        "AT&T B超 c# C# c++ C++ T恤 A座 A股 A型 A轮 AA制 AB型 B座 B股 B型 B轮 BB机 BP机 C盘 C座",
        "C语言 CD盒 CD机 CALL机 D盘 D座 D版 E盘 E座 E化 E通 F盘 F座 G盘 H盘 H股 I盘 IC卡 IP卡",
        "IP电话 IP地址 K党 K歌之王 N年 O型 PC机 PH值 SIM卡 U盘 VISA卡 Z盘 Q版 QQ号 RSS订阅 T盘",
        "X光 X光线 X射线 T恤衫 T型台 T台 4S店 4s店 江南style 江南Style 1号店 小S 大S 阿Q",
    )
    for word in line.split()
)
"""The words of jieba's dictionary with ASCII in them (a test reads jieba's own file)."""

_FIRST_HAN, _LAST_HAN = 0x4E00, 0x9FD5  # what jieba means by Han
# Classes of code points: between the blocks, Han, ASCII letters and digits, `+#&._%-`, CJK that is
# Han to rjieba but punctuation to jieba (and lone surrogates, which cannot enter rjieba).
_OUTSIDE, _HAN, _ALNUM, _SIGN, _FOREIGN = range(5)
_MASKS = np.array([0, 0, ord("_"), ord("_"), ord("，")], np.uint32)


def _classes() -> np.ndarray:
    table = np.full(0x110000, _OUTSIDE, np.uint8)
    for first, last in [(0x3400, 0x4DBF), (_LAST_HAN + 1, 0x9FFF), (0xD800, 0xDFFF)]:
        table[first : last + 1] = _FOREIGN
    for first, last in [(0xF900, 0xFAFF), (0x20000, 0x3FFFF)]:
        table[first : last + 1] = _FOREIGN
    table[_FIRST_HAN : _LAST_HAN + 1] = _HAN
    table[:128] = [_ALNUM if chr(c).isalnum() else _OUTSIDE for c in range(128)]
    table[[ord(c) for c in "+#&._%-"]] = _SIGN
    return table


_CLASS = _classes()

_MIXED = re.compile("|".join(re.escape(w) for w in sorted(MIXED_WORDS, key=len)[::-1]))
_FARTHEST_PAIR = 3  # characters from a mixed word's start to where letters first begin or end


def _mixed_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Which characters stand left and right of where ASCII letters first begin or end in a word."""

    def alnum(char: str) -> bool:
        return char.isascii() and char.isalnum()

    left, right = np.zeros(0x110000, np.bool_), np.zeros(0x110000, np.bool_)
    for word in MIXED_WORDS:
        at = next(i for i, (a, b) in enumerate(pairwise(word)) if alnum(a) != alnum(b))
        assert at <= _FARTHEST_PAIR
        left[ord(word[at])] = right[ord(word[at + 1])] = True
    return left, right


_LEFT, _RIGHT = _mixed_pairs()


def words(text: str, hmm: bool = True) -> list[str]:
    """The words of `text`, equal to `list(jieba.cut(text, HMM=hmm))` of jieba 0.42.1.

    Joined they are `text`. `hmm` guesses words that the dictionary lacks: jieba's default and CPM's
    way; T5 PEGASUS and RoFormer cut without.
    """
    _, border_C = cut(text, hmm)
    ends = (border_C.nonzero()[0] + 1).tolist()
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def spaced(texts: Sequence[str], hmm: bool = True) -> list[str]:
    """`" ".join(words(text, hmm))` of each text, without making the words.

    All are cut as one, between characters that no word holds: a call has a price of its own.
    """
    codes_C, border_C = cut("\x00".join(texts), hmm)
    spaced_C, place_C = _spread(codes_C, border_C)
    together = spaced_C.tobytes().decode("utf-32-le", "surrogatepass")
    out, start = [], 0
    for text in texts:
        end = start + len(text)
        out.append(together[place_C[start] : place_C[end - 1] + 1] if text else "")
        start = end + 1
    return out


def cut(text: str, hmm: bool) -> tuple[np.ndarray, np.ndarray]:
    """The code points of `text`, and where its words end (a bool per character)."""
    codes_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    class_C, differ, mixed = _classify(codes_C, _CLASS, _LEFT, _RIGHT)
    path = rjieba.cut(_mask(text, codes_C, class_C, mixed) if differ else text, False)
    ends_W = np.fromiter(map(len, path), np.int64, len(path)).cumsum()
    border_C, guesses_G2 = _join(codes_C, class_C, ends_W, hmm, *_hmm_tables())
    if len(guesses_G2):
        apart = _words_apart()
        for start, end in guesses_G2.tolist():
            if text[start:end] in apart:
                border_C[start:end] = True
    return codes_C, border_C


def _mask(text: str, codes_C: np.ndarray, class_C: np.ndarray, mixed: bool) -> str:
    """`text`, as long as before, without the characters on which rjieba and jieba differ."""
    masked_C = np.where(class_C > _HAN, _MASKS[class_C], codes_C)
    if mixed:
        for pair in np.flatnonzero(_LEFT[codes_C[:-1]] & _RIGHT[codes_C[1:]]).tolist():
            for start in range(max(0, pair - _FARTHEST_PAIR), pair + 1):
                if match := _MIXED.match(text, start):
                    masked_C[start : match.end()] = codes_C[start : match.end()]
    return masked_C.tobytes().decode("utf-32-le")


@cache
def _words_apart() -> frozenset[str]:
    """The dictionary's words that are less likely than their characters one by one: some 8,000.

    No other word can be a run of single characters on a path, and one that is, jieba leaves apart.
    """
    fields = resources.files("jieba").joinpath("dict.txt").read_text("utf-8").split()
    entries, count_E = fields[::3], np.array(fields[1::3], np.float64)  # word, count, tag
    length_E = np.fromiter(map(len, entries), np.int64, len(entries))
    log_E = np.log(count_E)
    codes_C = np.frombuffer("".join(entries).encode("utf-32-le"), np.uint32)
    start_E = np.cumsum(length_E) - length_E
    alone = length_E == 1
    log_of_code = np.zeros(0x110000)  # one that is no word of its own counts as seen once
    log_of_code[codes_C[start_E[alone]]] = log_E[alone]
    apart_E = np.add.reduceat(log_of_code[codes_C], start_E)
    apart_E -= (length_E - 1) * np.log(count_E.sum())
    close = 1e-6  # a tie may round either way
    chosen = np.flatnonzero(~alone & (apart_E >= log_E - close) & (length_E <= _LONGEST_APART))
    return frozenset(entries[i] for i in chosen)


_LONGEST_APART = 4  # characters; the longest there is has 3


def commonest(count: int) -> list[str]:
    """The `count` commonest words of jieba's dictionary; of equal ones, as they stand there."""
    fields = resources.files("jieba").joinpath("dict.txt").read_text("utf-8").split()
    order = np.argsort(-np.array(fields[1::3], np.int64), kind="stable")
    return [fields[3 * i] for i in order[:count].tolist()]


@cache
def _hmm_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """jieba's log probabilities: start [S], step [S, S] and emission [H, S]."""
    absent = finalseg.MIN_FLOAT
    start_S = np.array([finalseg.start_P[state] for state in "BEMS"])
    step_SS = np.array([[finalseg.trans_P[a].get(b, absent) for b in "BEMS"] for a in "BEMS"])
    emit_HS = np.full((_LAST_HAN - _FIRST_HAN + 1, 4), absent)
    for i, state in enumerate("BEMS"):
        for char, log_p in finalseg.emit_P[state].items():
            if _FIRST_HAN <= ord(char) <= _LAST_HAN:
                emit_HS[ord(char) - _FIRST_HAN, i] = log_p
    return start_S, step_SS, emit_HS


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled, and kept on disk for the next process if there is a place to write."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder
        return numba.njit(function)


@compiled
def _classify(codes_C, table, left, right):  # type: ignore[no-untyped-def]
    """The class of each character; whether any needs a mask; whether there may be a mixed word."""
    class_C = np.empty(len(codes_C), np.uint8)
    differ = mixed = False
    for c in range(len(codes_C)):
        code = codes_C[c]
        class_C[c] = table[code]
        differ |= class_C[c] > _HAN
        mixed |= c > 0 and right[code] and left[codes_C[c - 1]]
    return class_C, differ, mixed


@compiled
def _join(codes_C, class_C, ends_W, hmm, start_S, step_SS, emit_HS):  # type: ignore[no-untyped-def]
    """Join what the path (words that end at `ends_W`) left as single characters, as jieba does.

    Returns where words end (a bool per character), and [start, end) of each run of Han that the
    HMM joined but that jieba leaves apart if the whole run is a word of its dictionary.
    """
    count = len(codes_C)
    border_C = np.zeros(count, np.bool_)
    loose_C = np.zeros(count, np.bool_)  # characters of blocks that are in no word of the path
    first = 0
    for end in ends_W:
        border_C[end - 1] = True
        kind = class_C[first]
        if kind == _ALNUM:  # a run of these is no word: without HMM, rjieba joins loose ones
            for c in range(first + 1, end):
                kind = kind if class_C[c] == _ALNUM else _OUTSIDE
            loose_C[first:end] = kind == _ALNUM
        elif kind in (_HAN, _SIGN):
            loose_C[first] = end - first == 1
        first = end

    guesses_G2 = np.empty((len(ends_W) // 2 + 1, 2), np.int64)
    guess = 0
    from_CS = np.empty((count, 4), np.uint8)
    c = 0
    while c < count:
        first = c
        c += 1
        if not loose_C[first]:
            continue
        han = class_C[first] == _HAN
        while c < count and loose_C[c] and (class_C[c] == _HAN) == han:
            c += 1
        if not han:
            _join_ascii(codes_C, class_C, border_C, first, c, hmm)
        elif hmm and c - first > 1:
            joined = _join_han(codes_C, border_C, first, c, start_S, step_SS, emit_HS, from_CS)
            alone = not (first > 0 and loose_C[first - 1]) and not (c < count and loose_C[c])
            if joined and alone and c - first <= _LONGEST_APART:
                guesses_G2[guess] = first, c
                guess += 1
    return border_C, guesses_G2[:guess]


@compiled
def _join_ascii(codes_C, class_C, border_C, first, end, hmm):  # type: ignore[no-untyped-def]
    """Split loose ASCII: with HMM by `[a-zA-Z0-9]+(\\.[0-9]+)?%?`, else signs stand alone."""
    border_C[first:end] = False
    c = first
    while c < end:
        kind = class_C[c]
        c += 1
        while c < end and class_C[c] == kind and (hmm or kind == _ALNUM):
            c += 1
        if hmm and kind == _ALNUM:
            if c + 1 < end and codes_C[c] == 0x2E and 0x30 <= codes_C[c + 1] <= 0x39:
                c += 2
                while c < end and 0x30 <= codes_C[c] <= 0x39:
                    c += 1
            if c < end and codes_C[c] == 0x25:
                c += 1
        border_C[c - 1] = True


@compiled
def _join_han(codes_C, border_C, first, end, start_S, step_SS, emit_HS, from_CS):  # type: ignore[no-untyped-def]
    """Mark the likeliest words of the Han run [first, end) by Viterbi; True if any characters join.

    States are B E M S (begin, end, middle of a word, single). jieba compares (log p, letter), so a
    tie goes to the later letter; sums are taken in its order, so that they round as there.
    """
    log_S = start_S + emit_HS[codes_C[first] - _FIRST_HAN]
    next_S = np.empty(4)
    for c in range(first + 1, end):
        emit_S = emit_HS[codes_C[c] - _FIRST_HAN]
        for state in range(4):
            low, high = (1, 3) if state == 0 or state == 3 else (0, 2)  # E S may precede B, S
            log_low = log_S[low] + step_SS[low, state] + emit_S[state]
            log_high = log_S[high] + step_SS[high, state] + emit_S[state]
            from_CS[c, state] = high if log_high >= log_low else low
            next_S[state] = max(log_low, log_high)
        log_S[:] = next_S
    state = 3 if log_S[3] >= log_S[1] else 1
    joined = False
    for c in range(end - 1, first - 1, -1):
        border_C[c] = state == 1 or state == 3
        joined = joined or state != 3
        state = from_CS[c, state]
    return joined


@compiled
def _spread(codes_C, border_C):  # type: ignore[no-untyped-def]
    """The characters with a blank after each word, and where each one went."""
    place_C = np.empty(len(codes_C), np.int64)
    place = 0
    for c in range(len(codes_C)):
        place_C[c] = place
        place += 2 if border_C[c] else 1
    spaced_C = np.full(place, 0x20, np.uint32)
    for c in range(len(codes_C)):
        spaced_C[place_C[c]] = codes_C[c]
    return spaced_C, place_C


_SENTENCE = re.compile(r"[^。！？!?…；;\n]*(?:[。！？!?…；;]+[”’」』）》】\"')\]]*\n?|\n|$)")


def sentences(text: str) -> list[str]:
    """`text` in sentences with their closing marks, quotes and line end; joined they are `text`."""
    return [sentence for sentence in _SENTENCE.findall(text) if sentence]
