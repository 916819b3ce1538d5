"""RUN/stop and signals: what counts as being asked, and how ranks on other machines are reached."""

import errno
import fcntl
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from launch import train as launcher
from launch.train import Job
from pretrain import parallel, stopping, train
from pretrain.loop import SIGNAL
from pretrain.stopping import StopFile
from pretrain.watch import STOPPED, ends, enlist, halted, told
from tests.run_jobs import page, write
from tests.test_command_line import RUN, Stage
from tests.worlds import World

FAR_RANK = """
import os, sys, time
out = sys.argv[1]
open(f"{out}/{os.getpid()}", "w").close()
while not os.path.exists(f"{out}/stop"): time.sleep(0.05)
open(f"{out}/saved", "w").close()
"""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOKED_EVERY_S", 0.0)


def test_a_file_that_was_left_asks_for_nothing_until_it_is_laid_again(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    left, counts = (StopFile(tmp_path, left_counts=c) for c in (False, True))
    assert not left.asked() and counts.asked()
    (tmp_path / "stop").unlink()
    assert not left.asked() and counts.asked()  # who was asked once stays so
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", ns=(1, 1))  # file systems count time in jiffies, inodes come again
    assert left.asked()


def test_it_is_looked_for_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "LOOKED_EVERY_S", 60.0)
    file = StopFile(tmp_path, left_counts=True)
    assert not file.asked()
    (tmp_path / "stop").touch()
    assert not file.asked()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOENT])
def test_a_file_system_that_fails_asks_for_nothing(tmp_path: Path, number: int) -> None:
    """A launcher ended, and killed a healthy job, by what it could not look at."""
    file = StopFile(tmp_path, left_counts=True)
    with mock.patch.object(Path, "stat", side_effect=OSError(number, os.strerror(number))):
        assert not file.asked()
    (tmp_path / "stop").touch()
    assert file.asked()


