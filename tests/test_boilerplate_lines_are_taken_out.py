"""A line that stands in many documents goes: the same as counting all lines in one table."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.load import ConfigError
from data_pipeline import build, clean, lines
from data_pipeline.shards import key_range, records
from tests.test_corpus_build import contents, kept, page

WORDS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
FOOTER = "版权所有，转载请注明出处——某某新闻网"
NAVIGATION = "您现在的位置：首页 > 新闻中心 > 正文"


def texts(count: int) -> list[str]:
    """Documents of three lines of their own; every second ends with the footer, every third begins
    with the navigation in one of two scripts; every tenth is hardly anything else."""
    draw, found = random.Random(1), []
    for number in range(count):
        own = ["".join(draw.choices(WORDS, k=30)) + f"{number}。" for _ in range(3)]
        if number % 10 == 0:
            own = ["短文章"]
        if number % 3 == 0:
            own.insert(0, NAVIGATION.replace("现", "現") if number % 2 else NAVIGATION)
        if number % 2 == 0:
            own += ["", FOOTER.replace("，", " ")]
        found.append("\n".join(own))
    return found


def write(path: Path, found: list[str]) -> Path:
    rows = [json.dumps({"id": f"n{n}", "text": text}) for n, text in enumerate(found)]
    path.write_text("\n".join(rows), "utf-8")
    return path


def built(out: Path, source: Path, rules: dict[str, Any] | None, **data: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {"dedup": {"exact": False, "lines": rules}}
    sections["encode"] = {"boundaries": False}
    sections["clean"] = {"min_characters": 10, "simplify": False}
    return build.build(page(out, source, **sections, **({"data": data} if data else {})))


def stay(out: Path) -> dict[int, str]:
    rows = [row for split in ("train", "valid") for row in kept(out, split)]
    return {int(row["id"].rpartition("n")[2]): row["text"] for row in rows}


def letters(line: str) -> str:
    return "".join(filter(str.isalnum, line)).replace("現", "现")


def test_hashes_of_lines_are_as_distinct_as_their_letters() -> None:
    text = (
        "一二三四五六七八\n\n一二，三四五六七八。\n短\n現在一二三四五六\n现在一二三四五六\n"
        + "a" * 9
    )
    starts, stops, hashes = lines.of(text, 8)
    found = [text[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    assert found == [line for line in text.split("\n") if len(letters(line)) >= 8]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3] != hashes[4]
    assert len(lines.of("", 1)[0]) == len(lines.of("\n\n", 1)[0]) == 0


def test_tables_equal_a_dictionary() -> None:
    draw = random.Random(2)
    drawn = [(draw.randrange(20) << 58, draw.randrange(9)) for _ in range(400)]
    hashes, rows = (np.array(column, np.uint64) for column in zip(*drawn, strict=True))
    table = lines.together(hashes, rows, np.ones(400, np.uint32))
    expected = Counter(one for one, _ in set(drawn))
    assert dict(zip(table["hash"].tolist(), table["documents"].tolist(), strict=True)) == expected
    firsts = {one: min(row for other, row in drawn if other == one) for one in expected}
    assert dict(zip(table["hash"].tolist(), table["first"].tolist(), strict=True)) == firsts
    parts = [table[key_range(table, bucket, 4)] for bucket in range(4)]
    assert np.array_equal(np.concatenate(parts), table)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("source") / "text.jsonl", texts(1200))


@pytest.mark.parametrize("first", [False, True])
def test_lines_of_many_documents_go(source: Path, tmp_path: Path, first: bool) -> None:
    rules = {"max_documents": 300, "min_characters": 8, "keep_first": first}
    manifest, every = built(tmp_path / "c", source, rules), texts(1200)
    table = Counter(
        line for text in every for line in {*map(letters, text.split("\n"))} if len(line) >= 8
    )
    common, seen, expected, small = {line for line in table if table[line] > 300}, set(), {}, set()
    assert common == {letters(FOOTER), letters(NAVIGATION)}
    removed = 0
    for number, text in enumerate(every):
        left = []
        for line in text.split("\n"):
            if letters(line) in common and not (first and letters(line) not in seen):
                removed += 1
            else:
                left.append(line)
            seen.add(letters(line))
        trimmed = clean.normalise("\n".join(left)).text
        if len("".join(trimmed.split())) < 10:
            small.add(number)
        else:
            expected[number] = trimmed
    # Documents of "短文章" alone were refused before: they never had their lines counted out.
    alone = {n for n in small if every[n] == "短文章"}
    assert stay(tmp_path / "c") == expected
    gone = [r for p in tmp_path.glob("c/rejects/trimmed:too_short/*") for r in records(p)]
    assert {int(row["id"].rpartition("n")[2]) for row in gone} == small - alone
    assert {row["text"] for row in gone} <= {clean.normalise(t).text for t in every}
    assert manifest["lines"]["lines"] == removed
    assert manifest["lines"]["distinct"] == 2
    assert manifest["rejects"]["trimmed:too_short"]["documents"] == len(gone)
    said = {letters(row["text"]): row["documents"] for row in lines.shown(tmp_path / "c")}
    assert said == {line: table[line] for line in common}


def test_nothing_common_changes_nothing(source: Path, tmp_path: Path) -> None:
    manifest = built(tmp_path / "a", source, {"max_documents": 900})
    plain = built(tmp_path / "b", source, None)
    assert stay(tmp_path / "a") == stay(tmp_path / "b")
    assert manifest["fingerprint"] == plain["fingerprint"]
    assert manifest["rejects"] == plain["rejects"]
    assert (
        built(tmp_path / "c", source, {"max_documents": 250})["fingerprint"] != plain["fingerprint"]
    )


def test_bytes_do_not_depend_on_workers(source: Path, tmp_path: Path) -> None:
    rules = {"max_documents": 300}
    built(tmp_path / "a", source, rules, workers=1)
    built(tmp_path / "b", source, rules, workers=2)
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {name: one[name] for name in one if name != "report.html"} == {
        name: two[name] for name in two if name != "report.html"
    }


def test_mistakes_in_lines_are_sentences(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_documents: is 0, must be at least 1"):
        built(tmp_path / "c", source, {"max_documents": 0})
