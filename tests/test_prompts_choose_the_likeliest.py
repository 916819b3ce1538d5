"""Promise: CPM's tasks are asked as they were published, and the text with the lowest mean loss is
the answer: on files of the published formats, against the losses of each text computed alone.

Losses are compared to 1e-5: fp32, in batches and alone.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.model import CPMConfig, RoFormerConfig
from data_pipeline import wordpiece
from launch import cli
from pretrain import checkpoint, prompts, state
from pretrain.models import build
from pretrain.prompts import Option, Question
from pretrain.tasks import TaskError

CHARACTERS = "这是关于体育文章军事的应用程序：对错也许，？今天天气很好成语甲乙丙丁一二三。"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(CHARACTERS)]
CPM = CPMConfig("cpm", len(WORDS), 24, 2, 2, 12, 32, 48)


def words() -> wordpiece.WordPiece:
    return wordpiece.WordPiece("".join(f"{word}\n" for word in WORDS).encode(), False)


def random_model(config: Any = CPM) -> torch.nn.Module:
    model = build(config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model


def lines(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, "utf-8")
    return path


TNEWS = (
    {"label": 103, "label_desc": "news_sports", "sentence": "今天很好"},
    {"label": 110, "label_desc": "news_military", "sentence": "天气很好"},
)
OCNLI = (
    {"sentence1": "今天天气好", "sentence2": "天气很好", "label": "neutral"},
    {"sentence1": "一", "sentence2": "二", "label": "-"},
    {"sentence1": "今天", "sentence2": "今", "label": "contradiction"},
)


CLUE = {"103": "news_sports", "110": "news_military"}
"""Lines of the labels.json that CLUE publishes beside TNEWS."""


def test_questions_are_those_that_were_published(tmp_path: Path) -> None:
    (first, second) = prompts.questions("tnews", lines(tmp_path / "dev.json", *TNEWS))
    assert first.options == [
        Option("这是关于军事的文章：", "今天很好"), Option("这是关于体育的文章：", "今天很好")
    ]  # fmt: skip
    assert (first.right, second.right, first.ends) == (1, 0, False)
    lines(  # the names and their order are those of labels.json, where it is there
        tmp_path / "labels.json",
        *(
            {"label": str(number), "label_desc": name}
            for number, name in ((103, "甲"), (110, "乙"))
        ),
    )
    (first, _) = prompts.questions("tnews", tmp_path / "dev.json")
    assert first.right == 0 and first.options[0].before == "这是关于甲的文章："
    lines(tmp_path / "labels.json", *({"label": n, "label_desc": d} for n, d in CLUE.items()))
    (first, _) = prompts.questions("tnews", tmp_path / "dev.json")
    assert first.options[0].before == "这是关于体育的文章："
    (first, second) = prompts.questions("ocnli", lines(tmp_path / "ocnli.json", *OCNLI))
    assert [option.before for option in first.options] == [
        "今天天气好？对，", "今天天气好？错，", "今天天气好？也许，"
    ]  # fmt: skip
    assert (first.right, second.right) == (2, 1)
    assert {option.scored for option in first.options} == {"天气很好"}
    (tmp_path / "iflytek").mkdir()
    row = {"label": "0", "label_des": "体育", "sentence": "好"}
    (one,) = prompts.questions("iflytek", lines(tmp_path / "iflytek/dev.json", row))
    assert one.options == [Option("这是关于体育的应用程序：", "好")]


def test_an_idiom_goes_into_its_blank_and_other_blanks_go(tmp_path: Path) -> None:
    passage = {"content": ["今天#idiom000001#，#idiom000002#。"], "candidates": ["甲乙", "丙丁"]}
    path = lines(tmp_path / "test.json", passage)
    answers = {"#idiom000001#": 1, "#idiom000002#": 0}
    (tmp_path / "test_answer.json").write_text(json.dumps(answers), "utf-8")
    first, second = prompts.questions("chid", path)
    assert [option.scored for option in first.options] == ["今天甲乙，。", "今天丙丁，。"]
    assert [option.scored for option in second.options] == ["今天，甲乙。", "今天，丙丁。"]
    assert (first.right, second.right) == (1, 0) and first.ends


@pytest.mark.parametrize("before", [0, 20, 60, 100])
def test_a_long_passage_is_cut_around_its_blank(before: int, tmp_path: Path) -> None:
    content = ["今" * before + "#idiom1#" + "好" * (120 - before)]
    path = lines(tmp_path / "c.json", {"content": content, "candidates": ["甲乙", "丙丁"]})
    (tmp_path / "c_answer.json").write_text('{"#idiom1#": 1}', "utf-8")
    (question,) = prompts.questions("chid", path)
    rows = [prompts._ids(words(), option, [], True, 48) for option in question.options]
    assert [len(ids) for ids, _ in rows] == [48, 48] and [scored for _, scored in rows] == [47, 47]
    assert all(ids[-1] == words().eod_id for ids, _ in rows)
    said = [words().decode(ids) for ids, _ in rows]
    assert "甲乙" in said[0] and said[1] == said[0].replace("甲乙", "丙丁")
    assert said[0].count("今") == min(before, max(23, before - 75))


def test_an_answer_is_one_of_the_candidates(tmp_path: Path) -> None:
    path = lines(tmp_path / "c.json", {"content": ["今#idiom1#好"], "candidates": ["甲", "乙"]})
    for answer, candidates in ((2, 0), (2, 2), (-1, 0), (-1, 2)):
        (tmp_path / "c_answer.json").write_text(json.dumps({"#idiom1#": answer}), "utf-8")
        with pytest.raises(TaskError, match=f"question 1: the answer is {answer}, must be at "):
            prompts.questions("chid", path, None, candidates)


def test_a_tie_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, same = random_model(), Question([Option("今", "天"), Option("今", "天")], 0)
    found = prompts.chosen(model, words(), [same])
    assert (found["accuracy"], found["unanswered"]) == (0, 1)
    asked = [Question([Option("今", text) for text in "天气很"], right) for right in (1, 0, 1)]
    losses = [3.0, 1.0, 3.0, 1.0, math.nan, 2.0, 2.0, 1.0, 1.0]
    monkeypatch.setattr(prompts, "_losses", lambda *_: losses)
    found = prompts.chosen(model, words(), asked)
    assert (found["accuracy"], found["unanswered"]) == (100 / 3, 2)


def test_full_width_characters_are_read_as_a_corpus_reads_them() -> None:
    made = wordpiece.WordPiece("\n".join([*WORDS, *"0123", ""]).encode(), False)
    wide, plain = Option("今１", "２３天"), Option("今1", "23天")
    assert prompts._ids(made, wide, [wide], True, 48) == prompts._ids(
        made, plain, [plain], True, 48
    )
    assert made.encode("２").tolist() != made.encode("2").tolist()


def test_fewer_candidates_keep_the_right_one() -> None:
    options = [Option("", str(number)) for number in range(15)]
    import random

    seen = set()
    for number in range(60):
        one = prompts._fewer(Question(options, 7), 4, random.Random(number))
        assert len(one.options) == 4 and one.options[one.right].scored == "7"
        seen |= {option.scored for option in one.options}
    assert len(seen) == 15


def alone(model: Any, ids: list[int], scored: int) -> float:
    """Mean loss of the last `scored` tokens: softmax by hand, in float64, one row."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model.logits(model(tokens, torch.arange(len(ids))[None], None))[0].double()
    log = logits - logits.exp().sum(-1, keepdim=True).log()
    picked = [float(log[at - 1, ids[at]]) for at in range(len(ids) - scored, len(ids))]
    return -sum(picked) / scored


