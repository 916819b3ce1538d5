"""A run killed at random moments, saves included, ends with the weights of the unbroken one.

Each life is two forked ranks that resume, train and are sent SIGKILL, both or one of them, after a
random number of steps; fp32 on one thread is deterministic, so the comparison is of bits. Some
moments lie in the start, some are aimed at a save: they come when a folder is being written.
"""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from tests.mortals import Mortals
from tests.run_jobs import digests, losses, page

STEPS = 200
CHANGES: dict[str, Any] = {
    "run__steps": STEPS,
    "run__save_every_steps": 20,
    "run__ephemeral_every_steps": 5,
    "run__log_every_steps": 1,
    "model__dropout": 0.1,
    "schedule__decay_steps": 0,
}
GO = "tests.run_jobs:go"


def _writing(run: Path) -> bool:
    folder = run / "checkpoints"
    return folder.is_dir() and any(name.endswith(".writing") for name in os.listdir(folder))


def _killed(ranks: Mortals, run: Path, draw: random.Random, reach: int) -> bool:
    """Kill within `reach` steps of this life, or while it starts; False if the job ended well."""
    begun, began = _steps(run), time.monotonic()
    target, patience_s = begun + draw.randrange(reach), draw.uniform(0.0, 1.0)
    starting, aimed = draw.random() < 0.15, draw.random() < 0.4
    while True:
        if all(process.exitcode is not None for process in ranks.processes):
            assert ranks.codes() == [0, 0], ranks.log(0) + ranks.log(1)
            return False
        if starting and time.monotonic() > began + patience_s:
            break
        if _steps(run) >= target and (not aimed or _writing(run)):
            break
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.01))
    for rank in draw.choice([[0], [1], [0, 1]]):
        process = ranks.processes[rank]
        if process.pid and process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
    ranks.codes(timeout_s=20.0)  # a peer that is left ends by itself: its collective fails
    return True


def _steps(run: Path) -> int:
    with contextlib.suppress(OSError):
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def _lives(tmp_path: Path, corpus: Path, kills: int, steps: int, seed: int) -> None:
    changes = CHANGES | {"run__steps": steps}
    unbroken = Mortals(2, tmp_path / "0", GO, config=page(tmp_path / "whole", corpus, **changes))
    began = time.monotonic()
    assert unbroken.codes(600.0) == [0, 0], unbroken.log(0) + unbroken.log(1)
    whole_s = time.monotonic() - began
    run, draw, done = tmp_path / "run", random.Random(seed), 0
    config = page(run, corpus, **changes)
    while done < kills:
        ranks = Mortals(2, tmp_path / f"life{done}", GO, config=config)
        if not _killed(ranks, run, draw, max(8, steps // (kills + 1))):
            break
        done += 1
        _, wrong = checkpoint.newest(run)
        assert wrong == [], f"kill {done}: a checkpoint that is damaged has a name: {wrong}"
    last = Mortals(2, tmp_path / "last", GO, config=config)
    assert last.codes(600.0) == [0, 0], last.log(0) + last.log(1)
    print(f"{done} kills; unbroken {whole_s:.1f} s")
    assert done == kills, f"only {done} of {kills} kills before the end: raise the steps"
    final = checkpoint.checkpoint_name(0, steps)
    assert digests(run / "checkpoints" / final) == digests(tmp_path / "whole/checkpoints" / final)
    assert losses(run) == losses(tmp_path / "whole")
    hidden = [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]
    assert hidden == []


def test_a_few_kills_change_nothing(tmp_path: Path, tiny_corpus: Path) -> None:
    _lives(tmp_path, tiny_corpus, kills=2, steps=40, seed=3)


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tmp_path: Path, tiny_corpus: Path) -> None:
    """BAJIE_KILLS=10 for a first look."""
    kills = int(os.environ.get("BAJIE_KILLS", "100"))
    _lives(tmp_path, tiny_corpus, kills=kills, steps=4 * max(kills, 20), seed=4)
