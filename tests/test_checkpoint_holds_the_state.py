"""A checkpoint holds the logical state: whole, plain, and in the same bytes whoever wrote it."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.load import to_dict
from configs.model import shape, tensors
from pretrain import checkpoint
from pretrain.checkpoint.ranks import Ranks
from pretrain.state import Entry, State, draw, fresh, seed_of
from tests.checkpoint_jobs import pieces, shapes
from tests.growing import TINY, trained
from tests.worlds import World


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / checkpoint.checkpoint_name(0, 9)


# ---- the state -----------------------------------------------------------------------------------


def test_a_fresh_state_is_the_table_drawn_by_name() -> None:
    one, other = fresh(TINY, 1), fresh(TINY, 2)
    assert one.names() == [t.name for t in tensors(TINY)]
    for tensor in tensors(TINY):
        values = one.read(f"weights/{tensor.name}")
        assert tuple(values.shape) == shape(TINY, tensor) and values.dtype == torch.float32
        assert torch.equal(values, one.read(f"weights/{tensor.name}"))
        if tensor.init in ("normal", "output"):
            assert not torch.equal(values, other.read(f"weights/{tensor.name}"))
            assert values.abs().max() <= 3 * TINY.init_std
        else:
            assert values.eq(1 if tensor.init == "ones" else 0).all()
    assert one.record == {"model": to_dict(TINY)}
    assert torch.equal(draw("x", 3, (5,), 1.0), draw("x", 3, (5,), 1.0))
    assert seed_of(1, "x") != seed_of("1", "x") and seed_of(1, "x") < 2**63


def test_weights_only_leaves_the_moments() -> None:
    state = trained()
    light = state.weights_only()
    assert light.names() == state.names() and light.names("optim/exp_avg") == []
    assert state.names("optim/exp_avg_sq") == state.names()


# ---- there and back ------------------------------------------------------------------------------


def test_there_and_back_is_the_identity(folder: Path) -> None:
    state = trained()
    counts = torch.tensor([3, -(2**40)])
    entries = {**state.entries, "buffers/seen": Entry((2,), "int64", lambda: counts)}
    state = State(entries, {**state.record, "词": "文字", "scaler": None})
    assert checkpoint.write_state(folder, state) == folder
    back = checkpoint.read(folder)
    assert back.record == state.record
    assert set(back.entries) == set(state.entries)
    for key, entry in state.entries.items():
        assert back.entries[key].shape == entry.shape and back.entries[key].dtype == entry.dtype
        assert torch.equal(back.read(key), entry.read())
    assert checkpoint.damage(folder) == []


def test_the_safetensors_library_reads_the_files(folder: Path) -> None:
    state = trained()
    checkpoint.write_state(folder, state)
    for kind, prefix in (("weights", "weights"), ("exp_avg", "optim/exp_avg")):
        found = load_file(folder / f"{kind}-00000.safetensors")
        assert set(found) == set(state.names())
        assert all(torch.equal(v, state.read(f"{prefix}/{n}")) for n, v in found.items())
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]


def test_files_stay_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.places, "FILE_BYTES", 20_000)
    state = trained()
    checkpoint.write_state(folder, state)
    files = list(folder.glob("weights-*.safetensors"))
    assert len(files) > 3
    # a file has at most 20,000 bytes of tensors, or one tensor, and its header
    assert all(p.stat().st_size < 24_000 for p in files)
    back = checkpoint.read(folder)
    assert all(torch.equal(back.read(k), e.read()) for k, e in state.entries.items())


def test_the_tokenizer_travels_along(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words/deep").mkdir(parents=True)
    (tmp_path / "words/tokenizer.json").write_text("{}")
    (tmp_path / "words/deep/a.model").write_bytes(b"\0\1")
    checkpoint.write_state(folder, trained(), tmp_path / "words")
    assert (folder / "tokenizer/deep/a.model").read_bytes() == b"\0\1"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"tokenizer/tokenizer.json", "tokenizer/deep/a.model", "state.json"} <= set(files)


@pytest.mark.parametrize("seed", range(5))
def test_the_bytes_do_not_depend_on_how_the_state_was_cut(
    folder: Path, tmp_path: Path, seed: int
) -> None:
    state = trained()
    checkpoint.write_state(folder, state)
    other = tmp_path / "other" / folder.name
    checkpoint.save(other, shapes(state), pieces(state, 0, 1, seed), state.record)
    assert bytes_of(other) == bytes_of(folder)


def test_the_bytes_do_not_depend_on_the_number_of_ranks(
    folder: Path, tmp_path: Path, world2: World
) -> None:
    checkpoint.write_state(folder, trained())
    other = tmp_path / "other" / folder.name
    assert world2.run("tests.checkpoint_jobs:save_cut", folder=str(other), seed=1) == [[], []]
    assert bytes_of(other) == bytes_of(folder)
    seen = world2.run("tests.checkpoint_jobs:write_and_look", run=str(tmp_path / "run"))
    name = tmp_path / "run/checkpoints/stage-00-step-00000004"
    assert seen == [{"good": str(name), "wrong": []}] * 2
    assert bytes_of(name) == bytes_of(folder)


def test_a_growing_copy_is_read_while_it_is_written(folder: Path, tmp_path: Path) -> None:
    """Reading is lazy: a state that maps one checkpoint can be written as another."""
    checkpoint.write_state(folder, trained())
    other = tmp_path / "other" / folder.name
    checkpoint.write_state(other, checkpoint.read(folder))
    one, two = checkpoint.read(folder), checkpoint.read(other)
    assert one.record == two.record and set(one.entries) == set(two.entries)
    assert all(torch.equal(one.read(key), two.read(key)) for key in one.entries)


# ---- a run's checkpoints -------------------------------------------------------------------------


def test_the_newest_is_the_highest_stage_and_step(tmp_path: Path) -> None:
    state = trained()
    for stage, step in ((0, 9), (0, 10), (1, 10), (0, 100000000)):
        checkpoint.write_state(
            tmp_path / "checkpoints" / checkpoint.checkpoint_name(stage, step), state
        )
    (tmp_path / "checkpoints/.stage-02-step-00000011.writing").mkdir()
    (tmp_path / "checkpoints/notes").mkdir()
    names = [p.name for p in checkpoint.found_in(tmp_path)]
    assert names[0] == "stage-01-step-00000010" and names[-1] == "stage-00-step-00000009"
    assert len(names) == 4
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoints" / names[0]
    assert checkpoint.resolve(tmp_path) == tmp_path / "checkpoints" / names[0]
    assert checkpoint.found_in(tmp_path / "nowhere") == []


def test_rotation_keeps_the_newest_and_the_borders(tmp_path: Path) -> None:
    state = trained()
    for step in range(1, 7):
        border = State(state.entries, {**state.record, "border": step == 2})
        name = checkpoint.checkpoint_name(0, step)
        checkpoint.write_state(tmp_path / "checkpoints" / name, border)
    checkpoint.rotate(tmp_path, keep=2)
    steps = [int(p.name[-2:]) for p in checkpoint.found_in(tmp_path)]
    assert steps == [6, 5, 2]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == sorted(
        p.name for p in checkpoint.found_in(tmp_path)
    )


def test_what_was_passed_over_neither_counts_nor_goes(tmp_path: Path) -> None:
    """A damaged one at step 9 is newer than all that a run resumed before it writes."""
    state = trained()
    for step in (3, 4, 9, 5):
        ephemeral = State(state.entries, {**state.record, "ephemeral": step == 5})
        name = checkpoint.checkpoint_name(0, step)
        checkpoint.write_state(tmp_path / "checkpoints" / name, ephemeral)
        if step == 9:
            damaged = checkpoint.passed_over(tmp_path, {"stage": 0, "step": 4})
            assert [path.name[-2:] for path in damaged] == ["09"]
    checkpoint.rotate(tmp_path, keep=1, but=damaged)
    steps = [int(p.name[-2:]) for p in checkpoint.found_in(tmp_path)]
    assert steps == [9, 5, 4]  # 3 alone was one too many
    name = checkpoint.checkpoint_name(0, 10)
    checkpoint.write_state(tmp_path / "checkpoints" / name, state)
    checkpoint.rotate(tmp_path, keep=2, but=damaged)
    assert [int(p.name[-2:]) for p in checkpoint.found_in(tmp_path)] == [10, 9, 4]


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOSPC, False)]
)
def test_a_write_that_failed_may_pass_or_is_for_a_person(
    number: int, passes: bool, tmp_path: Path
) -> None:
    """What may pass is begun again (exit code 74); a full disk waits for somebody."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(checkpoint.CheckpointError, match="cannot be written") as told:
        Ranks().together(act, tmp_path / "aside")
    assert isinstance(told.value, checkpoint.StorageError) == passes


def test_what_cannot_be_removed_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained()
    for step in range(1, 4):
        name = checkpoint.checkpoint_name(0, step)
        checkpoint.write_state(tmp_path / "checkpoints" / name, state)
    rename = os.rename

    def failing(path: Path, to: Path) -> None:
        if path.name.endswith("1"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        rename(path, to)

    with monkeypatch.context() as context:
        context.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="Input/output"):
            checkpoint.rotate(tmp_path, keep=1)
    assert [int(p.name[-2:]) for p in checkpoint.found_in(tmp_path)] == [3, 1]
    (tmp_path / "checkpoints" / ".stage-00-step-00000001.deleting" / "left").mkdir(parents=True)
    checkpoint.rotate(tmp_path, keep=1)
    assert [p.name[-2:] for p in (tmp_path / "checkpoints").iterdir()] == ["03"]


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    state = trained()
    checkpoint.write_state(folder, state)
    checkpoint.write_state(folder, State(state.entries, {**state.record, "step": 10}))
    assert checkpoint.read(folder).record["step"] == 10
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
