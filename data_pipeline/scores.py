"""Numbers that say how a document is written: one compiled pass over its characters.

    Page --characters, lines--> shares, means, marks          whole document
         --windows of <= 2,000--> n-grams, entropy            mean over the windows
         -> float32 [SCORES], a row of cleaned.data/scores/SHARD.npy

What each score means stands in configs/quality.py, where the bounds on it are set. The families are
those of Gopher (Rae et al. 2021, A1), FineWeb-2 and MAP-CC; their words are characters here, which
needs no segmenter and is 300 times as fast. Repetition is counted in windows: in a book of 100,000
characters every run of five has stood before somewhere, and that says nothing about it.

In a window a run can only repeat where the two shorter runs in it do: runs of two are counted, and
each longer size looks at the few places that are left.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from configs.quality import SCORES
from data_pipeline.clean import Page, together
from data_pipeline.kernels import compiled
from data_pipeline.kinds import BLANK, DIGIT, HAN, LETTER, SYMBOL
from data_pipeline.shards import save

WINDOW = 2000  # characters
SHORT_LINE = 10  # characters
LONGEST = 13
SLOTS = 16384  # eight times a window
COLUMNS = np.dtype([(name, "<f4") for name in SCORES])
"""A row of a shard's table of scores."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 by the golden ratio: Knuth's hash

_TERMINAL, _SENTENCE, _CLOSER, _BULLET, _ELLIPSIS, _RARE = (1 << bit for bit in range(6))
_STOP_SHIFT = 8
_MARKED = {
    _TERMINAL: "。！？!?.…．｡；;‼⁇⁈⁉‽",
    _SENTENCE: "。！？!?…｡‼⁇⁈⁉‽",
    _CLOSER: "”’」』）)】》〉〕］\"'",
    _BULLET: "•●○■□▪▫※·➢‣▶◀◦–▲△◆◇★☆",
    _ELLIPSIS: "…",
    _RARE: "….#【】",
}
STOP_WORDS = ("于於", "为為", "与與", "后後", *"的年在月是和日了有被人中他也而由")
"""FineWeb-2's for cmn_Hani, the two scripts of one word together, without its "·"."""


@cache
def _marks() -> np.ndarray:
    """Marks of every code point: bits, and above them the number (from 1) of its stop word."""
    marks = np.zeros(0x110000, dtype=np.uint16)
    for bit, characters in _MARKED.items():
        marks[[ord(char) for char in characters]] |= bit
    for number, forms in enumerate(STOP_WORDS, 1):
        for char in forms:
            marks[ord(char)] |= number << _STOP_SHIFT
    return marks


@cache
def _products() -> np.ndarray:
    """n ln n for the counts in a window, float64."""
    counts = np.arange(WINDOW + 1, dtype=np.float64)
    return counts * np.log(np.maximum(counts, 1))


@cache
def _work() -> tuple[np.ndarray, ...]:
    """What kernels look up and count in, made once: marks, products, counts of characters."""
    return _marks(), _products(), np.zeros(0x110000, np.int16)


def scores(page: Page) -> np.ndarray:
    """All scores of a document, float32 [SCORES] in the order of configs.quality.SCORES."""
    return table([page])[0]


def table(pages: Sequence[Page]) -> np.ndarray:
    """`scores` of each, float32 [documents, SCORES]."""
    out = np.zeros((len(pages), len(SCORES)), dtype=np.float32)
    codes, kinds, ends = together(pages)
    counts = np.array([page.counts[HAN : SYMBOL + 1] for page in pages], np.int64)
    if len(codes):
        _score_all(codes, kinds, ends, counts, *_work(), out)
    return out


def as_fields(row: np.ndarray) -> dict[str, float]:
    """A row of scores for a record, to four digits."""
    return {name: float(f"{value:.4g}") for name, value in zip(SCORES, row.tolist(), strict=True)}


def stored(cleaned: Path, rank: int) -> np.ndarray:
    """The scores of a shard's documents, left on the disk: row i is document i, the fields are
    those of configs.quality.SCORES."""
    return np.load(cleaned / "scores" / f"{rank:05d}.npy", mmap_mode="r")


