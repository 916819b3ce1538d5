"""Promise: what is paired, layers, units or heads, adds nothing and learns at once, reading and
writing, in every family.

A pair's two terms are the same number with opposite signs; what is left is the order in which a
matrix product adds them, some 1e-15 of the logits (bound as elsewhere: 1e-12 of their deviation).
"""

import dataclasses
from typing import Any

import pytest
import torch

from configs.grown import EXACT, Growing, refusal
from configs.model import ModelConfig, axis_size, tensors
from pretrain import proof
from pretrain.growth import GrowthError, grow, model_config
from pretrain.growth.depth import source
from pretrain.models import build
from pretrain.state import State, fresh, seed_of
from tests.growing import changed, trained
from tests.test_growth_of_every_family import ALL, FAMILIES, POST_NORM, PROBES, far, larger
from tests.test_growth_parts_the_copies import gradients, trained_on

PAIRED = Growing(new_layers="paired", added="paired")
STACKED = Growing(method="stack", added="paired")
ODD: dict[str, dict[str, int]] = {
    "cpm": {"ffn": 63, "head_dim": 7, "heads": 3},
    "t5": {"ffn": 47, "head_dim": 7, "heads": 3},
    "v1": {"ffn": 63, "heads": 3},
    "v2": {"ffn": 63, "heads": 3},
    "bert": {"ffn": 63, "heads": 3, "head_dim": 7},
}
"""Sizes that leave a unit without a twin; rotary heads are even."""


def start(family: str, **sizes: int) -> State:
    return trained(dataclasses.replace(FAMILIES[family], **sizes))


def deeper(before: State, layers: int = 4, **sizes: int) -> ModelConfig:
    return dataclasses.replace(model_config(before), layers=layers, **sizes)


def new_tensors(before: State, grown: State) -> list[Any]:
    """The matrices and biases of layers that were not there."""
    old, to = model_config(before).layers, model_config(grown)
    return [
        t for t in tensors(to)
        if t.layer is not None and source(t.layer, old, to.layers)[1] and t.op != "norm"
    ]  # fmt: skip


