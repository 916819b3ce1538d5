"""Characters as BERT sees them: single or of a piece, blank, dropped; accents; lower case.

    text --normal--> without case and accents --basic--> single Han and signs | the rest between

Tables hold a value for each code point [0x110000], from Unicode's categories.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np

_HAN = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
INSIDE, ALONE, BLANK = range(3)
"""Classes of characters: of a piece, one on its own, between."""
NEXT = "\x00"
"""Between texts that are read as one; in a text it means what \\x01 means: nothing."""


def normal(text: str) -> str:
    """A text as the word kind segments it: lower case, without accents."""
    return without(unicodedata.normalize("NFD", text.lower()), accents())


def basic(text: str, word: bool) -> Iterator[str]:
    """Han and signs alone, and what blanks leave together."""
    parts: list[str] = []
    dropped = dropped_codes()
    for char in text:
        if is_sign(char) or is_han(ord(char)):
            parts.append(f" {char} ")
        elif char in " \t\n\r" or unicodedata.category(char) == "Zs":
            parts.append(" ")
        elif not dropped[ord(char)] or (word and unicodedata.category(char) == "Co"):
            parts.append(char)
    return iter("".join(parts).split())


def is_han(code: int) -> bool:
    """Whether BERT takes a code point for Chinese."""
    return any(first <= code <= last for first, last in _HAN)


def is_sign(char: str) -> bool:
    """ASCII that is no letter, digit, blank or control, or punctuation of Unicode."""
    if char.isascii():
        return "!" <= char <= "~" and not char.isalnum()
    return unicodedata.category(char)[0] == "P"


def without(text: str, dropped: np.ndarray) -> str:
    """`text` without the characters of which `dropped` [code points] is true."""
    codes_C = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    dropped_C = dropped[codes_C]
    return codes_C[~dropped_C].tobytes().decode("utf-32-le") if dropped_C.any() else text


@cache
def _categories() -> np.ndarray:
    """The category of each code point, two letters [0x110000]."""
    return np.array([unicodedata.category(chr(code)) for code in range(0x110000)], "S2")


@cache
def accents() -> np.ndarray:
    """Accents: what NFD sets apart and lower-casing models leave out."""
    return _categories() == b"Mn"


@cache
def dropped_codes() -> np.ndarray:
    """Control, format and private use (to bert4keras the last are characters), U+FFFD."""
    dropped = np.isin(_categories(), [b"Cc", b"Cf", b"Co"])
    dropped[[0x9, 0xA, 0xD]] = False
    dropped[0xFFFD] = True
    dropped[0] = False  # NEXT; a text has none
    return dropped


@cache
def classes() -> np.ndarray:
    """INSIDE, ALONE or BLANK of each code point."""
    categories = _categories()
    table = np.full(0x110000, INSIDE, np.uint8)
    table[np.char.startswith(categories, b"P")] = ALONE
    for first, last in _HAN:
        table[first : last + 1] = ALONE
    table[:128] = [ALONE if is_sign(chr(c)) else table[c] for c in range(128)]
    table[np.isin(categories, [b"Zs", b"Zl", b"Zp"])] = BLANK
    table[[0x9, 0xA, 0xD]] = BLANK
    table[0] = ALONE  # NEXT
    return table
