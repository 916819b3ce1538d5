"""Scores are computed once and stored as columns; bounds on them are applied to the columns."""

import json
import random
import re
from collections import Counter
from math import log
from pathlib import Path

import numpy as np
import pytest

from configs.load import ConfigError, from_dict
from configs.quality import SCORES, Quality
from data_pipeline import build, quality
from data_pipeline.clean import Page, normalise
from data_pipeline.kinds import DIGIT, HAN, LETTER, PUNCTUATION, SYMBOL
from data_pipeline.scores import COLUMNS, STOP_WORDS, WINDOW, as_fields, scores, stored
from data_pipeline.shards import records
from tests.test_corpus_build import SAMPLE, contents, kept, page, write_source

TERMINAL, CLOSER = "。！？!?.…．｡；;‼⁇⁈⁉‽", "”’」』）)】》〉〕］\"'"


def slow_repeats(window: str, n: int) -> int:
    """Characters in runs of n that stood before, one after another without overlap."""
    seen: set[str] = set()
    places = [
        seen.__contains__(window[k : k + n]) or seen.add(window[k : k + n])
        for k in range(len(window) - n + 1)
    ]
    found, free = 0, 0
    for k, again in enumerate(places):
        if again and k >= free:
            found, free = found + n, k + n
    return found


def slow_lines(text: str) -> dict[str, float]:
    lines = ["".join(line.split()) for line in text.split("\n") if line.strip()]
    bare = [line.rstrip(CLOSER) or line[:1] for line in lines]
    first = {}
    again = [first.setdefault(line, k) != k for k, line in enumerate(lines)]
    characters = sum(map(len, lines))
    return {
        "line_punct": sum(line[-1] in TERMINAL for line in bare) / len(lines),
        "short_lines": sum(len(line) < 10 for line in lines) / len(lines),
        "mean_line": characters / len(lines),
        "newline_ratio": text.count("\n") / characters,
        "dup_lines": sum(again) / len(lines),
        "dup_line_characters": sum(len(a) for a, b in zip(lines, again, strict=True) if b)
        / characters,
        "bullet_lines": sum(line[0] in "•●■※·" for line in lines) / len(lines),
        "ellipsis_lines": sum(
            a[-1] == "…" or b.endswith(("...", "。。。")) for a, b in zip(bare, lines, strict=True)
        )
        / len(lines),
        "readmore_lines": sum(line.endswith(("展开", "更多", "。。。")) for line in lines)
        / len(lines),
    }


