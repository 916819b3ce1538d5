"""Where sentences begin in the tokens of a text: characters and tokens laid along one ruler.

    text     我 来 了 。 」 你 呢 ？            sentences begin at 我 and at 你
    widths   1  1  1  1  0  1  1  1             of each character in what the vocabulary spells
    tokens   ▁我  ▁来了  ▁。  ▁  <unk>  ▁你  ▁呢  ▁？
    widths    1     2      1   0    0     1    1    1      the token at 4 begins the second one

A tokenizer says which tokens begin words, not where in the text they stand; but a token is as wide
as it is spelled, and a character as what the tokenizer reads in its place (NFKC, lower case; 0 for
a blank). Where a vocabulary spells <unk> that is not known: then, and wherever a border is not met
by the beginning of a word or the sums differ in the end, the sentences of that text are encoded on
their own. No word lies across their border, so that the words of each are counted in the whole. A
text where that does not add up has no sentences, and is counted.

Suffixes of names: C characters, T tokens, D texts, V the vocabulary.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from data_pipeline.frozen import Marked
from data_pipeline.kernels import compiled
from data_pipeline.segment import sentences
from data_pipeline.sidefile import SENTENCE, WORD
from data_pipeline.tablefile import running

_ENDS, _CLOSES, _LINE = 1, 2, 3  # kinds of characters; 0 is any other
_FRESH, _BODY, _ENDED, _CLOSED = range(4)  # before a sentence, in it, after 。, after 」
# Widths of characters that the vocabulary lacks: one unit of its own, perhaps part of a unit with
# others, of some run that may be <unk> as a whole; and of those not looked up yet.
_UNKNOWN, _RARE, _UNSURE, _UNSET = -1, -2, -3, -4
_WORD, _TOKEN, _BYTE = range(3)  # units
_SENTENCE = np.uint8(SENTENCE)
_BLANK = "\u2581"  # sentencepiece's mark for a blank


class Words(Protocol):
    """What is asked of a tokenizer."""

    kind: str
    vocab_size: int

    def encode_together(self, texts: Sequence[str], /) -> Marked:
        """The ids of the texts and which of them begin words."""
        ...

    def pieces(self, ids: range, /) -> list[str]:
        """The vocabulary's spelling."""
        ...


