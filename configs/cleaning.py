"""Which documents of a corpus are kept: every threshold, and why it is what it is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cleaning:
    """Which normalised documents are kept; a ratio is a share of the characters that are not blank.

    Normalisation itself (NFC, narrow width fold, private use, control, zero-width) has no choices:
    data_pipeline/clean.py.
    """

    simplify: bool = True
    """Pages in traditional characters (OpenCC would change over 5 % of their Han) become simplified
    ones; classical prose and verse stay as they are: data_pipeline/hanzi.py (繁转简)."""

    min_characters: int = 20
    """Fewer characters (blanks not counted): `too_short`. Classical quatrains have 24."""
    max_characters: int = 10_000_000
    """More: `too_long`. Books are documents; this only stops what is no text."""
    min_han_ratio: float = 0.3
    """A smaller share of Chinese characters: `few_han`; web: 0.5. A page that falls below is
    counted again without its code, formulas, tags and addresses."""
    min_han_ratio_with_code: float = 0.1
    """A smaller share of the whole page, code and all: `few_han` without a second look."""
    max_digit_ratio: float = 0.3
    """A larger share of digits: `many_digits`."""
    max_symbol_ratio: float = 0.3
    """A larger share of characters that are neither letters, digits nor punctuation in use in
    Chinese text (box drawings, currency, emoji ...): `many_symbols`."""
    max_lost_ratio: float = 0.01
    """A larger share of U+FFFD, the trace of a failed decoding: `lost_characters`. Below it they
    are removed and counted."""
    max_private_use_ratio: float = 0.05
    """A larger share of private-use code points: `private_use`. Below it they are removed."""
    max_repeated_line_ratio: float = 0.5
    """A larger share of the characters in lines that stood before in the same document:
    `repeated_lines`."""

    scores_in_records: bool = False
    """Write every score of configs/quality.py into each document's field `scores` too; they are
    stored as columns beside the shards in any case."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if self.min_characters < 1:
            found.append(f"min_characters: is {self.min_characters}, must be at least 1")
        if self.max_characters < self.min_characters:
            found.append(
                f"max_characters: is {self.max_characters}, must be at least min_characters"
                f" ({self.min_characters})"
            )
        for name in vars(self):
            if "_ratio" in name and not 0 <= getattr(self, name) <= 1:
                found.append(f"{name}: is {getattr(self, name)}, must lie in [0, 1]")
        return found
