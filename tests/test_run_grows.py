"""A stage with a larger model grows the run: the loss does not jump, a kill loses nothing.

The border writes two checkpoints of the same step, before and after the growth. A run that dies
anywhere around it goes on without a difference to the last bit.
"""

import json
import shutil
from math import prod
from pathlib import Path

import pytest

from configs.load import from_dict
from configs.run import RunConfig, stage_model
from pretrain import checkpoint, disk
from tests.run_jobs import digests, losses, metrics, page
from tests.worlds import World

GO = "tests.run_jobs:go"
STAGES = [{"steps": 15}, {"steps": 15, "model": {"layers": 4, "ffn": 96}}]


def _page(run: Path, corpus: Path, **changes: object) -> dict[str, object]:
    stages = {
        "stages": STAGES,
        "run__steps": None,
        "model__dropout": 0.1,
        "run__save_every_steps": 5,
    }
    return page(run, corpus, **{**stages, "run__keep_checkpoints": 9, **changes})


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World) -> Path:
    """A run of 15 + 15 steps that grew from 2 to 4 layers and from 64 to 96 in its middle."""
    run = tmp_path_factory.mktemp("grown") / "run"
    world2.run(GO, config=_page(run, tiny_corpus))
    return run


def test_the_function_is_kept_and_the_loss_does_not_jump(
    grown: Path, tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    proof = json.loads((grown / "checkpoints/stage-01-step-00000015/proof.json").read_text())
    assert proof["kept"]
    assert proof["float64"]["max_difference"] <= 1e-12 * proof["float64"]["std"]
    course = losses(grown)
    assert len(course) == 30
    # without dropout the first step after the border has the loss the small model would have had
    small = page(tmp_path / "small", tiny_corpus, run__steps=16, schedule__steps=30)
    world2.run(GO, config=small)
    larger = _page(tmp_path / "larger", tiny_corpus, model__dropout=0.0)
    world2.run(GO, config=larger)
    assert losses(tmp_path / "larger")[:16] == pytest.approx(losses(tmp_path / "small"), rel=1e-6)
    assert losses(tmp_path / "larger")[-1] < losses(tmp_path / "larger")[15]


def test_new_tensors_are_born_at_the_border_and_learn(grown: Path) -> None:
    before = checkpoint.read(grown / "checkpoints/stage-01-step-00000015")
    after = checkpoint.read(grown / "checkpoints/stage-01-step-00000030")
    born = after.record["born"]
    new = [name for name, at in born.items() if at == 15]
    assert new and all(".layers." in name for name in new)
    assert born["embed.tokens.weight"] == 0
    output = next(n for n in new if n.endswith("self.o.weight"))
    assert not before.read(f"weights/{output}").any()
    assert after.read(f"weights/{output}").abs().max() > 1e-4
    assert len(after.record["growth"]) == 1


def test_the_checkpoints_of_the_border_are_those_that_plan_counts(grown: Path) -> None:
    found = [checkpoint.read(path) for path in sorted(checkpoint.found_in(grown))]
    border = [state for state in found if state.record["border"]]
    assert len(found) == 7 and [state.record["stage"] for state in border] == [0, 1]
    config = from_dict(RunConfig, _page(grown, grown))
    planned = disk.border_bytes(config, [stage_model(config, number) for number in range(2)])
    assert planned == [sum(4 * prod(e.shape) for e in s.entries.values()) for s in border]


@pytest.mark.parametrize(
    "last",
    [
        "stage-00-step-00000010",
        "stage-00-step-00000015",  # killed between the two checkpoints of the border
        "stage-01-step-00000015",
        "stage-01-step-00000020",
    ],
)
def test_killed_and_resumed_around_the_border(
    grown: Path, tmp_path: Path, tiny_corpus: Path, world2: World, last: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(grown, run)
    for path in checkpoint.found_in(run):
        if path.name > last:
            shutil.rmtree(path)
    for left in ("writing", "growing"):  # killed while writing, killed while proving
        (run / "checkpoints" / f".stage-01-step-00000015.{left}").mkdir()
    world2.run(GO, config=_page(run, tiny_corpus))
    assert not list((run / "checkpoints").glob(".*"))
    assert losses(run) == losses(grown)
    final = "checkpoints/stage-01-step-00000030"
    assert digests(run / final) == digests(grown / final)


def test_grown_run_resumes_on_one_process_under_zero_3(
    tmp_path: Path, tiny_corpus: Path, world1: World, world2: World
) -> None:
    for name in ("whole", "broken"):
        stop = {"run__stop_at_step": 20} if name == "broken" else {}
        world2.run(GO, config=_page(tmp_path / name, tiny_corpus, model__dropout=0.0, **stop))
    last = _page(tmp_path / "broken", tiny_corpus, model__dropout=0.0, parallel__zero=3)
    world1.run(GO, config=last)
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert [line["stage"] for line in metrics(tmp_path / "broken")] == [0] * 15 + [1] * 15