def test_a_log_that_cannot_be_written_ends_no_job(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    stage = Stage(tmp_path)
    stage.log = Full()
    assert stage.job("good").run() == 0


@pytest.mark.parametrize("far", [("node01",), ()], ids=["far", "here"])
def test_ranks_of_other_machines_are_told_by_the_file(tmp_path: Path, far: tuple[str, ...]) -> None:
    """They are children of an sshd: a signal would reach DeepSpeed's launcher alone, which kills.
    The control: on this machine there is no file, and the played rank, not on the roll, is lost."""
    (tmp_path / "rank.py").write_text(FAR_RANK)
    line = ["python3", str(tmp_path / "rank.py"), str(tmp_path)]
    job = Job(line, dict(os.environ), io.BytesIO(), far=far, grace_s=10.0, folder=tmp_path)

    def stop() -> None:
        while not any(path.name.isdigit() for path in tmp_path.iterdir()):
            time.sleep(0.02)
        job._signals.append(15)

    threading.Thread(target=stop, daemon=True).start()
    assert job.run() == 0 and (tmp_path / "saved").exists() == bool(far)
    assert job.stopped


def test_what_hangs_on_other_machines_is_ended_and_nothing_else(tmp_path: Path) -> None:
    """By the port of the job: DeepSpeed's own line would end every job of this user there."""
    (tmp_path / "pdsh").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/asked\n')
    (tmp_path / "pdsh").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    line = ["python3", "-c", "import time; time.sleep(60)", "--master_port", "29517"]
    job = Job(line, env, io.BytesIO(), far=("a.lab", "b.lab"), grace_s=0.1, folder=tmp_path)
    job._signals.append(15)
    assert job.run() == 137
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["-S", "-w", "a.lab,b.lab", "pkill -f '[m]aster_port=29517'"]


RANK = """
import signal, subprocess, sys, time
from pathlib import Path
from pretrain.watch import STOPPED, enlist, told
told_to = []
signal.signal(signal.SIGTERM, lambda *_: told_to.append(1))
out = Path(sys.argv[1])
entry = enlist(out, 0)
told(entry, begun=True)
worker = subprocess.Popen(["sh", "-c", "sleep 30; true"])
(out / "begun").touch()
while not told_to: time.sleep(0.02)
time.sleep(1.5)
if worker.poll() is None:
    (out / "saved").touch()
    told(entry, state=STOPPED)
worker.kill()
"""
LAUNCH = """
import signal, subprocess, sys, time
rank = subprocess.Popen([sys.executable, *sys.argv[1:], "--local_rank=0"])
def end(*_):
    time.sleep(1.0)
    rank.kill()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
sys.exit(rank.wait())
"""
RUNNER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"


def _played(tmp_path: Path) -> Job:
    """A runner, its launch.py, which kills, and a rank, which takes its time to save and needs its
    worker's worker for it."""
    scripts = {"runner": RUNNER, "launch": LAUNCH, "rank": RANK}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    words = [*(str(tmp_path / f"{name}.py") for name in scripts), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(launcher.ROOT)}
    return Job([sys.executable, *words], env, io.BytesIO(), ranks=1, grace_s=20.0, folder=tmp_path)


def test_a_signal_to_every_process_lets_the_ranks_save(tmp_path: Path) -> None:
    """As a scheduler sends it: DeepSpeed's runner dies of it at once, the ranks are saving."""
    job = _played(tmp_path)

    def stop() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        for process in job._family():
            if process.name().startswith("python"):
                process.terminate()
        job._signals.append(15)

    threading.Thread(target=stop, daemon=True).start()
    assert job.run() == 0 and job.stopped and (tmp_path / "saved").exists()
    assert not job._family()


def test_an_error_of_the_launcher_lets_the_ranks_save(tmp_path: Path) -> None:
    job = _played(tmp_path)

    def fails(process: Any) -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        raise RuntimeError("of ours")

    with mock.patch.object(job, "_watch", fails), pytest.raises(RuntimeError):
        job.run()
    assert (tmp_path / "saved").exists() and not job._family()


def test_who_was_told_before_it_had_begun_was_stopped_and_no_later(tmp_path: Path) -> None:
    """DeepSpeed's code is that of a death; whether a run was lost by it stands on the roll."""
    job = Job([], {}, io.BytesIO(), folder=tmp_path)
    assert job._code(241) == 1  # nobody had told it to stop
    job._signals.append(15)
    assert job._code(241) == 0
    entry = enlist(tmp_path, 0)
    assert job._code(241) == 0
    told(entry, begun=True)
    assert job._code(241) == 1
    told(entry, state=STOPPED)
    assert job._code(241) == job._code(1) == 0
    told(enlist(tmp_path, 0), state="running")
    assert job._code(241) == 0  # a new life has not begun


@pytest.fixture
def signals() -> Iterator[None]:
    """As they were, afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_rank_hears_a_stop_from_its_first_line_on() -> None:
    """And goes on ignoring what it ignored, but for the launcher's word."""

    def look(argv: object) -> None:
        heard = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
        assert [callable(handler) for handler in heard] == [True, False, True]
        raise SystemExit

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with mock.patch.object(train, "_words", look), pytest.raises(SystemExit):
        train.main([])


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("busy", [False, True])
def test_the_roll_and_a_stop_are_those_of_the_job_at_work(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, a rank that dies as it starts can be named; it has not begun yet."""
    out, since = tmp_path / "run", time.time() - 1
    out.mkdir()
    (out / "stop").touch()

    def run(config: object, out_: object, interrupted: Any, begins: Any) -> dict[str, Any]:
        assert interrupted() != busy  # a stop that lies there is the other's
        assert (out / "logs" / "rank-0000.json").exists() != busy
        assert ends(out, since) == (0, 0)
        begins()
        assert ends(out, since) == (1, 0)
        return {"stopped": SIGNAL}

    monkeypatch.setattr(train, "train", run)
    monkeypatch.setattr("pretrain.monitor.terminal", mock.Mock())
    monkeypatch.setattr(train, "ON_CPU", {})
    config = write(tmp_path / "run.yaml", page(out, tmp_path / "corpus"))
    with open(out / ".lock", "w") as lock:
        if busy:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert train.main([str(config), "--launched"]) == 0
    assert ends(out, since) == (1, 1)


@pytest.mark.parametrize("ignored", [True, False])
def test_who_ignores_a_hang_up_goes_on_ignoring_it(ignored: bool, tmp_path: Path) -> None:
    """nohup: the launcher is not told by the end of its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        job = Job(["sh", "-c", "kill -HUP $PPID; sleep 0.5"], dict(os.environ), io.BytesIO())
        job.run()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert bool(job._signals) == (not ignored)


def test_what_the_terminal_cannot_show_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample with an emoji, on a terminal of GBK."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="gbk")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert launcher.main([RUN, "--dry-run"]) == 0
    launcher._put(narrow, "\N{PIG FACE}\n")
    assert narrow.buffer.getvalue().endswith(b"?\n")  # type: ignore[attr-defined]


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    master, slave = os.openpty()
    os.close(master)
    with open(slave, "w", encoding="utf-8") as lost:
        for _ in range(3):
            launcher._put(lost, "step 1/100\n")  # EIO, then into nothing


@pytest.mark.parametrize(("code", "told"), [(-9, 1), (247, 1), (2, 2), (69, 69), (74, 74)])
def test_a_death_by_a_signal_is_code_1(code: int, told: int) -> None:
    """DeepSpeed passes a rank's negative number on; the table in docs/faults.md knows one code."""
    assert Job([], {}, io.BytesIO())._code(code) == told


def test_a_stop_for_a_job_at_work_is_left(tmp_path: Path) -> None:
    """One that is refused, for the run is another's, takes nothing away from it."""
    (tmp_path / "stop").touch()
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stopping.forget_stop(tmp_path)
        assert (tmp_path / "stop").exists()
    stopping.forget_stop(tmp_path)
    assert not (tmp_path / "stop").exists()
    stopping.forget_stop(tmp_path / "none")


def test_who_is_refused_is_not_on_the_roll(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    config = page(tmp_path / "run", tiny_corpus, run__steps=1, schedule={})
    assert world1.run("tests.fault_jobs:go_beginning", config=config) == [
        ["another job is at work", 0, 1]
    ]


@pytest.mark.parametrize("late", [False, True])
def test_on_a_gpu_the_answer_is_that_of_the_border_before(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its own would wait for the device; but at a stage's last step, before a growth."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_: None)
    mesh = parallel.Mesh(0, 2, 1, 0, 2, 0, torch.device("cpu"))
    for asked_at, border, heard_at in ((2, 9, 3), (2, 2, 2), (3, 3, 3)):
        now = [0]
        ask = stopping.Stopping(mesh, lambda now=now, at=asked_at: now[0] >= at)  # type: ignore[misc]
        ask._late = late
        heard = []
        for step in range(1, 5):
            now[0] = step
            heard += [step] if ask.asked(now=step == border) else []
        assert heard[0] == (heard_at if late else asked_at)


def test_a_launcher_knows_of_a_stop_that_another_one_was_told(tmp_path: Path) -> None:
    """A pod that is evicted stops them all: the others have not completed their index either."""
    since = time.time() - 1
    entry = enlist(tmp_path, 3)
    assert not halted(tmp_path, since)
    told(entry, state="ended")
    assert not halted(tmp_path, since)
    told(entry, state=STOPPED)
    assert halted(tmp_path, since)
    assert not halted(tmp_path, time.time() + 1)  # of an earlier life
    job = Job([], {}, io.BytesIO(), folder=tmp_path)
    assert job.stopped and not job._signals
    assert launcher.Job([], {}, io.BytesIO()).stopped is False
