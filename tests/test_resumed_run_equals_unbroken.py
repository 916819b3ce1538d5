"""A run that was stopped and resumed equals the unbroken one.

On the same layout bit for bit, dropout on. On another number of processes, ZeRO stage or tensor
parallelism the order of summation differs, so the losses agree to 1e-5 (fp32 rounding over 15
steps was measured at 6e-7). Negative controls: a resume that forgets the moments, the step counter
or the order must be caught by the same comparison.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint
from pretrain.state import Entry, State
from tests.run_jobs import digests, losses, metrics, rewrite
from tests.run_jobs import page as run_page
from tests.worlds import World

GO = "tests.run_jobs:go"
STEPS, STOP = 20, 10


def page(run: Path, corpus: Path, **changes: Any) -> dict[str, Any]:
    """A run of 20 steps."""
    return run_page(run, corpus, **{"run__steps": STEPS, **changes})


DROPOUT: dict[str, Any] = {"model__dropout": 0.1, "model__attention_dropout": 0.1}


@pytest.mark.parametrize(
    ("precision", "zero"),
    [
        ("fp32", 1),
        ("fp32", 3),
        pytest.param("bf16", 1, marks=pytest.mark.slow),
        pytest.param("bf16", 3, marks=pytest.mark.slow),
    ],
)
def test_bit_for_bit_with_dropout(
    tmp_path: Path, tiny_corpus: Path, world2: World, precision: str, zero: int
) -> None:
    changes = DROPOUT | {"precision": precision, "parallel__zero": zero}
    whole = page(tmp_path / "whole", tiny_corpus, **changes)
    broken = page(tmp_path / "broken", tiny_corpus, **changes)
    unbroken = world2.run(GO, config=whole)[0]
    stopped = world2.run(
        GO, config=page(tmp_path / "broken", tiny_corpus, **changes, run__stop_at_step=STOP)
    )
    assert stopped[0]["step"] == STOP
    assert stopped[0]["stopped"] == "run.stop_at_step"
    resumed = world2.run(GO, config=broken)[0]
    assert resumed["step"] == unbroken["step"] == STEPS
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert digests(resumed["checkpoint"]) == digests(unbroken["checkpoint"])


@pytest.fixture(scope="module")
def half(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World
) -> tuple[Path, list[float]]:
    """A run stopped at 10 on 2 processes under ZeRO 1, and the losses of the unbroken one."""
    folder = tmp_path_factory.mktemp("half")
    world2.run(GO, config=page(folder / "whole", tiny_corpus))
    world2.run(GO, config=page(folder / "half", tiny_corpus, run__stop_at_step=STOP))
    return folder, losses(folder / "whole")


def _copy(half: Path, to: Path) -> Path:
    shutil.copytree(half, to)
    return to


@pytest.mark.parametrize(
    ("processes", "zero", "tensor"),
    [(1, 1, 1), (2, 3, 1), (2, 0, 1), (2, 2, 1), (2, 1, 2), (1, 3, 1)],
)
def test_on_another_layout(
    tmp_path: Path,
    tiny_corpus: Path,
    half: tuple[Path, list[float]],
    world1: World,
    world2: World,
    processes: int,
    zero: int,
    tensor: int,
) -> None:
    folder, expected = half
    run = _copy(folder / "half", tmp_path / "run")
    config = page(run, tiny_corpus, parallel__zero=zero, parallel__tensor=tensor)
    {1: world1, 2: world2}[processes].run(GO, config=config)
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    seen = [(line["samples"], line["tokens"]) for line in metrics(run)]
    assert seen == [(line["samples"], line["tokens"]) for line in metrics(folder / "whole")]


def _forget_moments(state: State) -> State:
    def zeros(entry: Entry) -> Entry:
        return dataclasses.replace(entry, read=lambda: torch.zeros(entry.shape))

    entries = {k: zeros(e) if k.startswith("optim/") else e for k, e in state.entries.items()}
    return State(entries, state.record)


def _forget_counter(state: State) -> State:
    return State(state.entries, state.record | {"updates": 0})


def _forget_order(state: State) -> State:
    return State(state.entries, state.record | {"samples": 0})


@pytest.mark.parametrize("forget", [_forget_moments, _forget_counter, _forget_order])
def test_a_forgetful_resume_is_caught(
    tmp_path: Path,
    tiny_corpus: Path,
    half: tuple[Path, list[float]],
    world2: World,
    forget: Any,
) -> None:
    folder, expected = half
    run = _copy(folder / "half", tmp_path / "run")
    rewrite(checkpoint.found_in(run)[0], forget)
    world2.run(GO, config=page(run, tiny_corpus))
    gap = max(abs(a - b) / b for a, b in zip(losses(run), expected, strict=True))
    assert gap > 1e-4, f"{forget.__name__} went unnoticed: the losses differ by {gap:.1e} only"


def test_lines_past_the_checkpoint_are_cut(
    tmp_path: Path, tiny_corpus: Path, half: tuple[Path, list[float]], world2: World
) -> None:
    run = _copy(half[0] / "half", tmp_path / "run")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write(json.dumps({"step": 11, "loss": 99.0}) + '\n{"step": 12, "lo')
    world2.run(GO, config=page(run, tiny_corpus))
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert losses(run) == half[1]
