"""Promise: `evaluate` measures its tasks as they are defined: on models whose answers are known, on
files of the published formats, from a checkpoint through the command.

Vectors are compared to 1e-12 of the largest value (float64, in batches and alone); the rest is
counted.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import from_dict
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from configs.objectives import Masked
from configs.run import CorpusShare, Data
from data_pipeline import wordpiece
from launch import cli
from pretrain import checkpoint, evaluate, state, tasks
from pretrain.answer import answer, framed
from pretrain.corpora import open_corpora
from pretrain.decoding import Decoding

TEXTS = ["今天天气很好", "天气好", "很好很好今天", "好", "今今天天气气很很好好"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今天气很好1234567890+-*/=x()"]
SIZES: dict[str, ModelConfig] = {
    "t5": T5PegasusConfig("t5_pegasus", len(WORDS), 24, 2, 2, 12, 32),
    "cpm": CPMConfig("cpm", len(WORDS), 24, 3, 2, 12, 32, 80),
    "roformer": RoFormerConfig("roformer", 1, len(WORDS), 24, 3, 2, 12, 32),
}


def saved(folder: Path, config: ModelConfig, **changed: torch.Tensor) -> Path:
    """A checkpoint of random weights with a tokenizer of single characters."""
    made = state.fresh(config, 1)
    entries = {}
    for number, (key, entry) in enumerate(made.entries.items()):
        generator = torch.Generator().manual_seed(number)
        value = torch.randn(entry.shape, generator=generator) * 0.3 + ("norm" in key)
        value = changed.get(key.removeprefix("weights/").replace(".", "_"), value)
        entries[key] = state.Entry(entry.shape, "float32", lambda value=value: value)
    words = wordpiece.WordPiece("".join(f"{word}\n" for word in WORDS).encode(), False)
    words.save(folder / "tokenizer")
    checkpoint.write_state(folder / "made", state.State(entries, made.record), folder / "tokenizer")
    return folder / "made"


def said(capsys: pytest.CaptureFixture[str], *line: Any) -> dict[str, Any]:
    assert cli.main(["evaluate", *map(str, line), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_masked_tokens_are_counted(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that says token 9 wherever it is asked is right as often as that is the target."""
    config = RoFormerConfig("roformer", 1, 320, 8, 1, 1, 8, 8)
    bias = torch.zeros(320)
    data = Data((CorpusShare(str(tiny_corpus)),), 64)
    section = from_dict(Masked, {"name": "masked", "masking": "token"}, "objective")
    corpora = open_corpora(data, section, 0, 320)
    batches = list(corpora.validation(40, 0, 1, 4))
    targets = torch.cat([b.targets_BT[b.loss_mask_BT] for b in batches])
    shown = torch.cat([b.tokens_BT[b.loss_mask_BT] for b in batches])
    token = int(targets.mode().values)
    bias[token] = 50.0
    folder = saved(tmp_path, config, head_bias=bias)
    record = json.loads((folder / "state.json").read_text())
    assert record.get("tokenizer") is None
    line = (folder, "--task", "mlm", "--data", tiny_corpus, "--masking", "token")
    found = said(capsys, *line, "--samples", 40, "--seq-len", 64)
    right = targets == token
    assert found["tokens"] == len(targets) > 100
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    assert 0 < found["accuracy"] < 1
    mask = shown == corpora.tokenizer.mask_id
    hidden = found["by_kind"]["masked"]
    assert hidden["tokens"] == int(mask.sum())
    assert hidden["accuracy"] == pytest.approx(float(right[mask].double().mean()))
    assert sum(kind["tokens"] for kind in found["by_kind"].values()) == len(targets)
    assert found["among_best_5"] >= found["accuracy"]
    assert cli.main(["evaluate", *map(str, line), "--seq-len", "64"]) == 0
    assert "of those masked" in capsys.readouterr().out