def store(cleaned: Path, rank: int, rows: Iterable[np.ndarray]) -> None:
    """Write the rows (float32 [SCORES]) of a shard's documents."""
    whole = np.array(list(rows), dtype=np.float32).reshape(-1, len(SCORES))
    save(cleaned / "scores" / f"{rank:05d}.npy", whole.view(COLUMNS).reshape(-1))


# ---- kernels. Indexes of SCORES are written as constants: numba folds them.

_AT = {name: number for number, name in enumerate(SCORES)}
(CHARACTERS, HAN_RATIO, LETTER_RATIO, DIGIT_RATIO, PUNCTUATION_RATIO, SYMBOL_RATIO) = (
    _AT[name]
    for name in (
        *("characters", "han_ratio", "letter_ratio", "digit_ratio"),
        *("punctuation_ratio", "symbol_ratio"),
    )
)
LINE_PUNCT, SHORT_LINES, MEAN_LINE, NEWLINE_RATIO = (
    _AT[name] for name in ("line_punct", "short_lines", "mean_line", "newline_ratio")
)
DUP_LINES, DUP_LINE_CHARACTERS, BULLET_LINES, ELLIPSIS_LINES, READMORE_LINES = (
    _AT[name]
    for name in (
        *("dup_lines", "dup_line_characters", "bullet_lines", "ellipsis_lines", "readmore_lines"),
    )
)
MEAN_SENTENCE, MEAN_WORD, STOPS, BRACKET_RATIO, ELLIPSIS_RATIO, HASH_RATIO, LONGEST_RUN = (
    _AT[name]
    for name in (
        *("mean_sentence", "mean_word", "stop_words", "bracket_ratio", "ellipsis_ratio"),
        *("hash_ratio", "longest_run"),
    )
)
TOP_2, DUP_5, ENTROPY, UNIQUE_RATIO = (
    _AT[name] for name in ("top_2grams", "dup_5grams", "entropy", "unique_ratio")
)


@compiled
def _score_all(codes, kinds, ends, counts, marks, products, singles, out):  # type: ignore[no-untyped-def]
    """Scores of each document into its row of `out`; `counts`: of HAN to SYMBOL in each."""
    start = 0
    for d in range(len(ends)):
        here = slice(start, ends[d])
        if ends[d] > start:
            _score(
                codes[here],
                kinds[here],
                counts[d, 0],
                counts[d, 1],
                counts[d, 2],
                counts[d, 3],
                counts[d, 4],
                marks,
                products,
                singles,
                out[d],
            )
        start = ends[d]


