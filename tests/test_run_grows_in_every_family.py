"""A stage with a larger model grows a run of any family, twice; a resume finds the grown model.

The first loss behind a border is that of the small model trained one step more, to 1e-5 (fp32).
"""

from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from tests.run_jobs import digests, losses
from tests.test_run_of_every_objective import corpus, page  # noqa: F401
from tests.worlds import World

GO = "tests.run_jobs:go"
FIRST = {
    "masked": {"hidden": 64, "layers": 3, "head_dim": 24},
    "v2": {"hidden": 48, "layers": 3, "head_dim": 24},
    "pseudo_summary": {"hidden": 48, "layers": 3, "heads": 3},
}
SECOND = {"ffn": 96, "layers": 4, "vocab": 608}


def staged(run: Path, words: Path, name: str, stages: list[dict[str, Any]]) -> dict[str, Any]:
    plain = page(run, words, "masked" if name == "v2" else name)
    if name == "v2":
        plain["model"] = plain["model"] | {"version": 2}
    plain["run"] |= {"steps": None, "save_every_steps": 2, "keep_checkpoints": 9}
    plain["schedule"] = {"name": "constant", "warmup_steps": 2}
    return plain | {"stages": stages}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_a_run_grows_twice(
    tmp_path: Path,
    corpus: Path,  # noqa: F811
    world1: World,
    world2: World,
    name: str,
) -> None:
    stages = [{"steps": 4}, {"steps": 4, "model": FIRST[name]}, {"steps": 4, "model": SECOND}]
    whole = staged(tmp_path / "whole", corpus, name, stages)
    world2.run(GO, config=whole)
    world2.run(GO, config=staged(tmp_path / "small", corpus, name, [{"steps": 5}]))
    found = losses(tmp_path / "whole")
    assert len(found) == 12
    assert found[:5] == pytest.approx(losses(tmp_path / "small"), rel=1e-5)
    last = "checkpoints/stage-02-step-00000012"
    model = checkpoint.read(tmp_path / "whole" / last).record["model"]
    if name != "masked":
        assert model["logit_scale"] not in (None, 1.0)  # the page said nothing of it
    broken = staged(tmp_path / "broken", corpus, name, stages)
    broken["run"]["stop_at_step"] = 6
    world2.run(GO, config=broken)
    del broken["run"]["stop_at_step"]
    world2.run(GO, config=broken)
    assert losses(tmp_path / "broken") == found
    assert digests(tmp_path / "broken" / last) == digests(tmp_path / "whole" / last)
    # and from the command line's side: one process, another layout, goes on from there
    more = staged(tmp_path / "whole", corpus, name, [*stages[:2], {**stages[2], "steps": 6}])
    more["parallel"] = {"zero": 3}
    world1.run(GO, config=more)
    assert len(losses(tmp_path / "whole")) == 14
