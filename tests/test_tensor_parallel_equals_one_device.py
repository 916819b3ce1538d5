"""Matrices cut over two devices compute what one device computes."""

from dataclasses import replace

import pytest
import torch

from tests import zero_jobs as jobs
from tests.worlds import World

STEPS = 30


@pytest.mark.parametrize("zero", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_tensor_two_by_data_two_equals_one_process(world1: World, world4: World, zero: int) -> None:
    """Losses within 1e-5 over 30 steps, gradient norms within 1e-4: sums in another order."""
    alone = world1.run(jobs.train, zero=1, steps=STEPS)[0]
    ranks = world4.run(jobs.train, zero=zero, tensor=2, steps=STEPS, micro=2)
    assert len({tuple(rank["losses"]) for rank in ranks}) == 1
    for what, most in (("losses", 1e-5), ("norms", 1e-4)):
        pairs = zip(ranks[0][what], alone[what], strict=True)
        assert max(abs(a - b) / b for a, b in pairs) < most, what


@pytest.mark.parametrize("said", [None, 60, 30])
def test_a_cut_model_says_what_a_whole_one_says(
    world1: World, world2: World, said: int | None
) -> None:
    """Masked words too, where the mask begins in the second half and in the first."""
    config = replace(jobs.TINY, words_said=said)
    one = world1.run(jobs.train, zero=1, steps=0, look=True, config=config)[0]
    two = world2.run(jobs.train, zero=1, tensor=2, steps=0, look=True, config=config)
    halves = torch.cat([rank["logits"] for rank in two], dim=-1)
    assert (halves - one["logits"]).abs().max() < 1e-5  # fp32, logits of size 1
    assert bool((halves[:, said or 96 :] == -1e4).all())
    assert two[0]["evaluated"] == pytest.approx(one["evaluated"], rel=1e-6)


def test_bf16_under_tensor_parallelism_follows_fp32(world2: World) -> None:
    """bf16 has 8 bits; the partial sums of a row-cut matrix are rounded once more."""
    full = world2.run(jobs.train, zero=1, tensor=2, steps=8)[0]["losses"]
    half = world2.run(jobs.train, zero=1, tensor=2, steps=8, precision="bf16")[0]["losses"]
    assert max(abs(a - b) / b for a, b in zip(half, full, strict=True)) < 3e-3


def test_the_head_in_turns_under_tensor_parallelism(world2: World) -> None:
    whole = world2.run(jobs.train, zero=1, tensor=2, steps=4)[0]["losses"]
    turns = world2.run(jobs.small_turns, logits=48 * 13, zero=3, tensor=2, steps=4)[0]["losses"]
    assert max(abs(a - b) / b for a, b in zip(turns, whole, strict=True)) < 1e-6


def test_dropout_differs_in_the_cut_region_only(world2: World) -> None:
    one, other = world2.run(jobs.dropout_masks)
    assert not torch.equal(one["region"], other["region"])
    assert torch.equal(one["before"], other["before"])
    assert torch.equal(one["after"], other["after"])


def test_a_run_with_dropout_keeps_the_ranks_of_a_group_together(world2: World) -> None:
    """What both ranks hold whole (norms, positions) must stay the same number on both."""
    config = replace(jobs.TINY, dropout=0.2, attention_dropout=0.2)
    one, other = world2.run(jobs.replicated_after, steps=5, config=config)
    assert one.keys() == other.keys() and len(one) == 15
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_what_does_not_divide_is_refused_in_a_sentence(world2: World, world1: World) -> None:
    config = replace(jobs.TINY, heads=3, vocab=97, ffn=65)
    sentence = world2.run(jobs.refused, zero=1, tensor=2, config=config)[0]
    lines = sentence.splitlines()
    assert [line.split(":")[0] for line in lines] == ["ffn", "heads", "vocab"]
    assert all("parallel.tensor=2" in line and "不能整除" in line for line in lines)
    assert "parallel.tensor" in world1.run(jobs.refused, zero=1, tensor=2)[0]
