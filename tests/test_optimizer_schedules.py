"""Learning rates are pure functions of the step; groups are pure functions of the table."""

import math
from typing import Any

import pytest
import torch

from configs.load import ConfigError, from_dict
from configs.model import parameter_count, shape, tensors
from configs.optimizers import Optimizer, Schedule, moment_bytes
from configs.run import RunConfig
from pretrain import optimizer
from pretrain.schedules import schedule
from tests import zero_jobs as jobs


def of_100(name: str = "wsd", **changes: Any) -> Schedule:
    """A warm-up of 10 and a decay of 20 updates unless said otherwise."""
    return Schedule(name, **({"warmup_steps": 10, "decay_steps": 20} | changes))  # type: ignore[arg-type]


def rates(section: Schedule, steps: int = 100, lr: float = 2.0) -> list[float]:
    return [schedule(step, section, lr, steps) for step in range(steps)]


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(name: str) -> None:
    found = rates(of_100(name))
    assert found[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert max(found) == 2.0 and all(isinstance(rate, float) for rate in found)


@pytest.mark.parametrize("decay", ["linear", "sqrt"])
def test_wsd_stays_then_decays_to_the_last_step(decay: str) -> None:
    found = rates(of_100(decay=decay))
    assert found[9:80] == [2.0] * 71
    assert found[80] < 2.0 and found[-1] == pytest.approx(0.2)
    half = 0.5 if decay == "linear" else 1 - math.sqrt(0.5)
    assert found[89] == pytest.approx(0.2 + 1.8 * half)
    assert found[80:] == sorted(found[80:], reverse=True)


def test_cosine_falls_from_the_warm_up_to_the_last_step() -> None:
    found = rates(of_100("cosine"))
    assert found[-1] == pytest.approx(0.2) and found[54] == pytest.approx(0.2 + 1.8 * 0.5)
    assert found[9:] == sorted(found[9:], reverse=True)


def test_degenerate_lengths_are_numbers_too() -> None:
    assert rates(of_100(warmup_steps=0, decay_steps=0), 3) == [2.0] * 3
    assert rates(of_100(warmup_steps=0, decay_steps=3), 3)[-1] == pytest.approx(0.2)
    assert rates(of_100("cosine", warmup_steps=3), 3)[-1] == 2.0
    assert rates(of_100(warmup_steps=3, decay_steps=9), 5)[-1] == pytest.approx(0.2)


def test_groups_hold_every_tensor_once_and_split_by_decay_and_birth() -> None:
    born = {"decoder.layers.1.ffn.up.weight": 7, "decoder.layers.1.ffn.up.bias": 7}
    found = optimizer.groups(jobs.TINY, born)
    names = [name for group in found for name in group.names]
    assert sorted(names) == sorted(t.name for t in tensors(jobs.TINY))
    assert [(g.key.decay, g.key.born) for g in found] == [
        (True, 0), (True, 7), (False, 0), (False, 7),
    ]  # fmt: skip
    decayed = {name for group in found if group.key.decay for name in group.names}
    assert decayed == {t.name for t in tensors(jobs.TINY) if t.decay}
    assert optimizer.groups(jobs.TINY, born) == found


def test_scales_multiply_lr_decay_and_eps() -> None:
    name = "decoder.layers.0.self.q.weight"
    found = optimizer.groups(jobs.TINY, scales={name: optimizer.Scales(lr=0.5, wd=2, eps=3)})
    parameters = {t.name: torch.nn.Parameter(torch.zeros(1)) for t in tensors(jobs.TINY)}
    made = optimizer.build(found, parameters, jobs.optimizer_of())
    optimizer.set_lr(made, 0.01)
    mine = next(g for g in made.param_groups if any(p is parameters[name] for p in g["params"]))
    assert (mine["lr"], mine["weight_decay"], mine["eps"]) == (0.005, 0.2, 3e-6)
    others = [g for g in made.param_groups if g is not mine]
    assert all(g["lr"] == 0.01 and g["eps"] == 1e-6 for g in others)


POINTS = ((4, 1.0), (10, 0.5), (20, 0.1))


def test_piecewise_runs_along_its_points_and_stays_at_the_last() -> None:
    """RoFormer v2's shape: {32k: 1, 320k: .5, 1.28M: .1 ...} in updates."""
    found = rates(Schedule("piecewise", points=POINTS), 30)
    written = [0.5, 1.0, 1.5, 2.0, 2 - 1 / 6, 2 - 2 / 6, 1.5, 2 - 4 / 6, 2 - 5 / 6, 1.0, 0.92]
    assert found[:11] == pytest.approx(written)
    assert found[19:] == pytest.approx([0.2] * 11)
    steps = Schedule("piecewise", points=((0, 1.0), (2, 0.5)))
    assert rates(steps, 4) == pytest.approx([1.5, 1.0, 1.0, 1.0])


def test_inverse_root_is_the_peak_at_the_end_of_its_warm_up() -> None:
    found = rates(of_100("inverse_root"))
    assert found[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert (found[39], found[89]) == pytest.approx((2.0 / 2, 2.0 / 3))
    assert rates(Schedule("inverse_root"), 4) == pytest.approx([2, 2 / 2**0.5, 2 / 3**0.5, 1.0])


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"name": "piecewise"}, "points: has 0 points under piecewise"),
        ({"name": "wsd", "points": [[1, 1.0]]}, "points: has 1 points under wsd"),
        ({"name": "piecewise", "points": [[5, 1.0], [5, 0.5]]}, "they must rise"),
        ({"name": "piecewise", "points": [[5, -1.0]]}, "is negative"),
        ({"name": "piecewise", "points": [[5, 1.0]], "warmup_steps": 3}, "says its warm-up"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(section: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        from_dict(Schedule, section)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"bias_correction": False}, "bias_correction: is False, which adamw does not read"),
        ({"name": "adafactor", "beta2": 0.9}, "only adamw, lamb"),
        ({"ema": 1.0}, r"ema: is 1.0, must lie in \[0, 1\)"),
        ({"layer_decay": 0.0}, r"layer_decay: is 0.0, must lie in \(0, 1\]"),
        ({"name": "lamb", "lazy_rows": True}, "lazy_rows: is built for adamw"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(section: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        from_dict(Optimizer, {"lr": 0.1, **section})


def test_layers_learn_slower_the_deeper_they_lie() -> None:
    found = optimizer.groups(jobs.TINY, section=jobs.optimizer_of(layer_decay=0.5))
    scale = {name: group.key.layer_scale for group in found for name in group.names}
    assert scale["embed.tokens.weight"] == 0.125  # two layers and what stands behind them
    assert scale["decoder.layers.0.self.q.weight"] == 0.25
    assert scale["decoder.layers.1.self.q.weight"] == 0.5
    assert scale["decoder.final_norm.weight"] == 1.0


def test_decay_is_the_tables_or_everybodys() -> None:
    every = optimizer.groups(jobs.TINY, section=jobs.optimizer_of(decay="all"))
    assert all(group.key.decay for group in every)
    table = optimizer.groups(jobs.TINY, section=jobs.optimizer_of())
    decayed = {name for group in table if group.key.decay for name in group.names}
    assert decayed == {t.name for t in tensors(jobs.TINY) if t.decay}


def page(family: str = "cpm", **changes: Any) -> dict[str, Any]:
    """A run's page as plain data."""
    sizes = {"vocab": 8, "hidden": 4, "layers": 1, "heads": 2, "head_dim": 2, "ffn": 4}
    base: dict[str, Any] = {
        "model": {"family": family, **sizes},
        "data": {"train": [{"corpus": "none"}], "seq_len": 4},
        "batch": {"samples": 2, "micro": 1},
        "optimizer": {"lr": 0.1},
        "run": {"out": "none", "steps": 8},
    }
    return base | changes


GROWS = {"stages": [{"steps": 4}, {"steps": 4, "model": {"ffn": 4096}}], "run": {"out": "none"}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer": {"lr": 0.1, "lazy_rows": True}}, "embed.tokens.weight of cpm is tied"),
        ({"optimizer": {"lr": 0.1, "name": "muon"}} | GROWS, "muon_scale: is rms, a grown matrix"),
        (
            {"optimizer": {"lr": 0.1, "name": "muon", "muon_scale": "spectral"},
             "run": {"out": "none"},
             "stages": [{"steps": 4},
                        {"steps": 4, "model": {"hidden": 2048}, "grow": {"method": "su"}}]},
            "name: muon cannot go on as the small model did from matrices that grew by method su",
        ),
        (
            {"stages": [{"steps": 4}, {"steps": 4, "optimizer": {"name": "muon"}}],
             "run": {"out": "none"}},
            "stages.1.optimizer.name: cannot go from adamw to muon",
        ),
    ],
)  # fmt: skip
def test_check_refuses_what_a_rule_cannot_do_there(changes: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_dict(RunConfig, page(**changes))
    assert sentence in str(refused.value) and str(refused.value).count("\n") == 0


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ({}, (2.0, 0)),
        ({"name": "lamb", "ema": 0.9, "lookahead_every": 5}, (4.0, 0)),
        ({"name": "adafactor", "beta1": 0.0}, (0.0, 1)),
    ],
)
def test_what_a_rule_remembers_is_counted(section: Any, values: tuple[float, int]) -> None:
    spread, whole = moment_bytes(Optimizer(lr=0.1, **section), jobs.TINY)
    assert spread == values[0] * 4 * parameter_count(jobs.TINY)
    sizes = [shape(jobs.TINY, t) for t in tensors(jobs.TINY)]
    sides = sum(sum(size) if len(size) == 2 else size[0] for size in sizes)
    assert whole == values[1] * 4 * sides
