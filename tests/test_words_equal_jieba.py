"""The words of segment.py are the words of jieba 0.42.1, to the last border, on any text."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import resources

import jieba
import pytest
import rjieba

from data_pipeline.segment import sentences, spaced, words
from tests.dev_corpus import documents

BY_HAND = [
    "",
    "x_1是变量，我用x_1测试",
    "2-3个，2.5mL水，1.5%的3.14.15",
    "www.bilibili.com和markdownlint-disable",
    "A股市场大涨，T恤衫与小S、阿Q正传；大SIM卡",
    "C++、c#和AT&T，用c++写C+++，江南Style",
    "刷卡拉OKay吧4S店1号店AB型BP机",
    "表情👍🏽和👨‍👩‍👧，全角ＡＢＣ１２３，①②㈠",
    "㐂鿖豈𠀀𪚥都是汉字，〇也是",
    "一行\r\n\r\n二行\n\r\t　空格 结束",
    "\x00\x07\u200b\ufeff\ufffd\ue000\U000f0000",
    "孤立的\ud800代理\udfff",
    "仁心常在抱，他常在镇中",  # rjieba's HMM says 常在
    "γ射线和·间隔号",
    "龘靐齉爩麤灪吁鱻爨癵籱麣",
]


@pytest.fixture(scope="module")
def reference() -> Callable[[str, bool], list[str]]:
    """jieba with its dictionary read from its wheel: its shared cache file in /tmp is a race."""
    tokenizer = jieba.Tokenizer()
    dictionary = resources.files("jieba").joinpath("dict.txt").open("rb")
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(dictionary)
    tokenizer.initialized = True
    return lambda text, hmm: list(tokenizer.cut(text, HMM=hmm))


@pytest.mark.parametrize("hmm", [True, False])
@pytest.mark.parametrize("text", BY_HAND, ids=lambda text: ascii(text[:12]))
def test_by_hand(text: str, hmm: bool, reference: Callable[[str, bool], list[str]]) -> None:
    expected = reference(text, hmm)
    assert words(text, hmm) == expected
    assert spaced([text, "", text], hmm) == [" ".join(expected), "", " ".join(expected)]
    assert "".join(expected) == text


def test_random_mixtures(reference: Callable[[str, bool], list[str]]) -> None:
    """Fragments that meet nowhere in real text: mixed words, signs, rare Han."""
    draw = random.Random(1)
    with resources.files("jieba").joinpath("dict.txt").open(encoding="utf-8") as dictionary:
        entries = [line.split(" ")[0] for line in dictionary]
    mixed = [entry for entry in entries if any(char.isascii() for char in entry)]
    assert len(mixed) > 60
    han = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年常"

    def fragment() -> str:
        kind = draw.random()
        if kind < 0.4:
            return "".join(draw.choices(han, k=draw.randint(1, 4)))
        if kind < 0.45:
            return "".join(chr(draw.randint(0x4E00, 0x9FD5)) for _ in range(draw.randint(1, 4)))
        if kind < 0.65:
            return draw.choice(mixed)
        if kind < 0.9:
            return "".join(draw.choices("abXYTSAQSPH014s9+#&._%-", k=draw.randint(1, 5)))
        return "".join(
            draw.choices("，。！ \t\r\n　“㐂𠀀鿖é①Ａ１\ud800😀\x00", k=draw.randint(1, 3))
        )

    for _ in range(4000):
        text = "".join(fragment() for _ in range(draw.randint(1, 12)))
        for hmm in (True, False):
            assert words(text, hmm) == reference(text, hmm), ascii(text)


def test_documents_of_every_genre(reference: Callable[[str, bool], list[str]]) -> None:
    genres = documents(per_genre=30, longest=3000, seed=7)
    assert len(genres) == 10 and min(map(len, genres.values())) == 30
    for genre, texts in genres.items():
        assert spaced(texts) == [" ".join(words(text)) for text in texts]
        for text in texts:
            for hmm in (True, False):
                assert words(text, hmm) == reference(text, hmm), (genre, text[:40])


def test_rjieba_alone_is_not_jieba(reference: Callable[[str, bool], list[str]]) -> None:
    """Negative control: another reading of jieba's rules, compiled too, does differ."""
    differing = [text for text in BY_HAND[:-1] if "\ud800" not in text]
    differing = [text for text in differing if rjieba.cut(text, True) != reference(text, True)]
    assert len(differing) >= 5
    assert any("常在" in text for text in differing)


def test_words_less_likely_than_their_parts(reference: Callable[[str, bool], list[str]]) -> None:
    """What the path leaves in single characters the HMM joins, unless it is a word as a whole."""
    with resources.files("jieba").joinpath("dict.txt").open(encoding="utf-8") as dictionary:
        entries = [line.split(" ")[0] for line in dictionary]
    apart = 0
    for word in [*entries[::50], *(entry for entry in entries[::7] if len(entry) == 2)]:
        left_apart = len(word) > 1 and reference(word, False) == list(word)
        apart += left_apart
        assert words(word) == reference(word, True)
        if left_apart:
            assert words(word) == list(word)
            assert words(word + "_x") == reference(word + "_x", True)  # a run that is no word
    assert apart > 500  # of some 8,000


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("他说：“走吧！”她走了。", ["他说：“走吧！”", "她走了。"]),
        ("真的吗？！好……\n第二段；完", ["真的吗？！", "好……\n", "第二段；", "完"]),
        ("（见上。）没有标点的一行\n\n", ["（见上。）", "没有标点的一行\n", "\n"]),
        ("", []),
    ],
)
def test_sentences_keep_their_marks(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts
