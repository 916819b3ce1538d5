"""Sketches of documents: how alike two of them are, without laying them side by side.

    text --NFC, letters and digits, simplified--> code points --n in a row--> hashes of n-grams
         --108 times a * hash + b, the lowest stays--> signature --6 numbers at a time--> 18 keys

Two documents share a number of their signatures with a probability equal to the Jaccard similarity
of their sets of n-grams (Broder 1997, "On the resemblance and containment of documents"); they
share a key, and become candidates, with probability 1 - (1 - J^6)^18: J = 0.8: 0.996, 0.7: 0.90,
0.5: 0.25, 0.2: 0.001. n-grams of characters, because one edited character spoils 5 of them, but 5
words of Chinese text take 8 characters to spoil. The kernels are compiled by numba; a text goes
through them in pieces, so that memory does not grow with a document.
"""

import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np

from data_pipeline import hanzi
from data_pipeline.kernels import compiled
from data_pipeline.kinds import DIGIT, tables

PIECE = 1 << 18  # characters at a time: 1 MB of code points, 2 MB of hashes
BLOCK = 512  # hashes of n-grams that stay in the first cache while all functions see them
PERMUTATION_SEED = 0xBA51E
NOTHING = np.uint64(0xFFFFFFFFFFFFFFFF)


# ---- texts -> hashes of n-grams


def kinds() -> np.ndarray:
    """The kind (kinds.py) of every code point, uint8."""
    return tables()[0]


def letters(text: str) -> np.ndarray:
    """Code points of the letters and digits of a text in NFC, Han in simplified form, uint32;
    blanks, punctuation and symbols are left out, and so are wide letters, which a cleaned text does
    not have."""
    text = _nfc(text)
    pieces = [_letters_of(text[at : at + PIECE]) for at in range(0, len(text), PIECE)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)


def _nfc(text: str) -> str:
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _letters_of(text: str) -> np.ndarray:
    return _solid(_codes(text), kinds(), hanzi.forms())


def _pieces(text: str, n: int) -> Iterator[np.ndarray]:
    """The letters of a text, a piece at a time; each begins with the last n - 1 of the one before,
    so that every n-gram stands in exactly one. Fewer than n letters are one piece."""
    rest, whole = np.empty(0, np.uint32), True
    for at in range(0, len(text), PIECE):
        rest = np.concatenate([rest, _letters_of(text[at : at + PIECE])])
        if len(rest) >= n:
            yield rest
            rest, whole = rest[len(rest) - n + 1 :], False
    if whole and len(rest):
        yield rest


def gram_hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """The hash of every n-gram of code points, in order, uint64; of fewer than n, one of them all;
    of none, none."""
    if len(codes) == 0:
        return np.empty(0, np.uint64)
    return _grams(codes, min(n, len(codes)))


def gram_set(codes: np.ndarray, n: int) -> np.ndarray:
    """The distinct hashes of gram_hashes(), sorted."""
    hashes = gram_hashes(codes, n)
    hashes.sort()
    return hashes[_distinct(hashes)]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The share of n-grams that two sets (of gram_set) have in common; 0 for two empty ones."""
    both = _common(a, b)
    return both / max(len(a) + len(b) - both, 1)


# ---- hashes of n-grams -> signature -> keys


@cache
def functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors (odd) and the summands of the hash functions, uint64 [count] each."""
    draw = np.random.Generator(np.random.PCG64(PERMUTATION_SEED))
    a = draw.integers(0, 1 << 64, count, dtype=np.uint64) | np.uint64(1)
    return a, draw.integers(0, 1 << 64, count, dtype=np.uint64)


def signature(text: str, n: int, count: int) -> np.ndarray | None:
    """The lowest value of each of `count` hash functions over the n-grams of a text, uint64
    [count]; None for a text without letters."""
    a, b = functions(count)
    lowest = np.full(count, NOTHING)
    text = _nfc(text)
    if len(text) <= PIECE:
        found = _sign(_codes(text), kinds(), hanzi.forms(), n, a, b, lowest)
        return lowest if found else None
    empty = True
    for codes in _pieces(text, n):
        _lower(gram_hashes(codes, n), a, b, lowest)
        empty = False
    return None if empty else lowest


def estimate(a: np.ndarray, b: np.ndarray) -> float:
    """What two signatures say about the Jaccard similarity of their documents; standard error
    sqrt(J (1 - J) / count)."""
    return float(np.mean(a == b))


def band_keys(signed: np.ndarray, bands: int) -> np.ndarray:
    """One hash for each band of a signature, uint64 [bands]."""
    return _keys(signed.reshape(bands, -1))


# ---- kernels


@compiled
def _solid(codes, kinds, forms):  # type: ignore[no-untyped-def]
    """The code points that make words, in their simplified forms."""
    out = np.empty(len(codes), np.uint32)
    n = 0
    for code in codes:
        out[n] = forms[code]
        n += kinds[code] <= DIGIT
    return out[:n]


@compiled
def _mix(x):  # type: ignore[no-untyped-def]
    """splitmix64's finaliser: every bit of a hash depends on every bit of what it is made of."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _grams(codes, n):  # type: ignore[no-untyped-def]
    """Rolling polynomial hash (Karp and Rabin 1987) modulo 2^64, mixed."""
    factor = np.uint64(0x9E3779B97F4A7C15)
    leaving = np.uint64(1)
    rolling = np.uint64(0)
    for k in range(n):
        leaving *= factor
        rolling = rolling * factor + np.uint64(codes[k])
    out = np.empty(len(codes) - n + 1, np.uint64)
    out[0] = _mix(rolling)
    for k in range(n, len(codes)):
        rolling = rolling * factor + np.uint64(codes[k]) - np.uint64(codes[k - n]) * leaving
        out[k - n + 1] = _mix(rolling)
    return out


@compiled
def _lower(hashes, a, b, lowest):  # type: ignore[no-untyped-def]
    """Lower a signature by more hashes, in place."""
    for start in range(0, len(hashes), BLOCK):
        block = hashes[start : start + BLOCK]
        for f in range(len(a)):
            factor, summand, least = a[f], b[f], lowest[f]
            for k in range(len(block)):
                least = min(least, block[k] * factor + summand)
            lowest[f] = least


@compiled
def _sign(codes, kinds, forms, n, a, b, lowest):  # type: ignore[no-untyped-def]
    """The three above in one call, for the many short texts; how many letters there are."""
    solid = _solid(codes, kinds, forms)
    if len(solid):
        _lower(_grams(solid, min(n, len(solid))), a, b, lowest)
    return len(solid)


@compiled
def _keys(bands):  # type: ignore[no-untyped-def]
    out = np.empty(len(bands), np.uint64)
    for band in range(len(bands)):
        key = np.uint64(band)
        for value in bands[band]:
            key = _mix(key * np.uint64(0x9E3779B97F4A7C15) + value)
        out[band] = key
    return out


@compiled
def _distinct(hashes):  # type: ignore[no-untyped-def]
    """Which of sorted hashes differ from the one before."""
    out = np.ones(len(hashes), np.bool_)
    for k in range(1, len(hashes)):
        out[k] = hashes[k] != hashes[k - 1]
    return out


@compiled
def _common(a, b):  # type: ignore[no-untyped-def]
    """How many hashes two sorted sets share."""
    i = j = both = 0
    while i < len(a) and j < len(b):
        x, y = a[i], b[j]
        both += x == y
        i += x <= y
        j += y <= x
    return both