class Borders:
    """Finds the beginnings of sentences for one tokenizer."""

    def __init__(self, words: Words) -> None:
        self.words = words
        pieces = words.pieces(range(words.vocab_size))
        how = {"cpm": _unigram, "wordpiece": _wordpiece}.get(words.kind, _bytes)
        self._unit = _UNITS[how]
        widths, self._width_of = how(pieces)
        self._width_V = np.array(widths, np.int32)
        self._width = np.full(0x110000, _UNSET, np.int8)
        self._kind = _kinds()

    def encode(self, texts: Sequence[str]) -> tuple[Marked, np.ndarray, int]:
        """Ids of the texts, marks (uint8: WORD, SENTENCE) of all tokens, and of how many texts the
        sentences could not be found, which have none marked.

        A sentence begins with the first token that holds its first character, or, where that one
        has no token (a blank), with the next token there is.
        """
        whole = self.words.encode_together(texts)
        start_T, sure_D = self._along_the_ruler(texts, whole)
        doubtful = np.flatnonzero(~sure_D).tolist()
        unknown = self._by_counting(doubtful, texts, whole, start_T) if doubtful else 0
        marks_T = whole.starts.view(np.uint8) * np.uint8(WORD)
        marks_T |= start_T.view(np.uint8) * _SENTENCE
        return whole, marks_T, unknown

    def _along_the_ruler(
        self, texts: Sequence[str], whole: Marked
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens begin sentences, and of which texts that is sure."""
        if self._unit == _TOKEN:
            texts = [unicodedata.normalize("NFD", text.lower()) for text in texts]
        codes_C = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        for code in set(_unset(codes_C, self._width).tolist()):
            self._width[code] = self._width_of(chr(code))
        last_D = np.cumsum([len(text) for text in texts], dtype=np.int64)
        start_T = np.zeros(len(whole.ids), np.bool_)
        sure_D = _walk(
            codes_C, last_D, self._width, self._kind,
            whole.ids, whole.ends, self._width_V, whole.starts, self._unit, start_T,
        )  # fmt: skip
        return start_T, sure_D

    def _by_counting(
        self, numbers: Sequence[int], texts: Sequence[str], whole: Marked, start_T: np.ndarray
    ) -> int:
        """Mark which tokens of some texts begin sentences, from how many words each sentence has on
        its own; of how many of these texts that does not add up."""
        cut = [sentences(texts[number]) for number in numbers]
        alone = self.words.encode_together([part for parts in cut for part in parts])
        words_before = running(alone.starts)[np.concatenate([[0], alone.ends])]
        first = unknown = 0
        for number, parts in zip(numbers, cut, strict=True):
            words_in = np.diff(words_before[first : first + len(parts) + 1])
            first += len(parts)
            begin = int(whole.ends[number - 1]) if number else 0
            word_T = whole.starts[begin : whole.ends[number]]
            first_T = np.flatnonzero(word_T)
            if words_in.sum() != len(first_T) or (len(word_T) and not word_T[0]):
                unknown += 1
                continue
            start_T[begin + first_T[(words_in.cumsum() - words_in)[words_in > 0]]] = True
        return unknown


# ---- widths of each kind of tokenizer


def _unigram(pieces: list[str]) -> tuple[list[int], Callable[[str], int]]:
    """CPM's: NFKC, blanks and control characters are nothing, an unknown one is <unk>."""
    known = {piece for piece in pieces if len(piece) == 1}
    marks = {" ": "\u2582", "\n": "\u2583"}

    def width(char: str) -> int:
        read = unicodedata.normalize("NFKC", marks.get(char, char))
        if unicodedata.category(char)[0] == "C" and char != "\n":
            return 0
        if read.isspace() or read == _BLANK:
            return 0
        if all(c in known for c in read):
            return len(read)
        if len(read) > 1:
            return _UNSURE
        # To jieba all but Han and ASCII are single words.
        return _RARE if char.isascii() or "\u4e00" <= char <= "\u9fff" else _UNKNOWN

    return [0 if piece == "<unk>" else len(piece.lstrip(_BLANK)) for piece in pieces], width


def _wordpiece(pieces: list[str]) -> tuple[list[int], Callable[[str], int]]:
    """BERT's, of text in lower case and decomposed: accents and blanks are nothing; Han and signs
    are known or [UNK], of another character a whole run may be [UNK]."""
    known = set(pieces)

    def width(char: str) -> int:
        category = unicodedata.category(char)
        if category == "Mn" or category[0] in "CZ" or char.isspace():
            return 0
        if char in known or "##" + char in known:
            return 1
        alone = category[0] in "PS" or unicodedata.name(char, "").startswith("CJK ")
        return _UNKNOWN if alone else _UNSURE

    def spelled(piece: str) -> int:
        return 0 if piece == "[UNK]" else len(piece.removeprefix("##") or piece)

    return [spelled(piece) for piece in pieces], width


def _bytes(pieces: list[str]) -> tuple[list[int], Callable[[str], int]]:
    """Those that spell every byte."""

    def spelled(piece: str) -> int:
        if len(piece) == 6 and piece.startswith("<0x"):
            return 1
        return len(piece.replace(_BLANK, " ").encode())

    return [spelled(piece) for piece in pieces], lambda char: len(
        char.encode("utf-8", "surrogatepass")
    )


_UNITS = {_unigram: _WORD, _wordpiece: _TOKEN, _bytes: _BYTE}


def _kinds() -> np.ndarray:
    """What each character is to the border of a sentence, as in segment.sentences."""
    kind = np.zeros(0x110000, np.uint8)
    for chars, which in [("。！？!?…；;", _ENDS), ("”’」』）》】\"')]", _CLOSES), ("\n", _LINE)]:
        kind[[ord(char) for char in chars]] = which
    return kind


@compiled
def _unset(codes_C, width):  # type: ignore[no-untyped-def]
    """The characters whose width was not looked up yet, one time or more each."""
    found = [np.uint32(0) for _ in range(0)]
    before = np.uint32(0)
    for code in codes_C:
        if width[code] == _UNSET and code != before:
            found.append(code)
            before = code
    return np.array(found, np.uint32)


@compiled
def _walk(codes_C, last_D, width, kind, ids_T, last_T, width_V, word_T, unit, start_T):  # type: ignore[no-untyped-def]
    """Mark the tokens that begin sentences; returns of which texts it is sure.

    `unit`: what an unknown character is, a word or a token; a sentence begins with a word. _BYTE:
    nothing is unknown, a sentence begins with whatever token holds its first byte.
    """
    sure_D = np.ones(len(last_D), np.bool_)
    c = t = 0
    for d in range(len(last_D)):
        first_t = t
        at, place = 0, 0  # where token t begins, where character c does
        unknown, rare = 0, False  # what the vocabulary lacks since the last character with a width
        state, sure = _FRESH, True
        while c < last_D[d] and sure:
            what = kind[codes_C[c]]
            if (
                state == _FRESH
                or (state == _ENDED and what == 0)
                or (state == _CLOSED and what <= _ENDS)
            ):
                if unit != _BYTE:
                    while t < last_T[d] and at < place:
                        at += width_V[ids_T[t]]
                        t += 1
                    for _ in range(unknown):  # the end of the sentence before: one unit for each
                        sure = sure and t < last_T[d] and width_V[ids_T[t]] == 0
                        t += 1
                        while (
                            unit == _WORD
                            and t < last_T[d]
                            and width_V[ids_T[t]] == 0
                            and not word_T[t]
                        ):
                            t += 1
                else:
                    while t < last_T[d] and at + width_V[ids_T[t]] <= place:
                        at += width_V[ids_T[t]]
                        t += 1
                if t < last_T[d]:
                    sure = sure and (unit == _BYTE or (at == place and word_T[t] and not rare))
                    start_T[t] = True
                unknown, rare = 0, False
                state = _BODY
            if what == _LINE:
                state = _FRESH
            elif what == _ENDS:
                state = _ENDED
            elif what == _CLOSES and state == _ENDED:
                state = _CLOSED
            wide = width[codes_C[c]]
            sure = sure and wide != _UNSURE
            if wide > 0:
                place += wide
                unknown, rare = 0, False
            elif wide == _UNKNOWN:
                unknown += 1
            elif wide == _RARE:
                rare = True
            c += 1
        while t < last_T[d]:
            at += width_V[ids_T[t]]
            t += 1
        if not sure or at != place:
            sure_D[d] = False
            start_T[first_t:t] = False
        c = last_D[d]
    return sure_D
