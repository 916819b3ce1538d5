"""After tiling, AdamW under the exact rule trains the large model as it would the small one.

A plain float64 AdamW is the reference: moments from the state, lr, decay, eps and the weight in the
gradient's norm from the record's `scales`. Losses of 20 steps agree to 1e-10; the rounding of sums
in another order reaches 1e-13.
"""

import dataclasses
from typing import Any

import pytest
import torch

from configs.model import ModelConfig, tensors
from pretrain.growth import grow, model_config
from pretrain.models import build
from pretrain.state import State
from tests.test_growth_of_every_family import FAMILIES, PROBES, small

BETAS, LR, EPS, DECAY, CLIP = (0.9, 0.95), 1e-3, 1e-6, 0.1, 0.5
PLAIN = {"lr": 1.0, "wd": 1.0, "eps": 1.0, "clip": 1.0}


def losses(state: State, steps: int = 20, **without: float) -> list[float]:
    """`without`: a scale -> the number that stands in for every tensor's."""
    config = dataclasses.replace(model_config(state), dropout=0.0, attention_dropout=0.0)
    with torch.device("meta"):
        model = build(config)
    model.to_empty(device="cpu").double().train()
    weights = {n: state.read(f"weights/{n}").double() for n in state.names()}
    model.load_state_dict(weights)
    parameters = dict(model.named_parameters())
    m, v = (
        {n: state.read(f"optim/{slot}/{n}").double() for n in parameters}
        for slot in ("exp_avg", "exp_avg_sq")
    )
    scales = {n: {**PLAIN, **state.record.get("scales", {}).get(n, {}), **without} for n in m}
    decays = {t.name: t.decay for t in tensors(config)}
    found = []
    for step in range(steps):
        model.zero_grad()
        loss = _loss(model, config)
        loss.backward()
        found.append(loss.item())
        norm = sum(scales[n]["clip"] * p.grad.square().sum() for n, p in parameters.items()) ** 0.5
        shrink = min(1.0, CLIP / float(norm))
        with torch.no_grad():
            for n, p in parameters.items():
                scale, gradient = scales[n], p.grad * shrink
                age = state.record["updates"] - state.record["born"][n] + step + 1
                m[n] = BETAS[0] * m[n] + (1 - BETAS[0]) * gradient
                v[n] = BETAS[1] * v[n] + (1 - BETAS[1]) * gradient**2
                lr = LR * scale["lr"]
                p -= lr * scale["wd"] * DECAY * decays[n] * p
                root = (v[n] / (1 - BETAS[1] ** age)).sqrt()
                p -= lr * m[n] / (1 - BETAS[0] ** age) / (root + EPS * scale["eps"])
    return found


def _loss(model: Any, config: ModelConfig) -> torch.Tensor:
    sides = (PROBES, torch.arange(PROBES.shape[1]).expand_as(PROBES), None)
    hidden = model(*sides, *sides) if config.family == "t5_pegasus" else model(*sides)
    logits = model.logits(hidden)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), PROBES[:, 1:].flatten())


def gap(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def gentle(family: str) -> State:
    """Moments of the size of gradients: large ones would hide what the gradient does."""
    state = small(family)

    def lesser(key: str) -> Any:
        return dataclasses.replace(
            state.entries[key],
            read=lambda: state.entries[key].read() * (1e-2 if "sq" not in key else 1e-4),
        )

    moments = {key: lesser(key) for key in state.entries if key.startswith("optim/")}
    return State({**state.entries, **moments}, state.record)


@pytest.mark.parametrize(("family", "factor"), [("cpm", 3), ("t5", 2), ("v1", 2), ("v2", 3)])
def test_twenty_steps_are_the_small_models(family: str, factor: int) -> None:
    before = gentle(family)
    target = dataclasses.replace(FAMILIES[family], hidden=32 * factor)
    grown = grow(before, target, 1, rounded=False)
    course = losses(before)
    assert course[-1] < course[0] - 0.01
    assert gap(course, losses(grown)) <= 1e-10
    for scale in ("lr", "clip"):  # negative controls
        assert gap(course, losses(grown, **{scale: 1.0})) > 1e-6
    flat = {k: dataclasses.replace(e) for k, e in grown.entries.items()}
    for key in [k for k in flat if "optim/exp_avg_sq/" in k]:
        flat[key] = dataclasses.replace(flat[key], read=lambda e=flat[key]: 4 * e.read())
    assert gap(course, losses(State(flat, grown.record))) > 1e-6


@pytest.mark.parametrize("family", ["cpm", "v2"])
def test_scales_add_up_over_two_growths(family: str) -> None:
    before = gentle(family)
    once = grow(before, dataclasses.replace(FAMILIES[family], hidden=64), 1, rounded=False)
    twice = grow(once, dataclasses.replace(model_config(once), hidden=128), 1, rounded=False)
    direct = grow(before, dataclasses.replace(FAMILIES[family], hidden=128), 1, rounded=False)
    assert twice.record["scales"] == direct.record["scales"]
    assert gap(losses(before, 5), losses(twice, 5)) <= 1e-10
