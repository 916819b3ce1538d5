"""100 random pairs of sizes per family: the reachable ones are proven, the others refused with a
nearest size that is reachable."""

import dataclasses
import random
import re

import pytest
import torch

from configs.grown import refusal
from configs.model import ModelConfig
from pretrain import proof
from pretrain.growth import grow
from tests.growing import trained
from tests.test_growth_of_every_family import FAMILIES, POST_NORM

PAIRS = 100
PROBES = torch.arange(40).view(2, 20) % 40


def sized(config: ModelConfig, dice: random.Random) -> ModelConfig:
    return dataclasses.replace(
        config,
        hidden=dice.randrange(8, 65),
        layers=dice.randrange(1, 4),
        heads=dice.randrange(1, 5),
        head_dim=2 * dice.randrange(1, 7),
        ffn=dice.randrange(8, 65),
        vocab=dice.randrange(40, 90),
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_pairs(family: str) -> None:
    """1e-12 of the logits' deviation; 3e-12 behind a post-norm, whose eps of 1e-12 each new layer
    adds once, more where a stream's variance is small."""
    dice = random.Random(family)
    proven = refused = 0
    tolerance = 3e-12 if family in (*POST_NORM, "v2") else 1e-12
    while proven + refused < PAIRS:
        now, to = sized(FAMILIES[family], dice), sized(FAMILIES[family], dice)
        if dice.random() < 0.75:  # most pairs upwards, or hardly any could be reached
            sizes = {k: max(getattr(now, k), getattr(to, k)) for k in ("hidden", "layers", "heads")}
            sizes |= {k: max(getattr(now, k), getattr(to, k)) for k in ("head_dim", "ffn", "vocab")}
            if family in POST_NORM:
                sizes["hidden"] = now.hidden * dice.choice((1, 2))
            to = dataclasses.replace(to, **sizes)
        if sentence := refusal(now, to):
            nearest = dict(re.findall(r"(\w+)=(\d+)\b", sentence))
            reachable = dataclasses.replace(to, **{k: int(v) for k, v in nearest.items()})
            assert refusal(now, reachable) is None, sentence
            refused += 1
            continue
        before = trained(now)
        exact = proof.logits(before, PROBES, torch.float64)
        grown = proof.logits(grow(before, to, 1, rounded=False), PROBES, torch.float64)
        far = float((grown[..., : now.vocab] - exact).abs().max() / exact.std())
        assert far <= tolerance, f"{now} -> {to}"
        proven += 1
    assert proven >= 50 and refused >= 10