def slow_windows(solid: str) -> dict[str, float]:
    said = dict.fromkeys(SCORES[SCORES.index("top_2grams") :], 0.0)
    count = -(-len(solid) // WINDOW)
    for w in range(count):
        window = solid[w * len(solid) // count : (w + 1) * len(solid) // count]
        share = len(window) / len(solid)
        single = Counter(window)
        said["entropy"] += -share * sum(
            n / len(window) * log(n / len(window)) for n in single.values()
        )
        said["unique_ratio"] += share * len(single) / len(window)
        for n in (2, 3, 4):
            runs = Counter(window[k : k + n] for k in range(len(window) - n + 1))
            top = max(runs.values(), default=0)
            if top > 1 and len(window) >= 5:
                said[f"top_{n}grams"] += share * min(n * top / len(window), 1)
        for n in (5, 6, 7, 8, 9, 10, 13):
            said[f"dup_{n}grams"] += slow_repeats(window, n) / len(solid)
    return said


def slow(page: Page) -> dict[str, float]:
    """All scores in plain Python."""
    text, solid = page.text, "".join(page.text.split())
    n = len(solid)
    pieces = re.split(r"[。！？!?…｡‼⁇⁈⁉‽\n]", "".join(c for c in text if c not in CLOSER + " \t"))
    words = re.findall("w+", "".join("w" if k in (LETTER, DIGIT) else "." for k in page.kinds))
    runs = [len(run[0]) for run in re.finditer(r"(\S)\1*", text)]
    share = {kind: page.counts[kind] / n for kind in (HAN, LETTER, DIGIT, PUNCTUATION, SYMBOL)}
    return {
        "characters": n,
        "han_ratio": share[HAN],
        "letter_ratio": share[HAN] + share[LETTER],
        "digit_ratio": share[DIGIT],
        "punctuation_ratio": share[PUNCTUATION],
        "symbol_ratio": share[SYMBOL],
        "mean_sentence": n / max(sum(map(bool, pieces)), 1),
        "mean_word": sum(map(len, words)) / max(len(words), 1),
        "stop_words": sum(any(c in text for c in forms) for forms in STOP_WORDS),
        "bracket_ratio": sum(len("".join(m.split())) for m in re.findall(r"【([^】\n]*)】", text))
        / n,
        "ellipsis_ratio": len(re.findall(r"…+|\.{2,}", text)) / n,
        "hash_ratio": len(re.findall("#+", text)) / n,
        "longest_run": max(runs),
        **slow_lines(text),
        **slow_windows(solid),
    }


def drawn_texts() -> list[str]:
    """Documents of the sample, long ones of many windows, and rows of few characters."""
    draw = random.Random(4)
    texts = [row["text"] for row in map(json.loads, SAMPLE.read_text("utf-8").splitlines())]
    marks = "的了。，！…..##【】（”\n\n  ab1是一一一展开更多"
    odd = ["".join(draw.choices(marks, k=draw.randrange(1, 400))) for _ in range(300)]
    odd += [
        "哈" * 3000,
        "一二三四五六七。" * 900,
        "甲",
        "甲乙丙丁戊" * 2,
        "（\n。。。\n展开\n• 一…",
    ]
    return texts[::4] + ["\n".join(draw.sample(texts, 40)) for _ in range(12)] + odd


def test_every_score_equals_a_slow_one() -> None:
    compared = 0
    for text in drawn_texts():
        page = normalise(text)
        if not page.solid:
            assert not scores(page).any()
            continue
        wanted, found = slow(page), dict(zip(SCORES, scores(page).tolist(), strict=True))
        assert wanted.keys() == set(SCORES)
        for name in SCORES:  # float32 sums over windows
            assert found[name] == pytest.approx(wanted[name], rel=2e-5, abs=2e-6), (name, text)
            compared += wanted[name] != 0
    assert compared > 10_000


def test_scores_are_columns_in_the_order_of_the_shard_and_fields_if_asked(tmp_path: Path) -> None:
    source = write_source(tmp_path / "text.jsonl")
    build.build(page(tmp_path / "c", source, clean={"scores_in_records": True}))
    (cleaned,) = (tmp_path / "c" / "stages").glob("clean-*")
    rows = list(records(cleaned / "data" / "documents" / "00000.jsonl.zst"))
    table = stored(cleaned / "data", 0)
    assert table.dtype.names == SCORES
    assert len(table) == len(rows) > 50
    for row, said in zip(rows, table, strict=True):
        expected = scores(normalise(row["text"]))
        assert np.array_equal(np.array(said.tolist(), np.float32), expected)
        assert row["scores"] == as_fields(expected)
    build.build(page(tmp_path / "d", source))
    assert all("scores" not in row for row in kept(tmp_path / "d", "train"))


def test_another_bound_cleans_nothing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "text.jsonl")
    first = build.build(page(tmp_path / "c", source))
    assert not any(reason.startswith("quality") for reason in first["rejects"])
    everything = {r["id"]: r for s in ("train", "valid") for r in kept(tmp_path / "c", s)}
    bounds = {"characters": [60, None], "entropy": [None, 4.2], "line_punct": [0.5, 1]}
    capsys.readouterr()
    bounded = page(tmp_path / "c", source, quality=bounds, dedup={"near": {}})
    second = build.build(bounded, replacing=True)
    lines = capsys.readouterr().err.splitlines()
    before = {line.split()[0] for line in lines if line.endswith("done before")}
    assert {"clean", "duplicates"} <= before
    assert "quality" not in before
    rules = from_dict(Quality, bounds)
    for name, row in everything.items():
        said = dict(zip(SCORES, scores(normalise(row["text"])).tolist(), strict=True))
        broken = [
            n
            for n, (low, high) in rules.rules().items()
            if (low is not None and said[n] < low) or (high is not None and said[n] > high)
        ]
        row["reason"] = f"quality:{broken[0]}" if broken else ""
        del name
    for reason in ("quality:characters", "quality:entropy", "quality:line_punct"):
        aside = {
            r["id"] for p in (tmp_path / "c" / "rejects" / reason).iterdir() for r in records(p)
        }
        assert aside == {name for name, row in everything.items() if row["reason"] == reason}
        assert second["rejects"][reason]["documents"] == len(aside) > 0
    stay = {r["id"] for s in ("train", "valid") for r in kept(tmp_path / "c", s)}
    assert stay <= {name for name, row in everything.items() if not row["reason"]}
    build.build(
        page(tmp_path / "d" / "c", source, quality=bounds, dedup={"near": {}}, data={"workers": 1})
    )
    assert contents(tmp_path / "c") == contents(tmp_path / "d" / "c")


def test_a_bound_that_is_met_exactly_keeps() -> None:
    said = scores(normalise("春眠不觉晓，处处闻啼鸟。" * 5 + "12345678"))
    table = np.array([said], np.float32).view(COLUMNS).reshape(-1)
    for name, value in zip(SCORES, said.tolist(), strict=True):
        rounded = float(f"{value:.9g}")
        for bounds in ([rounded, None], [None, rounded], [rounded, rounded]):
            rules = from_dict(Quality, {name: bounds})
            assert not len(quality.outside(table, rules)[name])
        above = from_dict(Quality, {name: [rounded + 0.01, None]})
        assert len(quality.outside(table, above)[name]) == 1


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"han_ration": [0.3, None]}, "did you mean 'han_ratio'"),
        ({"entropy": [3]}, "entropy: must hold 2 values, holds 1"),
        ({"entropy": [5, 3]}, r"entropy: is \[5, 3\], the first must not be above"),
        ({"entropy": [None, -1]}, "no score is below 0"),
        ({"entropy": 3}, "must be a list"),
    ],
)
def test_mistakes_in_bounds_are_sentences(section: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(Quality, section)
