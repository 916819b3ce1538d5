"""What belongs to a person is replaced, what only looks like it stays."""

import random
import re
import time

import pytest

from configs.cleaning import PRIVATE_KINDS, Cleaning
from configs.load import ConfigError, from_dict
from data_pipeline.clean import normalise, prepared
from data_pipeline.private import PLACEHOLDERS, mask
from tests import dev_corpus

IDENTITY = "11010519491231002X"  # the example of GB 11643
CARD = "6222021234567890128"

MASKED = [
    ("phone next to Han", "电话13812345678找王先生", "电话[电话]找王先生"),
    ("phone with marks", "138-1234-5678，138 1234 5678", "[电话]，[电话]"),
    ("phone abroad", "请拨+86 13812345678或8613812345678", "请拨[电话]或[电话]"),
    ("phone at both ends", "13812345678", "[电话]"),
    ("phone after another", "010-88886666/13812345678", "010-88886666/[电话]"),
    ("identity number", f"身份证{IDENTITY}。", "身份证[身份证号]。"),
    ("identity number, small x", f"({IDENTITY.lower()})", "([身份证号])"),
    ("card of UnionPay", f"卡号{CARD}，", "卡号[银行卡号]，"),
    ("card in fours", "账号 4111 1111 1111 1111 请查收", "账号 [银行卡号] 请查收"),
    ("card that says so", "visa卡4111111111111111", "visa卡[银行卡号]"),
    ("mail after Han", "邮箱abc.def@foo.com", "邮箱[邮箱]"),
    ("mail between Han", "联系a@b.cn或者来访", "联系[邮箱]或者来访"),
    ("mail with a wide @", "写信到zhang_san＠163.com吧", "写信到[邮箱]吧"),
    ("mail at a sentence's end", "Write to li@pku.edu.cn.", "Write to [邮箱]."),
    ("QQ", "加QQ：123456789", "加QQ：[QQ号]"),
    ("QQ group", "qq群号 12345678，欢迎", "qq群号 [QQ号]，欢迎"),
    ("WeChat", "微信号：wxid_abc123", "微信号：[微信号]"),
    ("WeChat, a phone", "微信:13812345678", "微信:[微信号]"),
    ("vx", "加vx：lovely_cat88领取", "加vx：[微信号]领取"),
    ("address", "登录IP：61.135.169.125，", "登录IP：[IP地址]，"),
    ("address next to Han", "来自221.130.33.52的用户", "来自[IP地址]的用户"),
]
LEFT = [
    ("order number", "订单号：13812345678，2024年"),
    ("order number, longer", "订单138123456789012"),
    ("identity number, wrong checksum", "编码110105194912310021号"),
    ("identity number, no such day", "110105194902300025"),
    ("identity number, no province", "990105194912310021"),
    ("card, wrong checksum", "卡号6222021234567890129，"),
    ("sixteen digits", "流水4111111111111111号"),
    ("decimal", "圆周率3.1415926535897932，0.13812345678"),
    ("decimals of a phone's length", "13812345678.25"),
    ("ISBN", "ISBN 9787302423287，ISBN：978-7-302-42328-7"),
    ("date", "2024-01-02 03:04:05，20240102030405"),
    ("time stamp", "1712345678，1712345678901"),
    ("version", "版本1.2.3.4，v10.20.30.40，Chrome 109.0.5414.120"),
    ("section", "见第1.2.3.4节"),
    ("five numbers", "1.3.6.1.4.1.311"),
    ("nobody's address", "127.0.0.1 192.168.1.100 10.0.0.8 172.16.31.99 255.255.255.0 8.8.8.8"),
    ("address of a document", "203.0.113.77 user@example.com"),
    ("file", "logo@2x.png，@app.route，user@host"),
    ("package", "react@18.2.0 见 @types/node"),
    ("QQ without a number", "QQ2013版，QQ用户超过100000000，QQ空间"),
    ("QQ as money", "QQ是100000元的公司"),
    ("WeChat without a number", "微信支付wechatpay，微信Android版，微信公众号：rmrbwx"),
    ("in a link", "https://a.cn/item/13812345678.html https://a.cn/13812345678"),
    ("part of a name", "abc13812345678def，id_13812345678"),
    ("hexadecimal", "5f13812345678ab"),
]


@pytest.mark.parametrize(("text", "masked"), [r[1:] for r in MASKED], ids=[r[0] for r in MASKED])
def test_what_is_private_is_masked(text: str, masked: str) -> None:
    answer, found = mask(text)
    assert answer == masked
    assert sum(found.values()) == masked.count("[")
    assert mask(answer) == (answer, {})
    assert normalise(answer).text == answer
    around, _ = mask(f"甲乙{text}丙丁")
    assert around == f"甲乙{masked}丙丁"


@pytest.mark.parametrize("text", [row[1] for row in LEFT], ids=[row[0] for row in LEFT])
def test_what_only_looks_private_stays(text: str) -> None:
    assert mask(text) == (text, {})


def test_every_kind_is_found_alone_and_counted() -> None:
    text = "；".join(row[1] for row in MASKED)
    seen = set()
    for kind in PRIVATE_KINDS:
        answer, found = mask(text, (kind,))
        assert set(found) == {kind}
        assert set(re.findall(r"\[\w+\]", answer)) == {PLACEHOLDERS[kind]}
        seen.add(found[kind])
    page = prepared(text, Cleaning(mask_private=("phone", "email")))
    assert {k for k in page.changed if k.startswith("private")} == {
        "private_phone",
        "private_email",
    }
    assert "[身份证号]" not in page.text
    assert prepared(text, Cleaning()).text == text
    assert min(seen) > 0


def test_checksums_decide() -> None:
    """Of numbers with a random last digit one in eleven and one in ten pass, no more."""
    draw = random.Random(2)
    days = [f"{draw.randrange(1950, 2000)}0{draw.randrange(1, 10)}" for _ in range(3000)]
    identities = [f"110105{day}1{draw.randrange(10_000, 100_000)}" for day in days]
    assert 0.07 < sum("id" in mask(text)[1] for text in identities) / 3000 < 0.11
    cards = [f"62{draw.randrange(10**16, 10**17)}" for _ in range(3000)]
    assert 0.08 < sum("card" in mask(text)[1] for text in cards) / 3000 < 0.12


def test_long_runs_take_no_longer_than_their_length() -> None:
    """Patterns that go back over a run would need minutes for these."""
    started = time.process_time()
    for run in ("1", "a", "1.", "a.", "1-", "@", "a@", "a@a.", "微信", "QQ：", "138 ", "://1"):
        mask(run * (200_000 // len(run)) + "电话13812345678")
    assert time.process_time() - started < 20


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'phones' is none of .*did you mean 'phone'"):
        from_dict(Cleaning, {"mask_private": ["phones"]})
    assert from_dict(Cleaning, {"mask_private": ["ip", "qq"]}).private_kinds() == ("ip", "qq")
    assert from_dict(Cleaning, {"mask_private": True}).private_kinds() == PRIVATE_KINDS


@pytest.mark.slow
def test_almost_nothing_is_masked_in_a_corpus_of_published_works() -> None:
    """Laws, classics, novels, manuals: at most a few in ten thousand documents."""
    documents = dev_corpus.documents(150, 4000, 5)
    masked = [
        (genre, sum(mask(text)[1].values())) for genre, texts in documents.items() for text in texts
    ]
    assert sum(n for genre, n in masked if genre in ("poetry", "law", "classical-prose")) == 0
    assert sum(n > 0 for _, n in masked) < 0.02 * len(masked)
