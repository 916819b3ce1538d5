"""Recompute by a budget keeps no more than it may and computes as little again as that allows; an
input that is offloaded comes back the same. Losses and gradients are those of no recompute.

Bytes are held against what saved-tensor hooks count (5 %: small things are left out of the count),
FLOPs against FlopCounterMode (1 %: log-n, norms), the choice against a search of all choices.
"""

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs.load import ConfigError, from_dict
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from configs.recompute import Recompute
from configs.run import RunConfig
from launch import cli
from pretrain import models, recompute
from pretrain.costs import Row
from pretrain.kept import Kept, kept_of
from tests.run_jobs import losses, page
from tests.saved_bytes import fused, rows_of, saved_bytes
from tests.worlds import World

OFF = {"dropout": 0.0, "attention_dropout": 0.0}
FAMILIES: dict[str, ModelConfig] = {
    "cpm": CPMConfig("cpm", 500, 64, 3, 4, 16, 256, positions=256, **OFF),
    "t5_pegasus": T5PegasusConfig("t5_pegasus", 500, 64, 2, 4, 16, 96, **OFF),
    "roformer": RoFormerConfig("roformer", 1, 500, 64, 3, 4, 16, 256, **OFF),
    "roformer v2": RoFormerConfig("roformer", 2, 500, 64, 3, 4, 16, 256, **OFF),
}
ROW, ROWS = Row(96, 40), 2
SHARES = (0.75, 0.4, 0.1)
"""Budgets: 0 is the least that can be kept, 1 is everything."""


def chosen(config: ModelConfig, share: float, offload: bool = False) -> tuple[Kept, float]:
    """The choice for a budget between the least and everything, and the budget in bytes."""
    full = Recompute("full", None, offload)
    most, least = (kept_of(config, ROW, ROWS, "fp32", how).device for how in ("none", full))
    budget = least + share * (most - least)
    how = Recompute("budget", budget / 2**30, offload)
    return kept_of(config, ROW, ROWS, "fp32", how), budget


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", ["cpm", "t5_pegasus", "roformer"])
def test_bytes_are_within_the_budget_and_are_those_that_autograd_keeps(
    family: str, share: float
) -> None:
    config = dataclasses.replace(FAMILIES[family], hidden=128, layers=6)
    kept, budget = chosen(config, share)
    assert kept.forward <= kept.device <= budget * (1 + 1e-9)
    model, biases = fused(config, torch.float32)
    recompute.apply(model, kept.by_block())
    given = rows_of(config, ROW, ROWS)
    # a decoder's head keeps what the last norm gives
    ends = model.logits if family == "cpm" else lambda hidden: hidden
    counted = saved_bytes(model, lambda: ends(model(*given)), biases)
    counted += sum(b.untyped_storage().nbytes() for b in biases.values())  # their gradients
    assert counted == pytest.approx(kept.forward, rel=0.05)
    # Negative control: without a budget more is kept.
    assert counted != pytest.approx(kept_of(config, ROW, ROWS, "fp32", "none").forward, rel=0.05)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("family", ["cpm", "t5_pegasus", "roformer"])
def test_no_other_choice_computes_much_less_again(family: str, share: float) -> None:
    """Of all choices of all blocks the best saves less than the work of one block more."""
    kept, budget = chosen(FAMILIES[family], share)
    ways = [[stack.ways() for _ in range(stack.layers)] for stack in kept.stacks]
    best = kept.flops
    for way in product(*(product(*of_stack) for of_stack in ways)):
        other = dataclasses.replace(kept, again=way)
        if other.device <= budget:
            best = min(best, other.flops)
    assert kept.flops - best < max(stack.flops(("forward",)) for stack in kept.stacks)
    assert kept.flops < kept_of(FAMILIES[family], ROW, ROWS, "fp32", "full").flops


