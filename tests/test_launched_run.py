"""Through the real launcher: what a user types, what the terminal shows, what a signal does.

The warm worlds test what a run computes; here stands what only a launch has: processes that die,
signals, the terminal. Every test starts DeepSpeed's own launcher.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.machines import free_port
from launch.train import MARK
from pretrain import checkpoint
from pretrain.watch import STALLED
from tests.run_jobs import digests, losses, metrics, page, write
from tests.worlds import World

pytestmark = pytest.mark.launcher
ROOT = Path(__file__).resolve().parent.parent
ENDS_S = 120


def _start(config: Path, *words: str, folder: Path = ROOT) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "launch", "train", str(config), "--devices", "2", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def _until(run: Path, enough: Callable[[], Any]) -> None:
    deadline = time.monotonic() + ENDS_S
    while not enough():
        assert time.monotonic() < deadline, f"{run}: it did not come so far"
        time.sleep(0.02)


def _steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text("utf-8").count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World) -> Path:
    """An unbroken run of 100 steps, from a warm world."""
    run = tmp_path_factory.mktemp("long") / "run"
    world2.run("tests.run_jobs:go", config=_page(run, tiny_corpus))
    return run


def _page(run: Path, corpus: Path) -> dict[str, Any]:
    changes = {"run__steps": 100, "run__save_every_steps": 12, "model__dropout": 0.1}
    return page(run, corpus, **changes, run__threads=1)


def test_killed_and_started_again_equals_the_unbroken_warm_run(
    long: Path, tmp_path: Path, tiny_corpus: Path
) -> None:
    run = tmp_path / "a folder" / "run"
    run.parent.mkdir()
    config = write(tmp_path / "run.yaml", _page(run, tiny_corpus))
    job = _start(config, folder=tmp_path)
    _until(run, lambda: _steps(run) >= 30)
    for process in [*psutil.Process(job.pid).children(recursive=True), job]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.communicate(timeout=ENDS_S)
    assert _steps(run) < 100
    again = _start(config, folder=tmp_path)
    out, err = again.communicate(timeout=ENDS_S)
    assert again.returncode == 0, err
    assert "resuming from" in out
    assert losses(run) == losses(long)
    final = Path("checkpoints", "stage-00-step-00000100")
    assert digests(run / final) == digests(long / final)
    shown = [line for line in out.splitlines() if line.strip()]
    known = ("$ deepspeed", "resuming", "step ")
    assert all(line.startswith(known) for line in shown), "library chatter reached the terminal"
    assert err == ""


def test_a_signal_saves_and_ends_well(tmp_path: Path, tiny_corpus: Path, long: Path) -> None:
    run = tmp_path / "run"
    config = write(tmp_path / "run.yaml", _page(run, tiny_corpus))
    job = _start(config)
    _until(run, lambda: _steps(run) >= 5)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=ENDS_S)
    assert job.returncode == 0, err
    saved = checkpoint.found_in(run)[0]
    last = metrics(run)[-1]["step"]
    assert json.loads((saved / "state.json").read_text("utf-8"))["step"] == last < 100
    assert losses(run) == losses(long)[:last]


def test_a_mistake_is_one_sentence(tmp_path: Path, tiny_corpus: Path) -> None:
    config = page(tmp_path / "run", tmp_path / "no-corpus")
    job = _start(write(tmp_path / "run.yaml", config))
    _, err = job.communicate(timeout=ENDS_S)
    assert job.returncode not in (0, None)
    assert "is no corpus, it has no manifest.json" in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_frozen_rank_ends_the_job_with_code_69(tmp_path: Path, tiny_corpus: Path) -> None:
    """DeepSpeed's launcher waits for it longer than its peers may take, and is ended. (By the roll
    alone: test_faults_restart_the_job.py; here a busy machine must not take as long over a step.)
    """
    changes: dict[str, Any] = {"run__steps": 4000, "run__log_every_steps": 1, "schedule": {}}
    run = tmp_path / "run"
    config = page(run, tiny_corpus, **changes, run__threads=1, faults__stall_s=15.0)
    job = _start(write(tmp_path / "run.yaml", config))
    _until(run, lambda: _steps(run) >= 3)
    frozen = json.loads((run / "logs" / "rank-0001.json").read_text("utf-8"))["pid"]
    os.kill(frozen, signal.SIGSTOP)
    _, err = job.communicate(timeout=ENDS_S)
    assert job.returncode == STALLED == 69, err
    assert "answers no more (frozen or dead)" in err and len(err.strip().splitlines()) == 1
    assert not psutil.pid_exists(frozen)


def test_deepspeed_itself_from_another_folder(tmp_path: Path, tiny_corpus: Path) -> None:
    run = tmp_path / "run"
    config = write(tmp_path / "run.yaml", page(run, tiny_corpus, run__steps=15))
    program = Path(sys.executable).parent / "deepspeed"
    port = str(free_port())
    # Python is named: the script's first line breaks where the environment's path has a space
    line = [
        sys.executable,
        program,
        "--num_accelerators",
        "2",
        "--master_port",
        port,
        ROOT / "pretrain/train.py",
    ]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"DS_ACCELERATOR": "cpu"}
    env["PATH"] = f"{program.parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        [*map(str, line), "run.yaml", "run.log_every_steps=15"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )
    assert config.exists()
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(run)] == list(range(1, 16))


SSH = '#!/bin/sh\n[ "$#" = 3 ] && echo 127.0.0.1\nexit 0\n'  # ssh HOST hostname -I
PDSH = """#!/usr/bin/env python3
import os, subprocess, sys
at = sys.argv.index("-w")
hosts, line = sys.argv[at + 1].split(","), " ".join(sys.argv[at + 2 :])
env = {name: os.environ[name] for name in ("HOME", "PATH")}
pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
jobs = [
    subprocess.Popen(["bash", "-c", line.replace("%n", str(n))], env=env, **pipe)
    for n in range(len(hosts))
]
for host, job in zip(hosts, jobs):
    for text in job.stdout:
        sys.stdout.buffer.write(host.encode() + b": " + text)
sys.exit(max(job.wait() for job in jobs))
"""


@pytest.mark.skipif(" " in f"{sys.executable}{ROOT}", reason="ssh takes no path with a blank")
def test_what_ranks_say_by_ssh_is_heard(tmp_path: Path) -> None:
    """Two "machines" behind a pdsh that, as ssh does, takes nothing of the environment along."""
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("node01 slots=1\nnode02 slots=1\n")
    config = write(tmp_path / "run.yaml", page(tmp_path / "run", tmp_path / "no-corpus"))
    line = [sys.executable, "-m", "launch", "train", str(config), "--hostfile"]
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*line, str(tmp_path / "hosts")],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
    )
    said = done.stderr.splitlines()
    assert done.returncode == 2 and 1 <= len(said) <= 2, done.stderr
    assert all("is no corpus, it has no manifest.json" in text for text in said)
    log = (tmp_path / "run/logs/launcher.log").read_text("utf-8")
    assert "node02: " in log and f": {MARK}bajie: " in log
