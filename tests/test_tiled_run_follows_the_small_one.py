"""A run that is widened by tiling goes on as the small run would have, step for step.

The copies of a weight share its change under the exact rule (lr, decay and eps of each tensor by
its own factor: growth/moments.py). Clipping is off: the weights of tensors in the global norm are
not built. Tolerance: 15 fp32 steps of two summation orders drift by a few 1e-6 of the loss; 1e-4
leaves room, and the control is forty times further away (4.6e-3 measured).
"""

from pathlib import Path

import pytest

from pretrain.state import State
from tests.run_jobs import losses, page, rewrite
from tests.worlds import World

GO = "tests.run_jobs:go"
STAGES = [{"steps": 15}, {"steps": 15, "model": {"hidden": 64}}]
COMMON = {"model__dropout": 0.0, "model__attention_dropout": 0.0, "optimizer__clip_norm": 1e9}


def without_scales(state: State) -> State:
    """The same, its factors forgotten."""
    assert state.record["scales"]
    return State(state.entries, state.record | {"scales": {}})


def test_a_run_widened_by_tiling_follows_the_small_one(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    small = page(tmp_path / "small", tiny_corpus, **COMMON)
    world2.run(GO, config=small)
    staged = {"stages": STAGES, "run__steps": None, "run__save_every_steps": 5}
    wide = page(tmp_path / "wide", tiny_corpus, **COMMON, **staged, run__keep_checkpoints=9)
    world2.run(GO, config=wide)
    expected = losses(tmp_path / "small")
    assert losses(tmp_path / "wide") == pytest.approx(expected, rel=1e-4)

    # Control: the run goes on from step 20 with the factors forgotten, and parts from it.
    checkpoints = tmp_path / "wide" / "checkpoints"
    for path in checkpoints.iterdir():
        if int(path.name[-8:]) > 20:
            path.rename(tmp_path / path.name)
    rewrite(checkpoints / "stage-01-step-00000020", without_scales)
    world2.run(GO, config=wide)
    far = max(abs(a / b - 1) for a, b in zip(losses(tmp_path / "wide"), expected, strict=True))
    assert far > 1e-3
