"""What stands beside an update rule keeps its promise: EMA, Lookahead, rows that were not used.

One process, no DeepSpeed: an Update over two plain tensors, against the definitions written out.
fp32 against float64: 1e-6 of numbers of about 1.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.model import T5PegasusConfig, shape, tensors
from configs.optimizers import Optimizer
from pretrain import checkpoint
from pretrain import optimizer as optimizers
from pretrain.optimizers.fragments import Fragment, Logical
from pretrain.optimizers.update import Update
from pretrain.parallel import Mesh
from pretrain.state import Entry, State

CONFIG = T5PegasusConfig(
    family="t5_pegasus", vocab=6, hidden=4, layers=1, heads=2, head_dim=2, ffn=4
)
WORDS, FIRST = "embed.tokens.weight", "encoder.layers.0.self.q.weight"


def made(
    config: T5PegasusConfig = CONFIG, born: dict[str, int] | None = None, **section: Any
) -> tuple[Update, dict[str, Tensor]]:
    """An update over every tensor of a tiny model, weights drawn, and the weights by name."""
    generator = torch.Generator().manual_seed(1)
    parameters = {
        t.name: torch.nn.Parameter(torch.randn(shape(config, t), generator=generator))
        for t in tensors(config)
    }
    page = Optimizer(**({"lr": 0.1, "clip_norm": 0.0} | section))
    groups = optimizers.groups(config, born, section=page)
    update = optimizers.build(groups, parameters, page)
    fragments = [Fragment(n, 0, p.numel(), p, 0, 1) for n, p in parameters.items()]
    mesh = Mesh(0, 1, 1, 0, 1, 0, torch.device("cpu"))
    flats = [(group, p) for group in update.groups for p in group["params"]]
    update.begin(flats, Logical(fragments, config, mesh), lambda: None)
    for slot in ("ema", "slow"):
        for flat in update.flats:
            if slot in update.state[flat]:
                update.state[flat][slot].copy_(flat.detach())  # as Partitions.load does
    return update, dict(parameters)


def step(update: Update, seed: int, seen: list[int] | None = None) -> None:
    """One update with random gradients, the same whatever the groups; `seen` are used words."""
    generator = torch.Generator().manual_seed(seed)
    for f in update.logical.fragments:
        f.flat.grad = torch.randn(f.flat.shape, generator=generator)
        if seen is not None and f.name == WORDS:
            f.flat.grad[[row for row in range(CONFIG.vocab) if row not in seen]] = 0.0
    update.step()


def test_an_average_is_that_of_the_weights_after_each_update() -> None:
    """Weights decay ** age, divided by their sum: bert4keras' EMA with its correction."""
    decay = 0.9
    update, weights = made(ema=decay)
    history = []
    for number in range(12):
        step(update, number)
        history.append(weights[FIRST].detach().double().clone())
    shares = torch.tensor([decay**age for age in reversed(range(12))], dtype=torch.float64)
    expected = sum(s * w for s, w in zip(shares / shares.sum(), history, strict=True))
    assert torch.allclose(update.state[weights[FIRST]]["ema"].double(), expected, atol=1e-6)
    assert not torch.allclose(history[-1], expected, atol=1e-2)


def test_lookahead_goes_back_to_slow_weights_that_began_at_the_weights() -> None:
    plain, fast_only = made()
    update, weights = made(lookahead_every=3, lookahead_share=0.5)
    slow = weights[FIRST].detach().clone()
    for number in range(3):
        step(plain, number)
        step(update, number)
        if number < 2:
            assert torch.equal(weights[FIRST], fast_only[FIRST])
    slow.lerp_(fast_only[FIRST].detach(), 0.5)
    assert torch.allclose(weights[FIRST], slow, atol=1e-7)
    assert torch.equal(update.state[weights[FIRST]]["slow"], weights[FIRST])
    step(update, 7)
    assert not torch.equal(update.state[weights[FIRST]]["slow"], weights[FIRST])


def test_rows_that_were_not_used_stay_and_the_others_are_adams() -> None:
    lazy, weights = made(lazy_rows=True)
    plain, others = made()
    for number, seen in enumerate(([0, 1], [1, 4], [0])):
        before = weights[WORDS].detach().clone(), lazy.state[weights[WORDS]]["exp_avg"].clone()
        step(lazy, number, seen)
        step(plain, number, seen)
        unused = [row for row in range(CONFIG.vocab) if row not in seen]
        assert torch.equal(weights[WORDS][unused], before[0][unused])
        assert torch.equal(lazy.state[weights[WORDS]]["exp_avg"][unused], before[1][unused])
        if number == 0:  # later the moments differ, as they must
            assert torch.allclose(weights[WORDS][seen], others[WORDS][seen], atol=1e-6)
    assert torch.equal(weights[FIRST], others[FIRST])
    assert not torch.equal(weights[WORDS][1], others[WORDS][1])  # its moments waited


