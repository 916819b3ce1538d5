"""`launch train` starts a job again when a rank died, within its budget, and never after a mistake.

The launcher and its ranks are played by a short script, which says what DeepSpeed's launcher says;
one test goes through the real one.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from configs.load import ConfigError
from launch import train
from pretrain import checkpoint
from pretrain import train as rank
from pretrain.watch import STALLED, enlist, failure, told
from tests.run_jobs import losses, page, write
from tests.worlds import World

ROOT = Path(__file__).resolve().parent.parent
PLAYED = """
import json, os, sys, time
run, codes = sys.argv[1], json.loads(sys.argv[2])
count = os.path.join(run, "count")
life = os.path.getsize(count) if os.path.exists(count) else 0
open(count, "a").write("x")
code = codes[min(life, len(codes) - 1)]
if code:
    if code != 2:
        entry = {"rank": 1, "host": sys.argv[3], "pid": 2**22 + 5, "step": 7, "state": "running"}
        with open(os.path.join(run, "logs", "rank-0001.json"), "w") as out:
            json.dump(entry | {"born": time.time()}, out)
    print("Killing subprocess 1")
    print("[cmd] exits with return code =", code)
else:
    print("Process 1 exits successfully.")
sys.exit(code % 256)
"""


def _play(
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    codes: list[int],
    restarts: int,
    words: Sequence[str] = (),
) -> tuple[int, int]:
    """(exit code, lives) of a job whose lives end with these codes."""
    command = [sys.executable, "-c", PLAYED, str(run), json.dumps(codes), socket.gethostname()]
    monkeypatch.setattr(train, "deepspeed_line", lambda *_, **__: command)
    config = page(run, run / "corpus", faults__restarts=restarts)
    code = train.main([str(write(run.parent / "run.yaml", config)), *words])
    return code, (run / "count").stat().st_size


def test_a_rank_that_died_is_named_and_the_job_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _play(monkeypatch, tmp_path / "run", [-9, 0], restarts=3) == (0, 2)
    out, err = capfd.readouterr()
    assert "starting again, 2 more times at most (faults.restarts" in out
    assert f"rank 1 on {socket.gethostname()} (last known step 7) died" in err


def test_a_job_begins_again_without_its_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = os.openpty()
    os.close(master)
    with open(slave, "w", encoding="utf-8") as out, open(os.dup(slave), "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert _play(monkeypatch, tmp_path / "run", [-9, 0], restarts=1) == (0, 2)


@pytest.mark.parametrize(
    ("codes", "restarts", "lives"), [([-9], 2, 3), ([-9], 0, 1), ([75, 0], 1, 2), ([2], 5, 1)]
)
def test_the_budget_is_kept_and_a_mistake_is_not_repeated(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    restarts: int,
    lives: int,
) -> None:
    code, lived = _play(monkeypatch, tmp_path / "run", codes, restarts)
    assert lived == lives
    assert (code == 0) == (codes[-1] == 0)


def test_of_several_machines_none_begins_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks would meet the others' old store; who started them all begins on all together."""
    words = ["--nodes", "2", "--node-rank", "1", "--master", "head:29500"]
    assert _play(monkeypatch, tmp_path / "run", [1, 0], 3, words) == (1, 1)


HANGS = """
import sys, time
from pathlib import Path
from pretrain.watch import enlist, told
run, how = Path(sys.argv[1]), eval(sys.argv[2])
with open(run / "count", "a") as count:
    count.write("x")
enlist(run, 1)
told(enlist(run, 0), **{key: value or time.time() for key, value in how.items()})
print("Killing subprocess 1", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "code", "lives"),
    [
        ({"stalled_at": 0}, STALLED, 2),
        ({"code": 2, "left": 0}, 2, 1),
        ({"code": 74, "left": 0}, 74, 2),
        ({"code": 1, "left": 0}, 1, 2),
        ({"code": 2, "left": 9.0}, 1, 2),  # an earlier job's
        ({}, 1, 2),
    ],
)
def test_a_job_that_is_killed_for_a_rank_that_failed_has_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], code: int, lives: int
) -> None:
    """DeepSpeed's launcher waits for a frozen peer, longer than it may: it says no code."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", HANGS, str(run), repr(how)]
    monkeypatch.setattr(train, "deepspeed_line", lambda *_, **__: command)
    monkeypatch.setattr(train, "FAILED_PEER_GRACE_S", 0.2)
    config = page(run, run / "corpus", faults__restarts=1)
    assert train.main([str(write(tmp_path / "run.yaml", config))]) == code
    assert (run / "count").stat().st_size == lives


def test_of_several_codes_a_mistake_counts_then_a_stall_then_the_first(tmp_path: Path) -> None:
    entries = [enlist(tmp_path, rank) for rank in range(3)]
    assert failure(tmp_path, 100.0) is None
    told(entries[0], code=74, left=120.0)
    told(entries[1], code=1, left=110.0)
    assert (failure(tmp_path, 100.0), failure(tmp_path, 115.0)) == (1, 74)
    told(entries[2], stalled_at=130.0)
    assert (failure(tmp_path, 100.0), failure(tmp_path, 140.0)) == (STALLED, None)
    told(entries[2], code=2, left=140.0)
    assert failure(tmp_path, 100.0) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("batch.micro: is 0"), 2),
        (checkpoint.StorageError("a disk"), 74),
        (OSError(5, "a disk"), 74),
        (FileNotFoundError(2, "no corpus"), 2),
        (RuntimeError("a peer is gone"), 1),
    ],
)
def test_a_rank_leaves_its_code_on_the_roll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def run(*_: object) -> None:
        raise error

    since = time.time()
    monkeypatch.setattr(rank, "train", run)
    monkeypatch.setattr("pretrain.monitor.terminal", mock.Mock())
    monkeypatch.setattr(rank, "ON_CPU", {})
    words = [str(write(tmp_path / "run.yaml", page(tmp_path / "run", tmp_path))), "--launched"]
    if code == 1:
        with pytest.raises(RuntimeError):
            rank.main(words)
    else:
        assert rank.main(words) == code
    assert failure(tmp_path / "run", since) == code


@pytest.mark.launcher
@pytest.mark.slow
def test_through_the_real_launcher(tmp_path: Path, tiny_corpus: Path, world2: World) -> None:
    changes: dict[str, Any] = {"run__steps": 60, "run__threads": 1, "run__save_every_steps": 10}
    changes |= {"run__log_every_steps": 1, "faults__restarts": 1, "schedule__decay_steps": 0}
    run = tmp_path / "run"
    config = write(tmp_path / "run.yaml", page(run, tiny_corpus, **changes))
    line = [sys.executable, "-m", "launch", "train", str(config), "--devices", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    job = subprocess.Popen(line, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)
    while job.poll() is None:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            if (run / "metrics.jsonl").read_text().count("\n") >= 15:
                entry = json.loads((run / "logs/rank-0001.json").read_text())
                os.kill(entry["pid"], signal.SIGKILL)
                break
        time.sleep(0.01)
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert f"rank 1 on {socket.gethostname()}" in err and "died" in err
    assert "starting again, 0 more times" in out + err and "tensors verified" in out + err
    world2.run("tests.run_jobs:go", config=page(tmp_path / "whole", tiny_corpus, **changes))
    assert losses(run) == losses(tmp_path / "whole")