def test_a_damaged_newest_checkpoint_is_told_and_the_one_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every verb that takes a run; its figures are of the step that it names."""
    made, run = saved(tmp_path, SIZES["cpm"]), tmp_path / "run"
    for step in (2, 4):
        shutil.copytree(made, run / f"checkpoints/stage-00-step-{step:08}")
    new, old = checkpoint.found_in(run)
    lcqmc = ("--task", "lcqmc", "--data", tmp_path / "pairs.tsv")
    (tmp_path / "pairs.tsv").write_text("今天\t天气\t1\n很好\t今天\t0\n", "utf-8")
    tasks_of = (lcqmc, ("--task", "passkey", "--lengths", "64", "--samples", "1"))
    for task in tasks_of:
        assert said(capsys, run, *task)["checkpoint"] == str(new)
    with (new / "weights-00000.safetensors").open("r+b") as file:
        file.truncate(1000)
    told = f"damaged, passed over: {new}/weights-00000.safetensors: has 1000 bytes"
    verbs: list[list[Any]] = [["evaluate", run, *task] for task in tasks_of]
    verbs += [["generate", run, "--prompt", "今天", "--json"], ["inspect", run]]
    verbs += [["convert", run, tmp_path / "theirs", "--to", "hf"]]
    verbs += [["convert", run, tmp_path / "ours", "--to", "native", "--json"]]
    for line in verbs:
        assert cli.main([*map(str, line)]) == 0
        both = capsys.readouterr()
        assert both.err.count(told) == 1 and f"reading {old} (" in both.err, line
        assert str(old) in both.out and str(new) not in both.out, line
    for task in tasks_of:
        assert said(capsys, run, *task)["checkpoint"] == str(old)


def test_titles_and_problems_of_known_outputs(tmp_path: Path) -> None:
    (tmp_path / "two.tsv").write_text("天气\t今天天气很好\n好\t很好\n", "utf-8")
    (tmp_path / "three.tsv").write_text(
        "to title\t今天天气很好\t天气\nto title\t很好\t好\n", "utf-8"
    )
    for name in ("two.tsv", "three.tsv"):
        asked: list[Sequence[str]] = []

        def right(sources: Sequence[str], asked: list[Sequence[str]] = asked) -> list[str]:
            asked.append(sources)
            return ["天气", "好"]

        found = tasks.titles(tmp_path / name, None, right)
        assert asked == [["今天天气很好", "很好"]]
        assert found["rouge-1"] == found["rouge-l"] == pytest.approx(100, abs=1e-5)
        half = tasks.titles(tmp_path / name, None, lambda _: ["天气", ""])
        assert half["rouge-1"] == pytest.approx(50, abs=1e-5) and half["samples"] == 2
        assert tasks.titles(tmp_path / name, 1, lambda _: ["天气"])["samples"] == 1
    rows = [("1+1=", "x=1+1", "2"), ("2%", "x=2%", "0.02"), ("错", "x=1", "2")]
    (tmp_path / "ape.json").write_text(
        "".join(
            json.dumps({"original_text": q, "equation": e, "ans": a}) + "\n" for q, e, a in rows
        ),
        "utf-8",
    )
    found = tasks.problems(tmp_path / "ape.json", None, lambda _: ["x=4 /2", "import os"])
    assert (found["samples"], found["accuracy"], found["same_equation"]) == (2, 50.0, 0.0)


@pytest.mark.parametrize("family", ["t5", "cpm"])
def test_a_checkpoint_writes_what_its_model_writes(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, SIZES[family])
    model, words = tasks.opened(folder)
    (tmp_path / "titles.tsv").write_text("".join(f"天气\t{text}\n" for text in TEXTS), "utf-8")
    for beams in (1, 3):
        outputs = tasks.written(model, words, TEXTS, beams, "csl", batch=2)
        alone = [tasks.written(model, words, [text], beams, "csl")[0] for text in TEXTS]
        assert outputs == alone
        line = (folder, "--task", "csl", "--data", tmp_path / "titles.tsv", "--beams", beams)
        found = said(capsys, *line, "--outputs", tmp_path / "out.txt")
        assert found["samples"] == len(TEXTS) and found["beams"] == beams
        lines = (tmp_path / "out.txt").read_text("utf-8").split("\n")[:-1]
        assert lines == [" ".join(text.split()) for text in outputs]
    if family == "t5":
        ids = framed([int(i) for i in words.encode(TEXTS[0])], words.bos_id, words.eod_id)
        known = (words.bos_id, words.eod_id, words.pad_id, words.vocab_size)
        (one,) = answer(model, [ids], Decoding(32, beams=3), *known)
        assert words.decode(one.ids) == outputs[0]


@pytest.mark.parametrize("family", ["t5", "cpm", "roformer"])
def test_vectors_are_means_of_the_first_and_last_block(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, SIZES[family])
    model, words = tasks.opened(folder)
    model = model.double()
    found = tasks.vectors(model, words, TEXTS, batch=2)
    stack = model.encoder if hasattr(model, "encoder") else model.decoder
    for text, vector in zip(TEXTS, found, strict=True):
        bos = [] if family == "cpm" else [words.bos_id]
        ids = torch.tensor([[*bos, *(int(i) for i in words.encode(text)), words.eod_id]])
        seen: list[torch.Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
            for block in (stack.layers[0], stack.layers[-1])
        ]
        places = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            (model.encode if family == "t5" else model)(ids, places, None)
        for hook in hooks:
            hook.remove()
        wanted = (seen[0] + seen[1]).double().mean(1)[0].numpy() / 2
        assert np.abs(wanted - vector).max() < 1e-12 * np.abs(wanted).max()
    # A pair of one text beside a pair of two: a perfect order.
    (tmp_path / "pairs.txt").write_text("今天\t今天\t1\n天气\t很好很好\t0\n", "utf-8")
    result = said(capsys, folder, "--task", "lcqmc", "--data", tmp_path / "pairs.txt")
    assert result["first_last_average"] == pytest.approx(100)
    assert result["samples"] == 2 and "whitened" in result


def test_texts_of_a_file_are_read_as_a_corpus_reads_them(tmp_path: Path) -> None:
    """Full-width characters are folded, what is spelt like a control token is text."""
    model, words = tasks.opened(saved(tmp_path, SIZES["roformer"]))
    plain, wide = "1天2气[MASK]", "　１天２气[MASK] "
    assert words.encode(wide).tolist() != words.encode(plain).tolist()
    assert tasks.encoded(words, [wide]) == [words.encode(plain).tolist()]
    assert words.mask_id not in tasks.encoded(words, [wide])[0]
    found = tasks.vectors(model.double(), words, [wide, plain])
    assert np.abs(found[0] - found[1]).max() < 1e-12 * np.abs(found).max()
    sources: list[list[int]] = []
    cpm, words = tasks.opened(saved(tmp_path / "cpm", SIZES["cpm"]))
    cpm.register_forward_pre_hook(lambda _, given: sources.append(given[0].tolist()))
    tasks.written(cpm, words, [wide], 1, "csl")
    assert sources[0] == [words.encode(plain).tolist()]


@pytest.mark.parametrize("task", ["bits", "mlm", "length", "passkey", "csl", "lcqmc", "tnews"])
def test_every_task_goes_where_generate_goes_with_a_gpu(
    task: str,
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No GPU is needed here: bf16 stays on the CPU. Where there is none for it, no task begins."""
    asked: list[bool] = []

    def place(gpu: bool) -> tuple[str, torch.dtype]:
        asked.append(gpu)
        return "cpu", torch.bfloat16 if gpu else torch.float32

    for room in ("device", "tasks", "lengths"):
        monkeypatch.setattr(f"pretrain.{room}.place", place)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    files = {"csl": "天气\t今天天气很好\n", "lcqmc": "今天\t今天\t1\n天气\t很好\t0\n"}
    files["tnews"] = '{"sentence": "今天天气很好", "label_desc": "news_sports"}\n'
    config = SIZES["roformer" if task == "mlm" else "cpm"]
    data: Path = tmp_path / "file"
    if task in files:
        data.write_text(files[task], "utf-8")
    elif task != "passkey":
        config, data = replace(config, vocab=320), tiny_corpus
    line = (saved(tmp_path, config), "--task", task, "--samples", 2)
    if task != "passkey":
        line = (*line, "--data", data)
    if task in ("length", "passkey"):
        line = (*line, "--lengths", 48)
    found = [said(capsys, *line, *words) for words in ([], ["--gpu"])]
    assert asked == [False, True]
    assert found[0].keys() == found[1].keys()


