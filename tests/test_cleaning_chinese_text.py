"""Normalisation leaves what a writer wrote and removes what a machine left behind."""

import random
import unicodedata

import pytest

from configs.cleaning import Cleaning
from data_pipeline import clean
from data_pipeline.clean import FILTERS, digest, folded, judge, normalise

HAN = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少"

EVEN = [
    ("full-width letters and digits", "ＡＢＣｘｙｚ０１９", "ABCxyz019"),
    (
        "punctuation stays as written",
        "，：；！？（）～％…「」“”《》、。",
        "，：；！？（）～％…「」“”《》、。",
    ),
    ("never NFKC", "①㈠℃㎡Ⅷ㍿½ﬁ", "①㈠℃㎡Ⅷ㍿½ﬁ"),
    ("NFC", "e\u0301 が".replace("が", "か\u3099"), "é が"),
    ("compatibility ideographs", "\uf900", "豈"),
    ("folded, then composed", "Ａ\u030a", "Å"),
    ("ideographic space inside a line", "第一章\u3000总则", "第一章 总则"),
    ("ideographic indentation", "\u3000\u3000一\n\u3000\u3000二", "一\n二"),
    ("code keeps its indentation", "if x:\n    y = 1", "if x:\n    y = 1"),
    ("tabs stay", "甲\t乙", "甲\t乙"),
    ("other wide spaces", "甲\u00a0乙\u2003丙", "甲 乙 丙"),
    ("line ends", "一\r\n二\r三\u2028四\u0085五\x0c六", "一\n二\n三\n四\n五\n六"),
    ("trailing blanks", "一  \n二\t\n三 ", "一\n二\n三"),
    ("gaps", "一\n\n\n\n二\n \n \n三", "一\n\n二\n\n三"),
    ("around", " \n\n一\n ", "一"),
    (
        "zero width and directions",
        "一\u200b二\u200d三\ufeff四\u202e五\u2060六\u00ad",
        "一二三四五六",
    ),
    ("control", "一\x00二\x1b三\x7f四", "一二三四"),
    ("private use", "一\ue123二\U0010fde3三\U000f0000", "一二三"),
    ("lost", "一\ufffd二", "一二"),
    ("no characters", "一\ufffe二\U0001ffff三\ufdd0", "一二三"),
    ("rare ideographs stay", "㐂𠮷龦〇々", "㐂𠮷龦〇々"),
    ("variation selectors stay", "葛\U000e0100", "葛\U000e0100"),
    ("emoji stay", "好😀", "好😀"),
    ("a removed mark does not hide indentation", "\u200b\u3000\u3000一", "一"),
    ("empty", "", ""),
    ("nothing but rubbish", "\u200b\x00\r\n\u3000", ""),
]


@pytest.mark.parametrize(
    ("before", "after"), [row[1:] for row in EVEN], ids=[row[0] for row in EVEN]
)
def test_normalisation_by_hand(before: str, after: str) -> None:
    assert normalise(before).text == after


def test_what_is_removed_is_counted() -> None:
    page = normalise("Ａ一\u3000二\ue000\ue001\ufffd\u200b\x00")
    assert dict(page.changed) == {
        "width": 2,
        "private_use": 2,
        "lost": 1,
        "zero_width": 1,
        "control": 1,
    }
    assert not normalise("一二三，abc 123。\n四").changed


def test_normalising_twice_changes_nothing_more() -> None:
    draw = random.Random(7)
    marks = [text for _, before, after in EVEN for text in (before, after)] + [
        " ",
        "\n",
        "\u3000",
        "\r",
    ]
    for _ in range(3000):
        text = "".join(draw.choices(marks, k=draw.randrange(8)))
        once = normalise(text)
        twice = normalise(once.text)
        assert twice.text == once.text
        assert not twice.changed
        assert unicodedata.is_normalized("NFC", once.text)
        assert len(once.kinds) == len(once.text) == sum(once.counts)


