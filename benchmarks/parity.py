"""Where transformers' tokenizers of CPM and RoFormer differ from the published ones, by cause.

    python benchmarks/parity.py TEXT.jsonl[.gz|.zst] [--cpm chinese_vocab.model]
                                [--roformer vocab.txt] [--documents 20000] [--longest 1000]

Ours is read once more with one of their ways in place of ours (rjieba's cuts, NFKD, ...): the
smallest set of ways that gives their ids is the cause. `the same` counts texts without a
difference; `unexplained` must be 0.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rjieba  # noqa: E402

from benchmarks.tokenizer import read  # noqa: E402
from data_pipeline import characters, segment, tokenizer, wordpiece  # noqa: E402

Ids = list[int]
Way = Callable[[str, frozenset[str]], Ids]
"""A text and the ways of theirs that it is read in -> ids."""

CUTS = "rjieba's cuts of what is not Han, and its rounded HMM"
FOLD = "NFKD without accents, blanks joined"
COMMA = "a comma after a digit set apart"
FIRST = "control and private characters dropped before cutting"
SIGNS = "signs inside a word left in it"
LONG = "a piece of more than 100 characters is unknown"
LETTERS = "lower case by BertNormalizer, a character at a time"


def cpm_ways(path: Path) -> tuple[Callable[[str], Ids], Way, Sequence[str]]:
    """Their CpmTokenizer; ours with ways of theirs; the ways."""
    from transformers import CpmTokenizer

    theirs = CpmTokenizer(str(path))
    pieces = theirs.sp_model

    def ours(text: str, ways: frozenset[str]) -> Ids:
        words = rjieba.cut(text, True) if CUTS in ways else segment.words(text)
        spaced = " ".join(tokenizer.cpm_text(word) for word in words)
        if FOLD in ways:
            spaced = theirs.preprocess_text(spaced)
        found: Ids = []
        for piece in pieces.encode(spaced, out_type=str):
            if COMMA in ways and len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit():
                parts = pieces.encode(piece[:-1].replace("▁", ""), out_type=str)
                if piece[0] != "▁" and parts[0][0] == "▁":
                    parts = parts[1:] if len(parts[0]) == 1 else [parts[0][1:], *parts[1:]]
                found += [pieces.piece_to_id(part) for part in [*parts, ","]]
            else:
                found.append(pieces.piece_to_id(piece))
        return found

    def read_by_them(text: str) -> Ids:
        words = [word.translate(theirs.translator) for word in rjieba.cut(text, True)]
        return [pieces.piece_to_id(piece) for piece in theirs._tokenize(" ".join(words))]

    return read_by_them, ours, (CUTS, FOLD, COMMA)


def roformer_ways(path: Path) -> tuple[Callable[[str], Ids], Way, Sequence[str]]:
    """Their RoFormerTokenizer; ours with ways of theirs; the ways."""
    from tokenizers.normalizers import BertNormalizer
    from transformers import RoFormerTokenizer

    tokens = wordpiece.tokens_of(path.read_bytes())
    vocabulary = {token: i for i, token in enumerate(tokens)}
    theirs = RoFormerTokenizer(vocab=vocabulary).backend_tokenizer
    theirs.encode_special_tokens = True
    made = wordpiece.WordPiece(path.read_bytes(), word=True)
    lower = BertNormalizer(clean_text=False, handle_chinese_chars=False, lowercase=True)
    clean = BertNormalizer(clean_text=True, handle_chinese_chars=False, lowercase=False)
    unknown = vocabulary["[UNK]"]

    def of_word(word: str, ways: frozenset[str]) -> Ids:
        if word in vocabulary and not wordpiece.is_control(word):
            return [vocabulary[word]]
        kept = word
        if SIGNS in ways:  # Han alone, the rest between blanks as one
            kept = "".join(f" {c} " if characters.is_han(ord(c)) else c for c in word)
        units = kept.split() if SIGNS in ways else list(characters.basic(word, True))
        found: Ids = []
        for unit in units:
            found += [unknown] if LONG in ways and len(unit) > 100 else made._cut(unit)
        return found

    def ours(text: str, ways: frozenset[str]) -> Ids:
        if FIRST in ways:
            text = clean.normalize_str(text)
        text = lower.normalize_str(text) if LETTERS in ways else characters.normal(text)
        words = rjieba.cut(text, False) if CUTS in ways else segment.words(text, False)
        return [i for word in words for i in of_word(word, ways)]

    def read_by_them(text: str) -> Ids:
        ids: Ids = theirs.encode(text, add_special_tokens=False).ids
        return ids

    return read_by_them, ours, (CUTS, FIRST, SIGNS, LONG, LETTERS)


def cause(text: str, theirs: Ids, ours: Way, ways: Sequence[str]) -> str:
    """The smallest set of their ways that gives their ids."""
    for size in range(len(ways) + 1):
        for some in itertools.combinations(ways, size):
            if ours(text, frozenset(some)) == theirs:
                return " + ".join(some) or "the same"
    return "unexplained"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", type=Path, help="a jsonl file with a `text` in each line")
    parser.add_argument("--cpm", type=Path, help="the published chinese_vocab.model")
    parser.add_argument("--roformer", type=Path, help="a vocab.txt, read as words")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=1, help="read one document of so many")
    parser.add_argument("--longest", type=int, default=1000, help="characters of one")
    said = parser.parse_args()
    texts = [text[: said.longest] for text in read(said.texts, 1e6, said.every)[: said.documents]]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    for name, make in (("cpm", cpm_ways), ("roformer", roformer_ways)):
        if (path := getattr(said, name)) is None:
            continue
        theirs, ours, ways = make(path)
        counts: Counter[str] = Counter()
        alike = differing = 0
        for text in texts:
            ids = theirs(text)
            found = cause(text, ids, ours, ways)
            counts[found] += 1
            hmm = name == "cpm"
            read_as = text if hmm else characters.normal(text)
            if rjieba.cut(read_as, hmm) == segment.words(read_as, hmm):
                alike += 1
                differing += found != "the same"
        print(f"{name}: {len(texts)} texts; cut alike {alike}, of those with other ids {differing}")
        for found, count in counts.most_common():
            print(f"  {count:8,}  {found}")


if __name__ == "__main__":
    main()
