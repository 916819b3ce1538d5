"""Promise: outputs are scored as the published numbers were: characters' ROUGE and BLEU, the value
of an equation, Spearman's correlation, whitening; each on cases that were computed by hand.

Tolerances: 1e-7 for ROUGE (its F has 1e-8 in the denominator), 1e-12 for what is plain arithmetic.
"""

import json
import math

import numpy as np
import pytest

from pretrain.scores import (
    NotArithmetic,
    bleu,
    cosine,
    same_value,
    spearman,
    title_scores,
    value,
    whitened,
)
from pretrain.word_problems import cleaned, without_brackets
from tests.dev_corpus import folder


def test_titles_by_hand() -> None:
    # 甲丙丁 are 3 of 4 characters and of 5, 丙丁 is 1 of 3 pairs and of 4
    found = title_scores("甲乙丙丁", "甲丙丁戊己")
    assert found["rouge-1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35, abs=1e-7)
    assert found["rouge-2"] == pytest.approx(2 * (1 / 3) * 0.25 / (1 / 3 + 0.25), abs=1e-7)
    assert found["rouge-l"] == pytest.approx(2 * 0.75 * 0.6 / 1.35, abs=1e-7)  # 甲丙丁
    # 3/4, 1/3, 0.1/2, 0.1/1, brevity e^(1 - 5/4)
    by_hand = (0.75 * (1 / 3) * 0.05 * 0.1) ** 0.25 * math.exp(-0.25)
    assert found["bleu"] == pytest.approx(by_hand, abs=1e-12)


def test_order_matters_to_rouge_l_and_repeats_count_once() -> None:
    turned = title_scores("丙乙甲", "甲乙丙")
    assert turned["rouge-1"] == pytest.approx(1, abs=1e-7)
    assert turned["rouge-2"] == 0.0
    assert turned["rouge-l"] == pytest.approx(1 / 3, abs=1e-7)
    # distinct characters: 甲 of {甲}, of {甲, 乙}
    assert title_scores("甲甲甲", "甲乙")["rouge-1"] == pytest.approx(2 / 3, abs=1e-7)
    # BLEU clips: 1 of 3, then nothing of 2 and of 1, and 4-grams of which there are none
    by_hand = ((1 / 3) * (0.1 / 2) * 0.1 * 0.1) ** 0.25
    assert title_scores("甲甲甲", "甲乙")["bleu"] == pytest.approx(by_hand, abs=1e-12)


def test_what_the_packages_do_with_blanks_stops_and_case() -> None:
    same = title_scores("BERT 模型", "bert模型")
    assert same["rouge-1"] == same["rouge-l"] == pytest.approx(1, abs=1e-7)
    tokens = [*"bert", "", "", *"模型"]
    assert same["bleu"] == bleu(tokens, list("bert模型")) < 1
    assert bleu(list("今天天气好"), list("今天天气好")) == pytest.approx(1, abs=1e-12)
    # a full stop parts sentences; a subsequence is looked for in each pair of them
    parted = title_scores("丙丁.甲乙", "甲乙.丙丁")
    whole = title_scores("丙丁甲乙", "甲乙丙丁")
    assert parted["rouge-l"] == pytest.approx(1, abs=1e-7)
    assert whole["rouge-l"] == pytest.approx(0.5, abs=1e-7)
    nothing = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0, "bleu": 0.0}
    assert title_scores("", "甲") == title_scores(" .", "甲") == nothing
    assert title_scores("乙", "甲") == nothing


def test_arithmetic_is_all_that_is_read() -> None:
    cases = {"1+2*3": 7, "(1+2)*3": 9, "-2**2": -4, "135/3": 45, "1-(1/5)-(1/4)": 0.55, "2.5*4": 10}
    for text, wanted in cases.items():
        assert value(text) == pytest.approx(wanted, abs=1e-12)
    wrong = (
        "1/0", "", "1+", "x", "3(4)", "__import__('os')", "9**9**9", "True", "1j", "'a'", "[1][0]",
        "1 if 1 else 2", "2**-1e9", "(-1)**0.5", "1e999", "(" * 500 + "1" + ")" * 500, "1" * 2000,
        "1//2", "~1", "1;2",
    )  # fmt: skip
    for text in wrong:
        with pytest.raises(NotArithmetic):
            value(text)
    assert same_value("135/3", "45") and same_value("1/3", "0.3333333")
    assert not same_value("135/3", "46") and not same_value("135/", "45")


def test_problems_are_cleaned_as_published() -> None:
    asked = cleaned("有1(1/2)米和(3/4)米", "x=1(1/2)*(50%)", "(3/4)")
    assert asked == ("有(1+1/2)米和3/4米", "(1+1/2)*50/100", "(3/4)")
    assert cleaned("比", "x=3:4", "0.75") == ("比", "3/4", "0.75")
    assert cleaned("错", "x=1+1", "3") is None
    assert cleaned("错", "x=a+1", "3") is None
    assert without_brackets("(1+2)+(3*(4+5))") == "1+2+3*(4+5)"
    assert without_brackets("2*(3)") == "2*3"


def test_of_the_published_problems_as_many_are_kept() -> None:
    path = folder() / "eval" / "ape210k" / "valid.ape.json"
    if not path.is_file():
        pytest.skip("the problems are not at hand")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    kept = [
        problem
        for row in rows
        if (problem := cleaned(row["original_text"], row["equation"], row["ans"]))
    ]
    assert (len(rows), len(kept)) == (5000, 4999)
    assert all(same_value(problem.equation, problem.answer) for problem in kept)


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 * sum d^2 / (n (n^2 - 1)) with d = 0, 1, 1, 0
    assert spearman([1, 2, 3, 4], [0.1, 0.7, 0.5, 0.9]) == pytest.approx(0.8)
    # ties at their mean rank: (1.5, 1.5, 3) against (1, 2, 3)
    assert spearman([0, 0, 1], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_whitened_vectors_have_unit_covariance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3
    x[:, 5] = x[:, 4] * 2  # a direction without spread goes
    out = whitened(x)
    assert out.shape == (500, 5)
    assert np.abs(out.mean(0)).max() < 1e-9
    assert np.abs(out.T @ out / 500 - np.eye(5)).max() < 1e-9
    assert np.array_equal(whitened(x, 2), out[:, :2])
    pair = cosine(np.array([[1.0, 0], [1, 1], [0, 0]]), np.array([[2.0, 0], [1, -1], [1, 0]]))
    assert pair == pytest.approx([1, 0, 0])
