"""Promise: a stage changes row length, batch, mixture, objective, rate and what is frozen; the run
goes on as one: every sample once, on any number of processes, killed or not.

Equality over processes: 1e-5 relative in fp32, as the order of sums differs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import ConfigError, from_dict
from configs.run import RunConfig, first_sample, schedule_span
from pretrain import checkpoint
from pretrain.corpora import trained_length
from tests.run_jobs import losses, metrics, page
from tests.worlds import World

GO = "tests.run_jobs:go"
STAGES: list[dict[str, Any]] = [
    {"steps": 6},
    {
        "steps": 6,
        "data": {"seq_len": 16},
        "batch": {"samples": 12},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2, "decay_steps": 3},
        "frozen": ["embed.*", "decoder.layers.0.self.*"],
    },
    {"steps": 4, "data": {"seq_len": 24, "packing": "best_fit"}, "batch": {"tokens": 192}},
]


def staged(run: Path, corpus: Path, **changes: Any) -> dict[str, Any]:
    """A run of three stages."""
    fixed = {"stages": STAGES, "run__steps": None, "schedule__warmup_steps": 2}
    fixed |= {"schedule__decay_steps": 2, "run__save_every_steps": 2, "run__keep_checkpoints": 99}
    return page(run, corpus, **{**fixed, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World) -> Path:
    """Run on two processes."""
    folder = tmp_path_factory.mktemp("staged") / "run"
    world2.run(GO, config=staged(folder, tiny_corpus))
    return folder


def test_each_stage_has_its_rows_batch_and_rate(run: Path) -> None:
    lines = metrics(run)
    assert [line["samples"] for line in lines] == [
        *range(8, 49, 8), *range(60, 121, 12), *range(128, 153, 8)
    ]  # fmt: skip
    counted = [a["tokens"] - b["tokens"] for a, b in zip(lines[1:], lines, strict=False)]
    assert counted == [256] * 5 + [192] * 6 + [192] * 4
    assert [line["stage"] for line in lines] == [0] * 6 + [1] * 6 + [2] * 4
    # the second schedule begins at step 6 with the stage's peak and spans stages 1 and 2
    rates = [line["lr"] for line in lines]
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3]) and rates[5] == pytest.approx(3e-4)
    assert rates[6:8] == pytest.approx([5e-4, 1e-3]) and rates[-1] == pytest.approx(1e-4)
    assert max(rates[6:]) == pytest.approx(1e-3)


def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(run: Path) -> None:
    before, after = (
        checkpoint.read(run / "checkpoints" / f"stage-{stage:02d}-step-{step:08d}")
        for stage, step in ((0, 6), (1, 12))
    )
    end = checkpoint.read(run / "checkpoints" / "stage-02-step-00000016")
    for key in before.names("weights"):
        name = f"weights/{key}"
        still = key.startswith(("embed.", "decoder.layers.0.self."))
        assert torch.equal(before.read(name), after.read(name)) == still, key
        assert not torch.equal(after.read(name), end.read(name)), key  # it thaws


def test_one_process_and_a_kill_change_nothing(
    run: Path, tmp_path: Path, tiny_corpus: Path, world1: World, world2: World
) -> None:
    world1.run(GO, config=staged(tmp_path / "one", tiny_corpus))
    assert losses(tmp_path / "one") == pytest.approx(losses(run), rel=1e-5)
    # stopped in the second stage and at its border, gone on with on the other number of processes
    for step, world in ((8, world1), (12, world2), (0, world1)):
        world.run(GO, config=staged(tmp_path / "cut", tiny_corpus, run__stop_at_step=step))
    assert losses(tmp_path / "cut") == pytest.approx(losses(run), rel=1e-5)


def test_a_border_that_was_passed_cannot_move_and_one_to_come_can(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    out = tmp_path / "run"
    world1.run(GO, config=staged(out, tiny_corpus, run__stop_at_step=8))
    moved = [STAGES[0], STAGES[1] | {"data": {"seq_len": 8}}, STAGES[2]]
    with pytest.raises(ConfigError, match="rows"):
        world1.run(GO, config=staged(out, tiny_corpus, stages=moved))
    earlier = [{"steps": 4}, *STAGES[1:]]
    with pytest.raises(ConfigError, match=r"begin at samples \[0, 32, 104\]|begin at samples"):
        world1.run(GO, config=staged(out, tiny_corpus, stages=earlier))
    later = [*STAGES[:2], {"steps": 2, "data": {"seq_len": 32}}]
    assert world1.run(GO, config=staged(out, tiny_corpus, stages=later))[0]["step"] == 14


def test_the_batch_of_a_stage_that_has_begun_stays_where_later_rows_hang_on_it(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    """The rows of stage 1 begin where the page says stage 0 ends: with another batch half-way, too
    early or too late. Where no later stage reads otherwise, the batch may change."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    world1.run(GO, config=staged(out, tiny_corpus, run__stop_at_step=2))
    for samples in (4, 16):
        with pytest.raises(ConfigError, match=f"read 16 samples at step 2, .* says {2 * samples}"):
            world1.run(GO, config=staged(out, tiny_corpus, batch__samples=samples))
    one = {"stages": [STAGES[0]]}
    world1.run(GO, config=staged(alone, tiny_corpus, run__stop_at_step=2, **one))
    world1.run(GO, config=staged(alone, tiny_corpus, batch__samples=16, **one))
    assert [line["samples"] for line in metrics(alone)] == [8, 16, 32, 48, 64, 80]


