"""Normalisation leaves what a writer wrote and removes what a machine left behind."""

import random
import unicodedata
from dataclasses import replace

import numpy as np
import pytest

from configs.cleaning import Cleaning
from data_pipeline import clean
from data_pipeline.clean import FILTERS, digest, folded, judge, normalise, prepared
from data_pipeline.scores import scores

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
    ("read with another encoding", HAN + "ÖÐÎÄ", "mojibake"),
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
    loose = Cleaning(1, 10**9, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, max_mojibake_ratio=1.0)
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


WRONG = [("gbk", "latin-1"), ("gbk", "cp1252"), ("utf-8", "cp1252"), ("utf-8", "gbk")]


@pytest.mark.parametrize(("wrote", "read"), WRONG)
def test_a_text_read_with_the_wrong_encoding_is_told(wrote: str, read: str) -> None:
    text = (
        "人民日报的文章说，中国的科学家们在这个方面有了很大的进步。他们认为，不同的方法可以得到"
        "相同的结果，但是需要更多的时间来研究，我们应该把经验总结下来，让后来的人少走弯路。"
    ) * 3
    spoilt = text.encode(wrote).decode(read, "ignore")
    rules = Cleaning(min_han_ratio=0.0, min_han_ratio_with_code=0.0, max_symbol_ratio=1.0)
    rules = replace(rules, max_repeated_line_ratio=1.0, max_private_use_ratio=1.0)
    assert judge(normalise(spoilt), rules) == (False, "mojibake")
    if read != "gbk":  # a part of a page is told where its characters alone tell it
        assert judge(normalise(text + spoilt[:80] + text), rules) == (False, "mojibake")
    assert judge(normalise(text), rules) is True


@pytest.mark.parametrize(
    "text",
    [
        "烫烫烫烫烫烫是没有初始化的内存，" * 2,
        "锟斤拷锟斤拷" * 5 + HAN,
        "ﾖﾐｹﾎﾄﾕﾂ" * 4 + HAN,
    ],
)
def test_famous_mojibake_is_told(text: str) -> None:
    assert judge(normalise(text), Cleaning(min_characters=5)) == (False, "mojibake")


@pytest.mark.parametrize(
    "text",
    [
        "“锟斤拷”是把错误解码后的字符再次用国标编码读出来的结果，" + HAN * 8,
        "À l'été, Françoise a déjà goûté le café «Ñandú» à Zürich, naïve et heureuse." + HAN,
        "鐘鏡銀鍾鄉開關門間聞鏈錄鐵銅錢鎮，" + "這是傳統漢字寫的文章，銀行開門的時間。" * 3,
        "拼音：āáǎà ōóǒò ēéěè īíǐì ūúǔù ǖǘǚǜü，" + HAN,
        "——……“”‘’——……“”·····×÷±°§" + HAN * 2,
        "カタカナと漢字：ｱｲｳ" + HAN,
    ],
)
def test_good_text_is_not_taken_for_mojibake(text: str) -> None:
    rules = Cleaning(min_characters=5, min_han_ratio=0.0, min_han_ratio_with_code=0.0)
    assert judge(normalise(text), rules) is True


MARKUP = [
    ("entities", "甲&nbsp;乙&amp;丙&#20013;&lt;b&gt;", "甲 乙&丙中"),
    ("twice escaped", "甲&amp;nbsp;乙", "甲 乙"),
    ("tags", '<p>第一段</p><p class="a">第二段<br/>换行</p>', "第一段\n\n第二段\n换行"),
    ("links, scripts", '<a href="x">甲</a><script>var a=1</script>乙<!-- 注 -->', "甲乙"),
    ("wiki", "'''北京'''是[[中国|中华]]的[[首都]]<ref name=\"a\">书</ref>。", "北京是中华的首都。"),
    ("wiki's files", "[[File:北京.jpg|thumb|天安门]]北京[[分类:城市]]", "北京"),
    ("not tags", "vector<int> 若a<c且b>c，<user@host>", "vector<int> 若a<c且b>c，<user@host>"),
    ("not entities", "a&b; x?a=1&copy=2 &未知;", "a&b; x?a=1&copy=2 &未知;"),
    ("not wiki", "x[[i]] [[ -f x ]] [[1, 2], [3]]", "x[[i]] [[ -f x ]] [[1, 2], [3]]"),
    ("code", "`<br>`换行：\n```\n<p>&nbsp;</p>\n```", "`<br>`换行：\n```\n<p>&nbsp;</p>\n```"),
]


@pytest.mark.parametrize(("text", "stripped"), [r[1:] for r in MARKUP], ids=[r[0] for r in MARKUP])
def test_markup_is_stripped_where_asked(text: str, stripped: str) -> None:
    asked = Cleaning(strip_markup=True)
    page = prepared(text, asked)
    assert page.text == stripped
    assert prepared(page.text, asked).text == stripped
    assert prepared(text, Cleaning()).text == normalise(text).text
    counted = sum(page.changed[what] for what in ("entities", "tags", "wiki_markup"))
    assert (counted > 0) == (text != stripped)


def test_ten_thousand_random_strings_are_cleaned_and_twice_is_once() -> None:
    """Characters of every plane, lone surrogates, and what the rules look for, in any order."""
    draw = random.Random(11)
    rules = Cleaning(1, mask_private=True, strip_markup=True)
    parts = [text for _, text, _ in MARKUP] + [text for row in EVEN for text in row[1:]]
    parts += ["<", ">", "&", "amp;", "[[", "]]", "''", "`", "```", "@", "a.b", "1.2.3.44"]
    parts += ["ÖÐ", "锟斤拷", "鐨勬槸", "\n", "\u3000", "《", "】", "13812345678", "QQ：12345"]
    parts += ["\ud800", "\udfff"]
    for number in range(10_000):
        if number % 2:
            text = "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(60)))
        else:
            text = "".join(draw.choices(parts, k=draw.randrange(12)))
        once = normalise(text)
        assert normalise(once.text).text == once.text
        page = prepared(text, rules)
        page.text.encode()
        judge(page, rules)
        row = scores(page)
        assert np.isfinite(row).all()
        assert (row >= 0).all()
        assert len(page.codes) == len(page.kinds) == len(page.text) == sum(page.counts)
        assert normalise(page.text).text == page.text
