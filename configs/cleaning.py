"""Which documents of a corpus are kept: every threshold, and why it is what it is."""

import difflib
from dataclasses import dataclass

PRIVATE_KINDS = ("email", "id", "card", "qq", "wechat", "phone", "ip")
"""What data_pipeline/private.py can find."""


@dataclass(frozen=True)
class Cleaning:
    """Which normalised documents are kept; a ratio is a share of the characters that are not blank.

    Normalisation itself (NFC, narrow width fold, private use, control, zero-width) has no choices:
    data_pipeline/clean.py.
    """

    min_characters: int = 20
    """Fewer characters (blanks not counted): `too_short`. Classical quatrains have 24."""
    max_characters: int = 10_000_000
    """More: `too_long`. Books are documents; this only stops what is no text."""
    min_han_ratio: float = 0.3
    """A smaller share of Chinese characters: `few_han`; recipes/web.yaml: 0.15. A page that
    falls below is counted again without its code, formulas, tags and addresses."""
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

    max_mojibake_ratio: float = 0.02
    """A larger share of characters that a wrong decoding makes (锟斤拷, ÖÐÎÄ, ä¸­æ–‡, 鐨勬槸):
    `mojibake`: data_pipeline/mojibake.py (乱码)."""
    simplify: bool = True
    """Pages in traditional characters (OpenCC would change over 5 % of their Han) become simplified
    ones; classical prose and verse stay as they are: data_pipeline/hanzi.py (繁转简)."""
    strip_markup: bool = False
    """Entities, tags and wiki markup that a page's source left in its text become what they stand
    for, or go: data_pipeline/leftovers.py. For crawled text; a book about HTML means its tags."""
    mask_private: bool | tuple[str, ...] = False
    """Replace telephone, identity and card numbers, e-mail, QQ, WeChat and IP addresses by [电话]
    and the like: data_pipeline/private.py; true for all, or a list of email, id, card, qq, wechat,
    phone, ip (隐私脱敏)."""
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
                f" ({self.min_characters}) (上下限颠倒)"
            )
        for name in vars(self):
            if "_ratio" in name and not 0 <= getattr(self, name) <= 1:
                found.append(f"{name}: is {getattr(self, name)}, must lie in [0, 1]")
        for kind in self.mask_private if isinstance(self.mask_private, tuple) else ():
            if kind not in PRIVATE_KINDS:
                near = difflib.get_close_matches(kind, PRIVATE_KINDS, 1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                found.append(
                    f"mask_private: '{kind}' is none of {', '.join(PRIVATE_KINDS)}{hint} (未知类别)"
                )
        return found

    def private_kinds(self) -> tuple[str, ...]:
        """What is masked."""
        if isinstance(self.mask_private, tuple):
            return self.mask_private
        return PRIVATE_KINDS if self.mask_private else ()
