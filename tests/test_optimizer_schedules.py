"""Learning rates are pure functions of the step; groups are pure functions of the table."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from configs.model import tensors
from pretrain import optimizer
from tests import zero_jobs as jobs


@dataclass(frozen=True)
class Section:
    """As configs.run.Schedule."""

    name: str = "wsd"
    warmup_steps: int = 10
    decay_steps: int = 20
    decay: str = "linear"
    min_ratio: float = 0.1


def rates(section: Section, steps: int = 100, lr: float = 2.0) -> list[float]:
    return [optimizer.schedule(step, section, lr, steps) for step in range(steps)]


@pytest.mark.parametrize("name", ["wsd", "cosine", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(name: str) -> None:
    found = rates(Section(name))
    assert found[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert max(found) == 2.0 and all(isinstance(rate, float) for rate in found)


@pytest.mark.parametrize("decay", ["linear", "sqrt"])
def test_wsd_stays_then_decays_to_the_last_step(decay: str) -> None:
    found = rates(Section(decay=decay))
    assert found[9:80] == [2.0] * 71
    assert found[80] < 2.0 and found[-1] == pytest.approx(0.2)
    half = 0.5 if decay == "linear" else 1 - math.sqrt(0.5)
    assert found[89] == pytest.approx(0.2 + 1.8 * half)
    assert found[80:] == sorted(found[80:], reverse=True)


def test_cosine_falls_from_the_warm_up_to_the_last_step() -> None:
    found = rates(Section("cosine"))
    assert found[-1] == pytest.approx(0.2) and found[54] == pytest.approx(0.2 + 1.8 * 0.5)
    assert found[9:] == sorted(found[9:], reverse=True)


def test_degenerate_lengths_are_numbers_too() -> None:
    assert rates(Section(warmup_steps=0, decay_steps=0), 3) == [2.0] * 3
    assert rates(Section(warmup_steps=0, decay_steps=3), 3)[-1] == pytest.approx(0.2)
    assert rates(Section("cosine", warmup_steps=3), 3)[-1] == 2.0
    assert rates(Section(warmup_steps=3, decay_steps=9), 5)[-1] == pytest.approx(0.2)


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
    made = optimizer.build(found, parameters, jobs.Section())
    optimizer.set_lr(made, 0.01)
    mine = next(g for g in made.param_groups if any(p is parameters[name] for p in g["params"]))
    assert (mine["lr"], mine["weight_decay"], mine["eps"]) == (0.005, 0.2, 3e-6)
    others = [g for g in made.param_groups if g is not mine]
    assert all(g["lr"] == 0.01 and g["eps"] == 1e-6 for g in others)


def test_state_made_ahead_equals_the_optimizers_own() -> None:
    """fill_state() must make what torch makes lazily, or a resumed step would differ."""
    torch.manual_seed(0)
    group = [optimizer.Group(optimizer.GroupKey(True), ("w",))]
    start, gradient = torch.randn(5), torch.randn(5)
    after = []
    for ahead in (False, True):
        weight = torch.nn.Parameter(start.clone())
        made = optimizer.build(group, {"w": weight}, replace(jobs.Section(), lr=0.1))
        if ahead:
            optimizer.fill_state(made, weight)
        weight.grad = gradient.clone()
        made.step()
        after.append((weight.detach(), made.state[weight]))
    assert torch.equal(after[0][0], after[1][0])
    assert after[0][1].keys() == after[1][1].keys()
