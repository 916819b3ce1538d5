"""What every code point is: its kind, and its traits, which give a step of cleaning work.

Unicode's categories, our ranges --> tables()   kind of each code point, what it becomes
hanzi, mojibake, private         --> traits()   kind and traits in one number: one look-up
"""

import unicodedata
from functools import cache

import numpy as np

from data_pipeline import hanzi, mojibake, private

# Kinds of characters. Up to DIGIT they make words; from WIDE on normalisation has work to do.
HAN, LETTER, DIGIT, PUNCTUATION, SYMBOL, BLANK, WIDE, RETURN, LOST, PRIVATE, CONTROL, INVISIBLE = (
    range(12)
)
KINDS = 12
# Traits of characters, above their kind in one number: what gives a later step work.
ALL_KINDS = 15
COMPOSES = 1 << 4  # Unicode may move it, compose it, or replace it
ADDRESSED = 1 << 5  # addresses or their labels have it: private.py
SPOILT = 1 << 6  # a wrong decoding makes it: mojibake.py
ODD_HAN = 1 << 7  # Han here and not in mojibake.py or hanzi.py, or the other way round
SIMPLER = 1 << 8  # OpenCC changes it: hanzi.py
LEAD = 1 << 9  # Han that could begin a wrong decoding: mojibake.py
RAGGED = 1 << 10  # of a text, not of a character: blanks end a line, or three line breaks follow
MODERN = 1 << 11  # a function word of modern Chinese: hanzi.py
CLASSICAL = 1 << 12  # one of classical Chinese

_HAN = (
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),  # 々〆〇
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),  # compatibility ideographs; NFC replaces most of them
    (0x20000, 0x3FFFF),
)
_WIDE_ASCII = ((0xFF10, 0xFF19), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A))
_WIDE_BLANKS = (0x00A0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000)
_LINE_ENDS = (0x000B, 0x000C, 0x0085, 0x2028, 0x2029)
_PRIVATE = ((0xE000, 0xF8FF), (0xF0000, 0x10FFFF))
_INVISIBLE = (
    (0x00AD, 0x00AD),  # soft hyphen
    (0x061C, 0x061C),
    (0x180E, 0x180E),
    (0x200B, 0x200F),  # zero-width space and joiners, direction marks
    (0x202A, 0x202E),
    (0x2060, 0x206F),
    (0xFEFF, 0xFEFF),  # byte order mark
    (0xFFF9, 0xFFFB),
    (0xE0000, 0xE007F),  # tags
)
_CONTROL = ((0x00, 0x08), (0x0E, 0x1F), (0x7F, 0x84), (0x86, 0x9F), (0xD800, 0xDFFF))


@cache
def tables() -> "tuple[np.ndarray, np.ndarray]":
    """The kind of every code point, and what each becomes."""
    kinds = np.full(0x110000, SYMBOL, dtype=np.uint8)
    becomes = np.arange(0x110000, dtype=np.uint32)
    named = {"L": LETTER, "M": LETTER, "N": DIGIT, "P": PUNCTUATION, "S": SYMBOL}
    for code in range(0x20000):
        kinds[code] = named.get(unicodedata.category(chr(code))[0], SYMBOL)
    kinds[0xE0100:0xE01F0] = LETTER  # variation selectors of ideographs
    for kind, ranges in (
        (HAN, _HAN),
        (PRIVATE, _PRIVATE),
        (INVISIBLE, _INVISIBLE),
        (CONTROL, _CONTROL),
        (WIDE, _WIDE_ASCII),
    ):
        for first, last in ranges:
            kinds[first : last + 1] = kind
    kinds[0xFDD0:0xFDF0] = CONTROL  # no characters, by definition
    kinds[0xFFFE::0x10000] = kinds[0xFFFF::0x10000] = CONTROL
    for first, last in _WIDE_ASCII:
        becomes[first : last + 1] -= 0xFEE0
    for codes, plain in ((_WIDE_BLANKS, " "), (_LINE_ENDS, "\n")):
        kinds[list(codes)] = WIDE
        becomes[list(codes)] = ord(plain)
    kinds[[ord(" "), ord("\t"), ord("\n")]] = BLANK
    kinds[ord("\r")] = RETURN
    kinds[0xFFFD] = LOST
    return kinds, becomes


@cache
def traits() -> "np.ndarray":
    """The kind and the traits of every code point, uint16."""
    kinds = tables()[0]
    found, han = kinds.astype(np.uint16), kinds == HAN
    found[_composing()] |= COMPOSES
    found[[ord(char) for char in private.ADDRESSES]] |= ADDRESSED
    spoilt, lead, counted = mojibake.characters()
    found[spoilt] |= SPOILT
    found[lead] |= LEAD
    simpler, told, modern, classical = hanzi.characters()
    found[simpler] |= SIMPLER
    found[modern] |= MODERN
    found[classical] |= CLASSICAL
    found[(counted != han) | (told != han)] |= ODD_HAN
    return found


def _composing() -> list[int]:
    """Code points without which a text is NFC: what moves or composes, and what NFC replaces (the
    quick check of Unicode's annex 15)."""
    found = {*range(0x1100, 0x1200)}  # Hangul's parts
    for code in range(0x110000):
        parts = unicodedata.decomposition(char := chr(code)).split()
        if len(parts) == 2 and parts[0][0] != "<":
            found.add(int(parts[1], 16))
        if unicodedata.combining(char) or (
            parts and parts[0][0] != "<" and not unicodedata.is_normalized("NFC", char)
        ):
            found.add(code)
    return sorted(found)
