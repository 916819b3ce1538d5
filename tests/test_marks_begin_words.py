"""encode_marked: the ids of encode_batch, and a mark where a word of jieba 0.42.1's begins.

Each kind is compared with a slow reading of its own: jieba itself, and the place of every token in
the text, a token at a time.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jieba
import numpy as np
import pytest

from data_pipeline import characters as bert
from data_pipeline import training, vocabulary, wordpiece
from data_pipeline.frozen import Frozen
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.wordpiece import WordPiece
from tests.dev_corpus import documents

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "data_pipeline" / "sample" / "sample.jsonl"

BY_HAND = [
    "",
    " ",
    "\n\n",
    "今天天气不错，Hello World! 3.14%\n",
    "x_1是变量，我用x_1测试C++和T恤 unbelievable",
    "Café naïve がぎぐ パピプ 한국어 ｶﾞ ﬁ①㈠㍿",
    "㐂鿖𠀀𪚥龘〇豈更車😀👍🏽",
    "甲\u200b乙\ufeff丙\u3000癸\u00a0子\t丑\r\n寅\x00\ufffd",
    "[MASK]<eod>[UNK]▁▂▃▁▁ ▁",
    "仁心常在抱，他常在镇中 " + "a" * 120 + " b",
]


@pytest.fixture(scope="module")
def reference() -> jieba.Tokenizer:
    made = jieba.Tokenizer()
    dictionary = resources.files("jieba").joinpath("dict.txt").open("rb")
    made.FREQ, made.total = made.gen_pfdict(dictionary)
    made.initialized = True
    return made


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = SAMPLE.read_text("utf-8").splitlines()
    return [json.loads(line)["text"][:1500] for line in lines[:: max(1, len(lines) // 300)]]


@pytest.fixture(scope="module")
def byte_bpe(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return training.train("byte_bpe", texts, tmp_path_factory.mktemp("byte_bpe"), 1500)


@pytest.fixture(scope="module")
def cpm(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return training.train("cpm", texts, tmp_path_factory.mktemp("cpm"), 1500)


@pytest.fixture(scope="module")
def words(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> WordPiece:
    out = tmp_path_factory.mktemp("words")
    return vocabulary.build(texts, out, 1500, word=True, dictionary_words=30_000)


@pytest.fixture(scope="module")
def characters(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> WordPiece:
    return vocabulary.build(texts, tmp_path_factory.mktemp("chars"), 1200, word=False)


def places(made: WordPiece, text: str) -> Iterator[tuple[int, int]]:
    """(id, place of its first character) of each token of BERT's way, a character at a time; the
    text is lowered and holds nothing that BERT drops."""
    tokens = made.pieces(range(made.vocab_size))
    ids = {token: i for i, token in enumerate(tokens)}

    def alone(char: str) -> bool:
        sign = "!" <= char <= "~" and not char.isalnum()
        return sign or bert.is_han(ord(char)) or unicodedata.category(char)[0] == "P"

    at = 0
    while at < len(text):
        end = at + 1
        if text[at].isspace():
            at = end
            continue
        while not alone(text[at]) and end < len(text):
            if text[end].isspace() or alone(text[end]):
                break
            end += 1
        found: list[tuple[int, int]] = []
        start = at
        while start < end and found != [(ids["[UNK]"], at)]:
            spelt = (
                (stop, "##" * (start > at) + text[start:stop]) for stop in range(end, start, -1)
            )
            stop, token = next(((s, t) for s, t in spelt if t in ids), (end, ""))
            found = [*found, (ids[token], start)] if token else [(ids["[UNK]"], at)]
            start = stop
        longest = 200 if made.word else 100
        yield from found if end - at <= longest else [(ids["[UNK]"], at)]
        at = end


def of_characters(made: Frozen, text: str, jieba_: jieba.Tokenizer) -> tuple[list[int], list[bool]]:
    assert isinstance(made, WordPiece)
    text = unicodedata.normalize("NFD", text.replace("Σ", "σ").lower())
    dropped = ("Mn", "Cc", "Cf", "Co")
    kept = [c for c in text if c in "\t\r\n" or unicodedata.category(c) not in dropped]
    text = "".join(c for c in kept if c != "\ufffd")
    found = list(places(made, text))
    starts = word_starts(text, jieba_, hmm=False)
    return [i for i, _ in found], [at in starts for _, at in found]


def of_words(made: Frozen, text: str, jieba_: jieba.Tokenizer) -> tuple[list[int], list[bool]]:
    assert isinstance(made, WordPiece)
    text = bert.normal(text)
    known = {token: i for i, token in enumerate(made.pieces(range(made.vocab_size)))}
    ids: list[int] = []
    marks: list[bool] = []
    for word in jieba_.cut(text, HMM=False):
        if word in known and not wordpiece.is_control(word):
            some = [known[word]]
        else:
            dropped = ("Cc", "Cf")
            kept = "".join(
                c for c in word if c in "\t\r\n" or unicodedata.category(c) not in dropped
            )
            some = [i for i, _ in places(made, kept.replace("\ufffd", ""))]
        ids += some
        marks += [True, *[False] * len(some)][: len(some)]
    return ids, marks


def of_cpm(made: Frozen, text: str, jieba_: jieba.Tokenizer) -> tuple[list[int], list[bool]]:
    """Each word on its own through sentencepiece: a piece does not reach over a blank."""
    assert isinstance(made, Tokenizer)
    ids: list[int] = []
    marks: list[bool] = []
    for word in jieba_.cut(text.replace(" ", "▂").replace("\n", "▃")):
        some = made._pieces.encode(word)
        ids += [0 if made._is_control[i] else i for i in some]
        marks += [True, *[False] * len(some)][: len(some)]
    return ids, marks


def of_bytes(made: Frozen, text: str, jieba_: jieba.Tokenizer) -> tuple[list[int], list[bool]]:
    assert isinstance(made, Tokenizer)
    ids = made.encode(text).tolist()
    starts = {len(text[:at].encode()) for at in word_starts(text, jieba_, hmm=True)}
    marks, at = [], 0
    for i in ids:
        marks.append(at in starts)
        at += len(made._bytes[i])
    assert at == len(text.encode())
    return ids, marks


def word_starts(text: str, jieba_: jieba.Tokenizer, hmm: bool) -> set[int]:
    starts, at = set(), 0
    for word in jieba_.cut(text, HMM=hmm):
        starts.add(at)
        at += len(word)
    assert at == len(text)
    return starts


KINDS = {"cpm": of_cpm, "byte_bpe": of_bytes, "words": of_words, "characters": of_characters}


def agree(kind: str, made: Frozen, rows: list[str], reference: jieba.Tokenizer) -> None:
    found = made.encode_marked(rows)
    assert len(found) == len(rows)
    for text, (ids, starts), plain in zip(rows, found, made.encode_batch(rows), strict=True):
        assert ids.dtype == np.int32 and starts.dtype == np.bool_
        assert np.array_equal(ids, plain)
        expected_ids, expected = KINDS[kind](made, text, reference)
        assert ids.tolist() == expected_ids, ascii(text[:40])
        assert starts.tolist() == expected, ascii(text[:40])


@pytest.mark.parametrize("kind", KINDS)
def test_marks_are_where_words_begin(
    kind: str, request: pytest.FixtureRequest, texts: list[str], reference: jieba.Tokenizer
) -> None:
    made = request.getfixturevalue(kind)
    draw = random.Random(3)
    mixed = ["".join(draw.choices("的我们在中国aB1._% ，\n𠀀か", k=30)) for _ in range(100)]
    agree(kind, made, [*BY_HAND, *texts[::4], *mixed], reference)
    assert made.encode_marked([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_marks_in_documents_of_every_genre(
    kind: str, request: pytest.FixtureRequest, reference: jieba.Tokenizer
) -> None:
    genres = documents(per_genre=5, longest=1000, seed=21)
    assert len(genres) == 10
    rows = [text for found in genres.values() for text in found]
    agree(kind, request.getfixturevalue(kind), rows, reference)


def test_marks_are_not_those_of_blanks_or_of_sharps(
    byte_bpe: Tokenizer, characters: WordPiece, texts: list[str]
) -> None:
    """Negative control: neither ▁ nor a missing ## says where a Chinese word begins."""
    ids, starts = byte_bpe.encode_marked([texts[0]])[0]
    assert [p.startswith("▁") for p in byte_bpe.pieces(ids)] != starts.tolist()
    ids, starts = characters.encode_marked([texts[0]])[0]
    assert [not p.startswith("##") for p in characters.pieces(ids)] != starts.tolist()
