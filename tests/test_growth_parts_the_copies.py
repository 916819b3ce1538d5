"""Copies are locked to each other; noise and unequal splits part them and keep the function.

Float64 as in test_growth_of_every_family.py. A copy without either stays within rounding of its
twin (1e-9 of its size after 10 steps, another order of summation); with one, it is further away
than 1e-3. Layers are no twins for long: behind the first step their inputs differ.
"""

import dataclasses
from typing import Any

import pytest
import torch

from configs.grown import Growing, idle, refusal
from configs.model import ModelConfig, tensors
from pretrain import proof
from pretrain.growth import grow, model_config
from pretrain.growth.copies import drawn, evenly
from pretrain.models import build
from pretrain.state import Entry, State
from tests.growing import changed
from tests.test_growth_of_every_family import FAMILIES, PROBES, far, small

WAYS = {
    "noise": Growing(added="copied", noise=0.1),
    "split": Growing(added="copied", split=0.7),
    "both": Growing(added="copied", noise=0.05, split=0.6),
}
LOCKED = Growing(added="copied")
SIZES: list[dict[str, int]] = [{"hidden": 64}, {"ffn": 128}, {"heads": 8}, {"layers": 4}]
LR, STEPS = 1e-2, 10


def larger(family: str, sizes: dict[str, int]) -> ModelConfig:
    if family == "t5" and "ffn" in sizes:
        sizes = {**sizes, "ffn": 96}
    return dataclasses.replace(FAMILIES[family], **sizes, dropout=0.0, attention_dropout=0.0)


