"""A ramp of the batch is the same run as stages that spell it out, on any number of processes and
through a stop in its middle; the plan and the schedule count what it takes.

Another number of processes sums gradients in another order: 1e-5 relative on the loss in fp32.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.batch import Batch
from configs.load import ConfigError, from_dict
from configs.run import RunConfig, first_sample, stage_samples
from launch import cli
from pretrain import plan
from tests.run_jobs import losses, metrics, page
from tests.worlds import World

GO = "tests.run_jobs:go"
RAMP = [[5, 2], [6, 5]]
"""Updates and rows; then 8 rows."""
TAKEN = [2] * 5 + [5] * 6 + [8] * 9


@pytest.fixture(scope="module")
def ramped(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World) -> Path:
    """20 steps on two processes."""
    run = tmp_path_factory.mktemp("ramped")
    world2.run(GO, config=page(run, tiny_corpus, run__steps=20, batch__ramp=RAMP))
    return run


def test_a_ramp_is_the_stages_that_spell_it_out(
    tmp_path: Path, tiny_corpus: Path, world1: World, ramped: Path
) -> None:
    stages = [{"steps": n, "batch": {"samples": rows}} for n, rows in (*RAMP, (9, 8))]
    world1.run(GO, config=page(tmp_path / "stages", tiny_corpus, run__steps=20, stages=stages))
    assert losses(ramped) == pytest.approx(losses(tmp_path / "stages"), rel=1e-5)
    seen = [line["samples"] for line in metrics(ramped)]
    assert [b - a for a, b in zip([0, *seen], seen, strict=False)] == TAKEN
    # Negative control: the same run without the ramp.
    brief = {"run__steps": 4, "schedule": {"warmup_steps": 4}}
    world1.run(GO, config=page(tmp_path / "flat", tiny_corpus, **brief))
    assert losses(tmp_path / "flat") != pytest.approx(losses(ramped)[:4], rel=1e-3)


def test_a_run_that_stops_in_the_ramp_goes_on_in_it(
    tmp_path: Path, tiny_corpus: Path, world1: World, world2: World, ramped: Path
) -> None:
    changes = {"run__steps": 20, "batch__ramp": RAMP}
    world1.run(GO, config=page(tmp_path, tiny_corpus, **changes, run__stop_at_step=8))
    world2.run(GO, config=page(tmp_path, tiny_corpus, **changes))
    assert losses(tmp_path) == pytest.approx(losses(ramped), rel=1e-5)
    ends = [metrics(run)[-1] for run in (tmp_path, ramped)]
    assert ends[0]["samples"] == ends[1]["samples"] == sum(TAKEN)
    assert ends[0]["tokens"] == ends[1]["tokens"] == sum(TAKEN) * 32


@pytest.mark.parametrize("unit", [1, 16])
def test_what_is_taken_is_the_sum_of_the_steps(unit: int) -> None:
    size = {"samples": 8} if unit == 1 else {"tokens": 8 * 16}
    batch = Batch(2, **size, ramp=tuple((n, rows * unit) for n, rows in RAMP))
    assert [batch.taken(n, 16) for n in range(21)] == [sum(TAKEN[:n]) for n in range(21)]


def test_a_ramp_goes_on_through_a_stage_that_keeps_the_batch(tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"steps": 7},
        {"steps": 6, "optimizer": {"lr": 1e-3}},
        {"steps": 7, "batch": {"samples": 4, "ramp": [[2, 1]]}},
    ]
    config = from_dict(
        RunConfig, page(tmp_path, tmp_path, run__steps=20, batch__ramp=RAMP, stages=stages)
    )
    assert stage_samples(config, 0) == sum(TAKEN[:7])
    assert stage_samples(config, 1) == sum(TAKEN[7:13])
    assert stage_samples(config, 2) == 2 * 1 + 5 * 4
    assert first_sample(config, 2) == sum(TAKEN[:13])


def test_the_plan_follows_the_ramp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = page(tmp_path, tmp_path, run__steps=20, batch__ramp=RAMP)
    (stage,) = plan.plan(from_dict(RunConfig, data), 1, "h200")["stages"]
    assert stage["tokens"] == sum(TAKEN) * 32 and stage["samples"] == 8
    (tmp_path / "page.yaml").write_text(json.dumps(data))
    assert cli.main(["plan", str(tmp_path / "page.yaml")]) == 0
    assert "the batch ramps (爬坡): 2 for 5 steps, 5 for 6 steps, then whole" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"samples": 8, "ramp": [[5, 0]]}, "batch.ramp: 5 updates of 0 mean nothing"),
        ({"tokens": 256, "ramp": [[5, 16]]}, "batch.ramp.0: is 16, less than one row of 32"),
        ({"samples": 8, "ramp": [[50, 2]]}, "batch.ramp: takes 50 updates, the run has 30"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, batch: dict[str, Any], says: str) -> None:
    data = page(tmp_path, tmp_path) | {"batch": {"micro": 2} | batch}
    with pytest.raises(ConfigError, match="batch") as error:
        from_dict(RunConfig, data)
    assert says in str(error.value)
