"""The gap sentences of pseudo_summary.py are those of T5 PEGASUS, to the last pick.

The reference is the published greedy written out: strings are joined, each score is a textbook
table, compiled only because it is looked up some hundred million times.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numba
import numpy as np
import pytest

from data_pipeline import pseudo_summary
from data_pipeline.pseudo_summary import pick, pick_batch, picks, scores, segments, units
from tests import dev_corpus

SAMPLE = Path(pseudo_summary.__file__).parent / "sample" / "sample.jsonl"

PUBLISHED = (
    "为什么原子分子没有实物图，只有模型？ 而且就算有实物图，应该很难观察，怎么画出的模型图。"
    "一个原子看不到，那为什么很多很多个原子就可以被看到了呢？这其中是量的变化。还是什么原因导致了质变。"
    "实物图如果是指隧道扫描图的话，电子显微镜（超薄玻璃）。而且，模型不是据实物图画出的，"
    "历史上原子的模型提出是由现有数据加猜想提出模型，再由实验证明修正。一开始认为原子是实心的，"
    "电子像枣子一样镶嵌在原子上，叫枣糕模型后来出现了历史上非常有名的实验粒子散射实验卢瑟福用阿尔法粒子"
    "撞击金原子，得出原子内部十分空旷。于是提出了著名的太阳系模型。电子像行星一样围绕原子核。"
    "现在由量子力学修正为电子云模型。"
)
"""The text of data-sample.png in ZhuiyiTechnology/t5-pegasus; red there: pieces 1 and 4."""


# ---- the reference ------------------------------------------------------------------------------


@numba.njit
def table_of_subsequences(a, b):  # type: ignore[no-untyped-def]
    """The corner of the textbook table: longest common subsequence of two arrays."""
    table = np.zeros((len(a) + 1, len(b) + 1), np.int32)
    for i in range(len(a)):
        for j in range(len(b)):
            if a[i] == b[j]:
                table[i + 1, j + 1] = table[i, j] + 1
            else:
                table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def lcs(a: str, b: str) -> int:
    arrays = [np.array([ord(char) for char in text], np.int64) for text in (a, b)]
    return int(table_of_subsequences(*arrays))


def joined(unit: Sequence[str], numbers: Sequence[int]) -> str:
    return "".join(unit[i] for i in numbers)


def greedy(
    unit: Sequence[str],
    ratio: float = 0.25,
    score: Callable[[str, str], int] = lcs,
    without_itself: bool = True,
    of_the_whole: bool = False,
    tie: Callable[[int], int] = lambda i: -i,
) -> list[int]:
    """T5 PEGASUS' pseudo_summary(); the last three are its near misses, for negative controls."""
    if len(unit) < 2:
        return []
    source, target = list(range(len(unit))), list[int]()
    while True:
        best = max(
            source,
            key=lambda i: (
                score(
                    joined(unit, [j for j in source if j != i or not without_itself]),
                    joined(unit, sorted([*target, i])),
                ),
                tie(i),
            ),
        )
        source.remove(best)
        target = sorted([*target, best])
        rest = len(joined(unit, range(len(unit)) if of_the_whole else source))
        if len(source) == 1 or not rest or len(joined(unit, target)) / rest > ratio:
            break
    return source if len(joined(unit, source)) < len(joined(unit, target)) else target


def best_by_rouge(unit: Sequence[str], ratio: float = 0.3) -> list[int]:
    """PEGASUS' Ind-Orig: the F1 of each sentence against the others, as an exact fraction."""
    words = [Counter(filter(str.isalnum, piece)) for piece in unit]
    whole = sum(words, Counter[str]())

    def f1(i: int) -> Fraction:
        rest = whole - words[i]
        common = (rest & words[i]).total()
        if not common:
            return Fraction(0)
        precision = Fraction(common, words[i].total())
        recall = Fraction(common, rest.total())
        return 2 * precision * recall / (precision + recall)

    ranked = sorted(range(len(unit)), key=lambda i: (-f1(i), i))
    return sorted(ranked[: max(1, int(len(unit) * ratio))])


def text_segmentate(text: str, longest: int, separators: str) -> list[str]:
    """bert4keras' function, read word by word."""
    text = text.strip()
    if separators and len(text) > longest:
        parts, run, found = text.split(separators[0]), "", list[str]()
        for i, part in enumerate(parts):
            if run and part and len(run) + len(part) > longest - 1:
                found.extend(text_segmentate(run, longest, separators[1:]))
                run = ""
            run = run + part
            if i < len(parts) - 1:
                run = run + separators[0]
        if run:
            found.extend(text_segmentate(run, longest, separators[1:]))
        return found
    return [text]