@compiled
def _score(codes, kinds, han, letters, digits, punctuation, symbols, marks, products, singles, out):  # type: ignore[no-untyped-def]
    """All scores of one document into `out`."""
    solid, ends = np.empty(len(codes), np.uint32), np.empty(len(codes) + 1, np.int64)
    n, lines, breaks = _characters(codes, kinds, marks, solid, ends, out)
    if n == 0:
        return
    out[CHARACTERS] = n
    out[HAN_RATIO], out[LETTER_RATIO] = han / n, (han + letters) / n
    out[DIGIT_RATIO], out[PUNCTUATION_RATIO] = digits / n, punctuation / n
    out[SYMBOL_RATIO], out[NEWLINE_RATIO] = symbols / n, breaks / n
    out[MEAN_WORD] = (letters + digits) / max(out[MEAN_WORD], 1.0)  # it held their number
    _lines(solid, ends[:lines], marks, out)
    windows, longest = (n + WINDOW - 1) // WINDOW, min(n, WINDOW)
    # Places of runs, the names of those, which are slots, and what these hold: keys, counts.
    work = (
        np.empty(longest, np.int16),
        np.empty(longest, np.int16),
        np.empty(8 * longest + 4, np.uint32),
        np.empty(SLOTS, np.int16),
    )
    for w in range(windows):
        _window(solid[w * n // windows : (w + 1) * n // windows], n, products, singles, work, out)


@compiled
def _characters(codes, kinds, marks, solid, ends, out):  # type: ignore[no-untyped-def]
    """Scores that look at characters and their neighbours. The solid ones go to `solid`, the ends
    of lines among them to `ends`; returns how many characters, lines, line breaks there are."""
    n, lines, breaks, before, run, longest = 0, 0, 0, np.uint32(0), 0, 0
    words, ellipses, hashes, sentences, open_at, inside = 0, 0, 0, 0, -1, 0
    in_word, in_sentence, stops = False, False, np.uint64(0)
    ends[0] = 0
    for k in range(len(codes)):
        code, kind = codes[k], kinds[k]
        word = kind in (LETTER, DIGIT)
        words += word and not in_word
        in_word = word
        if kind == BLANK:
            before = code
            if code == 10:
                breaks += 1
                sentences += in_sentence
                in_sentence, open_at = False, -1
                if n > (ends[lines - 1] if lines else 0):
                    ends[lines] = n
                    lines += 1
            continue
        solid[n] = code
        n += 1
        mark = marks[code]
        run = run + 1 if code == before else 1
        before = code
        longest = max(longest, run)
        stops |= np.uint64(1) << np.uint64(mark >> _STOP_SHIFT)
        if mark & _SENTENCE:
            sentences += in_sentence
            in_sentence = False
        else:
            in_sentence |= not mark & _CLOSER
        if mark & _RARE:
            ellipses += (code == 0x2026 and run == 1) or (code == 46 and run == 2)
            hashes += code == 35 and run == 1
            if code == 0x3010 and open_at < 0:
                open_at = n
            elif code == 0x3011 and open_at >= 0:
                inside += n - open_at - 1
                open_at = -1
    if n > (ends[lines - 1] if lines else 0):
        ends[lines] = n
        lines += 1
    out[MEAN_SENTENCE] = n / max(sentences + in_sentence, 1)
    out[MEAN_WORD] = words
    out[LONGEST_RUN] = longest
    while stops > np.uint64(1):  # bit 0 is that of characters which are no stop word
        out[STOPS] += stops & np.uint64(2) != 0
        stops >>= np.uint64(1)
    if n:
        out[BRACKET_RATIO], out[ELLIPSIS_RATIO] = inside / n, ellipses / n
        out[HASH_RATIO] = hashes / n
    return n, lines, breaks


@compiled
def _lines(solid, ends, marks, out):  # type: ignore[no-untyped-def]
    """Scores of the lines that are not blank; `ends`: where each ends in `solid`."""
    lines, slots, start = len(ends), 2, 0
    while slots < 2 * lines:
        slots *= 2
    seen = np.zeros(slots, np.uint64)
    short, full, bullets, dots, more, again, copied = 0, 0, 0, 0, 0, 0, 0
    for end in ends:
        line, start = solid[start:end], end
        short += len(line) < SHORT_LINE
        bullets += (marks[line[0]] & _BULLET) != 0
        last = len(line) - 1
        while last > 0 and marks[line[last]] & _CLOSER:
            last -= 1
        full += (marks[line[last]] & _TERMINAL) != 0
        dots += _dots(line) or (marks[line[last]] & _ELLIPSIS) != 0
        more += _more(line)
        digest = np.uint64(len(line))
        for code in line:
            digest = (digest ^ np.uint64(code)) * np.uint64(0x9DDFEA08EB382D69)
        digest = (digest ^ (digest >> np.uint64(29))) | np.uint64(1)  # 0 is an empty slot
        slot = (digest >> np.uint64(20)) & np.uint64(slots - 1)
        while seen[slot] != 0 and seen[slot] != digest:
            slot = (slot + np.uint64(1)) & np.uint64(slots - 1)
        if seen[slot] == digest:
            again, copied = again + 1, copied + len(line)
        seen[slot] = digest
    out[LINE_PUNCT], out[SHORT_LINES] = full / lines, short / lines
    out[MEAN_LINE] = len(solid[: ends[-1]]) / lines
    out[DUP_LINES], out[DUP_LINE_CHARACTERS] = again / lines, copied / ends[-1]
    out[BULLET_LINES], out[ELLIPSIS_LINES] = bullets / lines, dots / lines
    out[READMORE_LINES] = more / lines


@compiled
def _dots(line):  # type: ignore[no-untyped-def]
    """Whether a line ends in three full stops of either kind."""
    if len(line) < 3 or line[-2] != line[-1] or line[-3] != line[-1]:
        return False
    return line[-1] == 46 or line[-1] == 0x3002


@compiled
def _more(line):  # type: ignore[no-untyped-def]
    """Whether a line ends in 展开, 更多, 。。。 or (about) readmore."""
    if len(line) < 2:
        return False
    a, b = line[-2], line[-1]
    if (a == 0x5C55 and b == 0x5F00) or (a == 0x66F4 and b == 0x591A):
        return True
    if b == 0x3002:
        return _dots(line)
    if len(line) < 8 or b | 32 != 101 or a | 32 != 114:  # r, e
        return False
    return line[-3] | 32 == 111 and line[-4] | 32 == 109 and line[-8] | 32 == 114


# ---- windows


@compiled
def _window(window, whole, products, singles, work, out):  # type: ignore[no-untyped-def]
    """Scores of one window, each by its share of the whole."""
    _, names, _, held = work
    length, share, distinct, total = len(window), len(window) / whole, 0, 0.0
    held[: length + 1] = 0
    for k in range(length):  # characters are named 1, 2, ... as they come
        name = singles[window[k]]
        distinct += name == 0
        name = distinct if name == 0 else name
        singles[window[k]] = names[k] = name
        held[name] += 1
    for code in window:
        singles[code] = 0
    for name in range(1, distinct + 1):
        total += products[held[name]]
    out[ENTROPY] += share * (np.log(length) - total / length)
    out[UNIQUE_RATIO] += share * distinct / length
    if length >= 5:
        _repeated(length, whole, work, out)


@compiled
def _repeated(length, whole, work, out):  # type: ignore[no-untyped-def]
    """Share of the window in its most frequent run of 2, 3, 4; shares of the whole in runs of 5
    and more that stood before in the window; `names` are those of its characters.

    A run of n + 1 is told by the names of the two runs of n in it, and can only repeat where both
    do: so each size looks at what is left of the size before, and no hash can err.
    """
    places, names, keys, held = work
    number = _pairs(names[:length], places, held)
    for size in range(2, LONGEST + 1):
        if number == 0:
            return
        slots, shift = 4, np.uint64(62)
        while slots < 4 * number:
            slots, shift = slots * 2, shift - np.uint64(1)
        held[:slots] = 0
        top, free, copied = 0, 0, 0
        for m in range(number):
            k = places[m]
            key = np.uint32(names[k]) << np.uint32(16) | np.uint32(names[k + 1])
            slot = (np.uint64(key) * FACTOR) >> shift
            while (held[slot] != 0) & (keys[slot] != key):  # & is one branch, `and` would be two
                slot = (slot + np.uint64(1)) & np.uint64(slots - 1)
            copy = (held[slot] != 0) & (k >= free)
            free = k + size if copy else free
            copied += size if copy else 0
            keys[slot], names[k] = key, slot
            held[slot] += 1
            top = max(top, held[slot])
        if size < 5:
            if top > 1:
                out[TOP_2 + size - 2] += length / whole * min(size * top / length, 1.0)
        elif size <= 10 or size == LONGEST:
            out[DUP_5 + (size - 5 if size <= 10 else 6)] += copied / whole
        number = _longer(places[:number], names, held)


@compiled
def _pairs(names, places, buckets):  # type: ignore[no-untyped-def]
    """Where a run of two may stand that stands twice, into `places`; returns their number. Runs
    that share a bucket are taken for one, which _repeated finds out."""
    slots, shift, last = 64, np.uint64(58), len(names) - 1
    while slots < 8 * last and slots < SLOTS:
        slots, shift = slots * 2, shift - np.uint64(1)
    buckets[:slots] = 0
    for k in range(last):
        key = np.uint32(names[k]) << np.uint32(16) | np.uint32(names[k + 1])
        places[k] = (np.uint64(key) * FACTOR) >> shift
        buckets[places[k]] += 1
    number = 0
    for k in range(last):
        often = buckets[places[k]] > 1
        places[number] = k
        number += often
    return number


@compiled
def _longer(places, names, held):  # type: ignore[no-untyped-def]
    """Keep the places of runs that stand twice and are followed by another; returns how many."""
    number = 0
    for m in range(len(places) - 1):
        k = places[m]
        both = held[names[k]] > 1 and places[m + 1] == k + 1 and held[names[k + 1]] > 1
        places[number] = k
        number += both
    return number
