"""A run that is widened by tiling goes on as the small run would have, step for step.

The copies of a weight share its change under the exact rule: lr, decay, eps and weight in the
clipped norm of each tensor by its own factor (growth/moments.py). Clipping is on and bites at every
step. Tolerance: 15 fp32 steps of two summation orders drift by a few 1e-6 of the loss; 2e-5 leaves
room, and both controls are outside of it (LAMB hardly feels how its gradient is scaled).
"""

from pathlib import Path
from typing import Any

import pytest

from pretrain.state import State
from tests.run_jobs import losses, metrics, page, rewrite
from tests.test_run_of_every_objective import corpus  # noqa: F401
from tests.test_run_of_every_objective import page as page_of
from tests.worlds import World

GO = "tests.run_jobs:go"
STAGES = [{"steps": 15}, {"steps": 15, "model": {"hidden": 64}}]
CLIP = 0.3
COMMON = {"model__dropout": 0.0, "model__attention_dropout": 0.0, "optimizer__clip_norm": CLIP}
RULES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "lamb": {"optimizer__name": "lamb", "optimizer__lr": 1e-2},
    "muon": {"optimizer__name": "muon", "optimizer__muon_scale": "spectral"},
}


def without_scales(state: State) -> State:
    """The same, its factors forgotten."""
    assert state.record["scales"]
    return State(state.entries, state.record | {"scales": {}})


def without_clip_weights(state: State) -> State:
    """The same, each tensor weighing in the norm as what it is now."""
    scales = {name: scale | {"clip": 1.0} for name, scale in state.record["scales"].items()}
    assert scales != state.record["scales"]
    return State(state.entries, state.record | {"scales": scales})


@pytest.mark.parametrize("rule", RULES)
def test_a_run_widened_by_tiling_follows_the_small_one(
    tmp_path: Path, tiny_corpus: Path, world2: World, rule: str
) -> None:
    common = COMMON | RULES[rule]
    small = page(tmp_path / "small", tiny_corpus, **common)
    world2.run(GO, config=small)
    assert all(line["grad_norm"] > CLIP for line in metrics(tmp_path / "small"))
    staged = {"stages": STAGES, "run__steps": None, "run__save_every_steps": 5}
    wide = page(tmp_path / "wide", tiny_corpus, **common, **staged, run__keep_checkpoints=9)
    world2.run(GO, config=wide)
    expected = losses(tmp_path / "small")
    assert losses(tmp_path / "wide") == pytest.approx(expected, rel=2e-5)
    norms = [[line["grad_norm"] for line in metrics(tmp_path / at)] for at in ("small", "wide")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)

    # Controls: the run goes on from the growth with some of the factors forgotten, and parts.
    checkpoints = tmp_path / "wide" / "checkpoints"
    for number, change in enumerate((without_clip_weights, without_scales)):
        for path in list(checkpoints.iterdir()):
            if int(path.name[-8:]) > 15:
                path.rename(tmp_path / f"{number}-{path.name}")
        rewrite(checkpoints / "stage-01-step-00000015", change)
        world2.run(GO, config=wide)
        found = losses(tmp_path / "wide")
        far = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        assert far > 5e-5, change.__name__


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("family", ["cpm", "t5", "v1", "v2"])
def test_in_every_family_under_zero(
    tmp_path: Path,
    tiny_corpus: Path,
    corpus: Path,  # noqa: F811
    world2: World,
    family: str,
    zero: int,
) -> None:
    """20 clipped AdamW steps behind the border; the control brings the rates back to 1 at once."""
    plain = page(tmp_path, tiny_corpus)
    if family != "cpm":
        plain = page_of(tmp_path, corpus, "span_corruption" if family == "t5" else "masked")
    plain["model"] |= {"dropout": 0.0, "attention_dropout": 0.0}
    plain["model"] |= {"version": 2} if family == "v2" else {}
    wider, clip = {"hidden": 2 * plain["model"]["hidden"]}, CLIP / (10 if family == "t5" else 1)

    def run(name: str, *stages: dict[str, Any]) -> list[float]:
        changes = {"out": str(tmp_path / name), "steps": None, "save_every_steps": 99}
        sections = plain | {"stages": list(stages), "parallel": {"zero": zero}}
        sections["run"] = plain["run"] | changes
        sections["schedule"] = {"name": "constant", "warmup_steps": 2}
        sections["optimizer"] = plain["optimizer"] | {"clip_norm": clip}
        world2.run(GO, config=sections, timeout_s=400)
        return losses(tmp_path / name)

    small = run("small", {"steps": 24})
    assert all(line["grad_norm"] > clip for line in metrics(tmp_path / "small"))
    assert run("wide", {"steps": 4}, {"steps": 20, "model": wider}) == pytest.approx(
        small, rel=2e-5
    )
    control = run(
        "control", {"steps": 4}, {"steps": 20, "model": wider, "grow": {"rewarm_steps": 1}}
    )
    gaps = [abs(one / other - 1) for one, other in zip(control, small, strict=True)]
    assert max(gaps[:4]) < 2e-5 < 1e-3 < max(gaps)
