"""metrics.jsonl holds every step once, in JSON that every reader takes, whatever happened."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from pretrain.lines import cut_metrics
from pretrain.monitor import Monitor, NotFinite, Speed, Terminal, first_to_speak
from pretrain.step import StepResult
from tests.run_jobs import page
from tests.worlds import World


def _steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").open(encoding="utf-8")]


def test_a_run_begun_again_validates_its_beginning_once(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    changes = {"run__steps": 4, "schedule": {}, "run__validate_every_steps": 2}
    config = page(tmp_path, tiny_corpus, **changes)
    (tmp_path / ".lock").touch()  # as every run has, this one was killed
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    world1.run("tests.run_jobs:go", config=config)
    assert _steps(tmp_path) == [0, 1, 2, 3, 4]


def test_a_passage_with_odd_line_ends_survives_the_cut(tmp_path: Path) -> None:
    rows = [{"step": n, "sample": "春\u2028眠\u0085不\u2029觉\x0b晓"} for n in range(1, 5)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    cut_metrics(path, 3)
    assert [json.loads(x) for x in path.read_text("utf-8").split("\n") if x] == rows[:3]


@pytest.mark.parametrize(("loss", "norm"), [(1.0, math.inf), (math.nan, 1.0)])
def test_what_is_not_finite_is_null(tmp_path: Path, loss: float, norm: float) -> None:
    speed = Speed(1.0, "a test")
    monitor = Monitor(
        tmp_path, Terminal(enabled=False), writes=True, total_steps=9, speed=speed
    )  # fmt: skip
    monitor.begin(0)
    one, none = torch.ones((), dtype=torch.int64), torch.zeros(2, 0)
    result = StepResult(torch.tensor(loss), one, norm, True, none)
    monitor.record(
        {"step": 1, "lr": 1.0, "tokens": 1, "samples": 1, "stage": 0, "step_tokens": 1}, result
    )
    if math.isnan(loss):
        with pytest.raises(NotFinite, match="step 1: the loss is nan"):
            monitor.flush()
    else:
        monitor.flush()
    text = (tmp_path / "metrics.jsonl").read_text("utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads(text, parse_constant=refuse)
    assert line["loss"] == (None if math.isnan(loss) else loss)
    assert line["grad_norm"] == (None if math.isinf(norm) else norm)


def test_a_process_number_that_comes_again_does_not_silence(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f".said-{os.getppid()}").touch()  # an earlier container's launcher
    assert first_to_speak(tmp_path)
    assert not first_to_speak(tmp_path)


def test_the_old_end_of_an_extended_run_is_rotated_like_any_other(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    for steps in (10, 20, 30):
        changes = {"run__steps": steps, "run__keep_checkpoints": 1, "schedule__decay_steps": 0}
        world1.run("tests.run_jobs:go", config=page(tmp_path, tiny_corpus, **changes))
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert kept == ["stage-00-step-00000030"]
