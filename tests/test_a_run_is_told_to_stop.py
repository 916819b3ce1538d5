"""RUN/stop and signals: what counts as being asked, and how ranks on other machines are reached."""

import errno
import io
import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from launch import train as launcher
from launch.train import Job
from pretrain import parallel, stopping
from pretrain.stopping import StopFile
from pretrain.watch import STOPPED, enlist, halted, told
from tests.test_command_line import Stage

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
    The control: on this machine there is no file, and the played rank is killed unsaved."""
    (tmp_path / "rank.py").write_text(FAR_RANK)
    line = ["python3", str(tmp_path / "rank.py"), str(tmp_path)]
    job = Job(line, dict(os.environ), io.BytesIO(), far=far, grace_s=10.0, folder=tmp_path)

    def stop() -> None:
        while not any(path.name.isdigit() for path in tmp_path.iterdir()):
            time.sleep(0.02)
        job._signals.append(15)

    threading.Thread(target=stop, daemon=True).start()
    code = job.run()
    assert (code == 0, (tmp_path / "saved").exists()) == (bool(far), bool(far))
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
