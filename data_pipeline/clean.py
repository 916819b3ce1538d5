"""Chinese text made even, and judged.

    text --normalise--> Page(text, kinds of its characters, what was changed) --judge--> True
                                                                                  or (False, reason)

Normalisation is narrow, for text that a model will write again. NFC, never NFKC (which would make
ASCII and plain digits of "，：（）①㈠℃"); full-width letters and digits become ASCII, a wide
space one space, every line end "\\n". Private-use code points, control characters, zero-width and
direction marks and U+FFFD are removed and counted. Ideographic indentation and trailing blanks go,
three and more line breaks become two. Applied twice it changes nothing more.

It is fast because every character is looked up once, in a table that says all that the steps want
to know: its kind, and whether they may have work with it (TRAITS). A compiled pass counts them, and
only the steps that a page gives work to look at it again.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import xxhash

from configs.cleaning import Cleaning
from data_pipeline import hanzi, leftovers, mojibake, private
from data_pipeline.kernels import compiled

MODULES = ("clean", "hanzi", "kernels", "leftovers", "mojibake", "private")
"""What a page depends on."""

# Kinds of characters. Up to DIGIT they make words; from WIDE on normalisation has work to do.
HAN, LETTER, DIGIT, PUNCTUATION, SYMBOL, BLANK, WIDE, RETURN, LOST, PRIVATE, CONTROL, INVISIBLE = (
    range(12)
)
KINDS = 12
REMOVED = {
    LOST: "lost",
    PRIVATE: "private_use",
    CONTROL: "control",
    INVISIBLE: "zero_width",
}

# Traits of characters, above their kind in one number: what gives a later step work.
_ALL_KINDS = 15
COMPOSES = 1 << 4  # Unicode may move it, compose it, or replace it
ADDRESSED = 1 << 5  # addresses or their labels have it: private.py
SPOILT = 1 << 6  # a wrong decoding makes it: mojibake.py
ODD_HAN = 1 << 7  # Han here and not in mojibake.py or hanzi.py, or the other way round
SIMPLER = 1 << 8  # OpenCC changes it: hanzi.py
LEAD = 1 << 9  # Han that could begin a wrong decoding: mojibake.py
RAGGED = 1 << 10  # of a text, not of a character: blanks end a line, or three line breaks follow

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
_INDENTATION = re.compile(r"^[ \t\u00a0]*\u3000[ \t\u00a0\u3000]*", re.MULTILINE)
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_GAPS = re.compile(r"\n{3,}")
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|\$\$.*?\$\$|`[^`\n]{1,300}`|<[^<>\n]{1,300}>|https?://[!-~]+", re.DOTALL
)
"""Fenced and inline code, displayed formulas, tags, addresses."""


class Page(NamedTuple):
    """A normalised document."""

    text: str
    kinds: "np.ndarray"
    """The kind of every character, uint8 [characters]."""
    counts: list[int]
    """Characters of each kind, [KINDS]."""
    changed: Counter[str]
    """Characters removed (lost, private_use, control, zero_width), folded (width), simplified."""
    solid: int
    """Characters that are not blank."""
    codes: "np.ndarray"
    """Every character's code point, uint32 [characters]."""
    traits: int
    """The traits that any of its characters has."""
    simpler: int
    """Characters that OpenCC changes."""
    leads: int
    """Han that could begin a wrong decoding."""


@cache
def _tables() -> "tuple[np.ndarray, np.ndarray]":
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
def _traits() -> "tuple[np.ndarray, np.ndarray]":
    """The kind and the traits of every code point, uint16; and where _survey counts, int64."""
    kinds = _tables()[0]
    traits, han = kinds.astype(np.uint16), kinds == HAN
    traits[_composing()] |= COMPOSES
    traits[[ord(char) for char in private.ADDRESSES]] |= ADDRESSED
    spoilt, lead, counted = mojibake.characters()
    traits[spoilt] |= SPOILT
    traits[lead] |= LEAD
    simpler, told = hanzi.characters()
    traits[simpler] |= SIMPLER
    traits[(counted != han) | (told != han)] |= ODD_HAN
    return traits, np.zeros(KINDS + 3, dtype=np.int64)


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