def test_a_step_that_is_not_finite_changes_nothing_beside_the_weights_either() -> None:
    update, weights = made(ema=0.9, lookahead_every=1, name="lamb")
    step(update, 0)
    kept = {k: v.clone() for k, v in update.state[weights[FIRST]].items()}, weights[FIRST].clone()
    update.judge = lambda norm: torch.ones(())
    step(update, 1)
    assert torch.equal(weights[FIRST], kept[1])
    assert all(torch.equal(update.state[weights[FIRST]][k], v) for k, v in kept[0].items())


@pytest.mark.parametrize("name", ["lamb", "rms_adamw", "adafactor", "muon", "adamw"])
def test_what_is_frozen_stays_under_every_rule(name: str) -> None:
    """A stage freezes by factors of zero (pretrain/train.py)."""
    update, weights = made(name=name)
    for group in update.groups:
        group["lr_scale"], group["weight_decay"] = 0.0, 0.0
    optimizers.set_lr(update, 0.1)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    step(update, 1)
    assert all(torch.equal(weights[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("name", ["lamb", "rms_adamw", "adafactor"])
def test_a_young_tensor_counts_as_its_elders_until_it_has_grown(name: str) -> None:
    """A new layer's output, near zero: its step is as long as an old layer's."""
    config = replace(CONFIG, layers=3, hidden=16, ffn=16, head_dim=8)
    old, new, oldest = (f"decoder.layers.{i}.self.o.weight" for i in range(3))

    def first_step(born: dict[str, int]) -> dict[str, float]:
        update, weights = made(config, born, name=name, weight_decay=0.0)
        with torch.no_grad():
            weights[new].mul_(1e-4)
            weights[oldest].mul_(2)
        before = {key: weight.detach().clone() for key, weight in weights.items()}
        step(update, 1)
        return {k: float((weights[k].detach() - before[k]).norm()) for k in (old, new, oldest)}

    grown, plain = first_step({new: 5}), first_step({})
    mean = (grown[old] + grown[oldest]) / 2
    # random gradients: the lengths of three directions differ by some hundredths under adafactor
    assert grown[new] == pytest.approx(mean, rel=0.1)
    assert grown[old] == pytest.approx(plain[old]), "the others step as ever"
    assert plain[new] < 0.05 * mean, "born with the rest it would be kept where it is"


@pytest.mark.parametrize("name", ["lamb", "rms_adamw", "adafactor"])
def test_a_young_tensor_that_has_grown_counts_as_itself(name: str) -> None:
    """Larger than its elders' mean, it steps as if it were one of them."""
    config = replace(CONFIG, layers=2)
    new = "decoder.layers.1.self.o.weight"
    changed = []
    for born in ({new: 5}, {}):
        update, weights = made(config, born, name=name)
        with torch.no_grad():
            weights[new].mul_(3)
        step(update, 1)
        changed.append(weights[new].detach().clone())
    assert torch.equal(*changed)


def test_a_checkpoint_speaks_by_its_average_where_its_name_says_so(tmp_path: Path) -> None:
    entries = {
        f"{kind}/{WORDS}": Entry((2,), "float32", lambda value=value: torch.full((2,), value))
        for kind, value in (("weights", 1.0), ("optim/ema", 2.0), ("optim/exp_avg", 3.0))
    }
    run = tmp_path / "run"
    folder = run / "checkpoints" / checkpoint.checkpoint_name(0, 5)
    checkpoint.write_state(folder, State(entries, {"model": {"family": "t5_pegasus"}, "step": 5}))
    for name in (run, folder):
        assert checkpoint.read(checkpoint.resolve(name)).read(f"weights/{WORDS}").tolist() == [1, 1]
        named = checkpoint.resolve(f"{name}@ema")
        assert named == folder and (named / "state.json").exists()
        state = checkpoint.read(named)
        assert state.read(f"weights/{WORDS}").tolist() == [2, 2]
        assert state.names("optim/exp_avg") == [] and state.record["step"] == 5
    without = State({f"weights/{WORDS}": entries[f"weights/{WORDS}"]}, {"model": {"family": "cpm"}})
    checkpoint.write_state(folder, without)
    with pytest.raises(ValueError, match=r"keeps no average.*optimizer\.ema"):
        checkpoint.read(checkpoint.resolve(f"{run}@ema"))
