"""Words and sentences of Chinese text: jieba 0.42.1's words at the speed of compiled code.

The published models were trained on the words of jieba 0.42.1, so that is the segmentation of
record; but jieba is Python (1 MB/s). Here its rules are compiled, with its dictionary and its HMM:

    text     我用x_1测试C++，㐂好
    blocks   我用x_1测试C++ | ， | 㐂 | 好    Han, ASCII letters, digits and `+#&._%-`; the rest
    path     我 用 x _ 1 测试 C++ | ...       is single characters, and `\\r\\n`
    words    我 用 x _ 1 测试 C++ ， 㐂 好    single characters in a row joined again: ASCII, and
                                              Han by the HMM

The path is the likeliest one through the dictionary (lexicon.py), from each block's end to its
start. Sums are taken in jieba's order, so that they round as there and ties fall as there.

Suffixes of names: C characters, S the HMM's states B E M S, H Han characters, N nodes of the
dictionary's tree.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np

from data_pipeline.lexicon import Lexicon, published
from data_pipeline.trie import codes, compiled, step, walk

with warnings.catch_warnings():  # jieba's sources hold escapes that Python >= 3.12 complains about
    warnings.simplefilter("ignore")
    from jieba import finalseg

SEGMENTATION = "jieba-0.42.1"
"""The name of these words in a tokenizer's file: a change that moves a single border changes it."""

_FIRST_HAN, _LAST_HAN = 0x4E00, 0x9FD5  # what jieba means by Han
_OUTSIDE, _HAN, _ALNUM, _SIGN = range(4)  # classes of code points: between the blocks, and in them


def _classes() -> np.ndarray:
    table = np.full(0x110000, _OUTSIDE, np.uint8)
    table[_FIRST_HAN : _LAST_HAN + 1] = _HAN
    table[:128] = [_ALNUM if chr(c).isalnum() else _OUTSIDE for c in range(128)]
    table[[ord(c) for c in "+#&._%-"]] = _SIGN
    return table


_CLASS = _classes()


def words(text: str, hmm: bool = True, lexicon: Lexicon | None = None) -> list[str]:
    """The words of `text`, equal to `list(jieba.cut(text, HMM=hmm))` of jieba 0.42.1.

    Joined they are `text`. `hmm` guesses words that the dictionary lacks: jieba's default and CPM's
    way; T5 PEGASUS and RoFormer cut without. `lexicon`: another dictionary than jieba's own.
    """
    _, border_C = cut(text, hmm, lexicon)
    ends = (border_C.nonzero()[0] + 1).tolist()
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def spaced(texts: Sequence[str], hmm: bool = True, lexicon: Lexicon | None = None) -> list[str]:
    """`" ".join(words(text, hmm, lexicon))` of each text, without making the words.

    All are cut as one, between characters that no word holds: a call has a price of its own.
    """
    codes_C, border_C = cut("\x00".join(texts), hmm, lexicon)
    spaced_C, place_C = _spread(codes_C, border_C)
    together = spaced_C.tobytes().decode("utf-32-le", "surrogatepass")
    out, start = [], 0
    for text in texts:
        end = start + len(text)
        out.append(together[place_C[start] : place_C[end - 1] + 1] if text else "")
        start = end + 1
    return out


def spaced_utf8(
    texts: Sequence[str], hmm: bool = True, lexicon: Lexicon | None = None
) -> list[bytes]:
    """The same in UTF-8, which is what sentencepiece reads; of texts without halves of characters
    (frozen.unicode_text)."""
    codes_C, border_C = cut("\x00".join(texts), hmm, lexicon)
    last_D = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64) - 1
    utf8_B, ends_D = _spread_utf8(codes_C, border_C, last_D)
    together, out, start = utf8_B.tobytes(), [], 0
    for end in ends_D.tolist():
        out.append(together[start:end])
        start = end
    return out