def _look(text: str) -> "tuple[np.ndarray, np.ndarray, list[int]]":
    """Code points, their kinds, and what _survey counts."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = np.empty(len(codes), np.uint8)
    table, counted = _traits()
    _survey(codes, table, kinds, counted)
    return codes, kinds, counted.tolist()


@compiled
def _survey(codes, table, kinds, counted):  # type: ignore[no-untyped-def]
    """The kind of each code point; how many there are of each kind, the traits of any, how many are
    SIMPLER, how many LEAD."""
    found, simpler, leads, ragged = 0, 0, 0, False
    rows = np.zeros((2, _ALL_KINDS + 1), np.int64)
    for k in range(len(codes)):
        traits = table[codes[k]]
        kind = traits & _ALL_KINDS
        kinds[k] = kind
        rows[k & 1, kind] += 1  # two rows: neighbours seldom wait for each other
        found |= traits
        simpler += (traits & SIMPLER) != 0
        leads += (traits & LEAD) != 0
    for k in range(1, len(codes)):
        ragged |= (codes[k] == 10) & ((codes[k - 1] == 32) | (codes[k - 1] == 9))
    for k in range(2, len(codes)):
        ragged |= (codes[k] == 10) & (codes[k - 1] == 10) & (codes[k - 2] == 10)
    for kind in range(KINDS):
        counted[kind] = rows[0, kind] + rows[1, kind]
    counted[KINDS] = (found & ~_ALL_KINDS) | (RAGGED if ragged else 0)
    counted[KINDS + 1], counted[KINDS + 2] = simpler, leads


def normalise(text: str) -> Page:
    """Even out a document; see the head of this file for what that means and what it leaves."""
    codes, kinds, counted = _look(text)
    changed: Counter[str] = Counter()
    if any(counted[WIDE:KINDS]):
        for kind, name in REMOVED.items():
            if counted[kind]:
                changed[name] = counted[kind]
        if counted[WIDE]:
            changed["width"] = counted[WIDE]
        text = _even(text, codes, kinds, counted)
        codes, kinds, counted = _look(text)
    even = text
    if counted[KINDS] & COMPOSES and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if counted[KINDS] & RAGGED:
        text = _GAPS.sub("\n\n", _TRAILING.sub("", text))
    text = text.strip(" \t\n")
    if text is not even and text != even:
        codes, kinds, counted = _look(text)
    *counts, traits, simpler, leads = counted
    solid = len(text) - counts[BLANK]
    return Page(text, kinds, counts, changed, solid, codes, traits, simpler, leads)


def _even(text: str, codes: "np.ndarray", kinds: "np.ndarray", counts: list[int]) -> str:
    """What normalise() does where a character has to go or to change."""
    if any(counts[LOST:KINDS]):
        text = _text(codes[kinds < LOST])
    if counts[WIDE]:
        text = _INDENTATION.sub("", text)
    return _plain(text)


def _plain(text: str) -> str:
    """Line ends and wide characters in their plain form."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _text(_tables()[1][np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)])


def folded(text: str) -> str:
    """A text with the characters that documents of a corpus have; its blanks stay where they are.

    For prompts: what normalise() does to characters, and nothing that it does to layout.
    """
    codes, kinds, counted = _look(text)
    if any(counted[WIDE:KINDS]):
        text = _plain(_text(codes[kinds < LOST]))
    return unicodedata.normalize("NFC", text)


def _text(codes: "np.ndarray") -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")


def simplify(page: Page) -> tuple[Page, str]:
    """A page in traditional characters in simplified ones; also its script (hanzi.script): of
    "classical" and "simplified" nothing is changed."""
    if not page.traits & ODD_HAN and hanzi.few(page.simpler, page.counts[HAN]):
        return page, "simplified"
    script = hanzi.script(page.text, page.codes)
    if script != "traditional":
        return page, script
    text, number = hanzi.simplified(page.text)
    changed = page.changed + Counter(simplified=number)
    return normalise(text)._replace(changed=changed), script


def prepared(text: str, rules: Cleaning) -> Page:
    """A text normalised, and changed as the rules ask for: markup, script, private data. What was
    done is in `changed`, its script (hanzi.script) too, as `script/NAME`."""
    found: Counter[str] | None = None
    if rules.strip_markup:
        text, found = leftovers.strip(text)
    page = normalise(text)
    if rules.simplify:
        page, script = simplify(page)
        page.changed[f"script/{script}"] += 1
    if (kinds := rules.private_kinds()) and _may_be_private(page):
        text, masked = private.mask(page.text, kinds, page.codes)
        if masked:
            page = normalise(text)._replace(changed=page.changed)
            page.changed.update({f"private_{kind}": number for kind, number in masked.items()})
    if found:
        page.changed.update(+found)
    return page


