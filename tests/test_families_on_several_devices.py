"""Promise: T5 PEGASUS and RoFormer train alike on one device and on several.

Tolerances are relative, on losses near 4.7, dropout 0: sums in another order move a loss by a few
1e-7, and 30 steps of Adam let that grow to some 1e-6.
"""

from functools import cache
from typing import Any

import pytest
import torch

from tests import family_jobs as jobs
from tests.worlds import World

STEPS = 30
ALL = sorted(jobs.FAMILIES)


def apart(one: list[float], other: list[float]) -> float:
    """Largest relative difference."""
    assert len(one) == len(other) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def alone(world1: World) -> Any:
    """family -> its run on one process, ZeRO 1."""

    @cache
    def run(family: str) -> dict[str, Any]:
        return world1.run(jobs.train, family=family, zero=1, steps=STEPS)[0]

    return run


def same(ranks: list[dict[str, Any]], one: dict[str, Any], tensor: int = 1) -> None:
    """Losses and gradient norms of a run on several devices are those of one process."""
    assert len({tuple(rank["losses"]) for rank in ranks}) == 1
    steps = len(ranks[0]["losses"])
    assert apart(ranks[0]["losses"], one["losses"][:steps]) < 1e-5
    assert apart(ranks[0]["norms"], one["norms"][:steps]) < 1e-4
    logits = torch.cat([rank["logits"] for rank in ranks[:tensor]], dim=-1)
    assert (logits - one["logits"]).abs().max() < 1e-5  # fp32, logits of size 1


@pytest.mark.parametrize("family", ALL)
def test_zero_3_on_two_processes_equals_one(world2: World, alone: Any, family: str) -> None:
    """ZeRO 3 gathers the table that T5's encoder and decoder share, twice a forward."""
    same(world2.run(jobs.train, family=family, zero=3, steps=6, micro=2), alone(family))
    assert alone(family)["losses"][-1] < alone(family)["losses"][0] + 0.2


@pytest.mark.parametrize("family", ALL)
def test_tensor_two_equals_one_process(world2: World, alone: Any, family: str) -> None:
    ranks = world2.run(jobs.train, family=family, zero=1, tensor=2, steps=10, micro=4)
    same(ranks, alone(family), tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_layout_equals_one_process(
    world2: World, world4: World, alone: Any, family: str, zero: int
) -> None:
    """ZeRO 0 to 3 on two processes, and tensor 2 x data 2 on four, over 30 steps."""
    one = alone(family)
    same(world2.run(jobs.train, family=family, zero=zero, steps=STEPS, micro=2), one)
    four = world4.run(
        jobs.train, timeout_s=500, family=family, zero=zero, tensor=2, steps=STEPS, micro=2
    )
    same(four, one, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("how", ["full", "sublayer"])
def test_recompute_changes_nothing_under_zero_3(
    world2: World, alone: Any, family: str, how: str
) -> None:
    ranks = world2.run(jobs.train, family=family, zero=3, steps=10, recomputed=how)
    assert apart(ranks[0]["losses"], alone(family)["losses"][:10]) < 1e-6


@pytest.mark.parametrize("family", ALL)
def test_dropout_keeps_the_ranks_of_a_group_together(world2: World, family: str) -> None:
    """What both ranks hold whole must stay the same number on both."""
    dropout = {"dropout": 0.2, "attention_dropout": 0.2}
    ranks = world2.run(jobs.train, family=family, zero=1, tensor=2, steps=5, **dropout)
    assert ranks[0]["held"] and ranks[0]["losses"] == ranks[1]["losses"]
    for name, value in ranks[0]["held"].items():
        assert torch.equal(value, ranks[1]["held"][name]), name


@pytest.mark.parametrize("family", ALL)
def test_bf16_follows_fp32(world2: World, alone: Any, family: str) -> None:
    """bf16 has 8 bits; the partial sums of a row-cut matrix are rounded once more."""
    half = world2.run(jobs.train, family=family, zero=1, tensor=2, steps=8, precision="bf16")[0]
    assert apart(half["losses"], alone(family)["losses"][:8]) < 1e-2


def test_the_ramp_follows_the_steps_of_the_run(world1: World) -> None:
    """Also after a load; and a model that adds less says something else (the control)."""
    shares, losses = world1.run(jobs.ramp_shares, steps=6)[0]
    assert shares == [0.5, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert len(set(losses[:4])) == 4 and losses[3] == losses[4] == losses[5]