def gradients(state: State, **drops: float) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The float64 model of a state, and the gradient of its loss on the probes by name."""
    none = {"dropout": 0.0, "attention_dropout": 0.0}
    config = dataclasses.replace(model_config(state), **{**none, **drops})
    with torch.device("meta"):
        model = build(config)
    model.to_empty(device="cpu").double()
    model.load_state_dict({n: state.read(f"weights/{n}").double() for n in state.names()})
    backward(model, config)
    return model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def backward(model: Any, config: ModelConfig) -> None:
    model.zero_grad()
    sides = (PROBES, torch.arange(PROBES.shape[1]).expand_as(PROBES), None)
    hidden = model(*sides, *sides) if config.family == "t5_pegasus" else model(*sides)
    logits = model.logits(hidden)[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), PROBES[:, 1:].flatten()).backward()


def trained_on(state: State, steps: int, **drops: float) -> dict[str, torch.Tensor]:
    """The weights after Adam steps in float64."""
    model, _ = gradients(state, **drops)
    config = model_config(state)
    adam = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(steps):
        backward(model, config)
        adam.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def apart(weights: dict[str, torch.Tensor], sizes: dict[str, int], config: ModelConfig) -> float:
    """How far added ones are from their twins, the nearest old ones, as a share of their size."""
    stack = "decoder" if config.family == "cpm" else "encoder"
    if "hidden" in sizes:
        rows = weights["embed.tokens.weight"].T
    elif "ffn" in sizes:
        rows = weights[f"{stack}.layers.0.ffn.up.weight"]
    else:
        rows = weights[f"{stack}.layers.0.self.v.weight"]
    old, added = rows.chunk(2)
    far = (added[:, None] - old[None]).norm(dim=-1).amin(1)
    return float(far.norm() / old.norm())


@pytest.mark.parametrize("way", ["split", "both"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_kept(family: str, sizes: dict[str, int], way: str) -> None:
    before = small(family)
    found = proof.prove(before, grow(before, larger(family, sizes), 1, WAYS[way]), PROBES)
    assert found["float64"]["max_difference"] <= 1e-12 * found["float64"]["std"]
    assert found["float32"]["max_difference"] <= found["float32"]["tolerance"]
    assert found["kept"] and found["not_as_computed"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_at_once_and_again(family: str) -> None:
    """Copies of copies, of sizes that are no multiples, all by noise and unequal splits."""
    before = grown = small(family)
    for sizes in (
        {"hidden": 64, "ffn": 100, "heads": 6, "head_dim": 16, "layers": 3},
        {"hidden": 128, "ffn": 130, "heads": 7, "layers": 5},
    ):
        to = dataclasses.replace(model_config(grown), **sizes)
        grown = grow(grown, to, 2, WAYS["both"], rounded=False)
    assert far(before, grown) <= 1e-12


@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_part(family: str, sizes: dict[str, int]) -> None:
    config = larger(family, sizes)
    locked = grow(small(family), config, 1, LOCKED, rounded=False)
    assert apart(trained_on(locked, STEPS), sizes, config) < 1e-9  # the negative control
    for way in (WAYS["noise"], WAYS["split"]):
        parted = grow(small(family), config, 1, way, rounded=False)
        weights = {n: parted.read(f"weights/{n}").double() for n in parted.names()}
        assert apart(weights, sizes, config) == 0
        assert apart(trained_on(parted, STEPS), sizes, config) > 1e-3


@pytest.mark.parametrize("drops", [{}, {"dropout": 0.1}, {"attention_dropout": 0.1}], ids=str)
@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ({"hidden": 64}, LOCKED),
        ({"hidden": 64, "ffn": 128, "heads": 8}, Growing()),  # new units are copied with the width
        ({"hidden": 64, "layers": 4}, Growing(new_layers="paired")),
        ({"ffn": 128}, LOCKED),
        ({"ffn": 128, "layers": 4}, Growing(added="copied", new_layers="paired")),
        ({"heads": 8}, LOCKED),
        ({"hidden": 64, "layers": 4}, Growing(method="stack")),
        ({"ffn": 128}, Growing(method="stack", added="copied")),
        ({"hidden": 64}, Growing(method="bert2bert")),
        ({"ffn": 128}, Growing(method="bert2bert", split=0.7)),  # it draws, nothing splits there
        ({"heads": 8}, Growing(method="bert2bert", noise=0.1)),
        ({"hidden": 64, "ffn": 128}, Growing(method="bert2bert_aki")),
        ({"ffn": 128}, Growing(method="bert2bert_aki")),
        ({"hidden": 64, "ffn": 128}, Growing(method="random")),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_nothing_parts_is_told(
    family: str, sizes: dict[str, int], how: Growing, drops: dict[str, float]
) -> None:
    to = dataclasses.replace(larger(family, sizes), **drops)
    if refusal(FAMILIES[family], to, how):
        pytest.skip("the family cannot grow so")
    grown = grow(small(family), to, 1, how, rounded=False)
    alike = apart(trained_on(grown, STEPS, **drops), sizes, model_config(grown)) < 1e-9
    told = [s for s in idle(FAMILIES[family], to, how, False) if "copies of" in s]
    assert bool(told) == alike


def stream_rank(weights: dict[str, torch.Tensor], config: ModelConfig) -> int:
    """Dimensions that the residual stream uses behind the last layer, on random tokens: singular
    values above 1e-6 of the largest (locked copies leave 1e-9 of it, parted ones 1e-4)."""
    with torch.device("meta"):
        model = build(config)
    model.to_empty(device="cpu").double().eval()
    model.load_state_dict(weights)
    tokens = torch.randint(97, (16, 20), generator=torch.Generator().manual_seed(1))
    sides = (tokens, torch.arange(20).expand_as(tokens), None)
    with torch.no_grad():
        hidden = model(*sides, *sides) if config.family == "t5_pegasus" else model(*sides)
    values = torch.linalg.svdvals(hidden.flatten(0, 1))
    return int((values > 1e-6 * values[0]).sum())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_uses_more_than_the_old_dimensions(family: str) -> None:
    """After 50 steps, as GROWTH of record 10 asks: locked copies stay in the small model's 32."""
    config, ranks = larger(family, {"hidden": 64}), {}
    for name, way in {"locked": LOCKED, **WAYS}.items():
        grown = grow(small(family), config, 1, way, rounded=False)
        ranks[name] = stream_rank(trained_on(grown, 50), model_config(grown))
    assert ranks["locked"] <= 32  # the negative control
    assert all(ranks[name] > 48 for name in WAYS), ranks


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_layers_part_at_once_with_noise(family: str) -> None:
    """Copies of one layer: their first update is the same without noise, not with it."""
    at = "decoder" if family == "cpm" else "encoder"
    outputs = [f"{at}.layers.{layer}.self.o.weight" for layer in (2, 3)]

    def distance(how: Growing) -> float:
        before = small(family)
        grown = grow(before, larger(family, {"layers": 6}), 1, how, rounded=False)
        _, found = gradients(grown)
        one, other = (found[name] for name in (f"{at}.layers.1.self.o.weight", outputs[0]))
        assert float(one.norm()) > 0
        return float((one - other).norm() / one.norm())

    # a post-norm divides by the same deviation again: eps apart
    assert distance(LOCKED) < 1e-9
    assert distance(WAYS["noise"]) > 1e-3


