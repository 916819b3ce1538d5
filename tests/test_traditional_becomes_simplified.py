"""A modern page in traditional characters becomes simplified; classical text stays; both are the
same text to whatever compares texts."""

import json
from pathlib import Path

import numpy as np
import opencc
import pytest

from configs.cleaning import Cleaning
from data_pipeline import build, clean, hanzi, minhash
from data_pipeline.shards import records
from tests import dev_corpus
from tests.test_corpus_build import SAMPLE, kept, page

MODERN = (
    "「瞭解」這個問題的人們都說：頭髮乾了以後，乾隆皇帝的畫像還掛在那裡。我們沒有辦法證明它是不是真的，"
    "但是這裡的圖書館開放給所有的學生，讓他們自己去查。"
)
SIMPLE = (
    "「了解」这个问题的人们都说：头发干了以后，乾隆皇帝的画像还挂在那里。我们没有办法证明它是不是真的，"
    "但是这里的图书馆开放给所有的学生，让他们自己去查。"
)
CLASSICAL = (
    "臣聞求木之長者，必固其根本；欲流之遠者，必浚其泉源；思國之安者，必積其德義。源不深而望流之遠。"
)
VERSE = (
    "風急天高猿嘯哀，渚清沙白鳥飛迴。無邊落木蕭蕭下，不盡長江滾滾來。"
    "萬里悲秋常作客，百年多病獨登臺。"
)
TRADITIONAL = opencc.OpenCC("s2t")


def sample(kind: str) -> list[str]:
    """Texts of the shipped sample: modern handbooks, or poems."""
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    return [row["text"] for row in rows if (row["source"] == "poems") == (kind == "poems")]


def test_modern_pages_are_converted_and_classical_ones_left() -> None:
    done, script = clean.simplify(clean.normalise(MODERN))
    assert (done.text, script) == (SIMPLE, "traditional")
    changed = sum(one != two for one, two in zip(MODERN, SIMPLE, strict=True))
    assert done.changed == {"simplified": changed}
    assert done.counts == clean.normalise(SIMPLE).counts
    for text, kind in ((CLASSICAL, "classical"), (VERSE, "classical"), (SIMPLE, "simplified")):
        before = clean.normalise(text)
        assert clean.simplify(before) == (before, kind)


def test_simplified_pages_are_left_byte_for_byte() -> None:
    """「」, 份, 乾隆 and English are no signs of a traditional page."""
    texts = [
        *sample("handbooks"),
        *sample("poems"),
        "他说：「这份资料是乾隆年间的东西。」",
        "abc",
        "",
    ]
    assert {hanzi.script(text) for text in texts} == {"simplified"}


def test_a_converted_page_is_what_it_was_before_it_was_traditional() -> None:
    """s2t, then ours: 2 % of the pages may differ, in characters that s2t writes as variants."""
    texts = [clean.normalise(text).text for text in sample("handbooks")]
    texts = [text for text in texts if len(text) >= 100]
    found = [clean.simplify(clean.normalise(TRADITIONAL.convert(text))) for text in texts]
    taken = [page.text == text for (page, _), text in zip(found, texts, strict=True)]
    assert np.mean(taken) >= 0.9
    same = [
        np.array_equal(minhash.letters(page.text), minhash.letters(text))
        for (page, _), text in zip(found, texts, strict=True)
    ]
    assert np.mean(same) >= 0.98
    poems = [hanzi.script(TRADITIONAL.convert(text)) for text in sample("poems")]
    assert poems.count("traditional") / len(poems) < 0.05


def test_the_table_is_opencc_without_its_phrases() -> None:
    table = hanzi.table()
    one = opencc.OpenCC("t2s")
    for char in "漢後發髮乾頭麼裡的一a，":
        assert chr(table[ord(char)]) == one.convert(char)
    forms = hanzi.forms()
    assert np.array_equal(forms[forms], forms), "folding twice changes nothing more"
    apart = [code for code in range(0x110000) if forms[code] != forms[table[code]]]
    assert not apart, "what OpenCC makes one is one"
    assert np.array_equal(table[:0x2E80], np.arange(0x2E80, dtype=np.uint32))


def test_a_long_page_is_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join([MODERN] * 5)
    whole = hanzi.simplified(text)
    monkeypatch.setattr(hanzi, "PIECE", 100)
    assert hanzi.simplified(text) == whole
    assert hanzi.simplified(text + "\n")[0] == whole[0] + "\n"


def test_both_scripts_are_one_text_to_what_compares() -> None:
    def digest(text: str) -> bytes:
        return clean.digest(clean.normalise(text))

    assert digest(MODERN) == digest(SIMPLE) != digest(SIMPLE + "的")
    signed = [minhash.signature(text, 5, 108) for text in (MODERN, SIMPLE, SIMPLE[1:-9])]
    assert np.array_equal(signed[0], signed[1])  # type: ignore[arg-type]
    assert not np.array_equal(signed[0], signed[2])  # type: ignore[arg-type]
    assert np.array_equal(minhash.letters(MODERN), minhash.letters(SIMPLE))


def test_a_corpus_converts_counts_and_finds_the_other_script(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    texts = {"modern": MODERN, "classical": CLASSICAL, "verse": VERSE}
    texts |= {"simple": opencc.OpenCC("t2s").convert(VERSE)}
    texts |= {f"n{n}": text for n, text in enumerate(sample("handbooks")[:40])}
    rows = [json.dumps({"id": name, "text": text}) for name, text in texts.items()]
    source.write_text("\n".join(rows), "utf-8")

    def built(name: str, **rules: bool) -> tuple[dict[str, str], set[str], dict[str, int]]:
        out = tmp_path / name
        manifest = build.build(page(out, source, clean=rules))
        stay = {row["id"]: row["text"] for split in ("train", "valid") for row in kept(out, split)}
        gone = {r["id"] for p in (out / "rejects" / "duplicate").iterdir() for r in records(p)}
        names = {key.rpartition("/")[2].rpartition(":")[2]: text for key, text in stay.items()}
        return names, {n.rpartition("/")[2].rpartition(":")[2] for n in gone}, manifest["changed"]

    stay, gone, changed = built("yes")
    assert stay["modern"] == SIMPLE
    assert (stay["classical"], stay["verse"]) == (CLASSICAL, VERSE)
    assert "simple" in gone  # the poem stood before, in the other script
    assert changed["simplified"] > 20
    stay, gone, changed = built("no", simplify=False)
    assert stay["modern"] == MODERN
    assert "simple" in gone
    assert "simplified" not in changed
    assert Cleaning().simplify


@pytest.mark.slow
def test_genres_of_the_development_corpus_are_told_apart() -> None:
    """As they are, and written in traditional characters by OpenCC: 1,000 characters of each."""
    drawn = dev_corpus.documents(300, 1000, 5)
    for genre, texts in drawn.items():
        texts = [text for text in texts if _has_han(text)]
        there = [hanzi.script(text) for text in texts]
        back = [hanzi.script(TRADITIONAL.convert(text)) for text in texts]
        share = back.count("traditional") / len(back)
        print(f"{genre:18} {len(texts)} converted {share:.3f}, as they are: {set(there)}")
        if genre in ("poetry", "classical-prose"):
            assert share < 0.12
        elif genre != "vernacular-novel":  # of all ages; half of them read like classical prose
            assert there.count("simplified") == len(there)
            assert share > 0.9


def _has_han(text: str) -> bool:
    """100 Han and half of the text: not a table, a program, a list of links."""
    page = clean.normalise(text)
    return page.counts[clean.HAN] > max(100, page.solid / 2)