def _may_be_private(page: Page) -> bool:
    """Whether there are digits enough, or what an address or its label has."""
    return page.counts[DIGIT] >= private.FEWEST_DIGITS or page.traits & ADDRESSED != 0


def digest(page: Page) -> bytes:
    """16 bytes that are equal for documents with the same letters and digits, whatever stands
    between them, in traditional or simplified characters: xxh3-128 of their code points; without
    any, of all its characters."""
    words = _words(page.codes, page.kinds, hanzi.forms())
    return xxhash.xxh3_128_digest((words if len(words) else page.codes).data)


@compiled
def _words(codes, kinds, forms):  # type: ignore[no-untyped-def]
    """Letters and digits alone, both scripts made one."""
    words, number = np.empty(len(codes), np.uint32), 0
    for k in range(len(codes)):
        words[number] = forms[codes[k]]
        number += kinds[k] <= DIGIT
    return words[:number]


# ---- filters: each answers True or (False, reason)

Verdict = bool | tuple[bool, str]
Filter = Callable[[Page, Cleaning], Verdict]


def not_lost(page: Page, rules: Cleaning) -> Verdict:
    """Few U+FFFD: the text was decoded with the right encoding."""
    lost = page.changed.get("lost", 0)
    share = lost / max(page.solid + lost, 1)
    return share <= rules.max_lost_ratio or (False, "lost_characters")


def not_mojibake(page: Page, rules: Cleaning) -> Verdict:
    """Few characters that only a wrong decoding makes."""
    if not page.traits & (SPOILT | ODD_HAN) and page.leads <= mojibake.SUSPECT * page.counts[HAN]:
        return True
    made = mojibake.traces(page.text, page.codes)
    return made <= rules.max_mojibake_ratio * page.solid or (False, "mojibake")


def not_private(page: Page, rules: Cleaning) -> Verdict:
    """Few private-use code points: the text does not depend on one font."""
    private = page.changed.get("private_use", 0)
    return private <= rules.max_private_use_ratio * (page.solid + private) or (False, "private_use")


def long_enough(page: Page, rules: Cleaning) -> Verdict:
    """Not a fragment."""
    return page.solid >= rules.min_characters or (False, "too_short")


def short_enough(page: Page, rules: Cleaning) -> Verdict:
    """Not a dump."""
    return page.solid <= rules.max_characters or (False, "too_long")


def chinese(page: Page, rules: Cleaning) -> Verdict:
    """Chinese characters make up enough of it, or of what is no code, formula, tag or address."""
    if page.counts[HAN] >= rules.min_han_ratio * page.solid:
        return True
    if page.counts[HAN] < rules.min_han_ratio_with_code * page.solid:
        return False, "few_han"
    prose = _look(_NO_PROSE.sub("", page.text))[2][:KINDS]
    solid = sum(prose) - prose[BLANK]
    return prose[HAN] >= rules.min_han_ratio * solid or (False, "few_han")


def no_table(page: Page, rules: Cleaning) -> Verdict:
    """Not mainly numbers."""
    return page.counts[DIGIT] <= rules.max_digit_ratio * page.solid or (False, "many_digits")


def no_drawing(page: Page, rules: Cleaning) -> Verdict:
    """Not mainly symbols."""
    return page.counts[SYMBOL] <= rules.max_symbol_ratio * page.solid or (False, "many_symbols")


def no_echo(page: Page, rules: Cleaning) -> Verdict:
    """Lines seldom stand a second time."""
    lines = [line for line in page.text.split("\n") if line]
    distinct = set(lines)
    if len(distinct) == len(lines):
        return True
    repeated = sum(map(len, lines)) - sum(map(len, distinct))
    limit = rules.max_repeated_line_ratio * sum(map(len, lines))
    return repeated <= limit or (False, "repeated_lines")


FILTERS: tuple[Filter, ...] = (
    not_lost,
    not_private,
    not_mojibake,
    long_enough,
    short_enough,
    chinese,
    no_table,
    no_drawing,
    no_echo,
)


def judge(page: Page, rules: Cleaning) -> Verdict:
    """True, or (False, the reason of the first filter that refuses)."""
    for accepts in FILTERS:
        verdict = accepts(page, rules)
        if verdict is not True:
            return verdict
    return True