def test_what_a_user_gets_wrong_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, SIZES["roformer"])
    cases = {
        "a\tb\tc\td\n": (["csl"], "line 1 has 4 columns, there must be 2 or 3"),
        "\n": (["lcqmc"], "has no line with text"),
        "a\tb\tc\n": (["lcqmc"], "the third column is a number"),
        "a\tb\t1\nc\td\tnan\n": (["lcqmc"], "line 2: the label is nan, must be finite"),
        "{}\n": (["ape210k"], "line 1 is no problem with original_text"),
        "a\tb\n": (["csl"], "needs a model that writes"),
        "a\tb\t1\n": (["lcqmc", "--samples", "0"], "--samples: is 0"),
    }
    for content, (task, message) in cases.items():
        (tmp_path / "file").write_text(content, "utf-8")
        line = ["evaluate", str(folder), "--data", str(tmp_path / "file"), "--task", *task]
        assert cli.main(line) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    assert (
        cli.main(["evaluate", str(folder), "--task", "csl", "--data", str(tmp_path / "file")]) == 2
    )
    assert "is not UTF-8" in capsys.readouterr().err
    line = ["evaluate", str(folder), "--task", "mlm", "--data", str(tmp_path / "nocorpus")]
    assert cli.main(line) == 2
    assert f"--data: {tmp_path}/nocorpus is no corpus" in capsys.readouterr().err
    made = tmp_path / "t5"
    other = saved(made, SIZES["t5"])
    assert cli.main(["evaluate", str(other), "--task", "mlm", "--data", str(tmp_path)]) == 2
    assert "needs a RoFormer" in capsys.readouterr().err
    encoder, labels = saved(tmp_path / "v1", SIZES["roformer"]), tmp_path / "labels"
    classes = saved(labels, replace(SIZES["roformer"], labels=3))
    for asked, task, message in (
        (encoder, "bits", "--task bits: needs a CPM, the checkpoint is a roformer"),
        (other, "bits", "the checkpoint is a t5_pegasus"),
        (classes, "mlm", "--task mlm: needs a head over words, the checkpoint has one over 3"),
        (classes, "length", "--task length: needs a head over words"),
    ):
        assert cli.main(["evaluate", str(asked), "--task", task, "--data", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["evaluate", str(classes), "--task", "passkey"]) == 2
    assert "--task passkey: needs a head over words" in capsys.readouterr().err
    assert cli.main(["generate", str(classes), "--prompt", "今天"]) == 2
    assert "has a head over 3 labels, not over words" in capsys.readouterr().err


def test_a_flag_that_the_task_does_not_read_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"masking": "word"} | dict.fromkeys(("seq_len", "beams", "candidates", "shots"), "3")
    for name, readers in evaluate.READ_BY.items():
        flag = f"--{name.replace('_', '-')}"
        for task in evaluate.TASKS:
            line = ["evaluate", "nowhere", "--task", task, flag, given.get(name, "x")]
            line += [] if name == "data" or task == "passkey" else ["--data", "x"]
            assert cli.main(line) == 2
            refused = f"{flag}: is {given.get(name, 'x')}, which --task {task} does not read, only"
            assert (refused in capsys.readouterr().err) == (task not in readers)
    assert cli.main(["evaluate", "--data", "ape.json", "--cleaned", "out"]) == 2  # --task forgotten
    assert "--cleaned: is out, which --task bits does not read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--task", "ape210k", "--data", "ape.json"])
    assert "a checkpoint must be given" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "task"), [("cpm", "bits"), ("roformer", "mlm")])