def real_documents(count: int, longest: int) -> list[str]:
    """Texts of every genre of the development corpus, or of the shipped sample without it."""
    if os.environ.get("BAJIE_DEV_DATA"):
        genres = dev_corpus.documents(per_genre=-(-count // 10), longest=longest, seed=11)
        return [text for texts in genres.values() for text in texts]
    with SAMPLE.open(encoding="utf-8") as file:
        whole = "\n".join(json.loads(line)["text"] for line in file)
    draw = random.Random(11)
    starts = [draw.randrange(len(whole) - longest) for _ in range(count)]
    return [whole[start : start + draw.randint(longest // 4, longest)] for start in starts]


# ---- what was published -------------------------------------------------------------------------


def test_published_example() -> None:
    pieces = segments(PUBLISHED)
    assert list(map(len, pieces)) == [44, 37, 12, 27, 48, 78, 27, 16]
    assert scores(pieces) == [21, 11, 6, 10, 28, 25, 14, 10]
    after = scores(pieces, [4])
    assert dict(enumerate(after)) == {0: 30, 1: 33, 2: 31, 3: 29, 4: -1, 5: 31, 6: 27, 7: 28}
    (unit,) = pick(PUBLISHED)
    assert unit.picks == picks(pieces) == greedy(pieces) == [1, 4]
    assert unit.target == pieces[1] + pieces[4]
    assert len(unit.target) / len(unit.source) == pytest.approx(0.4167, abs=5e-5)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return real_documents(300, 1200)


def test_real_documents(texts: list[str]) -> None:
    """Hundreds of documents; 2,000 in the slow test below."""
    assert len(texts) >= 300
    agree(texts)


@pytest.mark.slow
def test_two_thousand_real_documents() -> None:
    texts = real_documents(2500, 2400)  # the rarer genres have fewer than a tenth of it
    texts = random.Random(12).sample(texts, 2000)
    seen = agree(texts)
    print(f"{len(texts)} documents, {sum(map(len, texts))} characters, {seen} units: all alike")


def agree(texts: list[str]) -> int:
    """Segments, units, picks of both criteria: as the references; returns the number of units."""
    by_lcs, by_rouge = pick_batch(texts), pick_batch(texts, "rouge1")
    seen = 0
    for text, found, other in zip(texts, by_lcs, by_rouge, strict=True):
        pieces = segments(text)
        assert pieces == text_segmentate(text, 32, "\n。")
        kept = [piece for unit in found for piece in unit.segments]
        assert kept == pieces[: len(kept)] and len(pieces) - len(kept) < 3
        for unit, by_words in zip(found, other, strict=True):
            assert unit.segments == by_words.segments
            assert unit.picks == greedy(unit.segments), unit.segments
            assert by_words.picks == best_by_rouge(unit.segments), unit.segments
            seen += 1
    return seen


def test_a_near_miss_is_seen(texts: list[str]) -> None:
    """Negative control: each way to get the greedy slightly wrong moves picks in these texts."""
    every = [unit for found in pick_batch(texts[::3]) for unit in found]
    wrong = {
        "a piece is compared with itself": {"without_itself": False},
        "the ratio is of the whole": {"of_the_whole": True},
        "of equals the last": {"tie": lambda i: i},
    }
    for what, change in wrong.items():
        moved = sum(unit.picks != greedy(unit.segments, **change) for unit in every)  # type: ignore[arg-type]
        assert moved > 0, what
    assert any(unit.picks != best_by_rouge(unit.segments) for unit in every)


# ---- the kernel ---------------------------------------------------------------------------------


def test_subsequences_equal_the_table() -> None:
    """Alphabets from one character to more than any text has, lengths around the words' borders."""
    draw = random.Random(3)
    borders = [0, 1, 2, 31, 62, 63, 64, 65, 66, 126, 127, 128, 129, 191, 192, 193, 300]
    alphabets = ["一", "一二", "甲乙丙丁戊", "".join(map(chr, range(0x4E00, 0x5200)))]
    alphabets.append("\x00a。\n\ud800\U00020000\U0001f600\U0010ffff")  # and planes beyond the first
    for alphabet in alphabets:
        for _ in range(120):
            a, b = (
                "".join(draw.choices(alphabet, k=draw.choice([*borders, draw.randint(0, 400)])))
                for _ in range(2)
            )
            expected = lcs(a, b)
            assert scores([a, b]) == [expected, expected], (a, b)
            cut = draw.randint(0, len(a))  # a target of several pieces, around the source
            assert scores([a[:cut], b, a[cut:]], [0])[2] == expected, (a, b, cut)


def test_the_table_can_be_told_from_its_neighbours() -> None:
    """Negative control: neither the common characters nor the longest common run would pass."""
    a, b = "甲乙丙丁", "丁丙甲乙"
    assert (lcs(a, b), table_of_subsequences.py_func([1, 2, 3], [3, 1, 2])) == (2, 2)
    assert scores([a, b]) == [2, 2] and scores([a, b], criterion="rouge1") == [4, 4]
    assert scores(["甲一乙", "甲二乙"]) == [2, 2]  # the longest common run is 1


def test_random_units() -> None:
    """Few characters, so that there are ties everywhere; empty pieces; ratios and swaps."""
    draw = random.Random(4)
    swapped = 0
    for number in range(1500):
        alphabet = draw.choice(["一", "一二", "甲乙丙丁戊己", "的一是在不了有和人这，。？"])
        unit = [
            "".join(draw.choices(alphabet, k=draw.choice([0, 1, 2, 3, draw.randint(0, 40)])))
            for _ in range(draw.randint(0, 9))
        ]
        ratio = draw.choice([0.1, 0.25, 0.25, 0.5, 0.9])
        found = picks(unit, gap_ratio=ratio)
        assert found == greedy(unit, ratio), (number, unit, ratio)
        rest = [i for i in range(len(unit)) if i not in found]
        assert len(joined(unit, found)) <= len(joined(unit, rest)), unit
        swapped += len(found) > 1 and sum(len(unit[i]) for i in rest) > 0.9 * len("".join(unit))
    assert swapped > 10  # some targets are what the greedy left over


# ---- edges --------------------------------------------------------------------------------------


def test_ties_go_to_the_first_and_the_ratio_is_passed() -> None:
    """One of five is exactly a quarter of the remainder: not above it, so there is a second."""
    assert picks(["一二三四"] * 5) == greedy(["一二三四"] * 5) == [0, 1]
    assert picks(["一二三四"] * 4) == [0]
    assert picks(["一二三四"] * 5, gap_ratio=0.24) == [0]


def test_the_shorter_side_is_the_target() -> None:
    unit = ["甲乙", "甲乙丙丁戊己庚辛壬癸", "丙丁"]
    assert scores(unit) == [2, 4, 2]
    assert picks(unit) == greedy(unit) == [0, 2]


def test_little_text_has_no_summary() -> None:
    assert (
        picks([]) == picks(["一句。"]) == picks([], "rouge1") == picks(["一句。"], "rouge1") == []
    )
    assert picks(["", "", ""]) == greedy(["", "", ""])
    assert pick("") == pick(" \n ") == pick("一句。两句。") == pick_batch([""])[0] == []
    assert pick_batch([]) == []
    assert segments("") == [""] and units([]) == []
    assert [len(found) for found in pick_batch(["", PUBLISHED, "短。"])] == [0, 1, 0]


def test_a_unit_is_long_when_its_pieces_are(texts: list[str]) -> None:
    """Without 。 a piece stays whole, three of them are a unit; beyond a limit none is picked."""
    draw = random.Random(5)
    long = ["".join(draw.choices(PUBLISHED.replace("。", ""), k=n)) for n in (900, 2500, 60)]
    text = "。".join(long) + "。"
    (unit,) = pick(text)
    assert len(text) > pseudo_summary.CHARACTERS and len(unit.segments) == 3
    assert unit.picks == greedy(unit.segments) != []
    huge = ["字" * pseudo_summary.LARGEST_UNIT, "一。", "二。"]
    assert [found.picks for found in pick(huge)] == [[]]
    assert picks(huge) == picks(huge, "rouge1") == []


def test_characters_of_every_plane() -> None:
    """Astral characters count as one, and a lone surrogate stops nothing."""
    text = "𠀀𠀁好𪚥。" * 3 + "\n" + "😀𠀀𪚥的\ud800原子模型一二三四五六七八九十甲乙丙丁。" * 6
    for unit in pick(text):
        assert unit.picks == greedy(unit.segments)
    assert scores(["𠀀𠀁", "\ud800𠀁"]) == [1, 1]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("短句。短句。", ["短句。短句。"]),
        ("　　首行缩进" + "字" * 30 + "。  \n次行。", ["首行缩进" + "字" * 30 + "。", "次行。"]),
        ("问？" * 20, ["问？" * 20]),
        ("字" * 100, ["字" * 100]),
        ("字" * 40 + "\n \n" + "词" * 40, ["字" * 40, "", "词" * 40]),
    ],
)
def test_segments_by_hand(text: str, pieces: list[str]) -> None:
    assert segments(text) == pieces == text_segmentate(text, 32, "\n。")


def test_random_segments() -> None:
    draw = random.Random(6)
    for _ in range(2000):
        text = "".join(draw.choices("字词，。。\n\n 　\t？", k=draw.randint(0, 200)))
        for longest, separators in [(32, "\n。"), (8, "\n。？，"), (5, "")]:
            expected = text_segmentate(text, longest, separators)
            assert segments(text, longest, separators) == expected
        assert "".join("".join(segments(text)).split()) == "".join(text.split())


def test_mistakes_are_sentences() -> None:
    with pytest.raises(ValueError, match=r"criterion 'rouge'.*lcs, rouge1.*准则"):
        picks(["一", "二"], "rouge")
    with pytest.raises(ValueError, match=r"gap_ratio is 1.5, must lie in \(0, 1\)"):
        pick("一", gap_ratio=1.5)
