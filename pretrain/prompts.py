"""CPM's tasks without fine-tuning: the likeliest of several texts is the model's answer.

    tnews    这是关于{体育}的文章：|sentence          a text for each label, its sentence scored
    iflytek  这是关于{旅游}的应用程序：|sentence
    ocnli    {sentence1}？{对|错|也许}，|sentence2
    chid     the passage with each of ten idioms in its blank, other blanks left out; all of it, and
             the end of the document behind it

The prompts are those that CPM-1 was measured with (TsinghuaAI/CPM-1-Generate and CPM-1-Finetune;
Zhang et al. 2020, CPM). What is behind | is scored: its mean loss a token, given what is before.
The lowest loss wins. `candidates` leaves the right label and so many others less one, drawn for
each line (4 in the report). With shots, solved examples stand in front, a line each.
"""

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from configs.model import CPMConfig
from pretrain.answer import right_padded
from pretrain.objectives.losses import token_losses_plain
from pretrain.tasks import TaskError, lines_of

TASKS = ("tnews", "iflytek", "ocnli", "chid")
TNEWS = {
    "news_story": "故事", "news_culture": "文化", "news_entertainment": "娱乐",
    "news_sports": "体育", "news_finance": "财经", "news_house": "房产", "news_car": "汽车",
    "news_edu": "教育", "news_tech": "科技", "news_military": "军事", "news_travel": "旅游",
    "news_world": "国际", "news_stock": "股票", "news_agriculture": "农业", "news_game": "游戏",
}  # fmt: skip
"""What CLUE's names of the labels mean; names of a labels.json are taken as they are."""
OCNLI = {"entailment": "对", "contradiction": "错", "neutral": "也许"}
BLANK = re.compile(r"#idiom\d+#")


class Option(NamedTuple):
    """One answer, spelled out."""

    before: str
    """What is read."""
    scored: str
    """What is scored."""
    at: int = 0
    """Its character that has to stay, where the text is too long."""


class Question(NamedTuple):
    """Answers of which one is right."""

    options: list[Option]
    right: int
    ends: bool = False
    """Whether the end of the document is scored as well."""


def questions(
    task: str, path: str | Path, limit: int | None = None, candidates: int = 0, seed: int = 0
) -> list[Question]:
    """The questions of a file in the format that the task was published in, a JSON object a line.

    tnews {sentence, label_desc}, iflytek {sentence, label_des}, with a labels.json beside the file
    or of the labels that it has; ocnli {sentence1, sentence2, label}, lines without agreement (-)
    left out; chid {content, candidates}, its answers in NAME_answer.json beside it. TaskError for
    another format.
    """
    rows = []
    for number, line in enumerate(lines_of(path, limit), 1):
        try:
            row = json.loads(line)
            assert isinstance(row, dict)
            rows.append(row)
        except (ValueError, AssertionError):
            raise TaskError(f"--data: {path}, line {number} is no JSON object (格式不符)") from None
    try:
        if task == "ocnli":
            found = [_ocnli(row) for row in rows if row["label"] != "-"]
        elif task == "chid":
            answers = _answers(Path(path))
            found = [one for row in rows for one in _chid(row, answers)]
        else:
            found = _topics(task, rows, Path(path))
    except TaskError:
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise TaskError(f"--data: {path} is no {task} as published: {error!r} (格式不符)") from None
    for number, one in enumerate(found, 1):
        if not 0 <= one.right < len(one.options):
            raise TaskError(
                f"--data: {path}, question {number}: the answer is {one.right}, must be at least 0 "
                f"and less than its {len(one.options)} candidates (答案越界)"
            )
    if candidates:
        found = [
            _fewer(one, candidates, random.Random(f"{seed} {n}")) for n, one in enumerate(found)
        ]
    return found


def _topics(task: str, rows: Sequence[dict[str, Any]], path: Path) -> list[Question]:
    key, prompt = ("label_desc", "这是关于{}的文章：")
    if task == "iflytek":
        key, prompt = ("label_des", "这是关于{}的应用程序：")
    beside = path.with_name("labels.json")
    if beside.is_file():
        table = [json.loads(line) for line in lines_of(beside, None)]
        names = [str(entry[key]) for entry in table]
        number_of = {str(entry["label"]): number for number, entry in enumerate(table)}
    else:
        names = sorted({str(row[key]) for row in rows})
        number_of = {name: number for number, name in enumerate(names)}
    said = [TNEWS.get(name, name) for name in names]  # CLUE's own labels.json is English too
    return [
        Question(
            [Option(prompt.format(name), row["sentence"]) for name in said],
            number_of[str(row["label" if beside.is_file() else key])],
        )
        for row in rows
    ]


