"""The plan of a run that grows: its cost beside the large model from scratch, and when to grow."""

import json
import re
from pathlib import Path

import pytest

from configs.load import ConfigError, load
from configs.run import RunConfig
from launch import cli
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
    assert beside["grows_at"] == [0.75] and beside["scratch"]["days"] > found["time"]["days"]
    assert "this run, grown at 75%" in plan.text(found)
    small, step = first["parameters"], beside["latest_step"]
    read = step * first["tokens"] / first["steps"] / small
    assert beside["tokens_per_parameter"] == pytest.approx(read)
    assert f"has read {read:.3g} tokens a parameter" in plan.text(found)


def test_the_disk_holds_both_checkpoints_of_a_growth() -> None:
    """The small run's end and the grown start stay (tests/test_run_grows.py: they do); beside them
    the newest two, and one being written."""
    found = plan.plan(page("run.steps=null", "run.keep_every_steps=0", STAGES), 1, "h200")
    small, large = (12 * stage["parameters"] for stage in found["stages"])
    assert found["disk"]["checkpoints_kept"] == 4
    assert found["disk"]["run_bytes"] == small + large + 3 * large
    stages = "stages=[{steps: 15000}, {steps: 5000, batch: {micro: 8}}]"
    same = page("run.steps=null", "run.keep_every_steps=0", stages)
    found = plan.plan(same, 1, "h200")["disk"]  # the same model goes on: one at the border
    assert found["run_bytes"] == (1 + 3) * small and found["checkpoints_kept"] == 3


def test_the_disk_holds_what_is_kept_for_good() -> None:
    """Every 5,000 steps of 20,000, saved every 500: 5,000 and 10,000 small, 15,000 a border, which
    stays as it is; 20,000 is among the newest two."""
    words = ["run.steps=null", STAGES, "run.save_every_steps=500", "run.keep_every_steps=5000"]
    found = plan.plan(page(*words), 1, "h200")
    small, large = (12 * stage["parameters"] for stage in found["stages"])
    assert found["disk"]["checkpoints_kept"] == 6
    assert found["disk"]["run_bytes"] == 3 * small + 4 * large


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
    assert found["latest"] == share
    cheaper = [row["flops"] for row in found["when"]]
    assert cheaper == sorted(cheaper, reverse=True)  # the later, the cheaper


def test_no_step_is_advised_where_growth_cost_more_than_scratch() -> None:
    """2.4 tokens for each parameter of the large model, as measured (docs/growth.md)."""
    for tokens, advised in ((22528, True), (24576, False)):  # 2.3 and 2.5
        found = plan.plan(page("run.steps=null", STAGES, f"batch.tokens={tokens}"), 1, "h200")
        each, said = 20000 * tokens / found["parameters"]["total"], plan.text(found)
        warning = f"{each:.3g} tokens a parameter of the large model: beyond 2.4, growing can cost"
        advice = "early too, unless the small model is there already"
        assert (warning in said, advice in said) == (not advised,) * 2
        assert ("70% of the steps *" in said, "about step 14,000 (*)" in said) == (advised,) * 2
        assert ("no step advised, step 14,000 at most" in said) == (not advised)
        assert max(map(len, said.splitlines())) <= 110


def test_steps_of_different_size_are_counted_as_they_are() -> None:
    """Half of the steps, a 17th of the tokens: what the grid says of growing there is what the run
    that grows there costs, and what it buys from scratch is bought at each stage's own price."""
    stages = "[{steps: 10000}, {steps: 10000, batch: {samples: 8192}, model: {layers: 24}}]"
    found = plan.plan(page("run.steps=null", f"stages={stages}"), 1, "h200")
    beside, (first, second) = found["growth"], found["stages"]
    assert second["tokens"] == 16 * first["tokens"]
    half = next(row for row in beside["when"] if row["share"] == 0.5)
    assert half["flops"] == pytest.approx(found["time"]["flops"], rel=1e-12)
    saved = beside["scratch"]["flops"] - beside["staged"]["flops"]
    dear = second["flops"] / second["steps"]
    assert beside["scratch_steps_for_the_same"] == round(20000 - saved / dear)


def test_every_growth_is_named_and_nothing_else_is_one() -> None:
    stages = (
        "[{steps: 5000}, {steps: 5000, model: {dropout: 0}}, {steps: 10000, model: {layers: 24}}]"
    )
    found = plan.plan(page("run.steps=null", f"stages={stages}"), 1, "h200")
    assert found["growth"]["grows_at"] == [0.5]
    longer = "[{steps: 5000}, {steps: 5000, data: {seq_len: 2048}, extend: {method: last}}]"
    words = ["run.steps=null", f"stages={longer}", "batch.micro=1"]
    assert plan.plan(page(*words), 1, "h200")["growth"] is None


def test_options_that_change_nothing_are_told_before_the_small_stage_is_paid_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By check and by plan, in the run's own words; those with effect are not told."""
    deeper = (
        "{steps: 5000, model: {layers: 24}, grow: {added: copied, split: 0.7, rewarm_steps: 9}}"
    )
    wider = "{steps: 500, model: {hidden: 1536}, grow: {noise: 0.1, split: 0.7, rewarm_steps: 501}}"
    stages = f"stages=[{{steps: 12000}}, {deeper}, {wider}]"
    told = [
        "stages.1.grow.added: copied, but neither ffn nor heads grow (该选项不起作用)",
        "stages.1.grow.split: 0.7, but no copies share a reading by it (该选项不起作用)",
        "stages.1.grow.rewarm_steps: 9, but no learning rate was divided (该选项不起作用)",
        "stages.2.grow.rewarm_steps: 501, but the run ends 500 steps later (学习率来不及恢复)",
    ]
    assert cli.main(["check", str(SMALL), "run.steps=null", stages]) == 0
    said = capsys.readouterr().out
    assert said.endswith("".join(f"  note: {sentence}\n" for sentence in told))
    assert cli.main(["plan", str(SMALL), "run.steps=null", stages]) == 0
    said = capsys.readouterr().out
    assert [line.strip() for line in said.splitlines() if ".grow." in line] == told
    assert cli.main(["check", str(SMALL), "run.steps=null", stages, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remarks"] == told
    good = stages.replace("added: copied, split: 0.7, rewarm_steps: 9", "").replace("501", "500")
    assert cli.main(["check", str(SMALL), "run.steps=null", good]) == 0
    assert "note" not in capsys.readouterr().out


def test_a_run_that_does_not_grow_is_beside_nothing() -> None:
    found = plan.plan(page(), 1, "h200")
    assert found["growth"] is None and "from scratch" not in plan.text(found)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[{steps: 9}, {steps: 9, model: {layers: 6}}]", "stages.1.model: layers would shrink"),
        (
            "[{steps: 9}, {steps: 9, grow: {noise: 0.1}}]",
            "stages.1.grow: says how a model grows, and",
        ),
        ("[{steps: 9, model: {layers: 6}, grow: {noise: 0.1}}]", "stages.0.grow: says how a model"),
    ],
)
def test_what_cannot_grow_is_said_before_anything_is_planned(stages: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        page("run.steps=null", f"stages={stages}")
