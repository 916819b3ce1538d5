"""A rank that stalls, freezes or dies ends the job within a bound, with its name and all stacks."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import pretrain.watch
from pretrain import checkpoint, parallel
from pretrain.watch import STALLED, Watch, died, enlist, told
from tests.mortals import Mortals
from tests.run_jobs import metrics, page

ROOT = Path(__file__).resolve().parent.parent
STALL_S = 9.0
BOUND_S = STALL_S + 2.0 + 3.0 + 15.0
"""faults.stall_s, a second for each rank to look, three for the ranks' accounts; and fifteen in
which a machine busy with other tests may let a process wait. Without the watch: for ever."""
CHANGES: dict[str, Any] = {"faults__stall_s": STALL_S, "run__log_every_steps": 1}
SLOW: dict[str, Any] = {"run__steps": 4000, "schedule__decay_steps": 0}


def _until(ranks: Mortals, steps: int) -> None:
    """Wait for a step to be on record."""
    while all(process.is_alive() for process in ranks.processes):
        with contextlib.suppress(OSError):
            if len(metrics(ranks.folder / "run")) >= steps:
                return
        time.sleep(0.02)
    raise AssertionError(ranks.log(0) + ranks.log(1))


def _log(folder: Path, name: str) -> str:
    return (folder / "run" / "logs" / name).read_text("utf-8")


def test_a_stalled_rank_is_named_and_all_stacks_are_kept(tmp_path: Path, tiny_corpus: Path) -> None:
    config = page(tmp_path / "run", tiny_corpus, **CHANGES)
    job = {"config": config, "rank": 1, "step": 9, "seconds": 600.0}
    ranks = Mortals(2, tmp_path, "tests.fault_jobs:go_stalling", **job)
    _until(ranks, 1)
    began = time.monotonic()
    assert ranks.codes() == [STALLED, STALLED]
    assert time.monotonic() - began < BOUND_S + 3.0  # the steps before the stall
    said = ranks.log(0) + ranks.log(1)
    assert said.count("no step was finished for 9 s (faults.stall_s)") == 1
    assert f"rank 1 on {socket.gethostname()} is stuck in fault_jobs.py:" in said
    assert "rank 0" not in said.split("faults.stall_s")[1].split(";")[0]
    assert "in loss" in _log(tmp_path, "stack-0001.txt")
    assert "in train_step" in _log(tmp_path, "stack-0000.txt")


def _proving(tmp_path: Path, corpus: Path, **job: Any) -> Mortals:
    """Two ranks that train for two steps, grow, and prove it for so many seconds."""
    stages = [{"steps": 2}, {"steps": 2, "model": {"layers": 3}}]
    changes = {**CHANGES, "stages": stages, "run__steps": None, "schedule": {}}
    config = page(tmp_path / "run", corpus, **changes)
    return Mortals(2, tmp_path / "ranks", "tests.fault_jobs:go_proving", config=config, **job)


def test_a_long_proof_is_no_stall(tmp_path: Path, tiny_corpus: Path) -> None:
    """Neither for the rank that proves nor for those that wait, whose steps wait for less."""
    ranks = _proving(tmp_path, tiny_corpus, seconds=14.0, reads=True)
    assert ranks.codes() == [0, 0], ranks.log(0) + ranks.log(1)
    assert len(metrics(tmp_path / "run")) == 4


def test_a_proof_that_reads_no_more_is_a_stall(tmp_path: Path, tiny_corpus: Path) -> None:
    """A shared disk that hangs under the rank that proves; the other waits for a day at most."""
    ranks = _proving(tmp_path, tiny_corpus, seconds=600.0, reads=False)
    proving, waiting = ranks.codes()
    assert proving == STALLED and waiting not in (0, None), ranks.log(0) + ranks.log(1)
    assert "no step was finished for 9 s (faults.stall_s): rank 0" in ranks.log(0)
    assert [path.name for path in checkpoint.found_in(tmp_path / "run")] == [
        "stage-00-step-00000002"
    ]


def test_a_frozen_rank_is_named_by_the_others(tmp_path: Path, tiny_corpus: Path) -> None:
    config = page(tmp_path / "run", tiny_corpus, **CHANGES, **SLOW)
    job = {"config": config, "rank": 9, "step": 0, "seconds": 0.0}
    ranks = Mortals(2, tmp_path, "tests.fault_jobs:go_stalling", **job)
    _until(ranks, 3)
    os.kill(ranks.processes[1].pid or 0, signal.SIGSTOP)
    began = time.monotonic()
    ranks.processes[0].join(BOUND_S)
    assert ranks.processes[0].exitcode == STALLED and time.monotonic() - began < BOUND_S
    ranks.kill()
    assert f"rank 1 on {socket.gethostname()} answers no more (frozen or dead)" in ranks.log(0)


def test_a_dead_rank_is_on_the_roll_and_its_peer_ends(tmp_path: Path, tiny_corpus: Path) -> None:
    since = time.time()
    config = page(tmp_path / "run", tiny_corpus, **CHANGES, **SLOW)
    job = {"config": config, "rank": 9, "step": 0, "seconds": 0.0}
    ranks = Mortals(2, tmp_path, "tests.fault_jobs:go_stalling", **job)
    _until(ranks, 3)
    ranks.processes[1].kill()
    ranks.processes[1].join(5)
    assert died(tmp_path / "run", since)[0].startswith(f"rank 1 on {socket.gethostname()}")
    assert ranks.codes(BOUND_S) == [1, -signal.SIGKILL]
    assert checkpoint.found_in(tmp_path / "run") == [], "nobody saves when the reduction fails"


@pytest.mark.parametrize(
    ("text", "told_ago_s", "peer", "known"),
    [
        ('{"step": 14}\n{"step": 15, "loss": 1.0}\n{"ste', 0.0, 7, " (last known step 15)"),
        ('{"step": 15}\n', 3600.0, 7, " (last known step 7)"),  # made again since a restart
        ('{"step": 3}\n', 0.0, 7, " (last known step 7)"),
        ("", 0.0, 7, " (last known step 7)"),
        ("", 0.0, 0, ""),
    ],
)
def test_the_step_of_a_dead_rank_is_the_last_that_anybody_told(
    tmp_path: Path, text: str, told_ago_s: float, peer: int, known: str
) -> None:
    """Its own entry is ten seconds old at times, or says 0."""
    since, metrics = time.time(), tmp_path / "metrics.jsonl"
    metrics.write_text(text)
    os.utime(metrics, (since - told_ago_s, since - told_ago_s + 1.0))
    told(enlist(tmp_path, 0), step=peer)
    told(enlist(tmp_path, 1), pid=2**22 + 5)
    assert died(tmp_path, since) == [f"rank 1 on {socket.gethostname()}{known}"]


def test_collectives_outlive_the_watch() -> None:
    """The watch says which rank the others wait for; the timeouts of NCCL and gloo say nothing."""
    for stall_s in (1800.0, 7200.0):
        assert parallel.patience(stall_s).total_seconds() >= stall_s + 60
    assert parallel.patience(0).total_seconds() >= 24 * 3600  # 0 waits "for ever"
    code = """
        from datetime import timedelta
        import torch, torch.distributed as dist
        from pretrain import parallel
        parallel.init_distributed(timedelta(seconds=7777))
        from deepspeed.utils import groups
        for group in (dist.group.WORLD, groups._clone_world_group()):  # ZeRO's is the second
            print(group._get_backend(torch.device("cpu")).options._timeout)
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["2:09:37", "2:09:37"]


