"""What a run learns does not depend on how it lies on the devices.

Two devices take each step in two micro-batches of 2 samples, one takes it in two of 4.

ZeRO stages and process counts change the order in which gradients are summed: 1e-5 relative on the
loss over 15 steps in fp32. Recompute and accumulation repeat the same arithmetic: 1e-6. A step of 7
samples on 2 ranks is cut 4 + 3; on 1 rank it is whole.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.run_jobs import losses, metrics, page
from tests.worlds import World

GO = "tests.run_jobs:go"
TWICE = {"batch__micro": 2, "run__stop_at_step": 15}


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world1: World
) -> list[float]:
    """Losses of 15 steps on one process."""
    run = tmp_path_factory.mktemp("alone")
    world1.run(GO, config=page(run, tiny_corpus, run__stop_at_step=15))
    found = losses(run)
    assert len(found) == 15
    assert found[-1] < found[0] - 0.3, "the run does not learn; equality would mean little"
    return found


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_zero_stage_on_two_processes(
    tmp_path: Path, tiny_corpus: Path, alone: list[float], world2: World, zero: int
) -> None:
    world2.run(GO, config=page(tmp_path, tiny_corpus, **TWICE, parallel__zero=zero))
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)


def test_tensor_2_by_data_2(
    tmp_path: Path, tiny_corpus: Path, alone: list[float], world4: World
) -> None:
    world4.run(GO, config=page(tmp_path, tiny_corpus, **TWICE, parallel__tensor=2))
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_overlapped_messages_change_no_digit(
    tmp_path: Path, tiny_corpus: Path, alone: list[float], world2: World, zero: int
) -> None:
    """Which stream a message takes is no arithmetic: the same losses to the last digit."""
    for overlap in (True, False):
        changes: dict[str, Any] = {
            "parallel__zero": zero,
            "parallel__overlap": overlap,
            "run__steps": 6,
        }
        changes["schedule"] = {"warmup_steps": 5}
        world2.run(GO, config=page(tmp_path / str(overlap), tiny_corpus, **changes))
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    assert losses(tmp_path / "True")[0] == pytest.approx(alone[0], rel=1e-5)


def test_validation_and_its_passage_under_tensor_parallelism(
    tmp_path: Path, tiny_corpus: Path, world1: World, world2: World
) -> None:
    seen = []
    for name, world, tensor in (("one", world1, 1), ("two", world2, 2)):
        changes = {"parallel__tensor": tensor, "run__steps": 15, "run__validate_every_steps": 15}
        world.run(GO, config=page(tmp_path / name, tiny_corpus, **changes))
        seen.append(metrics(tmp_path / name)[-1])
    assert seen[1]["valid_loss"] == pytest.approx(seen[0]["valid_loss"], rel=1e-5)
    # drawn from the whole vocabulary on every rank; rounding may turn a later draw
    assert seen[1]["sample"][:24] == seen[0]["sample"][:24]


@pytest.mark.parametrize(
    "changes",
    [
        {"batch__micro": 8},
        {"batch__micro": 2},
        {"recompute": "full"},
        {"recompute": "sublayer"},
    ],
)
def test_accumulation_and_recompute(
    tmp_path: Path, tiny_corpus: Path, alone: list[float], world1: World, changes: dict[str, Any]
) -> None:
    world1.run(GO, config=page(tmp_path, tiny_corpus, **changes, run__stop_at_step=15))
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    "recompute",
    ["full", *(pytest.param(how, marks=pytest.mark.slow) for how in ("none", "sublayer"))],
)
def test_recompute_under_zero_3_with_dropout(
    tmp_path: Path, tiny_corpus: Path, world2: World, recompute: str
) -> None:
    changes = {"model__dropout": 0.1, "model__attention_dropout": 0.1, "parallel__zero": 3}
    world2.run(GO, config=page(tmp_path / "none", tiny_corpus, **changes, run__steps=15))
    again = page(tmp_path / "again", tiny_corpus, **changes, recompute=recompute, run__steps=15)
    world2.run(GO, config=again)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)


def test_seven_samples_on_two_ranks(
    tmp_path: Path, tiny_corpus: Path, world1: World, world2: World
) -> None:
    for name, world in (("one", world1), ("two", world2)):
        world.run(GO, config=page(tmp_path / name, tiny_corpus, **TWICE, batch__samples=7))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_another_seed_is_another_run(
    tmp_path: Path, tiny_corpus: Path, alone: list[float], world1: World
) -> None:
    world1.run(GO, config=page(tmp_path, tiny_corpus, run__seed=2, run__stop_at_step=15))
    assert losses(tmp_path) != pytest.approx(alone, rel=1e-3)
