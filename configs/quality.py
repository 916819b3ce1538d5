"""Scores of a cleaned document, and the bounds that a corpus sets on them.

Cleaning computes every score of every kept document once (data_pipeline/scores.py) and stores them
as columns beside the shards. The bounds here are applied afterwards, to the columns alone: another
bound costs no cleaning. Published bounds, with their sources: configs/recipes/*.yaml.

Characters are those that are not blank, punctuation included. A score that would move with the
length of a text by itself (a book has few characters that it never repeats) is the mean over
windows of equal length, each of at most 2,000 characters. The mean and not the worst window: a
document stays or goes as a whole, and a longer one has more chances of one odd window.
"""

from dataclasses import dataclass, fields

Bounds = tuple[float | None, float | None] | None
"""[lowest, highest] that is kept, null for no bound on that side; null for no rule at all."""


@dataclass(frozen=True)
class Quality:
    """Bounds on scores: a document outside one goes as `quality:NAME`, the first of this page."""

    characters: Bounds = None
    """How many."""
    han_ratio: Bounds = None
    """Share of Chinese characters."""
    letter_ratio: Bounds = None
    """Share of Chinese characters and letters of any script."""
    digit_ratio: Bounds = None
    """Share of digits (and other numbers: ①, ½)."""
    punctuation_ratio: Bounds = None
    """Share of punctuation."""
    symbol_ratio: Bounds = None
    """Share of what is none of these: box drawings, currency, emoji."""
    line_punct: Bounds = None
    """Share of lines that end like a sentence: 。！？…； and the like, behind closing marks too."""
    short_lines: Bounds = None
    """Share of lines with fewer than 10 characters."""
    mean_line: Bounds = None
    """Characters of a line, on average."""
    newline_ratio: Bounds = None
    """Line breaks for each character."""
    dup_lines: Bounds = None
    """Share of lines that stood before in the same document."""
    dup_line_characters: Bounds = None
    """Share of characters in such lines."""
    bullet_lines: Bounds = None
    """Share of lines that begin with a bullet: • ● ■ ※ · and the like."""
    ellipsis_lines: Bounds = None
    """Share of lines that end in … or three dots."""
    readmore_lines: Bounds = None
    """Share of lines that end in 展开, 更多, 。。。 or readmore."""
    mean_sentence: Bounds = None
    """Characters of a sentence (up to 。！？… or a line's end), on average."""
    mean_word: Bounds = None
    """Length of runs of letters and digits that are not Han, on average; 0 without any. Keys,
    addresses and encoded files are long."""
    stop_words: Bounds = None
    """How many of 的年在月是和日了于有被人中为他与后也而由 (or their traditional forms) occur."""
    bracket_ratio: Bounds = None
    """Share of characters between 【 and 】."""
    ellipsis_ratio: Bounds = None
    """Runs of … or of two and more dots, for each character."""
    hash_ratio: Bounds = None
    """Runs of #, for each character."""
    longest_run: Bounds = None
    """The longest run of one and the same character."""
    top_2grams: Bounds = None
    """Share of characters in the pair that is most frequent (0 if none stands twice); windows."""
    top_3grams: Bounds = None
    """The same of three characters in a row."""
    top_4grams: Bounds = None
    """The same of four."""
    dup_5grams: Bounds = None
    """Share of characters in runs of five that stood before (not overlapping); windows."""
    dup_6grams: Bounds = None
    """The same of six."""
    dup_7grams: Bounds = None
    """The same of seven."""
    dup_8grams: Bounds = None
    """The same of eight."""
    dup_9grams: Bounds = None
    """The same of nine."""
    dup_10grams: Bounds = None
    """The same of ten."""
    dup_13grams: Bounds = None
    """The same of thirteen."""
    entropy: Bounds = None
    """Of the distribution of characters, in nats; windows. A text of n characters has ln n at
    most: 3.2 for a quatrain with its punctuation."""
    unique_ratio: Bounds = None
    """Different characters for each character; windows."""

    def problems(self) -> list[str]:
        """Bounds that nothing can keep."""
        found = []
        for name, bounds in vars(self).items():
            if bounds is None:
                continue
            low, high = bounds
            if low is not None and high is not None and low > high:
                found.append(
                    f"{name}: is [{low:g}, {high:g}], the first must not be above the second"
                    " (下限高于上限)"
                )
            if high is not None and high < 0:
                found.append(f"{name}: the highest is {high:g}, but no score is below 0 (无法满足)")
        return found

    def rules(self) -> dict[str, tuple[float | None, float | None]]:
        """The scores that have a bound, in the order of the page."""
        return {name: bounds for name, bounds in vars(self).items() if bounds not in _NO_RULE}


_NO_RULE = (None, (None, None))
SCORES = tuple(field.name for field in fields(Quality))
"""The columns, in order."""