def test_the_text_with_the_lowest_mean_loss_is_chosen(tmp_path: Path) -> None:
    model, tokenizer = random_model(), words()
    passage = {"content": ["今天#idiom000001#，很好。"], "candidates": ["甲乙", "丙丁", "一"]}
    (tmp_path / "c_answer.json").write_text('{"#idiom000001#": 2}', "utf-8")
    asked = [
        *prompts.questions("tnews", lines(tmp_path / "dev.json", *TNEWS)),
        *prompts.questions("ocnli", lines(tmp_path / "ocnli.json", *OCNLI)),
        *prompts.questions("chid", lines(tmp_path / "c.json", passage)),
    ]
    best = []
    for question in asked:
        losses = []
        for option in question.options:
            ids, scored = prompts._ids(tokenizer, option, [], question.ends, 48)
            before = [int(i) for i in tokenizer.encode(option.before)] if option.before else []
            expected = [*before, *map(int, tokenizer.encode(option.scored))]
            assert ids == expected + [tokenizer.eod_id] * question.ends
            # published: all of the passage but its first token, and what ends it
            assert scored == (len(ids) - 1 if question.ends else len(ids) - len(before))
            found = prompts._losses(model, tokenizer, [ids, ids[:5]], [scored, 1], 8)[0]
            assert math.isclose(found, alone(model, ids, scored), rel_tol=1e-5)
            losses.append(found)
        best.append(losses.index(min(losses)))
    found = prompts.chosen(model, tokenizer, asked, batch=3)
    right = sum(a == question.right for a, question in zip(best, asked, strict=True))
    assert found["accuracy"] == 100 * right / 5 and found["samples"] == 5
    known = [one._replace(right=at) for one, at in zip(asked, best, strict=True)]
    assert prompts.chosen(model, tokenizer, known)["accuracy"] == 100  # and the control:
    wrong = [one._replace(right=(one.right + 1) % 2) for one in known]
    assert prompts.chosen(model, tokenizer, wrong)["accuracy"] < 100
    assert found["by_chance"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 3 / 3) / 5)


