"""Vocabularies of sentencepiece learnt from text: cpm, byte_bpe, byte_unigram.

    texts --lines, spread evenly--> sample --words (cpm)--> the alphabet's characters --> trainer

The alphabet is chosen here (alphabet.py), lines are counted here, and the trainer's threads are a
fixed number, each with a fixed share of the words, whose sums are added in turn: the same text
gives the same bytes on any machine, and none of it is left out in silence.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from data_pipeline import alphabet, segment, user_dictionary
from data_pipeline.frozen import TokenizerFault, unicode_text
from data_pipeline.tokenizer import Tokenizer, cpm_text, known

SAMPLE_BYTES = 20_000_000
"""Text that training reads at most: it needs 17 (cpm) to 33 (byte_bpe) times that in memory."""
LINE = 1000  # characters of a line of the sample, 4,000 bytes at most; jieba's blanks double them
LONGEST_LINE_BYTES = 8000  # what sentencepiece reads; it leaves out longer lines silently
SKIPPED = 0.01  # the share of the sample that may be lost so
SEEDS = 1.5
"""Candidates that a unigram vocabulary is pruned from, by its size. sentencepiece's own million
(all that stand twice, in a sample of 20 MB) makes training twice as long and the vocabulary worse:
on held out text of the development corpus, 30,000 pieces of 30,000 x 1.5 / x 2 / all candidates
give 340,952 / 342,512 / 343,860 tokens and 9.257 / 9.305 / 9.343 bits a character."""
MOST_SEEDS = 1_000_000
THREADS = 4
LONGEST_ALPHABET = {"cpm": 0.65, "byte_bpe": 0.5, "byte_unigram": 0.5}  # of the vocabulary


def train(
    kind: str,
    texts: Iterable[str],
    out: str | Path,
    vocab_size: int,
    *,
    sample_bytes: int = SAMPLE_BYTES,
    dictionary: bytes | None = None,
) -> Tokenizer:
    """Train a vocabulary of exactly `vocab_size` on a sample of the texts, freeze it into `out`.

    The sample is lines spread evenly over all texts, of at most `sample_bytes`; texts may be any
    stream. The same texts give the same bytes. `dictionary`: the contents of a user's, kept with
    the vocabulary. TokenizerFault if the text cannot support the size.
    """
    known(kind)
    lexicon = None if dictionary is None else user_dictionary.loaded(dictionary)
    lines = sample(texts, sample_bytes)
    if kind == "cpm":
        for start in range(0, len(lines), 500):  # words take 20 times their text in memory
            some = [cpm_text(line) for line in lines[start : start + 500]]
            lines[start : start + 500] = segment.spaced(some, lexicon=lexicon)
    try:
        model = _model(kind, lines, vocab_size)
    except _TooLarge as fault:
        largest = fault.largest
        while True:  # sentencepiece's figure may be too large again: cpm prunes on the way
            try:
                _model(kind, lines, largest)
                break
            except _TooLarge as again:
                largest = min(again.largest, largest - 1)
        raise TokenizerFault(
            f"tokenizer.vocab_size is {vocab_size}, the text supports at most {largest} for "
            f"{kind}; lower it, or give more text (词表大于语料所能支持)"
        ) from None
    tokenizer = Tokenizer(kind, model, dictionary)
    tokenizer.save(out)
    return tokenizer


class _TooLarge(Exception):
    """The text does not give a vocabulary of the size asked for."""

    def __init__(self, largest: int) -> None:
        super().__init__(largest)
        self.largest = largest


_SHARED = {
    "num_threads": THREADS,
    "minloglevel": 2,
    "character_coverage": 1.0,  # the alphabet is chosen here
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
}
_BYTES: dict[str, Any] = _SHARED | {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "split_digits": True,
    "max_sentencepiece_length": 8,  # longer ones are boilerplate, not words
    "pad_id": 3,
    "control_symbols": ["<sep>", "<mask>", "<eod>"],  # ids 4, 5, 6
    "user_defined_symbols": ["\n"],  # 7
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "cpm": _SHARED
    | {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "pad_id": 5,
        "user_defined_symbols": ["\u2583", "<sep>", "<mask>", "<eod>"],  # ids 3, 4, 6, 7
    },
    "byte_bpe": _BYTES | {"model_type": "bpe", "num_threads": 1},
    "byte_unigram": _BYTES | {"model_type": "unigram"},
}


def _model(kind: str, lines: list[str], vocab_size: int) -> bytes:
    """sentencepiece's model of the lines. For a text too poor in pieces every candidate counts;
    then it may fill the vocabulary with characters."""
    usual = LONGEST_ALPHABET[kind]
    tried = [(int(SEEDS * vocab_size), usual), (MOST_SEEDS, usual), (MOST_SEEDS, 0.95)]
    for seeds, share in tried[kind == "byte_bpe" :]:  # which has no candidates
        try:
            return _trained(kind, lines, vocab_size, share, seeds)
        except _TooLarge as fault:
            last = fault
    raise last


def _trained(
    kind: str, lines: list[str], vocab_size: int, longest_alphabet: float, seeds: int
) -> bytes:
    fixed = 8 + (256 if kind != "cpm" else 0)  # controls and ▃ or \n; bytes
    chars = alphabet.chosen(lines, kind, int((vocab_size - fixed) * longest_alphabet))
    if len(chars) < 2:
        raise TokenizerFault(
            f"tokenizer.vocab_size is {vocab_size}, {fixed} of which are control tokens and bytes; "
            f"{kind} needs {fixed + 8} at least, and text to learn from (词表过小或没有文本)"
        )
    parts = list(alphabet.covered(lines, chars))
    _check_nothing_skipped(parts)
    model = io.BytesIO()
    options = _OPTIONS[kind] | ({} if kind == "byte_bpe" else {"seed_sentencepiece_size": seeds})
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=LONGEST_LINE_BYTES,
            **options,
        )
    except RuntimeError as error:
        if found := re.search(r"Vocabulary size too high .* value <= (\d+)", str(error)):
            raise _TooLarge(int(found[1])) from None
        raise TokenizerFault(
            f"sentencepiece cannot train {kind} of {vocab_size}: {error} (训练失败)"
        ) from None
    return model.getvalue()


def sample(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Lines spread evenly over all texts: every one, and each time they outgrow the budget half
    of those that are kept and half as many from then on."""
    kept: list[str] = []
    size, every, number = 0, 1, 0
    for text in texts:
        for line in _lines(unicode_text(text)):
            number += 1
            if number % every:
                continue
            kept.append(line)
            size += len(line.encode())
            if size > sample_bytes:
                kept, every = kept[1::2], every * 2
                size = sum(len(line.encode()) for line in kept)
    return kept


_SENTENCE_END = re.compile(r"(?s).*[。！？]")


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, long ones cut after their last 。！？ before LINE characters."""
    for line in text.split("\n"):
        while len(line) > LINE:
            end = _SENTENCE_END.match(line, 0, LINE)
            cut = end.end() if end else LINE
            yield line[:cut]
            line = line[cut:]
        if line:
            yield line


def _check_nothing_skipped(parts: list[str]) -> None:
    """sentencepiece leaves out lines above its limit without a word: here they are counted."""
    sizes = np.array([len(part.encode()) for part in parts])
    skipped = sizes[sizes > LONGEST_LINE_BYTES].sum() / sizes.sum()
    if skipped > SKIPPED:
        raise TokenizerFault(
            f"training would skip {skipped:.0%} of the sample, in lines of more than "
            f"{LONGEST_LINE_BYTES} bytes; at most {SKIPPED:.0%} may be (训练会跳过部分文本)"
        )