def cut(text: str, hmm: bool, lexicon: Lexicon | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The code points of `text`, and where its words end (a bool per character)."""
    lexicon = lexicon or published()
    codes_C = codes(text)
    border_C, loose_C = _path(
        codes_C,
        _CLASS,
        math.log(lexicon.total),
        lexicon.frequency_N,
        lexicon.log_N,
        *lexicon.trie.arrays,
    )
    _join(codes_C, _CLASS, border_C, loose_C, hmm, *_hmm_tables(), _looked_up(lexicon))
    return codes_C, border_C


def _looked_up(lexicon: Lexicon) -> tuple[np.ndarray | bool, ...]:
    """The lexicon as `_join` asks it: frequencies, what the HMM may not join, the tree."""
    return (
        lexicon.frequency_N,
        lexicon.forced_N,
        lexicon.any_forced,
        *lexicon.trie.arrays,
    )


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


@compiled
def _path(codes_C, table, log_total, frequency_N, log_N, first, slot_S):  # type: ignore[no-untyped-def]
    """The likeliest path through each block: where its words end, and which characters of blocks
    are words of their own (two bools per character)."""
    count = len(codes_C)
    score_C = np.zeros(count + 1)  # of the best path from here to the end of the block
    end_C = np.empty(count, np.int64)  # of the word that begins here on it
    for c in range(count - 1, -1, -1):
        if table[codes_C[c]] == _OUTSIDE:
            score_C[c] = 0.0  # a block before it ends here
            end_C[c] = c + 1
            if codes_C[c] == 0x0D and c + 1 < count and codes_C[c + 1] == 0x0A:
                end_C[c] = c + 2
            continue
        best, end = -np.inf, 0
        node, e = first[codes_C[c]], c + 1
        while node:
            if frequency_N[node]:
                score = log_N[node] - log_total + score_C[e]
                if score >= best:  # of equal ones jieba takes the longest
                    best, end = score, e
            if e == count or table[codes_C[e]] == _OUTSIDE:
                break
            node = step(node, codes_C[e], slot_S)
            e += 1
        if not end:
            best, end = 0.0 - log_total + score_C[c + 1], c + 1
        score_C[c] = best
        end_C[c] = end
    border_C = np.zeros(count, np.bool_)
    loose_C = np.zeros(count, np.bool_)
    c = 0
    while c < count:
        end = end_C[c]
        border_C[end - 1] = True
        loose_C[c] = end - c == 1 and table[codes_C[c]] != _OUTSIDE
        c = end
    return border_C, loose_C


@compiled
def _join(codes_C, table, border_C, loose_C, hmm, start_S, step_SS, emit_HS, lexicon):  # type: ignore[no-untyped-def]
    """Join what the path left as single characters, as jieba does: ASCII, and with `hmm` Han."""
    frequency_N, forced_N, any_forced, first, slot_S = lexicon
    count = len(codes_C)
    from_CS = np.empty((count if hmm else 0, 4), np.uint8)
    start = 0
    while start < count:
        if not loose_C[start]:
            start += 1
            continue
        end = start + 1
        while end < count and loose_C[end]:
            end += 1
        # One character needs nothing; nor, with HMM, a word that is less likely than its parts.
        known = end - start == 1
        if hmm and not known:
            known = frequency_N[walk(codes_C, start, end, first, slot_S)] > 0
        c = start
        while c < end and not known:
            run = c
            han = table[codes_C[c]] == _HAN
            while c < end and (table[codes_C[c]] == _HAN) == han:
                c += 1
            if not han:
                _join_ascii(codes_C, table, border_C, run, c, hmm)
            elif hmm and c - run > 1:
                _join_han(codes_C, border_C, run, c, start_S, step_SS, emit_HS, from_CS)
                if any_forced:
                    _force(codes_C, border_C, run, c, forced_N, first, slot_S)
        start = end


@compiled
def _join_ascii(codes_C, table, border_C, first, end, hmm):  # type: ignore[no-untyped-def]
    """Split loose ASCII: with HMM by `[a-zA-Z0-9]+(\\.[0-9]+)?%?`, else signs stand alone."""
    border_C[first:end] = False
    c = first
    while c < end:
        kind = table[codes_C[c]]
        c += 1
        while c < end and table[codes_C[c]] == kind and (hmm or kind == _ALNUM):
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
    """Mark the likeliest words of the Han run [first, end) by Viterbi.

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
    for c in range(end - 1, first - 1, -1):
        border_C[c] = state == 1 or state == 3
        state = from_CS[c, state]


@compiled
def _force(codes_C, border_C, start, end, forced_N, first, slot_S):  # type: ignore[no-untyped-def]
    """Split the HMM's words in [start, end) that a user took out of the dictionary."""
    for c in range(start, end):
        if border_C[c]:
            if forced_N[walk(codes_C, start, c + 1, first, slot_S)]:
                border_C[start : c + 1] = True
            start = c + 1


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


@compiled
def _spread_utf8(codes_C, border_C, last_D):  # type: ignore[no-untyped-def]
    """The same as UTF-8 without the characters at `last_D`, which lie between the texts, and
    without the blanks after their last words; and where each text ends."""
    utf8_B, ends_D = np.empty(5 * len(codes_C), np.uint8), np.empty(len(last_D), np.int64)
    place = c = 0
    for d in range(len(last_D)):
        while c < last_D[d]:
            code = codes_C[c]
            if code < 0x80:
                utf8_B[place] = code
                place += 1
            elif code < 0x800:
                utf8_B[place], utf8_B[place + 1] = 0xC0 | code >> 6, 0x80 | code & 63
                place += 2
            elif code < 0x10000:
                utf8_B[place], utf8_B[place + 1] = 0xE0 | code >> 12, 0x80 | code >> 6 & 63
                utf8_B[place + 2] = 0x80 | code & 63
                place += 3
            else:
                utf8_B[place], utf8_B[place + 1] = 0xF0 | code >> 18, 0x80 | code >> 12 & 63
                utf8_B[place + 2], utf8_B[place + 3] = 0x80 | code >> 6 & 63, 0x80 | code & 63
                place += 4
            c += 1
            if border_C[c - 1] and c < last_D[d]:
                utf8_B[place] = 0x20
                place += 1
        ends_D[d] = place
        c += 1
    return utf8_B[:place], ends_D


_SENTENCE = re.compile(r"[^。！？!?…；;\n]*(?:[。！？!?…；;]+[”’」』）》】\"')\]]*\n?|\n|$)")


def sentences(text: str) -> list[str]:
    """`text` in sentences with their closing marks, quotes and line end; joined they are `text`."""
    return [sentence for sentence in _SENTENCE.findall(text) if sentence]