def test_solved_examples_stand_in_front_as_far_as_there_is_room() -> None:
    tokenizer = words()
    front = [Option("今天", "很好"), Option("天气", "好")]
    option = Option("这是：", "好")
    ids, scored = prompts._ids(tokenizer, option, front, False, 48)
    assert tokenizer.decode(ids).replace(" ", "") == "今天很好天气好这是：好" and scored == 1
    ids, scored = prompts._ids(tokenizer, option, front, False, 8)
    assert tokenizer.decode(ids).replace(" ", "") == "天气好这是：好"
    ids, scored = prompts._ids(tokenizer, Option("今天", "好" * 90), front, False, 48)
    assert len(ids) == 48 and scored == 46


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {
        f"weights/{name}": state.Entry(tuple(p.shape), "float32", lambda p=p: p.detach())
        for name, p in random_model().named_parameters()
    }
    words().save(tmp_path / "tokenizer")
    record = state.fresh(CPM, 1).record
    checkpoint.write_state(tmp_path / "made", state.State(entries, record), tmp_path / "tokenizer")
    dev = lines(tmp_path / "dev.json", *TNEWS)
    line = ["evaluate", str(tmp_path / "made"), "--task", "tnews", "--data", str(dev)]
    assert cli.main([*line, "--json", "--shots", "1", "--examples", str(dev)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["candidates"], found["shots"]) == (2, 2, 1)
    assert cli.main(line) == 0
    assert "accuracy" in capsys.readouterr().out
    assert cli.main([*line, "--shots", "1"]) == 2
    assert "give both or neither" in capsys.readouterr().err
    assert cli.main([*line, "--candidates", "1"]) == 2
    assert "must be 0 (all) or at least 2" in capsys.readouterr().err


def test_what_is_no_such_file_is_a_sentence(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.json", {"sentence": "好"})
    with pytest.raises(TaskError, match="is no tnews as published"):
        prompts.questions("tnews", path)
    with pytest.raises(TaskError, match=r"x_answer\.json is missing"):
        prompts.questions("chid", path)
    path.write_text("好\n", "utf-8")
    with pytest.raises(TaskError, match="line 1 is no JSON object"):
        prompts.questions("ocnli", path)
    encoder = RoFormerConfig("roformer", 1, len(WORDS), 24, 1, 2, 12, 32)
    with pytest.raises(TaskError, match="scores texts by a decoder"):
        prompts.chosen(random_model(encoder), words(), [Question([Option("", "好")], 0)])
    with pytest.raises(TaskError, match="less than two tokens"):
        prompts.chosen(random_model(), words(), [Question([Option("", "好")], 0)])