@pytest.mark.parametrize("way", [WAYS["noise"], Growing(method="su", noise=0.1)])
def test_copies_of_units_part_in_silent_layers_too(way: Growing) -> None:
    """Nothing reads them there, so that noise on their readers alone would leave them locked."""
    config = larger("cpm", {"layers": 4, "ffn": 128})

    def distance(how: Growing) -> float:
        weights = trained_on(grow(small("cpm"), config, 1, how, rounded=False), STEPS)
        one, other = weights["decoder.layers.1.ffn.down.weight"].chunk(2, dim=1)
        assert float(one.norm()) > 0
        return float((one - other).norm() / one.norm())

    assert distance(dataclasses.replace(way, noise=0.0)) < 1e-9  # the negative control
    assert distance(way) > 1e-2


def test_silent_copies_have_other_noise_when_they_grow_again() -> None:
    name, first = "weights/decoder.layers.1.self.q.weight", larger("cpm", {"layers": 4})
    once = grow(small("cpm"), first, 1, WAYS["noise"])
    twice = grow(once, larger("cpm", {"layers": 8}), 1, WAYS["noise"])
    assert not torch.equal(twice.read(name), once.read(name))


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_noise_that_does_not_add_up_to_zero_is_found(sizes: dict[str, int]) -> None:
    before = small("cpm")
    grown = grow(before, larger("cpm", sizes), 1, WAYS["noise"])
    part = "self.q" if "hidden" in sizes else "ffn.down"
    name = f"decoder.layers.1.{part}.weight"
    values = grown.read(f"weights/{name}").clone()
    plain = grow(before, larger("cpm", sizes), 1, LOCKED).read(f"weights/{name}")
    values[:, : values.shape[1] // 2] = plain[:, : values.shape[1] // 2]  # one twin's noise gone
    found = proof.prove(before, changed(grown, **{name: values}), PROBES)
    assert not found["kept"] and found["not_as_computed"] == name


def with_its_gradient(state: State) -> State:
    """The state, its first moment the gradient of its loss."""
    _, found = gradients(state)

    def entry(values: torch.Tensor) -> Entry:
        return Entry(tuple(values.shape), "float64", lambda: values)

    moments = {f"optim/exp_avg/{n}": entry(g) for n, g in found.items()}
    return State({**state.entries, **moments}, state.record)


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ({"hidden": 64}, LOCKED),
        ({"ffn": 150, "heads": 7}, LOCKED),
        ({"ffn": 128, "heads": 8}, WAYS["split"]),
        ({"hidden": 64, "ffn": 192, "heads": 8}, Growing(method="su")),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_copies_own_gradients(
    family: str, sizes: dict[str, int], how: Growing
) -> None:
    """Carried moments equal the gradient that the grown model has, copy by copy, to 1e-9."""
    if how.method == "su" and family not in ("cpm", "t5"):
        sizes = {key: size for key, size in sizes.items() if key != "hidden"}  # refused there
    grown = grow(with_its_gradient(small(family)), larger(family, sizes), 1, how, rounded=False)
    _, found = gradients(grown)
    for tensor in tensors(model_config(grown)):
        carried = grown.read(f"optim/exp_avg/{tensor.name}").double()
        own, size = found[tensor.name], float(found[tensor.name].abs().max())
        # v1's keys' bias changes nothing: its gradient is rounding
        if size > 1e-12:
            assert float((carried - own).abs().max()) <= 1e-9 * size + 1e-15, tensor.name


def test_shares_add_up_to_one() -> None:
    for copies in (evenly(5, 12, 0.7), evenly(4, 8), drawn(5, 17, 3, "ffn")):
        sums = dict.fromkeys(range(copies.old), 0.0)
        for entry, share in zip(copies.of, copies.share, strict=True):
            assert share > 0
            sums[entry] += share
        assert all(total == pytest.approx(1, abs=1e-15) for total in sums.values())
        assert copies.of[: copies.old] == tuple(range(copies.old))
    assert evenly(4, 8, 0.7).share == (0.7,) * 4 + (pytest.approx(0.3),) * 4
    assert evenly(4, 8).times == 2 and evenly(4, 9).times is None


def test_noise_is_a_function_of_the_seed() -> None:
    name = "weights/decoder.layers.0.self.q.weight"
    states = [grow(small("cpm"), larger("cpm", SIZES[0]), s, WAYS["noise"]) for s in (1, 1, 2)]
    one, same, other = (state.read(name) for state in states)
    assert torch.equal(one, same) and not torch.isclose(one, other).any()
