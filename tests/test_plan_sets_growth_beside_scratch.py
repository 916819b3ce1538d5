"""The plan of a run that grows: its cost beside the large model from scratch, and when to grow."""

from pathlib import Path

import pytest

from configs.load import load
from configs.run import RunConfig
from pretrain import plan

SMALL = Path(__file__).resolve().parent.parent / "configs/runs/cpm-small-1gpu.yaml"
STAGES = "stages=[{steps: 15000}, {steps: 5000, model: {layers: 24}}]"


def page(*words: str) -> RunConfig:
    return load(SMALL, RunConfig, list(words))


def test_a_run_that_grows_is_counted_beside_scratch() -> None:
    found = plan.plan(page("run.steps=null", STAGES), 1, "h200")
    first, second = found["stages"]
    beside = found["growth"]
    tokens, per_token = first["tokens"] + second["tokens"], second["flops_per_token"]["full"]
    assert beside["scratch"]["flops"] == pytest.approx(tokens * per_token)
    assert beside["share"] == pytest.approx(found["time"]["flops"] / (tokens * per_token))
    assert beside["grows_at"] == 0.75 and beside["scratch"]["days"] > found["time"]["days"]
    assert "this run, grown at 75%" in plan.text(found)


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("{name: wsd, decay_steps: 2000}", 0.7),
        ("{name: wsd, decay_steps: 9000}", 0.4),
        ("{name: wsd, decay_steps: 15000}", None),
        ("{name: cosine}", 0.5),
    ],
)
def test_when_to_grow_leaves_room_before_the_decay(schedule: str, share: float | None) -> None:
    words = ["run.steps=null", STAGES, f"schedule={schedule}", "schedule.warmup_steps=0"]
    found = plan.plan(page(*words), 1, "h200")["growth"]
    assert found["suggestion"] == share
    cheaper = [row["flops"] for row in found["when"]]
    assert cheaper == sorted(cheaper, reverse=True)  # the later, the cheaper


def test_a_run_that_does_not_grow_is_beside_nothing() -> None:
    found = plan.plan(page(), 1, "h200")
    assert found["growth"] is None and "from scratch" not in plan.text(found)
