"""Chinese text made even, and judged.

    text --normalise--> Page(text, kinds of its characters, what was changed) --judge--> True
                                                                                  or (False, reason)

Normalisation is narrow, for text that a model will write again. NFC, never NFKC (which would make
ASCII and plain digits of "，：（）①㈠℃"); full-width letters and digits become ASCII, a wide
space one space, every line end "\\n". Private-use code points, control characters, zero-width and
direction marks and U+FFFD are removed and counted. Ideographic indentation and trailing blanks go,
three and more line breaks become two. Applied twice it changes nothing more.

It is fast because every character is looked up once, in a table that says all that the steps want
to know: its kind, and whether they may have work with it (TRAITS). A compiled pass over many texts
at a time counts them, and only the steps that a page gives work to look at it again.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import xxhash

from configs.cleaning import Cleaning
from data_pipeline import hanzi, leftovers, mojibake, private
from data_pipeline.kernels import compiled
from data_pipeline.kinds import (
    ADDRESSED,
    ALL_KINDS,
    BLANK,
    CLASSICAL,
    COMPOSES,
    CONTROL,
    DIGIT,
    HAN,
    INVISIBLE,
    KINDS,
    LEAD,
    LOST,
    MODERN,
    ODD_HAN,
    PRIVATE,
    RAGGED,
    SIMPLER,
    SPOILT,
    SYMBOL,
    WIDE,
    tables,
    traits,
)

MODULES = ("clean", "hanzi", "kernels", "kinds", "leftovers", "mojibake", "private")
"""What a page depends on."""

REMOVED = {
    LOST: "lost",
    PRIVATE: "private_use",
    CONTROL: "control",
    INVISIBLE: "zero_width",
}

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
    modern: int
    """Function words of modern Chinese (hanzi.MODERN)."""
    classical: int
    """Those of classical Chinese."""


COUNTED = KINDS + 5
"""What is counted of a text: each kind; then the traits of any character, how many are SIMPLER,
LEAD, MODERN, CLASSICAL."""


def _look(text: str) -> "tuple[np.ndarray, np.ndarray, list[int]]":
    """Code points, their kinds, and what is counted of them."""
    return _look_at([text])[0]


def _look_at(texts: Sequence[str]) -> "list[tuple[np.ndarray, np.ndarray, list[int]]]":
    """The same of each text; all are looked up as one, a call for each would cost more."""
    whole = texts[0] if len(texts) == 1 else "".join(texts)
    codes = np.frombuffer(whole.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    kinds = np.empty(len(codes), np.uint8)
    ends = list(accumulate(map(len, texts)))
    counted = np.empty((len(texts), COUNTED), np.int64)
    _survey(codes, np.array(ends, np.int64), traits(), kinds, counted)
    found, start = [], 0
    for end, row in zip(ends, counted.tolist(), strict=True):
        found.append((codes[start:end], kinds[start:end], row))
        start = end
    return found


@compiled
def _survey(codes, ends, table, kinds, counted):  # type: ignore[no-untyped-def]
    """The kind of each code point; of each text what COUNTED says."""
    rows = np.zeros((2, ALL_KINDS + 1), np.int64)
    start = 0
    for d in range(len(ends)):
        end = ends[d]
        found, simpler, leads, modern, classical, ragged = 0, 0, 0, 0, 0, False
        rows[:] = 0
        for k in range(start, end):
            traits = table[codes[k]]
            kind = traits & ALL_KINDS
            kinds[k] = kind
            rows[k & 1, kind] += 1  # two rows: neighbours seldom wait for each other
            found |= traits
            simpler += (traits & SIMPLER) != 0
            leads += (traits & LEAD) != 0
            modern += (traits & MODERN) != 0
            classical += (traits & CLASSICAL) != 0
        for k in range(start + 1, end):
            ragged |= (codes[k] == 10) & ((codes[k - 1] == 32) | (codes[k - 1] == 9))
        for k in range(start + 2, end):
            ragged |= (codes[k] == 10) & (codes[k - 1] == 10) & (codes[k - 2] == 10)
        for kind in range(KINDS):
            counted[d, kind] = rows[0, kind] + rows[1, kind]
        counted[d, KINDS] = (found & ~ALL_KINDS) | (RAGGED if ragged else 0)
        counted[d, KINDS + 1], counted[d, KINDS + 2] = simpler, leads
        counted[d, KINDS + 3], counted[d, KINDS + 4] = modern, classical
        start = end


def normalise(text: str) -> Page:
    """Even out a document; see the head of this file for what that means and what it leaves."""
    return _normal(text, *_look(text))


def _normal(text: str, codes: "np.ndarray", kinds: "np.ndarray", counted: list[int]) -> Page:
    """The same for a text that was looked at."""
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
    counts, (traits, *numbers) = counted[:KINDS], counted[KINDS:]
    return Page(text, kinds, counts, changed, len(text) - counts[BLANK], codes, traits, *numbers)


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
    return _text(tables()[1][np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)])


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
    if page.traits & ODD_HAN:
        script = hanzi.script(page.text, page.codes)
    else:
        script = hanzi.told(page.counts[HAN], page.simpler, page.modern, page.classical)
    if script != "traditional":
        return page, script
    text, number = hanzi.simplified(page.text)
    changed = page.changed + Counter(simplified=number)
    return normalise(text)._replace(changed=changed), script


def prepared(text: str, rules: Cleaning) -> Page:
    """A text normalised, and changed as the rules ask for: markup, script, private data. What was
    done is in `changed`, its script (hanzi.script) too, as `script/NAME`."""
    return prepared_all([text], rules)[0]


def prepared_all(texts: Sequence[str], rules: Cleaning) -> list[Page]:
    """`prepared` of each; for short texts much faster than one after the other."""
    found: Sequence[Counter[str] | None] = [None] * len(texts)
    if rules.strip_markup and texts:
        texts, found = zip(*map(leftovers.strip, texts), strict=True)
    looked = zip(texts, _look_at(texts), found, strict=True)
    return [_prepared(_normal(text, *look), rules, left) for text, look, left in looked]


def _prepared(page: Page, rules: Cleaning, found: Counter[str] | None) -> Page:
    """What is asked for beyond normalising; `found`: markup that was taken out before."""
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
    return digests([page])[0]


def digests(pages: Sequence[Page]) -> list[bytes]:
    """`digest` of each."""
    codes, kinds, ends = together(pages)
    words, last = _words(codes, kinds, ends, hanzi.forms())
    found, start = [], 0
    for page, end in zip(pages, last.tolist(), strict=True):
        some = words[start:end] if end > start else page.codes
        found.append(xxhash.xxh3_128_digest(some.data))
        start = end
    return found


def together(pages: Sequence[Page]) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """Code points and kinds of some pages as one, and where each page ends: a kernel's call has a
    price of its own."""
    ends = np.array(list(accumulate(len(page.codes) for page in pages)), np.int64)
    if len(pages) == 1:
        return pages[0].codes, pages[0].kinds, ends
    codes = np.concatenate([page.codes for page in pages] or [np.empty(0, np.uint32)])
    return codes, np.concatenate([page.kinds for page in pages] or [np.empty(0, np.uint8)]), ends


@compiled
def _words(codes, kinds, ends, forms):  # type: ignore[no-untyped-def]
    """Letters and digits alone, both scripts made one; where those of each page end."""
    words, last, number = np.empty(len(codes) + 1, np.uint32), np.empty(len(ends), np.int64), 0
    start = 0
    for d in range(len(ends)):
        for k in range(start, ends[d]):
            words[number] = forms[codes[k]]
            number += kinds[k] <= DIGIT
        start, last[d] = ends[d], number
    return words[:number], last


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
