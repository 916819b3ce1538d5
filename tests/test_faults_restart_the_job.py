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

import psutil
import pytest

from launch import train
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
    assert f"rank 1 on {socket.gethostname()} (step 7) died" in err


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
