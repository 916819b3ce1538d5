"""Traditional and simplified characters: the door to OpenCC.

    page --tally--> share of its Han that OpenCC would change
                      |  at most 0.05: simplified, or hardly anything else    left
                      |  more, and hardly a modern function word: classical   left, counted
                      +  more: a modern page in traditional characters        OpenCC t2s, counted

A simplified page changes by 0.01 at most, one in traditional characters by 0.26 at least, so the
threshold between has much room. What tells a modern page from classical prose and verse is how
often 的, 这, 们, 个 ... stand in it, and that they are not few beside 之, 乎, 者, 也 ...: measured
on the development corpus, this finds 97 to 100 % of technical, legal and spoken documents (85 to
100 % of pieces of 60 Han), and takes 2 % of poems and 5 % of classical prose for modern. A text
without any of those words is left as it is.

`folded` makes both scripts one, character by character, where texts are compared: OpenCC's table
of characters without its phrases (乾隆 becomes 干隆), and a character that only a phrase of
OpenCC's replaces (瞭解: 了解) is the same as its replacement. Nobody reads that.
"""

from functools import cache
from typing import Any

import numpy as np
import opencc

from data_pipeline.kernels import compiled

MOST_CHANGED = 0.05
"""Share of a page's Han that OpenCC may change before the page counts as traditional; one character
(the 乾 of 乾隆) never makes it so."""
MODERN = "的这们个么吗吧很它她您"
"""Function words of modern Chinese that classical text has no use for, in simplified form."""
CLASSICAL = "之乎者也矣焉哉兮曰吾汝其而以于"
LEAST_MODERN = 0.01
"""Share of the Han, at least, that MODERN has in a modern page."""
LEAST_MODERN_BY_CLASSICAL = 1 / 3
"""What MODERN is to CLASSICAL, at least, in a modern page."""

ONE_BY_PHRASE = "藉借覆复瞭了沈沉鍊链逕迳鉅钜鍾锺衹只甦苏彷仿画划傢家哩里俱具坏坯么幺"
"""Pairs of which OpenCC's phrases make the first one the second one in some word."""

_HAN = ((0x2E80, 0x2FE0), (0x3005, 0x3008), (0x3400, 0xA000), (0xF900, 0xFB00), (0x20000, 0x33480))
_IS_HAN, _CHANGES, _IS_MODERN, _IS_CLASSICAL = 1, 2, 4, 8
PIECE = 1 << 20  # characters that OpenCC converts at a time


def version() -> str:
    """Whose tables these are: part of the key of every stage that they decide."""
    return f"opencc {opencc.__version__}"


@cache
def _converter() -> Any:
    return opencc.OpenCC("t2s")


@cache
def table() -> np.ndarray:
    """The simplified form of every code point that stands alone, uint32 [0x110000]."""
    codes = [code for first, stop in _HAN for code in range(first, stop)]
    becomes = np.arange(0x110000, dtype=np.uint32)
    for code, form in zip(codes, _convert("\n".join(map(chr, codes))).split("\n"), strict=True):
        becomes[code] = ord(form) if len(form) == 1 else code
    return becomes


@cache
def _kinds() -> np.ndarray:
    """What each code point counts as, uint8."""
    kinds = np.zeros(0x110000, dtype=np.uint8)
    for first, stop in _HAN:
        kinds[first:stop] = _IS_HAN
    kinds[table() != np.arange(0x110000)] |= _CHANGES
    for words, kind in ((MODERN, _IS_MODERN), (CLASSICAL, _IS_CLASSICAL)):
        kinds[np.isin(table(), np.array([ord(word) for word in words], np.uint32))] |= kind
    return kinds


@cache
def forms() -> np.ndarray:
    """What each code point is where texts are compared, uint32 [0x110000]."""
    becomes = table()[table()]
    for one, other in zip(ONE_BY_PHRASE[::2], ONE_BY_PHRASE[1::2], strict=True):
        becomes[becomes == becomes[ord(one)]] = becomes[ord(other)]
    return becomes


def folded(codes: np.ndarray) -> np.ndarray:
    """Code points with both scripts made one, uint32."""
    return forms()[codes]


def characters() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which code points (bool) OpenCC changes, which are counted as Han, as MODERN, as
    CLASSICAL."""
    some = (_CHANGES, _IS_HAN, _IS_MODERN, _IS_CLASSICAL)
    changes, han, modern, classical = ((_kinds() & kind) != 0 for kind in some)
    return changes, han, modern, classical


def few(changing: int, han: int) -> bool:
    """Whether so few of a page's Han change that it is simplified."""
    return changing <= max(1, MOST_CHANGED * han)


def script(text: str, codes: np.ndarray | None = None) -> str:
    """ "traditional" (to be converted), "classical" (to be left) or "simplified" (or other).
    `codes`: its code points, if they are at hand."""
    if codes is None:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return told(*_tally(codes, _kinds()))


def told(han: int, changing: int, modern: int, classical: int) -> str:
    """`script` by how many characters of a text are Han, change, are MODERN, are CLASSICAL."""
    if few(changing, han):
        return "simplified"
    spoken = modern >= LEAST_MODERN * han and modern >= LEAST_MODERN_BY_CLASSICAL * classical
    return "traditional" if spoken else "classical"


def simplified(text: str) -> tuple[str, int]:
    """A text in simplified characters by OpenCC's words and characters, and how many of its
    characters became others; quotation marks 「」 stay."""
    converted = _convert(text)
    if len(converted) != len(text):  # a phrase of another length
        return converted, abs(len(converted) - len(text)) + 1
    before, after = (np.frombuffer(t.encode("utf-32-le"), np.uint32) for t in (text, converted))
    return converted, int(np.count_nonzero(before != after))


def _convert(text: str) -> str:
    """OpenCC's t2s, in pieces that end with a line: no phrase reaches over a line's end."""
    if len(text) <= PIECE:
        return str(_converter().convert(text))
    done, at = [], 0
    while at < len(text):
        stop = text.find("\n", at + PIECE) + 1 or len(text)
        done.append(str(_converter().convert(text[at:stop])))
        at = stop
    return "".join(done)


@compiled
def _tally(codes, kinds):  # type: ignore[no-untyped-def]
    """How many code points are Han, change, are modern, are classical."""
    han = changing = modern = classical = 0
    for code in codes:
        kind = kinds[code]
        han += kind & 1
        changing += (kind >> 1) & 1
        modern += (kind >> 2) & 1
        classical += (kind >> 3) & 1
    return han, changing, modern, classical