def test_another_dropout_at_a_border_is_no_growth(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    """Nor is one that the page changed meanwhile: no proof, no second checkpoint."""
    out, stages = tmp_path / "run", [{"steps": 2}, {"steps": 2, "optimizer": {"lr": 1e-3}}]
    world1.run(GO, config=staged(out, tiny_corpus, stages=stages, run__stop_at_step=1))
    changed = staged(out, tiny_corpus, stages=stages, model__dropout=0.25)
    world1.run(GO, config=changed)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == [
        f"stage-0{stage}-step-0000000{step}" for stage, step in ((0, 1), (0, 2), (1, 4))
    ]
    assert checkpoint.read(out / "checkpoints" / names[-1]).record["model"]["dropout"] == 0.25


def test_a_checkpoint_knows_the_rows_of_its_stage(run: Path) -> None:
    """What evaluate measures by, where nobody says --seq-len; before, the page's first length."""
    found = {}
    for path in (run / "checkpoints").glob("stage-*"):
        record = checkpoint.read(path).record
        found[int(record["stage"])] = trained_length(record)
    assert found == {0: 32, 1: 16, 2: 24}


def test_arithmetic_of_the_borders(tmp_path: Path) -> None:
    config = from_dict(RunConfig, staged(tmp_path, tmp_path))
    assert [first_sample(config, n) for n in range(3)] == [0, 48, 120]
    assert [schedule_span(config, n) for n in range(3)] == [(0, 6), (6, 10), (6, 10)]


@pytest.mark.parametrize(
    "stage, says",
    [
        ({"data": {"seqlen": 8}}, "stages.1.data.seqlen: unknown key"),
        (
            {"data": {"seq_len": 64}},
            "stages.1.data.seq_len: is 64, stages.1.model.positions has 32",
        ),
        ({"batch": {"tokens": 8}}, "stages.1.batch.tokens: is 8, less than one row of 32"),
        ({"schedule": {"warmup_steps": 99}}, "stages.1.schedule: warm-up and decay take 101 steps"),
        ({"objective": {"name": "masked"}}, "objective.name: is masked"),
        ({"frozen": ["encoder.*"]}, "stages.1.frozen: 'encoder.*' names no tensor"),
    ],
)
def test_mistakes_name_the_stages_key(tmp_path: Path, stage: dict[str, Any], says: str) -> None:
    pages = staged(tmp_path, tmp_path, stages=[{"steps": 6}, {"steps": 6} | stage])
    with pytest.raises(ConfigError) as told:
        from_dict(RunConfig, pages)
    assert says in str(told.value)
