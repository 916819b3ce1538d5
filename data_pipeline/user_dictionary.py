"""A user's words on top of jieba's: a file of `word [frequency [tag]]`, as jieba.load_userdict.

    user_dictionary.txt --line by line--> frequency given, or so high that the word comes out whole
                                          frequency 0: the word is taken out, also of the HMM's

Each word is set before the next is looked at, and the sum of all frequencies grows with it: so the
borders are those of jieba 0.42.1 after load_userdict, to the last one. What jieba would take for
something else than was meant (a tab, a frequency of 3.5) is refused here with its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from data_pipeline import segment
from data_pipeline.frozen import TokenizerFault
from data_pipeline.lexicon import Lexicon, published
from data_pipeline.trie import MOST_NODES

_LINE = re.compile(r"^(.+?)( [0-9]+)?( [a-z]+)?$")  # jieba's own
_BLANK = re.compile(r"[\s\x00]")
HIGHEST_FREQUENCY = 10**12


@lru_cache(maxsize=4)
def loaded(contents: bytes, read: Callable[[str], str] = str) -> Lexicon:
    """jieba's dictionary with the words of a user's file; `read` makes of a word what the text is
    made of before it is cut. TokenizerFault with the line of the first mistake."""
    lexicon = published().copy()
    for number, word, frequency in entries(contents):
        word = read(word)
        if not word:
            raise _wrong(number, "is nothing that is left of a text", "take the line out")
        try:
            lexicon.set(word, suggested(lexicon, word) if frequency is None else frequency)
        except OverflowError:
            raise _wrong(number, f"is one too many beside {MOST_NODES}", "shorten it") from None
    return lexicon


def entries(contents: bytes) -> list[tuple[int, str, int | None]]:
    """(line, word, frequency if there is one) of a user's file."""
    found: list[tuple[int, str, int | None]] = []
    for number, line in enumerate(contents.split(b"\n"), 1):
        try:
            text = line.strip().decode().lstrip("\ufeff")
        except UnicodeDecodeError:
            raise _wrong(number, "is not UTF-8", "save the file as UTF-8") from None
        match = _LINE.match(text)
        if match is None:
            continue
        word, frequency = match[1], match[2]
        if _BLANK.search(word):
            raise _wrong(
                number,
                f"'{text[:40]}' has as its word '{word[:40]}', with a blank in it",
                "write word, whole frequency and tag of small letters with one blank between",
            )
        if frequency is not None and int(frequency) > HIGHEST_FREQUENCY:
            raise _wrong(number, f"has frequency{frequency}", f"{HIGHEST_FREQUENCY} is the highest")
        found.append((number, word, None if frequency is None else int(frequency)))
    return found


def suggested(lexicon: Lexicon, word: str) -> int:
    """jieba's suggest_freq: the least that makes the word likelier than the words it falls into."""
    total = float(lexicon.total)
    frequency = 1.0
    for part in segment.words(word, hmm=False, lexicon=lexicon):
        frequency *= lexicon.frequency(part, 1) / total
    return max(int(frequency * lexicon.total) + 1, lexicon.frequency(word, 1))


def _wrong(number: int, what: str, remedy: str) -> TokenizerFault:
    return TokenizerFault(
        f"tokenizer.user_dictionary: line {number} {what}; {remedy} (用户词典第 {number} 行有误)"
    )
