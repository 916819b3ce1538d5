"""Promise: a slow reader is seen, a profile holds the steps asked for, events stay on record."""

import errno
import gzip
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from configs.load import ConfigError, from_dict
from configs.run import RunConfig
from pretrain.lines import Lines
from pretrain.monitor import Monitor, Terminal, first_to_speak, speed
from pretrain.profiling import Profiler
from pretrain.step import StepResult
from tests.run_jobs import metrics, page
from tests.worlds import World

GO = "tests.run_jobs:go"
ROOT = Path(__file__).resolve().parent.parent


def events(run: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl."""
    return [json.loads(text) for text in (run / "events.jsonl").read_text("utf-8").splitlines()]


def test_a_slow_reader_of_any_rank_is_seen(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    """Rank 1 reads step 6 (samples 40 to 47) for 3 s, two steps ahead; rank 0 writes it down.

    Two steps take 0.1 s, on a machine that is very busy 1 or 2: the rest is waited for.
    """
    config = page(tmp_path, tiny_corpus, run__steps=10, schedule={})
    world2.run("tests.monitor_jobs:go_slowly", config=config, rank=1, sample=45, seconds=3.0)
    waits = [line["loader_wait_s"] for line in metrics(tmp_path)]
    assert len(waits) == 10 and max(waits[1:]) == waits[5]  # the first waits for the start
    assert waits[5] > 0.5 and statistics.median(waits) < waits[5] / 4


def _steps_in(trace: Path) -> list[int]:
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        found = json.load(file)["traceEvents"]
    words = [e["name"].split() for e in found if e.get("ph") == "X" and "name" in e]
    return sorted({int(w[1]) for w in words if len(w) == 2 and w[0] == "step"})


def test_a_profile_holds_exactly_the_steps_asked_for(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    """Steps 2 and 3 by the page; 7 to 8 by a file that is found when the first five are read."""
    (tmp_path / "profile").write_text("7 8\n")
    config = page(tmp_path, tiny_corpus, run__steps=10, schedule={}, monitor__profile_steps=[2, 3])
    world2.run(GO, config=config)
    assert not (tmp_path / "profile").exists()
    folders = sorted((tmp_path / "profiles").iterdir())
    assert [f.name for f in folders] == [
        "steps-00000002-00000003",
        "steps-00000007-00000008",
    ]
    for folder, steps in zip(folders, ([2, 3], [7, 8]), strict=True):
        for rank in range(2):
            assert _steps_in(folder / f"rank-{rank:04d}.json.gz") == steps
            rows = (folder / f"rank-{rank:04d}.txt").read_text("utf-8").splitlines()
            assert len(rows) == 13 and sum("aten::" in row for row in rows) > 3
    assert len(metrics(tmp_path)) == 10


def test_a_request_that_comes_late_or_wrong(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = Profiler(tmp_path, 0, torch.device("cpu"), said.append)
    for words in ("ten", "5", "5 4", "0 3"):
        (tmp_path / "profile").write_text(words)
        profiler.look(3)
        assert f"says '{words}', must be two numbers" in said.pop()
    (tmp_path / "profile").write_bytes("100 103\n".encode("utf-16"))  # as PowerShell's echo
    profiler.look(3)
    assert "must be two numbers" in said.pop()
    (tmp_path / "profile").write_text("3 5")
    profiler.look(20)  # three steps, from the next on; the run ends after two of them
    for number in range(21, 23):
        with profiler.step(number):
            torch.ones(8, 8) @ torch.ones(8, 8)
    assert not said and not (tmp_path / "profiles").exists()
    profiler.close()
    assert _steps_in(tmp_path / "profiles/steps-00000021-00000022/rank-0000.json.gz") == [21, 22]
    assert "profile of steps 21 to 22" in said[0]
    for number in range(23, 25):  # nothing is recorded any more
        with profiler.step(number):
            pass
    assert len(list((tmp_path / "profiles").iterdir())) == 1


def test_a_run_that_goes_back_ends_its_profile(tmp_path: Path) -> None:
    """Asked for steps 7 to 9; after 8 the run goes back to 5 and makes all of them again."""
    profiler = Profiler(tmp_path, 0, torch.device("cpu"), lambda text: None, (7, 9))
    for number in (7, 8, 5, 6, 7, 8, 9):
        with profiler.step(number):
            torch.ones(8, 8) @ torch.ones(8, 8)
    [folder] = (tmp_path / "profiles").iterdir()
    assert folder.name == "steps-00000007-00000008"
    with gzip.open(folder / "rank-0000.json.gz", "rt", encoding="utf-8") as file:
        words = [e.get("name", "") for e in json.load(file)["traceEvents"]]
    assert [words.count(f"step {number}") for number in (7, 8)] == [1, 1]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"profile_steps": [4, 3]}, r"profile_steps: \[4, 3\] are no steps"),
        ({"profile_steps": [0, 3]}, r"profile_steps: \[0, 3\] are no steps"),
        ({"parts_every_steps": -1}, "parts_every_steps: is -1, must not be negative"),
    ],
)
def test_what_cannot_be_looked_at_is_a_sentence(
    tmp_path: Path, section: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(RunConfig, page(tmp_path, tmp_path, monitor=section))


def test_events_stay_on_record_over_restarts_and_stages(
    tmp_path: Path, tiny_corpus: Path, world1: World, world2: World
) -> None:
    """Two stages on two processes, stopped in the second, resumed on one."""
    changes: dict[str, Any] = {
        "stages": [{"steps": 4}, {"steps": 6, "data": {"seq_len": 16}}],
        "run__steps": None,
        "run__save_every_steps": 3,
        "schedule": {},
    }
    began = time.time()
    world2.run(GO, config=page(tmp_path, tiny_corpus, **changes, run__stop_at_step=7))
    world1.run(GO, config=page(tmp_path, tiny_corpus, **changes))
    told = [(e["event"], e["step"]) for e in events(tmp_path)]
    assert told == [
        ("start", 0), ("stage", 0), ("checkpoint", 3), ("checkpoint", 4), ("stage", 4),
        ("checkpoint", 6), ("checkpoint", 7), ("end", 7),
        ("start", 7), ("stage", 7), ("checkpoint", 9), ("checkpoint", 10), ("end", 10),
    ]  # fmt: skip
    assert [e["processes"] for e in events(tmp_path) if e["event"] == "start"] == [2, 1]
    assert [e["seq_len"] for e in events(tmp_path) if e["event"] == "stage"] == [32, 16, 16]
    ends = [e["why"] for e in events(tmp_path) if e["event"] == "end"]
    assert ends == ["run.stop_at_step", "finished"]
    assert all(began <= e["time"] <= time.time() for e in events(tmp_path))


def test_lines_wait_for_a_disk_that_is_full(tmp_path: Path) -> None:
    """A real limit, in the middle of a line: nothing is cut, nothing lost, it is said once."""
    said: list[str] = []
    lines = Lines(tmp_path / "metrics.jsonl", said.append)
    lines.add([{"step": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
        lines.add([{"step": 2}, {"step": 3}])
        lines.add([{"step": 4}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    assert len(said) == 1 and "metrics.jsonl: cannot be written: File too large" in said[0]
    lines.add([{"step": 5}])
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert "is written again, with 3 lines that had waited" in said[1]
    lines.add([{"step": 6}])
    assert len(metrics(tmp_path)) == 6 and len(said) == 2


def test_a_line_begins_behind_one_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start"}\n{"event": "che')  # killed
    Lines(path, print).add([{"event": "start"}, {"event": "end"}])
    assert path.read_text().splitlines()[2:] == ['{"event": "start"}', '{"event": "end"}']


def test_curves_that_cannot_be_written_end_no_training(tmp_path: Path) -> None:
    heard = io.StringIO()
    device = torch.device("cpu")
    monitor = Monitor(
        tmp_path, Terminal(heard), writes=True, total_steps=9, speed=speed(device, 1, "fp32")
    )
    monitor._curves([{"step": 1, "loss": 2.0}])
    good, monitor._board.add_scalar = monitor._board, _full
    for step in (2, 3):
        monitor._curves([{"step": step, "loss": 2.0}])
    assert "tensorboard: cannot be written: No space left on device" in heard.getvalue()
    assert monitor._board is not None and monitor._board is not good  # begun anew
    monitor.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_full_disk_leaves_no_empty_curves_and_events_wait_for_no_event(tmp_path: Path) -> None:
    device = torch.device("cpu")
    monitor = Monitor(
        tmp_path, Terminal(), writes=True, total_steps=9, speed=speed(device, 1, "fp32")
    )
    one, none = torch.ones((), dtype=torch.int64), torch.zeros(2, 0)
    values = {"lr": 1.0, "tokens": 1, "samples": 1, "stage": 0, "step_tokens": 1}
    monitor.begin(0)

    def step(number: int) -> None:
        monitor.record(values | {"step": number}, StepResult(torch.ones(()), one, 1.0, False, none))
        monitor.flush()

    with mock.patch.object(Lines, "_append", _full):
        monitor.event("checkpoint failed", 0)
        step(1)
    assert not (tmp_path / "tensorboard").exists()
    step(2)
    assert [e["event"] for e in events(tmp_path)] == ["checkpoint failed"]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    with mock.patch.object(Lines, "_append", _full):
        step(3)
    monitor.begin(2)  # a rewind takes back what waits, too
    with mock.patch.object(Lines, "_append", _full):
        step(3)
    monitor.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failure_is_told_where_no_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert [first_to_speak(tmp_path) for _ in range(2)] == [True, False]
    assert first_to_speak(tmp_path / "gone")


def test_a_log_and_a_terminal_without_room_change_no_exit_code(tmp_path: Path) -> None:
    """Chatter, a line of progress and the failure's traceback have no place; its sentence has."""
    code = """
import sys
from unittest import mock
from pretrain import train

def fails(config, out, *rest):
    print("chatter")
    out.say("step 1")
    raise OSError(28, "No space left on device", "a/checkpoint")

with mock.patch.object(train, "train", fails):
    sys.exit(train.main(sys.argv[1:]))
"""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0000.log").symlink_to("/dev/full")
    line = [sys.executable, "-c", code, "configs/runs/cpm-small-1gpu.yaml", f"run.out={tmp_path}"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            line, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == "bajie: [Errno 28] No space left on device: 'a/checkpoint'\n"
    assert done.returncode == 74
