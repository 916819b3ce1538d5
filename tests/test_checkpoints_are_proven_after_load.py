"""A load that went wrong is found before a step is trained on it: sums, then a replayed loss.

Saving goes on behind the training: what is written is the state at the step that it says, and
which ones stay is what the page says.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import checkpoint
from pretrain.checkpoint import saver, sums
from tests.growing import trained
from tests.run_jobs import digests, page
from tests.worlds import World

GO, TAMPERED = "tests.run_jobs:go", "tests.fault_jobs:go_tampered"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World) -> Path:
    """A bf16 run of 2 processes, stopped at 12, saved every 4 steps."""
    run = tmp_path_factory.mktemp("saved") / "run"
    world2.run(GO, config=_page(run, tiny_corpus, run__stop_at_step=12, run__save_every_steps=4))
    return run


def _page(run: Path, corpus: Path, **changes: Any) -> dict[str, Any]:
    return page(run, corpus, **{"precision": "bf16", "run__keep_checkpoints": 9} | changes)


def _copy(saved: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(saved, to)
    return to


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("master", r"decoder\..* stand in the engine with other sums than were saved"),
        ("moment", r"optim/exp_avg/.* stand in the engine with other sums than were saved"),
        ("forward", r"the recorded micro-batch has the loss .*, it had"),
    ],
)
@pytest.mark.parametrize("zero", [1, 3])
def test_a_load_that_went_wrong_ends_the_run(
    tmp_path: Path,
    tiny_corpus: Path,
    world2: World,
    saved: Path,
    what: str,
    sentence: str,
    zero: int,
) -> None:
    run = _copy(saved, tmp_path / "run")
    config = _page(run, tiny_corpus, parallel__zero=zero)
    with pytest.raises(ValueError, match=sentence):
        world2.run(TAMPERED, config=config, what=what)
    assert [p.name[-2:] for p in checkpoint.found_in(run)] == ["12", "08", "04"]


def test_an_honest_load_on_another_layout_is_verified(
    tmp_path: Path, tiny_corpus: Path, world1: World, saved: Path
) -> None:
    run = _copy(saved, tmp_path / "run")
    said = world1.run("tests.fault_jobs:go_listening", config=_page(run, tiny_corpus))[0]
    verified = [line for line in said if "tensors verified" in line]
    assert len(verified) == 1 and "replayed loss" in verified[0]


def test_what_was_written_behind_the_training_is_the_state_of_its_step(
    tmp_path: Path, tiny_corpus: Path, world2: World, saved: Path
) -> None:
    config = _page(tmp_path / "run", tiny_corpus, run__stop_at_step=8)
    alone = world2.run(GO, config=config)[0]["checkpoint"]
    behind = saved / "checkpoints" / checkpoint.checkpoint_name(0, 8)
    assert digests(alone) == digests(behind)


def test_a_sum_knows_every_word_and_its_place() -> None:
    values = torch.arange(1000, dtype=torch.float32)
    whole = sums.sum_of(values, [(0, 0, 1000)])
    parts = [sums.sum_of(values[a:b], [(a, 0, b - a)]) for a, b in ((0, 7), (7, 640), (640, 1000))]
    assert sum(parts) % sums.WORD == whole
    swapped = values.clone()
    swapped[[3, 900]] = values[[900, 3]]
    for other in (swapped, values + 1e-4, values.roll(1), torch.nn.functional.pad(values, (0, 1))):
        assert sums.sum_of(other, [(0, 0, len(other))]) != whole
    runs = np.array([[500, 0, 250], [0, 250, 250]])
    moved = torch.cat([values[500:750], values[:250]])
    first, second = sums.sum_of(values[:250], [(0, 0, 250)]), sums.sum_of(values, [(500, 500, 250)])
    assert sums.sum_of(moved, runs) == (first + second) % sums.WORD


def test_the_next_save_waits_and_a_failed_write_is_said_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained()
    shapes = {key: (entry.shape, entry.dtype) for key, entry in state.entries.items()}
    gate = threading.Event()
    honest = saver.save

    def slow(folder: Path, *arguments: Any, **keywords: Any) -> Path:
        gate.wait(20)
        if folder.name.endswith("2"):
            raise checkpoint.CheckpointError("the disk is full")
        return honest(folder, *arguments, **keywords)

    monkeypatch.setattr(saver, "save", slow)
    run = tmp_path / "checkpoints"

    def pieces() -> Any:
        return [(k, state.read(k).reshape(-1), [(0, 0, state.read(k).numel())]) for k in shapes]

    told: list[str] = []
    monkeypatch.setattr(saver, "AGAIN_S", 0.0)
    open_saver = checkpoint.Saver.open(
        lambda folder: None, lambda folder, _: told.append(folder.name)
    )
    with open_saver as behind:
        began = time.monotonic()
        one = behind.save(run / "stage-00-step-00000001", shapes, pieces(), dict(state.record))
        assert time.monotonic() - began < 5 and not one.exists(), "the training does not wait"
        gate.set()
        two = behind.save(run / "stage-00-step-00000002", shapes, pieces(), dict(state.record))
        assert checkpoint.damage(one) == [], "the second save waits for the first"
        with pytest.raises(checkpoint.CheckpointError, match="the disk is full"):
            behind.wait()
        assert not two.exists() and checkpoint.newest(tmp_path) == (one, [])
        assert told == [two.name], "once: the second failure is raised"
        behind.save(run / "stage-00-step-00000003", shapes, pieces(), dict(state.record))
    assert checkpoint.newest(tmp_path)[0] == run / "stage-00-step-00000003"


def test_a_write_that_fails_once_is_made_again_from_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full for a moment: neither the run nor that checkpoint is lost. It is on record
    when it is there, and only then."""
    state = trained()
    shapes = {key: (entry.shape, entry.dtype) for key, entry in state.entries.items()}
    honest, tries = saver.save, []

    def save(folder: Path, *arguments: Any, **keywords: Any) -> Path:
        tries.append(folder.name)
        if len(tries) == 1:
            raise checkpoint.CheckpointError("the disk is full")
        return honest(folder, *arguments, **keywords)

    monkeypatch.setattr(saver, "save", save)
    monkeypatch.setattr(saver, "AGAIN_S", 0.0)
    values = {key: state.read(key).reshape(-1).clone() for key in shapes}
    names = [f"stage-00-step-0000000{step}" for step in (1, 2)]
    told: list[str] = []
    there: list[bool] = []
    with checkpoint.Saver.open(
        lambda folder: None, lambda _, error: told.append(str(error))
    ) as behind:
        for name in names:
            pieces = [(key, flat, [(0, 0, flat.numel())]) for key, flat in values.items()]
            path = tmp_path / "checkpoints" / name
            behind.save(
                path,
                shapes,
                pieces,
                dict(state.record),
                written=lambda held_up_s, path=path: there.append(path.exists()),
            )
            for flat in values.values():  # the training goes on
                flat += 1
    assert tries == [names[0], names[0], names[1]] and told == ["the disk is full"]
    assert there == [True, True]
    for number, name in enumerate(names):
        written = checkpoint.read(tmp_path / "checkpoints" / name)
        assert all(torch.equal(written.read(k), state.read(k) + number) for k in shapes)


def test_retention_keeps_what_the_page_says(tmp_path: Path) -> None:
    """keep 2, every 6th, the best by validation loss; an ephemeral one while nothing is newer."""
    for step in range(1, 15):
        folder = tmp_path / "checkpoints" / checkpoint.checkpoint_name(0, step)
        folder.mkdir(parents=True)
        record: dict[str, Any] = {"step": step, "ephemeral": step in (9, 14)}
        record |= {"valid_loss": 3.0 if step == 4 else 5.0 + step} if step % 2 == 0 else {}
        (folder / "state.json").write_text(json.dumps(record))
        checkpoint.rotate(tmp_path, keep=2, every=6, best=1)
    assert [int(p.name[-8:]) for p in checkpoint.found_in(tmp_path)] == [14, 13, 12, 6, 4]