def test_no_tokens_are_no_row(
    family: str, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["evaluate", str(saved(tmp_path, SIZES[family])), "--task", task, "--data", "x"]
    assert cli.main([*line, "--seq-len", "0"]) == 2
    assert "--seq-len: is 0, must be at least 1" in capsys.readouterr().err


def test_every_task_is_on_the_page_of_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/evaluation.md").read_text("utf-8")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    choices = re.search(r"--task \{([\w,]+)\}", capsys.readouterr().out)
    assert choices and all(f"`{task}`" in page for task in choices.group(1).split(","))


def test_generate_with_beams_from_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, SIZES["t5"])
    (tmp_path / "lines.txt").write_text("天气\n很好\n", "utf-8")
    line = ["generate", str(folder), "--prompt", "今天", "--beams", "3", "--length-penalty", "1"]
    assert cli.main([*line, "--allowed", str(tmp_path / "lines.txt"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["generated"]
    assert row["text"] in ("天气", "很好") and row["ended"] and row["score"] < 0


def test_an_encoder_shows_where_a_word_was_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Around its masks the text has all its places, those too that the vocabulary lacks."""
    folder = saved(tmp_path, SIZES["roformer"])
    for prompt, around in (
        ("今天[MASK]气很坏!好", r"今天\[.*\]气很\[UNK\]\[UNK\]好"),
        ("坏今坏", r"\[UNK\]\[.*\]\[UNK\]"),
    ):
        assert cli.main(["generate", str(folder), "--prompt", prompt, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["generated"]
        assert re.fullmatch(around, row["text"]), row["text"]


def test_ape210k_is_written_as_it_was_cleaned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A problem whose equation has not the value of its answer is left out; no checkpoint."""
    rows = [
        {"original_text": "3(1/2)的50%是多少？", "equation": "x=3(1/2)*50%", "ans": "1.75"},
        {"original_text": "1加1是多少？", "equation": "x=1+1", "ans": "3"},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "ape.json").write_text(text, "utf-8")
    line = ["evaluate", "--task", "ape210k", "--data", str(tmp_path / "ape.json")]
    line += ["--cleaned", str(tmp_path / "clean.jsonl")]
    assert cli.main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 1
    (kept,) = (tmp_path / "clean.jsonl").read_text("utf-8").splitlines()
    assert json.loads(kept) == {
        "question": "(3+1/2)的50%是多少？", "equation": "(3+1/2)*50/100", "answer": "1.75"
    }  # fmt: skip
    assert cli.main(line) == 2 and "exists already" in capsys.readouterr().err
