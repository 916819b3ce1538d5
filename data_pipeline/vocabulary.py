"""A vocab.txt learnt from text, by the recipe of T5 PEGASUS (Su 2021, kexue.fm/archives/8209).

    base vocab.txt (BERT's) + the commonest words of jieba's dictionary = candidates
                                            |
    lines of text --tokenised by these--> how often each occurs --the most frequent--> vocab.txt

What is unknown of the recipe, the cut and its ties, is decided here: exactly the size asked for,
and of equally frequent tokens the earlier candidate.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from data_pipeline import lexicon, user_dictionary
from data_pipeline.characters import BLANK, INSIDE, classes, dropped_codes, normal
from data_pipeline.frozen import TokenizerFault
from data_pipeline.wordpiece import CONTROLS, WordPiece, is_control, tokens_of


def build(
    lines: Iterable[str],
    out: str | Path,
    vocab_size: int,
    *,
    word: bool,
    base: str | Path | None = None,
    dictionary_words: int = 200_000,
    dictionary: bytes | None = None,
) -> WordPiece:
    """Build a vocabulary of exactly `vocab_size` by the recipe of T5 PEGASUS, freeze it into `out`.

    Candidates: the tokens of `base` (a vocab.txt; None: the characters of the text, and ##x for
    what WordPiece may join), then, if `word`, the `dictionary_words` commonest of jieba's words,
    and those of a user's `dictionary`, by which the lines are then cut too.
    They tokenise the lines; the control tokens of `base` stay, with the most frequent others; of
    equally frequent ones the earlier candidate. All keep the order of the candidates. A token that
    the text does not use is not kept: TokenizerFault with the largest possible size.
    """
    lines = list(lines)
    tokens = list(_base(base) if base is not None else _characters_of(lines))
    fixed = _fixed(tokens)
    if word:
        entries = lexicon.commonest(dictionary_words)
        entries += [entry for _, entry, _ in user_dictionary.entries(dictionary or b"")]
        more = map(normal, entries)
        tokens = list(dict.fromkeys(chain(tokens, (entry for entry in more if entry))))
    every = WordPiece(_file(tokens), word, dictionary)
    count_T = np.zeros(len(tokens), np.int64)
    for start in range(0, len(lines), 1000):
        ids = np.concatenate(every.encode_batch(lines[start : start + 1000]))
        count_T += np.bincount(ids, minlength=len(tokens))
    count_T[:fixed] = 0  # they stay whatever their number
    seen, room = int((count_T > 0).sum()), vocab_size - fixed
    if not 0 < room <= seen:
        raise TokenizerFault(
            f"tokenizer.vocab_size is {vocab_size}, {fixed} of which are control tokens; the text "
            f"supports {fixed + 1} to {fixed + seen} for wordpiece; change it, or give more text "
            "(词表大小超出语料所能支持的范围)"
        )
    chosen = np.sort(np.argsort(-count_T, kind="stable")[:room])
    made = WordPiece(_file([*tokens[:fixed], *(tokens[i] for i in chosen)]), word, dictionary)
    made.save(out)
    return made


def _base(path: str | Path) -> list[str]:
    """The tokens of a base vocabulary, its control tokens first."""
    try:
        tokens = tokens_of(Path(path).read_bytes())
    except OSError as error:
        raise TokenizerFault(f"{path}: cannot be read: {error.strerror} (无法读取)") from None
    if missing := [name for name in CONTROLS if name not in tokens]:
        raise TokenizerFault(f"{path}: has no {' and no '.join(missing)} (词表缺少控制符)")
    return sorted(tokens, key=lambda token: not _is_kept(token))  # stable


def _characters_of(lines: Sequence[str]) -> Iterator[str]:
    """Control tokens, and the characters of the lines, the commonest first."""
    counts: Counter[str] = Counter()
    for start in range(0, len(lines), 1000):
        counts.update(normal("\n".join(lines[start : start + 1000])))
    class_of, dropped = classes(), dropped_codes()
    yield from CONTROLS
    for char, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        kind = class_of[ord(char)]
        if kind != BLANK and not dropped[ord(char)]:
            yield char
            if kind == INSIDE:
                yield "##" + char


def _fixed(tokens: list[str]) -> int:
    """How many tokens, at the head of the list, stay whether the text has them or not."""
    return sum(map(_is_kept, tokens))


def _is_kept(token: str) -> bool:
    return is_control(token) or token in ("<S>", "<T>")


def _file(tokens: Iterable[str]) -> bytes:
    return "".join(f"{token}\n" for token in tokens).encode()