def _ocnli(row: dict[str, Any]) -> Question:
    first, second = row["sentence1"], row["sentence2"]
    options = [Option(f"{first}？{word}，", second) for word in OCNLI.values()]
    return Question(options, list(OCNLI).index(row["label"]))


def _answers(path: Path) -> dict[str, int]:
    beside = path.with_name(f"{path.stem}_answer.json")
    try:
        return dict(json.loads(beside.read_text("utf-8")))
    except (OSError, ValueError):
        raise TaskError(
            f"--data: {beside} is missing or no JSON; chid's answers lie beside its passages "
            "(缺少答案文件)"
        ) from None


def _chid(row: dict[str, Any], answers: dict[str, int]) -> Iterator[Question]:
    for passage in row["content"]:
        for blank in BLANK.finditer(passage):
            before = BLANK.sub("", passage[: blank.start()])
            after = BLANK.sub("", passage[blank.end() :])
            options = [
                Option("", before + idiom + after, len(before)) for idiom in row["candidates"]
            ]
            yield Question(options, int(answers[blank[0]]), True)


def _fewer(question: Question, number: int, draw: random.Random) -> Question:
    others = [at for at in range(len(question.options)) if at != question.right]
    chosen = sorted([question.right, *draw.sample(others, min(number - 1, len(others)))])
    options = [question.options[at] for at in chosen]
    return question._replace(options=options, right=chosen.index(question.right))


# ---------------------------------------------------------------- scoring


def chosen(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Question],
    shots: int = 0,
    examples: Sequence[Question] = (),
    batch: int = 8,
) -> dict[str, Any]:
    """How often the right option has the lowest mean loss, x 100. A question is unanswered if its
    lowest loss is that of several options, or a loss is not finite.

    shots: so many of `examples`, drawn for each question, stand solved in front of it; as many as
    the model has positions for.
    """
    if not isinstance(model.config, CPMConfig):
        raise TaskError("--task: scores texts by a decoder, the checkpoint is none (仅支持 CPM)")
    if not asked:
        raise TaskError("--data: has no question (文件没有题目)")
    solved = [one.options[one.right] for one in examples]
    rows, counted = [], []
    for number, question in enumerate(asked):
        front = random.Random(f"shots {number}").sample(solved, min(shots, len(solved)))
        for option in question.options:
            ids, scored = _ids(tokenizer, option, front, question.ends, model.config.positions)
            rows.append(ids)
            counted.append(scored)
    loss = _losses(model, tokenizer, rows, counted, batch)
    right, unanswered, at, chance = 0, 0, 0, 0.0
    for question in asked:
        mine = loss[at : at + len(question.options)]
        at += len(question.options)
        if all(map(math.isfinite, mine)) and mine.count(min(mine)) == 1:
            right += mine.index(min(mine)) == question.right
        else:
            unanswered += 1
        chance += 1 / len(mine)
    return {
        "samples": len(asked),
        "candidates": max(len(question.options) for question in asked),
        "shots": shots if solved else 0,
        "accuracy": 100 * right / len(asked),
        "unanswered": unanswered,
        "by_chance": 100 * chance / len(asked),
    }


def _ids(
    tokenizer: Any, option: Option, front: Sequence[Option], ends: bool, room: int
) -> tuple[list[int], int]:
    """The tokens of an option, and how many at its end are scored."""

    def encoded(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode_folded([text])[0]] if text else []

    before, scored = encoded(option.before), encoded(option.scored)
    most = max(room - len(before) - ends, 1)
    if len(scored) > most:
        middle = len(encoded(option.scored[: option.at]))
        first = min(max(middle - most // 2, 0), len(scored) - most)
        scored = scored[first : first + most]
    scored += [tokenizer.eod_id] * ends
    shown = [encoded(f"{one.before}{one.scored}\n") for one in front]
    while shown and sum(map(len, shown)) + len(before) + len(scored) > room:
        shown.pop(0)
    ids = [token for one in shown for token in one] + before + scored
    return ids, min(len(scored), len(ids) - 1)


@torch.no_grad()
def _losses(
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    counted: Sequence[int],
    batch: int,
) -> list[float]:
    """Mean loss a token of the last `counted` tokens of each row."""
    if min(counted) < 1:
        raise TaskError("--data: has a text of less than two tokens (文本过短)")
    out, device = [0.0] * len(rows), next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        tokens_BT, *given = right_padded([rows[at] for at in places], tokenizer.pad_id, device)
        hidden_BTD = model(tokens_BT, *given)
        for row, at in enumerate(places):
            end = len(rows[at]) - 1
            span = slice(end - counted[at], end)
            targets = tokens_BT[row, span.start + 1 : end + 1]
            losses = token_losses_plain(model.logits, hidden_BTD[row, span], targets)
            out[at] = float(losses.double().mean())
    return out
