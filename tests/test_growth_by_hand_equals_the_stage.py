"""`launch grow`, then `init: {from: ..., what: all}`, trains on as a stage with a larger model."""

from pathlib import Path

import pytest

from configs.load import ConfigError
from launch.cli import main
from pretrain import checkpoint
from pretrain.state import State
from tests.run_jobs import digests, losses, page, write
from tests.worlds import World

GO = "tests.run_jobs:go"
LARGER = {"layers": 4, "ffn": 96}


def test_by_hand_and_as_a_stage_are_the_same_run(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    """To the last bit: moments, births, order and schedule all went along."""
    common = {"schedule__steps": 12, "schedule__decay_steps": 4}
    staged = page(
        tmp_path / "staged",
        tiny_corpus,
        run__steps=None,
        stages=[{"steps": 6}, {"steps": 6, "model": LARGER}],
        **common,
    )
    world2.run(GO, config=staged)
    small = page(tmp_path / "small", tiny_corpus, run__steps=6, **common)
    world2.run(GO, config=small)
    large = page(tmp_path / "large", tiny_corpus, run__steps=12, **common)
    large["model"] |= LARGER
    large["init"] = {"from": str(tmp_path / "grown"), "what": "all"}
    words = ["--to", str(write(tmp_path / "large.yaml", large)), "--out", str(tmp_path / "grown")]
    assert main(["grow", str(tmp_path / "small"), *words, "--seed", "1"]) == 0
    world2.run(GO, config=large)
    assert losses(tmp_path / "small") + losses(tmp_path / "large") == losses(tmp_path / "staged")
    ends = [
        tmp_path / "large/checkpoints/stage-00-step-00000012",
        tmp_path / "staged/checkpoints/stage-01-step-00000012",
    ]
    assert digests(ends[0]) == digests(ends[1])


def test_a_run_goes_on_from_a_small_one_that_ended_where_the_growth_begins(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    """`init: all` from the border itself: the stage grows it, as if it had been one run. From a
    state of weights alone there is nothing to go on with, and that is said."""
    common = {"schedule__steps": 12, "schedule__decay_steps": 4}
    stages = [{"steps": 6}, {"steps": 6, "model": LARGER}]
    whole = page(tmp_path / "whole", tiny_corpus, run__steps=None, stages=stages, **common)
    world2.run(GO, config=whole)
    small = page(tmp_path / "small", tiny_corpus, run__steps=6, **common)
    world2.run(GO, config=small)
    on = page(tmp_path / "on", tiny_corpus, run__steps=None, stages=stages, **common)
    on["init"] = {"from": str(tmp_path / "small"), "what": "all"}
    world2.run(GO, config=on)
    assert losses(tmp_path / "small") + losses(tmp_path / "on") == losses(tmp_path / "whole")
    end = "checkpoints/stage-01-step-00000012"
    assert digests(tmp_path / "on" / end) == digests(tmp_path / "whole" / end)
    state = checkpoint.read(checkpoint.resolve(tmp_path / "small"))
    alone = State(state.weights_only().entries, {"model": state.record["model"]})
    checkpoint.write_state(tmp_path / "alone", alone)
    on["init"]["from"], on["run"]["out"] = str(tmp_path / "alone"), str(tmp_path / "never")
    with pytest.raises(Exception, match=r"init\.what: is all, .*alone holds weights alone"):
        world2.run(GO, config=on)


def test_a_rule_that_cannot_go_on_from_wider_matrices_is_refused_by_hand_too(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    common = {"optimizer": {"lr": 1e-3, "name": "muon"}, "schedule": {}}
    world1.run(GO, config=page(tmp_path / "small", tiny_corpus, run__steps=1, **common))
    large = page(tmp_path / "large", tiny_corpus, run__steps=2, **common)
    large["model"] |= {"ffn": 96}
    large["init"] = {"from": str(tmp_path / "grown"), "what": "all"}
    words = ["--to", str(write(tmp_path / "large.yaml", large)), "--out", str(tmp_path / "grown")]
    assert main(["grow", str(tmp_path / "small"), *words]) == 0
    with pytest.raises(ConfigError, match=r"optimizer\.muon_scale: is rms, a grown matrix"):
        world1.run(GO, config=large)
