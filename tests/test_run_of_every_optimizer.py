"""Every update rule trains a run, and what it remembers survives a resume on another layout.

Through train(), as the launcher calls it: 12 steps unbroken, against 6 steps under one layout that
stop and save, and the rest under another. Losses of about 5.7 agree to 1e-6: sums in another order
(5e-8 measured).
"""

from pathlib import Path
from typing import Any

import pytest

from configs.load import from_dict
from configs.run import RunConfig
from pretrain import checkpoint
from tests.run_jobs import losses, page
from tests.worlds import World

GO = "tests.run_jobs:go"
RULES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "lamb": (
        {"optimizer__ema": 0.9, "optimizer__lookahead_every": 4, "optimizer__layer_decay": 0.8},
        {"parallel__zero": 1},
        {"parallel__zero": 3},
    ),
    "adafactor": (
        {"optimizer__beta1": 0.5, "schedule": {"name": "inverse_root", "warmup_steps": 3}},
        {"parallel__zero": 2},
        {"parallel__tensor": 2},
    ),
    "muon": (
        {"schedule": {"name": "piecewise", "points": [[4, 1.0], [12, 0.1]]}},
        {"parallel__zero": 3},
        {"parallel__zero": 1},
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_trains_and_resumes_elsewhere(
    tmp_path: Path, tiny_corpus: Path, world1: World, world2: World, rule: str
) -> None:
    changes, first, then = RULES[rule]
    common = {"optimizer__name": rule, "optimizer__lr": 1e-2, "run__steps": 12} | changes
    if "schedule" not in changes:
        common["schedule"] = {"warmup_steps": 3}
    world1.run(GO, config=page(tmp_path / "whole", tiny_corpus, **common))
    broken = tmp_path / "broken"
    world2.run(GO, config=page(broken, tiny_corpus, **common, **first, run__stop_at_step=6))
    world2.run(GO, config=page(broken, tiny_corpus, **common, **then))
    expected = losses(tmp_path / "whole")
    assert losses(broken) == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < expected[0] - 0.01

    kept = checkpoint.read(checkpoint.resolve(broken))
    slots = {key.split("/")[1] for key in kept.entries if key.startswith("optim/")}
    wanted = {
        "lamb": {"exp_avg", "exp_avg_sq", "ema", "slow"},
        "adafactor": {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
        "muon": {"exp_avg", "exp_avg_sq", "momentum"},
    }
    assert slots == wanted[rule]
    if rule == "lamb":
        whole = checkpoint.read(checkpoint.resolve(f"{tmp_path / 'whole'}@ema"))
        ours = checkpoint.read(checkpoint.resolve(f"{broken}@ema"))
        for name in whole.names():
            if not name.endswith("k.bias"):  # rounding alone moves it
                far = (whole.read(f"weights/{name}") - ours.read(f"weights/{name}")).norm()
                assert far < 1e-4 * whole.read(f"weights/{name}").norm().clamp(min=0.1), name


def test_a_checkpoint_of_another_rule_is_refused_in_a_sentence(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    config = page(tmp_path / "run", tiny_corpus, run__steps=4, schedule={}, run__stop_at_step=2)
    world1.run(GO, config=config)
    config["run"].pop("stop_at_step")
    config["optimizer"]["name"] = "muon"
    from_dict(RunConfig, config)
    with pytest.raises(ValueError, match="optimizer: keeps exp_avg, exp_avg_sq, momentum, the"):
        world1.run(GO, config=config)