def gradients(model: nn.Module, given: list[Any]) -> list[torch.Tensor]:
    """Of one forward and backward, with dropout from one seed."""
    model.zero_grad()
    torch.manual_seed(3)
    model.logits(model(*given)).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def lively(config: ModelConfig) -> nn.Module:
    model = models.build(config).train()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bits_and_flops_those_counted(family: str, dropout: float) -> None:
    config = dataclasses.replace(FAMILIES[family], dropout=dropout, attention_dropout=dropout)
    model, given = lively(config), rows_of(config, ROW, ROWS)
    with FlopCounterMode(display=False) as once:
        plain = gradients(model, given)
    for share, offload in ((0.6, False), (0.2, True)):
        kept, _ = chosen(config, share, offload)
        recompute.apply(model, kept.by_block(), offload)
        with FlopCounterMode(display=False) as counter:
            again = gradients(model, given)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
        more = counter.get_total_flops() - once.get_total_flops()
        assert more == pytest.approx(kept.flops * ROWS, rel=0.01)
    torch.manual_seed(4)  # Negative control: another seed of dropout is another gradient.
    recompute.apply(model, "none")
    other = model.logits(model(*given)).square().mean()
    first = torch.autograd.grad(other, next(model.parameters()))[0]
    assert torch.equal(first, plain[0]) == (dropout == 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_inputs_lie_on_the_host_and_are_counted_there(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAMILIES[family]
    kept = kept_of(config, ROW, ROWS, "fp32", Recompute("full", None, True))
    model, given, sent = lively(config), rows_of(config, ROW, ROWS), []
    out = recompute.Host._out
    monkeypatch.setattr(
        recompute.Host, "_out", lambda host, x: (sent.append(x.nbytes), out(host, x))[1]
    )
    recompute.apply(model, "full", offload=True)
    gradients(model, given)
    assert sum(sent) == kept.host > 0
    stay = kept_of(config, ROW, ROWS, "fp32", "full")
    assert stay.host == 0 and stay.forward - kept.forward == kept.host
    sent.clear()  # Negative control: without offloading nothing is sent.
    recompute.apply(model, "full")
    gradients(model, given)
    assert not sent


LAYOUTS = [
    (1, False),
    (3, True),
    *(pytest.param(*at, marks=pytest.mark.slow) for at in ((1, True), (3, False))),
]
BRIEF = {"schedule": {"warmup_steps": 2}, "run__steps": 8, "batch__micro": 2}
DROPOUT = {"model__dropout": 0.1, "model__attention_dropout": 0.1}


@pytest.mark.parametrize(("zero", "offload"), LAYOUTS)
def test_a_run_on_two_processes_learns_the_same(
    tmp_path: Path, tiny_corpus: Path, world2: World, zero: int, offload: bool
) -> None:
    """1e-6 relative on the loss of 8 steps, so on the gradients that led there, dropout on."""
    layout = {**BRIEF, **DROPOUT, "parallel__zero": zero}
    config = page(tmp_path / "none", tiny_corpus, **layout)
    world2.run("tests.run_jobs:go", config=config)
    most = kept_of(from_dict(RunConfig, config).model, 32, 2, "fp32", "none").device
    how = {"how": "budget", "budget_gib": 0.75 * most / 2**30, "offload": offload}
    again = page(tmp_path / "again", tiny_corpus, **layout, recompute=how)
    world2.run("tests.run_jobs:go", config=again)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)


def test_the_plan_shows_what_is_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(Path(__file__).parent.parent / "configs/runs/cpm-small-1gpu.yaml")]
    how = "recompute={how: budget, budget_gib: 3, offload: true}"
    assert cli.main([*words, "recompute=none"]) == 0 and "again" not in capsys.readouterr().out
    assert cli.main([*words, how]) == 0
    said = capsys.readouterr().out
    assert "recompute budget" in said and "computed again: decoder:" in said
    assert "on the host of each rank" in said
    assert cli.main([*words, "recompute={how: budget, budget_gib: 0.01}"]) == 2
    assert "recompute.budget_gib: is 0.01, the least that is kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"how": "budget"}, "recompute.budget_gib: is None, must be above 0"),
        ({"how": "full", "budget_gib": 2}, "recompute.budget_gib: is 2.0, and how is full"),
        ({"offload": True}, "recompute.offload: moves the inputs"),
        ("half", "recompute.how: is 'half', must be one of none, full, sublayer, budget"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, how: Any, says: str) -> None:
    with pytest.raises(ConfigError, match="recompute") as error:
        from_dict(RunConfig, page(tmp_path, tmp_path, recompute=how))
    assert says in str(error.value)