def test_the_fast_way_equals_a_slow_one() -> None:
    """Character by character, with Python's own database, on any code point."""

    def slow(text: str) -> str:
        out = []
        for char in text:
            if char in "\u3000\u00a0":
                out.append(" ")
            elif "０" <= char <= "９" or "Ａ" <= char <= "Ｚ" or "ａ" <= char <= "ｚ":
                out.append(chr(ord(char) - 0xFEE0))
            elif unicodedata.category(char) not in ("Cc", "Cf", "Co") and char != "\ufffd":
                out.append(char)
        return unicodedata.normalize("NFC", "".join(out)).strip(" ")

    draw = random.Random(3)
    wide = [chr(c) for c in (0xFF10, 0xFF3A, 0xFF41, 0x3000, 0xA0, 0xE000, 0x200B, 0xFFFD, 0x7)]
    for _ in range(2000):
        text = "一" + "".join(
            draw.choice(wide)
            if draw.random() < 0.1
            else chr(draw.choice([draw.randrange(0x21, 0x7F), draw.randrange(0x3001, 0x9FFF)]))
            for _ in range(draw.randrange(60))
        )
        assert normalise(text).text == slow(text).strip()


RULES = Cleaning(min_characters=10, max_characters=100)
JUDGED = [
    ("kept", HAN, True),
    ("short", "春眠不觉晓", "too_short"),
    ("blanks do not count", "春眠不觉晓" + " \n" * 20 + "处处", "too_short"),
    ("long", HAN * 6, "too_long"),
    ("english", "All that is gold does not glitter 春眠", "few_han"),
    ("technical", "用 apt install 安装软件包", True),
    ("numbers", "电话一二三四 0102 0304", "many_digits"),
    ("drawing", "┌──┐│春眠不觉晓处处│└──┘", "many_symbols"),
    ("decoded wrongly", HAN + "\ufffd", "lost_characters"),
    ("private font", HAN + "\ue000\ue001", "private_use"),
    ("echo", "\n".join(["春眠不觉晓处处"] * 4), "repeated_lines"),
    ("a refrain", "春眠不觉晓\n处处闻啼鸟\n春眠不觉晓\n花落知多少", True),
    ("empty", "", "too_short"),
]


@pytest.mark.parametrize(
    ("text", "verdict"), [row[1:] for row in JUDGED], ids=[row[0] for row in JUDGED]
)
def test_filters_by_hand(text: str, verdict: bool | str) -> None:
    answer = judge(normalise(text), RULES)
    assert answer == (True if verdict is True else (False, verdict))


def test_every_filter_answers_true_or_a_reason_and_every_threshold_is_used() -> None:
    refused = {row[2] for row in JUDGED if row[2] is not True}
    assert len(refused) == len(FILTERS)
    loose = Cleaning(1, 10**9, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    for _, text, _ in JUDGED[:-1]:
        assert judge(normalise(text), loose) is True


def test_equal_letters_have_equal_digests_and_others_do_not() -> None:
    plain = digest(normalise("春眠不觉晓，处处闻啼鸟。abc１２"))
    assert digest(normalise("春眠不觉晓 处处闻啼鸟\nabc12！？“”")) == plain
    assert digest(normalise("春眠不觉晓，处处闻啼鸟。abd12")) != plain
    assert digest(normalise("春眠不觉晓，处处闻啼鸟。abc21")) != plain


def test_a_prompt_gets_the_characters_of_the_corpus_and_keeps_its_layout() -> None:
    wide = ("２０２４年，第一章", "ａｂｃ\r\n甲\u3000乙")
    for text in (*wide, "零\u200b宽\ue000专用\ufffd", "e\u0301"):
        assert folded(text).split() == normalise(text).text.split()
    assert folded("  甲  \n\n\n\n 乙 \n") == "  甲  \n\n\n\n 乙 \n"
    assert folded(folded("　　２")) == folded("　　２") == "  2"


def test_pages_with_code_are_counted_again_without_it() -> None:
    rules = Cleaning(min_characters=10, max_repeated_line_ratio=1.0)
    said = "先安装依赖再运行下面的命令然后查看结果。"
    code = "```\n" + "kubectl get pods --all-namespaces\n" * 3 + "```\n"
    page = normalise(said + code)
    assert page.counts[clean.HAN] < rules.min_han_ratio * page.solid
    assert judge(page, rules) is True
    bare = normalise(said + code.replace("```", ""))
    assert judge(bare, rules) == (False, "few_han")
    drowned = normalise(said + code * 9)
    assert judge(drowned, rules) == (False, "few_han")
    formula = normalise(said + "$$" + "x_{1}+y^{2}=" * 8 + "$$" + "<br/><strong>" * 5)
    assert judge(formula, rules) is True