def twins(values: torch.Tensor, dim: int, size: int) -> tuple[torch.Tensor, ...]:
    """Of a factored dimension whose last axis has `size` entries: (the first ones of each pair, the
    second ones, those without a twin)."""
    units = values.movedim(dim, 0).unflatten(0, (-1, size))
    even = size // 2 * 2
    return units[:, 0:even:2], units[:, 1:even:2], units[:, even:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_the_function_is_kept_and_every_new_layer_could_speak(family: str, odd: bool) -> None:
    before = start(family, **(ODD[family] if odd else {}))
    grown = grow(before, deeper(before, 5), 1, PAIRED)
    assert far(before, grown) < 1e-12
    found = proof.prove(before, grown, PROBES)
    assert found["kept"] and found["float32"]["within"]
    config, writers = model_config(grown), 0
    for tensor in new_tensors(before, grown):
        values, part = grown.read(f"weights/{tensor.name}"), tensor.name.split(".")[-2]
        if part in ("o", "down") and tensor.in_:
            one, other, alone = twins(values, 1, axis_size(config, tensor.in_[-1]))
            assert one.any() and torch.equal(one, -other) and not alone.any(), tensor.name
            writers += 1
        elif part in ("v", "up", "gate"):
            one, other, _ = twins(values, 0, axis_size(config, tensor.out[-1]))
            assert torch.equal(one, other), tensor.name
        elif tensor.op == "linear":
            one, other, _ = twins(values, 0, axis_size(config, tensor.out[-1]))
            assert not torch.equal(one, other), tensor.name
    assert writers == 3 * (5 if family == "t5" else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_other_size_and_twice(family: str) -> None:
    before = start(family)
    sizes = ALL | ({"hidden": 64} if family in POST_NORM else {})
    first = grow(before, larger(family, **sizes), 1, PAIRED, rounded=False)
    both = Growing(new_layers="paired", added="copied", noise=0.1, split=0.6)
    to = deeper(first, 6, ffn=200, hidden=192)
    second = grow(first, to, 1, both, rounded=False)
    # old words' logits only: far() leaves the new ones out
    assert far(before, first) < 1e-12 and far(before, second) < 1e-12


def test_two_growths_with_one_seed_draw_other_numbers() -> None:
    """Layer 1 is new both times: of 2 -> 4 layers, and of 4 -> 8."""
    before, name = start("cpm"), "weights/decoder.layers.1.ffn.up.weight"
    first = grow(before, deeper(before, 4), 1, PAIRED)
    second = grow(first, deeper(before, 8), 1, PAIRED)
    assert torch.equal(first.read(name), second.read("weights/decoder.layers.2.ffn.up.weight"))
    assert not torch.equal(first.read(name), second.read(name))


@pytest.mark.parametrize("part", ["self.o", "ffn.down", "self.v", "ffn.up"])
def test_a_twin_that_is_not_one_is_found(part: str) -> None:
    before = start("cpm")
    grown = grow(before, deeper(before), 1, PAIRED)
    name = f"decoder.layers.1.{part}.weight"
    values = grown.read(f"weights/{name}").clone()
    if part in ("self.o", "ffn.down"):
        values[:, 1] *= -1
    else:
        values[1] *= 1.1
    wrong = changed(grown, **{name: values})
    found = proof.prove(before, wrong, PROBES)
    assert not found["float64"]["within"] and found["not_as_computed"] == name
    assert far(before, wrong) > 1e-6
    sublayer = part.split(".")[0]
    assert found["differs_at"].startswith(f"decoder.layers.1.{sublayer} (new, behind layer 0)")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_comes_with_other_sizes_is_a_fresh_one_of_those_sizes(family: str) -> None:
    """Not one of the old sizes, widened, learning at half the rate: new tensors have no scale. As
    large as the layer before it has become: two roundings of float32 apart, 1e-6."""
    before = start(family)
    to = larger(family, layers=4, hidden=64, ffn=128, heads=8)
    grown = grow(before, to, 1, PAIRED)
    plain, names = (
        fresh(model_config(grown), seed_of(1, "layers", 2, 4)),
        new_tensors(before, grown),
    )
    for tensor in names:
        drawn, found = (s.read(f"weights/{tensor.name}") for s in (plain, grown))
        if tensor.op != "linear":
            assert not found.any()
            continue
        origin = tensor.name.replace(f".layers.{tensor.layer}.", f".layers.{tensor.layer - 1}.")
        drawn *= float(grown.read(f"weights/{origin}").norm() / drawn.norm())
        if tensor.name.split(".")[-2] not in ("q", "k"):
            dim, axis = (1, tensor.in_[-1]) if tensor.writes else (0, tensor.out[-1])
            drawn, found = (twins(v, dim, axis_size(to, axis))[0] for v in (drawn, found))
        assert torch.allclose(drawn, found, rtol=1e-6, atol=0), tensor.name
    scales = grown.record["scales"]
    assert scales and not {t.name for t in names} & set(scales)
    silent = grow(before, to, 1, EXACT)  # the control: copies of tiled layers go on as those do
    assert {t.name for t in names if t.op == "linear"} & set(silent.record["scales"])


def test_twins_in_a_silent_layer_are_refused() -> None:
    """Not read at all, they would have the same gradient for ever."""
    before, how = start("cpm"), Growing(added="paired")
    with pytest.raises(GrowthError, match="whose twins would stay alike"):
        grow(before, larger("cpm", layers=3, ffn=100), 1, how)
    assert refusal(model_config(before), larger("cpm", layers=3, ffn=100), STACKED) is None
    assert far(before, grow(before, larger("cpm", ffn=100), 1, how)) < 1e-12
    assert far(before, grow(before, larger("cpm", layers=3), 1, how)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_and_writing_learn_from_the_first_step(family: str) -> None:
    """Twins' gradients are equal where they write and opposite where they read, so the first step
    parts them. Queries and keys, whose twins stand behind them, learn from the second on. Silent
    layers, the control, have no gradient where they read."""
    before = start(family)
    grown = grow(before, deeper(before), 1, PAIRED, rounded=False)
    _, found = gradients(grown)
    _, silent = gradients(grow(before, deeper(before), 1, EXACT, rounded=False))
    config = model_config(grown)
    for tensor in new_tensors(before, grown):
        gradient, part = found[tensor.name], tensor.name.split(".")[-2]
        largest = float(gradient.abs().max())
        if part in ("q", "k"):
            assert largest < 1e-12, tensor.name
        elif tensor.writes is None:
            one, other, _ = twins(gradient, 0, axis_size(config, tensor.out[-1]))
            assert largest > 1e-6 and float((one + other).abs().max()) < 1e-9 * largest
            assert float(silent[tensor.name].abs().max()) < 1e-12, tensor.name
        elif tensor.in_:
            one, other, _ = twins(gradient, 1, axis_size(config, tensor.in_[-1]))
            assert largest > 1e-6 and float((one - other).abs().max()) < 1e-9 * largest
            assert float(silent[tensor.name].abs().max()) > 1e-6, tensor.name
    after = trained_on(grown, 3)
    for tensor in new_tensors(before, grown):
        part = tensor.name.split(".")[-2]
        if part in ("v", "up", "gate", "q", "k") and tensor.in_:
            now = after[tensor.name]
            was = grown.read(f"weights/{tensor.name}").double()
            moved = float(((now - was) != 0).double().mean())
            assert moved > (0.9 if family == "v2" else 0.999), tensor.name  # a ReLU may rest
            one, other, _ = twins(now, 0, axis_size(config, tensor.out[-1]))
            assert float((one - other).abs().max()) > 1e-3, tensor.name


def test_an_average_of_weights_begins_as_the_weights_that_it_is_of() -> None:
    before = start("cpm")
    averages = {key.replace("weights/", "optim/ema/"): e for key, e in before.entries.items()}
    entries = before.entries | {k: e for k, e in averages.items() if k.startswith("optim/ema/")}
    grown = grow(State(entries, before.record), deeper(before), 1, PAIRED)
    for tensor in new_tensors(before, grown):
        kept, ema = (grown.read(f"{kind}/{tensor.name}") for kind in ("weights", "optim/ema"))
        assert torch.equal(kept, ema), tensor.name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_layer_adds_nothing_under_dropout(family: str) -> None:
    """Twins share their head's probabilities, those that dropout leaves too. In T5's gated layer
    dropout stands between them: noise of mean zero, of n / 2 pairs each 2 p / (1 - p) of a unit's
    variance: about (0.1 / 0.9) ** 0.5 = a third of what a layer as large says (0.25 to 0.42).
    """
    torch.manual_seed(1)
    before = start(family)
    grown = grow(before, deeper(before), 1, PAIRED)
    config = dataclasses.replace(model_config(grown), dropout=0.1, attention_dropout=0.5)
    model = build(config).double().train()
    model.load_state_dict({n: grown.read(f"weights/{n}").double() for n in grown.names()})
    said: dict[str, float] = {}
    for name, module in model.named_modules():
        if ".layers." in name and name.split(".")[-1] in ("self", "cross", "ffn"):
            module.register_forward_hook(
                lambda _, __, out, name=name: said.__setitem__(name, float(out.detach().std()))
            )
    sides = (PROBES, torch.arange(PROBES.shape[1]).expand_as(PROBES), None)
    model(*sides, *sides) if family == "t5" else model(*sides)
    assert len(said) == 4 * (5 if family == "t5" else 2)
    for name, std in said.items():
        is_new = source(int(name.split(".")[2]), 2, 4)[1]
        if is_new and family == "t5" and name.endswith("ffn"):
            old = said[name.replace(".layers.1.", ".layers.0.").replace(".layers.3.", ".layers.2.")]
            assert 0 < std < old / 2, name
        else:
            assert (std < 1e-12) == is_new, name


UNITS = [
    {"ffn": 100},
    {"ffn": 101},
    {"heads": 6},
    {"heads": 7},
    {"ffn": 99, "heads": 7, "layers": 3},
]


@pytest.mark.parametrize("sizes", UNITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_units_and_heads_in_pairs_keep_the_function_and_learn(
    family: str, sizes: dict[str, int]
) -> None:
    """In the old layers: alike where they read, opposite where they are read, gradients the other
    way round; one without a twin is not read."""
    before, to = start(family), larger(family, **sizes)
    grown = grow(before, to, 1, PAIRED)
    assert far(before, grown) < 1e-12 and proof.prove(before, grown, PROBES)["kept"]
    _, found = gradients(grow(before, to, 1, PAIRED, rounded=False))
    seen = 0
    for tensor in tensors(to):
        if tensor.layer is not None and source(tensor.layer, 2, to.layers)[1]:
            continue
        for dim, axes in enumerate((tensor.out, tensor.in_)):
            for axis in {"ffn", "heads"} & set(axes) & set(sizes):
                seen += 1
                sign = -1 if dim == 1 and tensor.op == "linear" else 1
                values = grown.read(f"weights/{tensor.name}")
                one, other, alone = added(values, dim, axis, family, to)
                assert one.any() and torch.equal(one, sign * other), tensor.name
                assert sign > 0 or not alone.any(), tensor.name
                if not tensor.name.endswith(".k.bias"):  # which no softmax sees
                    one, other, _ = added(found[tensor.name], dim, axis, family, to)
                    largest = float(one.abs().max())
                    assert largest > 1e-9, tensor.name
                    assert float((one + sign * other).abs().max()) < 1e-9 * largest, tensor.name
    assert seen


def added(
    values: torch.Tensor, dim: int, axis: str, family: str, to: ModelConfig
) -> tuple[torch.Tensor, ...]:
    """The entries that an axis got, of a dimension that it leads, as twins() gives them."""
    old, new = (axis_size(config, axis) for config in (FAMILIES[family], to))
    units = values.movedim(dim, 0).unflatten(0, (new, -1))[old:]
    even = (new - old) // 2 * 2
    return units[0:even:2], units[1:even:2], units[even:]


def test_a_column_with_the_wrong_sign_is_found() -> None:
    before = start("cpm")
    grown = grow(before, larger("cpm", ffn=100), 1, PAIRED)
    name = "decoder.layers.1.ffn.down.weight"
    values = grown.read(f"weights/{name}").clone()
    values[:, 65] *= -1
    wrong = changed(grown, **{name: values})
    found = proof.prove(before, wrong, PROBES)
    assert not found["float64"]["within"] and far(before, wrong) > 1e-6
    assert found["differs_at"].startswith("decoder.layers.1.ffn (was layer 1)")


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_pairs_cancel_as_well(family: str) -> None:
    """What two twins say is the same number in bf16 too: nothing differs. Behind
    post-norms each layer rounds the stream, and there are twice as many: at most twice the small
    model's own rounding."""
    before = start(family)
    grown = grow(before, deeper(before), 1, PAIRED)
    found = proof.prove(before, grown, PROBES, precision="bf16")["precision"]
    limit = 2.0 if family in ("v1", "v2", "bert") else 1e-9
    assert found["max_difference"] <= limit * found["own_rounding"], found
