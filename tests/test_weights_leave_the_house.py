"""Weights that are given away, and DeepSpeed's own checkpoints, hold what the run's weights are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch import cli
from launch.export import exported
from pretrain import checkpoint
from pretrain.convert import deepspeed
from pretrain.convert.rules import ConversionError
from pretrain.state import Entry, State
from tests.growing import trained
from tests.worlds import World


def _run(folder: Path, count: int) -> list[State]:
    """Checkpoints at steps 1 .. count, each 1.0 further."""
    state = trained()
    states = []
    for step in range(1, count + 1):
        entries = {
            key: Entry(e.shape, e.dtype, lambda e=e, step=step: e.read() + step)
            for key, e in state.entries.items()
        }
        states.append(State(entries, {**state.record, "step": step}))
        path = folder / "checkpoints" / checkpoint.checkpoint_name(0, step)
        checkpoint.write_state(path, states[-1])
    return states


def test_the_mean_of_the_newest_is_the_mean(tmp_path: Path) -> None:
    states = _run(tmp_path / "run", 4)
    line = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--average", "3"]
    assert cli.main([*line, "--dtype", "float32"]) == 0
    made = checkpoint.read(checkpoint.resolve(tmp_path / "out"))
    assert made.record["averaged"] == [4, 3, 2]
    assert not [key for key in made.entries if key.startswith("optim/")]
    for key, entry in made.entries.items():
        mean = sum(state.read(key).double() for state in states[1:]) / 3
        assert torch.equal(entry.read(), mean.float()), key  # type: ignore[union-attr]
    assert cli.main(line) == 2  # the folder is there


def test_bf16_weights_are_the_nearest_and_half_as_large(tmp_path: Path) -> None:
    [state] = _run(tmp_path / "run", 1)
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    made = checkpoint.read(checkpoint.resolve(tmp_path / "out"))
    for key, entry in made.entries.items():
        assert torch.equal(entry.read(), state.read(key).bfloat16()), key
    sizes = [
        sum(p.stat().st_size for p in folder.glob("weights-*"))
        for folder in (tmp_path / "out", checkpoint.found_in(tmp_path / "run")[0])
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_too_few_checkpoints_and_another_model_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = _run(tmp_path / "run", 2)
    line = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--average", "3"]
    assert cli.main(line) == 2
    assert "is 3" in (said := capsys.readouterr().err) and "has 2 good checkpoints" in said
    other = State(states[0].entries, {**states[0].record, "model": {"family": "cpm"}})
    with pytest.raises(ValueError, match="of different models"):
        exported([states[1], other], "float32")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeeds_own_checkpoint_comes_whole(tmp_path: Path, world2: World, zero: int) -> None:
    """What DeepSpeed saved of two ranks, read by us, is what our own pieces were, moments too."""
    ranks = world2.run("tests.fault_jobs:saved_by_deepspeed", folder=str(tmp_path), zero=zero)
    found = deepspeed.folder_of(tmp_path)
    assert found is not None
    tensors = deepspeed.read(found)
    from tests.zero_jobs import TINY, gathered

    whole = gathered(TINY, ranks)
    assert {key.split("/")[0] for key in whole} == {"weights", "optim"}
    for key, value in whole.items():
        kind, name = key.rsplit("/", 1)
        assert torch.equal(tensors[f"{kind}/model.{name}"](), value), key
    line = ["export", str(tmp_path), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert cli.main(line) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    some = next(iter(key for key in whole if key.startswith("weights/")))
    assert np.array_equal(written[f"model.{some[8:]}"].numpy(), whole[some].numpy())
    next(found.glob("*zero_pp_rank_1*_optim_states.pt")).unlink()
    with pytest.raises(ConversionError, match="分片文件不全"):
        deepspeed.read(found)
