"""A stage's `grow:`: noise, copies, the rate warmed up again, and methods that do not preserve.

Equalities are of the same arithmetic and hold to the last bit; the loss behind a border that keeps
the function is the small model's, to fp32 rounding (1e-5).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.grown import Growing
from configs.load import ConfigError, from_dict, to_dict
from configs.run import RunConfig, stage_model
from pretrain import checkpoint
from pretrain.growth import grow, remarks
from pretrain.growth.moments import rewarm, settled
from pretrain.optimizer import GroupKey
from pretrain.start import _otherwise
from pretrain.state import State
from tests.growing import TINY, trained
from tests.run_jobs import digests, losses, page
from tests.worlds import World

GO = "tests.run_jobs:go"
BORDER, WIDER = 10, {"hidden": 64, "ffn": 128}
COMMON = {"run__steps": None, "run__save_every_steps": 5, "run__keep_checkpoints": 9}


def staged(run: Path, corpus: Path, grow: dict[str, Any], **more: Any) -> dict[str, Any]:
    stages = [{"steps": BORDER}, {"steps": 15, "model": more.pop("model", WIDER), "grow": grow}]
    return page(run, corpus, stages=stages, **COMMON, **more)


def proof_of(run: Path) -> dict[str, Any]:
    path = run / f"checkpoints/stage-01-step-{BORDER:08d}/proof.json"
    return dict(json.loads(path.read_text("utf-8")))


def test_width_grows_with_noise_and_is_warmed_up_again(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    grow = {"added": "copied", "noise": 0.02, "split": 0.55, "rewarm_steps": 8}
    world2.run(GO, config=staged(tmp_path / "whole", tiny_corpus, grow))
    proof = proof_of(tmp_path / "whole")
    assert proof["kept"] and proof["batch"]["of"] == "validation rows"
    before, after = (proof["batch"]["float64"][at] for at in ("before", "after"))
    assert after == pytest.approx(before, abs=1e-6) and len(proof["batch"]["tokens_sha256"]) == 64
    small = page(tmp_path / "small", tiny_corpus, run__steps=BORDER + 1, schedule__steps=25)
    world2.run(GO, config=small)
    found = losses(tmp_path / "whole")[: BORDER + 1]
    assert found == pytest.approx(losses(tmp_path / "small"), rel=1e-5)
    record = checkpoint.read(
        tmp_path / "whole" / "checkpoints" / f"stage-01-step-{BORDER:08d}"
    ).record
    assert record["rewarm"] == {"step": BORDER, "steps": 8}
    assert record["scales"]["decoder.layers.0.self.q.weight"]["lr"] == 0.5
    # killed in the middle of the way back, it goes on to the last bit
    stop = staged(tmp_path / "broken", tiny_corpus, grow, run__stop_at_step=13)
    world2.run(GO, config=stop)
    world2.run(GO, config=staged(tmp_path / "broken", tiny_corpus, grow))
    last = "checkpoints/stage-01-step-00000025"
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert digests(tmp_path / "broken" / last) == digests(tmp_path / "whole" / last)
    # control: without the way back it is another run, from the second step after the border on
    plain = staged(tmp_path / "plain", tiny_corpus, {**grow, "rewarm_steps": 0})
    world2.run(GO, config=plain)
    one, other = losses(tmp_path / "whole"), losses(tmp_path / "plain")
    assert one[: BORDER + 1] == other[: BORDER + 1] and one[-1] != other[-1]


def test_a_growth_that_is_done_is_not_told_otherwise(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    run = tmp_path / "run"
    short = {"schedule": {}, "stages": [{"steps": 1}, {"steps": 2, "model": {"layers": 3}}]}
    config = page(run, tiny_corpus, run__steps=None, **short)
    config["stages"][1]["grow"] = {"noise": 0.05}
    world1.run(GO, config={**config, "run": {**config["run"], "stop_at_step": 2}})
    config["stages"][1]["grow"] = {"new_layers": "paired", "noise": 0.05}
    with pytest.raises(
        ConfigError, match=r"stages.1.grow.new_layers: is paired, .* with silent at step 1"
    ):
        world1.run(GO, config=config)
    config["stages"][1]["grow"] = {"noise": 0.05}
    world1.run(GO, config=config)


def test_all_words_are_said_where_a_stage_says_null() -> None:
    config = page(Path("run"), Path("corpus"), run__steps=None, schedule={})
    masked = {"steps": 2, "model": {"vocab": 640}, "grow": {"new_words": "masked"}}
    config["stages"] = [{"steps": 2}, masked, {"steps": 2, "model": {"words_said": None}}]
    read = from_dict(RunConfig, config)
    assert [stage_model(read, n).words_said for n in range(3)] == [None, 320, 640]


@pytest.mark.parametrize("rule", ["adamw", "lamb", "rms_adamw", "adafactor", "muon"])
def test_a_way_back_of_what_is_not_divided_is_told(rule: str) -> None:
    before, how = trained(), Growing(rewarm_steps=5)
    before.record["config"] = {"optimizer": {"name": rule}}
    found = remarks(before, grow(before, replace(TINY, hidden=64), 1, how), how)
    assert len(found) == (rule != "adamw")
    assert rule == "adamw" or f"under {rule}, which sizes its steps" in found[0]


def test_only_what_a_stage_tells_of_its_own_border_is_compared() -> None:
    """A checkpoint grown by hand may stand at the border of a stage that grows nothing."""
    config = page(Path("run"), Path("corpus"), run__steps=None, schedule={})
    config["model"] = to_dict(TINY)
    config["stages"] = [{"steps": 9}, {"steps": 2, "optimizer": {"lr": 1e-4}}]
    grown = grow(trained(), replace(TINY, layers=4), 1, Growing(noise=0.05))
    there = State(grown.entries, {**grown.record, "stage": 1})
    assert _otherwise(from_dict(RunConfig, config), there) == []
    config["stages"][1] = {"steps": 2, "model": {"layers": 4}}
    (sentence,) = _otherwise(from_dict(RunConfig, config), there)
    assert "stages.1.grow.noise: is 0.0, the checkpoint was made with 0.05 at step 9" in sentence
    wider = grow(there, replace(TINY, layers=4, ffn=96), 1, Growing())  # at the same step, by stage
    config["model"], config["stages"][1]["model"] = to_dict(TINY) | {"layers": 4}, {"ffn": 96}
    assert _otherwise(from_dict(RunConfig, config), wider) == []


def test_stacking_in_a_run_is_allowed_and_named(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    world2.run(
        GO,
        config=staged(tmp_path / "run", tiny_corpus, {"method": "stack"}, model={"layers": 4}),
    )
    proof = proof_of(tmp_path / "run")
    assert not proof["kept"] and not proof["means_to_keep"] and proof["moved"] > 0
    assert proof["batch"]["float64"]["after"] != proof["batch"]["float64"]["before"]
    assert len(losses(tmp_path / "run")) == BORDER + 15


def test_a_scale_goes_back_to_one_over_the_steps() -> None:
    keys = [GroupKey(True, lr_scale=0.5, wd_scale=2.0), GroupKey(True)]
    groups = [{"lr_scale": 0.5, "weight_decay": 0.2}, {"lr_scale": 1.0, "weight_decay": 0.1}]
    found = []
    for step in (9, 10, 12, 14, 99):
        rewarm(groups, keys, {"step": 10, "steps": 4}, step)
        found.append((groups[0]["lr_scale"], groups[0]["weight_decay"]))
        assert groups[1]["lr_scale"] == 1.0 and groups[1]["weight_decay"] == 0.1
    expected = [(0.5, 0.2), (0.5, 0.2), (0.75, 0.15), (1.0, 0.1), (1.0, 0.1)]
    assert found == [pytest.approx(pair) for pair in expected]
    frozen = [{"lr_scale": 0.0, "weight_decay": 0.0}]
    rewarm(frozen, [GroupKey(True, lr_scale=0.0, wd_scale=0.0)], {"step": 10, "steps": 4}, 12)
    assert frozen == [{"lr_scale": 0.0, "weight_decay": 0.0}]


def test_a_second_growth_starts_from_where_the_scales_are() -> None:
    scale = {"lr": 0.5, "wd": 2.0, "eps": 4.0, "clip": 0.25}
    record = {"step": 12, "scales": {"a": scale}, "rewarm": {"step": 10, "steps": 4}}
    half = settled(record)
    assert half["scales"] == {"a": {"lr": 0.75, "wd": 1.5, "eps": 4.0, "clip": 0.25}}
    over = settled(record | {"step": 40})
    assert over["scales"]["a"]["lr"] == 1.0 and "rewarm" not in over and settled(over) is over


def test_a_way_back_under_way_goes_on_behind_a_second_growth() -> None:
    """At each step to come the factors are those of the way that was begun, unless another begins;
    a stage that only says more words, as any other."""
    before = trained()
    tiled = grow(before, replace(TINY, hidden=64), 1, Growing(rewarm_steps=10))
    begun = tiled.record["rewarm"]
    later = State(tiled.entries, {**tiled.record, "step": begun["step"] + 4})
    name = "decoder.layers.0.self.q.weight"

    def factor(record: dict[str, Any], step: int) -> float:
        scale = record["scales"][name]
        keys = [GroupKey(True, lr_scale=scale["lr"], wd_scale=scale["wd"])]
        groups = [{"lr_scale": scale["lr"], "weight_decay": scale["wd"]}]
        rewarm(groups, keys, record["rewarm"], step)
        return float(groups[0]["lr_scale"])

    for to in (replace(TINY, hidden=64, layers=5), replace(TINY, hidden=64, dropout=0.0)):
        grown = grow(later, to, 1)
        assert grown.record["rewarm"] == {"step": begun["step"] + 4, "steps": 6}
        for step in range(begun["step"] + 4, begun["step"] + 13):
            expected = factor(tiled.record, step)
            assert factor(grown.record, step) == pytest.approx(expected, rel=1e-12)
        assert factor(grown.record, begun["step"] + 10) == 1.0
    # what is divided meanwhile goes along, and that is told; with steps of its own it begins anew
    along = grow(later, replace(TINY, hidden=128), 1)
    assert along.record["rewarm"]["steps"] == 6
    (told,) = remarks(later, along, Growing())
    assert "an earlier way back has 6 steps left and takes along" in told
    assert remarks(later, grow(later, replace(TINY, hidden=64, layers=5), 1), Growing()) == []
    anew = grow(later, replace(TINY, hidden=128), 1, Growing(rewarm_steps=7)).record
    assert anew["rewarm"] == {"step": begun["step"] + 4, "steps": 7}
    assert anew["scales"][name]["lr"] == pytest.approx(0.5 * (0.5 + 0.5 * 0.4))


def test_the_page_says_what_is_wrong(tmp_path: Path, tiny_corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages.1.grow.split: is 0.2, must lie in \[0.5, 1\)"):
        from_dict(RunConfig, staged(tmp_path / "run", tiny_corpus, {"split": 0.2}))
