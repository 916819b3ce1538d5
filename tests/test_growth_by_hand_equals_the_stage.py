"""`launch grow`, then `init: {from: ..., what: all}`, trains on as a stage with a larger model."""

from pathlib import Path

from launch.cli import main
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