def test_a_rank_that_moves_is_left_alone(tmp_path: Path) -> None:
    ends: list[int] = []
    watch = Watch(tmp_path, 0, 1, 0.3, print, ends.append)
    with watch():
        for step in range(8):
            time.sleep(0.1)
            watch.beat(step)
        assert ends == []
        time.sleep(1.0)
    assert ends == [STALLED]


def _stall(run: Path, complain: Callable[[str], object], busy_s: float = 0.0) -> list[int]:
    """What a rank without a step ends with."""
    ends: list[int] = []
    watch = Watch(run, 0, 1, 0.2, complain, ends.append)
    with mock.patch.object(pretrain.watch, "DISK_S", 0.5), watch():
        with watch.busy():
            time.sleep(busy_s)
        deadline = time.monotonic() + 20
        while not ends and time.monotonic() < deadline:
            time.sleep(0.02)
    return ends


@pytest.mark.parametrize(
    ("name", "busy_s"),
    [("stack-0000.txt", 0.0), ("rank-0000.writing", 0.0), ("rank-0000.writing", 0.2)],
)
def test_a_disk_that_hangs_holds_up_no_end(tmp_path: Path, name: str, busy_s: float) -> None:
    """A pipe that nobody reads: opening it takes for ever, the stacks, the account or the roll."""
    path, said = tmp_path / "logs" / name, list[str]()
    path.parent.mkdir()
    os.mkfifo(path)
    assert _stall(tmp_path, said.append, busy_s) == [STALLED]
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # the mount is back
    assert "logs cannot be written: its file system hangs; rank 0 on" in said[0]
    assert "test_faults_of_ranks_end_the_job.py:" in said[0], "no stacks, but where it is"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_or_a_terminal_that_fails_holds_up_no_end(tmp_path: Path) -> None:
    said: list[str] = []
    assert _stall(tmp_path / "gone", said.append) == [STALLED]
    assert "rank 0" in said[0] and "hangs" not in said[0]

    def lost(text: str) -> None:
        raise BrokenPipeError(text)

    assert _stall(tmp_path, lost) == [STALLED]


def told_of(tmp_path: Path, **states: tuple[str, int]) -> str:
    """The sentence about ranks r0, r1 ... of these states and steps; of the "silent" none has an
    account."""
    watch = Watch(tmp_path, 0, len(states), 60.0, lambda _: None)
    return watch._sentence(
        {
            n: {"rank": n, "host": "a", "where": f"file.py:{n} f()", "state": state, "step": step}
            for n, (state, step) in enumerate(states.values())
            if state != "silent"
        }
    )


def test_on_gpus_the_rank_that_lags_behind_is_named(tmp_path: Path) -> None:
    """NCCL's calls return at once: every rank is found where it reads a value, none in a
    collective. With collectives that wait it is the stack that tells, whatever the step."""
    said = told_of(tmp_path, a=("stuck", 12), b=("stuck", 10), c=("stuck", 12))
    assert "rank 1 on a is stuck in file.py:1 f()" in said and said.count("is stuck") == 1
    said = told_of(tmp_path, a=("waits", 10), b=("stuck", 12), c=("stuck", 12))
    assert said.count("is stuck") == 2 and "rank 0" not in said
    said = told_of(tmp_path, **{f"r{n}": ("stuck", 5) for n in range(800)})
    assert said.count("is stuck") == 8 and "and 792 more" in said
    frozen = {f"r{n}": ("silent" if n == 11 else "stuck", 5) for n in range(16)}
    said = told_of(tmp_path, **frozen)
    assert "rank 11 on its host answers no more" in said and "is stuck" not in said
    frozen["r3"], frozen["r4"] = ("waits", 5), ("stuck", 4)
    said = told_of(tmp_path, **frozen)
    assert said.index("rank 11") < said.index("is stuck") and "and 7 more" in said
