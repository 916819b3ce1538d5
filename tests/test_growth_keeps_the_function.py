"""Growth keeps the function: logits stay equal, and a wrong operator is found out."""

import dataclasses
import weakref

import pytest
import torch

from configs.model import ModelConfig, T5PegasusConfig, shape, tensors
from pretrain import proof
from pretrain.growth import GrowthError, grow
from pretrain.growth.depth import place, source
from pretrain.models.cpm import CPM
from pretrain.state import Entry, State, fresh
from tests.growing import TINY, changed, held, trained


def larger(**sizes: int) -> ModelConfig:
    return dataclasses.replace(TINY, **sizes)


PROBES = proof.probes(None, TINY)


@pytest.mark.parametrize(
    "targets",
    [
        [larger(layers=4)],
        [larger(layers=5)],
        [larger(layers=9)],
        [larger(ffn=65)],
        [larger(ffn=160)],
        [larger(layers=6, ffn=96)],
        [larger(layers=4), larger(layers=7), larger(layers=7, ffn=80), larger(layers=8, ffn=96)],
        [larger(dropout=0.0, init_std=0.5)],
    ],
    ids=["4", "5", "9", "ffn+1", "ffn*2.5", "both", "repeated", "nothing"],
)
def test_logits_are_the_same(targets: list[ModelConfig]) -> None:
    before = grown = trained()
    for target in targets:
        grown = grow(grown, target, seed=1)
    found = proof.prove(before, grown, PROBES)
    # a longer float64 sum rounds by about 1e-15 of a logit; 1e-12 leaves no room for a mistake
    assert found["float64"]["max_difference"] <= 1e-12 * found["float64"]["std"]
    # the small model's own rounding, three times (GROWTH of record); measured, not assumed
    assert found["float32"]["max_difference"] <= found["float32"]["tolerance"]
    assert found["kept"] and found["differs_at"] is None
    assert found["loss"]["before"] == pytest.approx(found["loss"]["after"], abs=1e-12)
    assert grown.record["model"]["layers"] == targets[-1].layers
    assert {n: e.shape for n, e in grown.entries.items()} == {
        f"{kind}/{t.name}": shape(targets[-1], t)
        for kind in ("weights", "optim/exp_avg", "optim/exp_avg_sq")
        for t in tensors(targets[-1])
    }


def test_the_logits_are_those_of_the_plain_model() -> None:
    """The proof's module-by-module model computes what an ordinary CPM computes."""
    state = trained()
    model = CPM(TINY).double().eval()
    model.load_state_dict({n: state.read(f"weights/{n}").double() for n in state.names()})
    positions = torch.arange(PROBES.shape[1]).expand_as(PROBES)
    with torch.no_grad():
        expected = model.logits(model(PROBES, positions))
    assert torch.equal(proof.logits(state, PROBES, torch.float64), expected)


@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("decoder.layers.2.self.o.weight", "decoder.layers.2.self (new, behind layer 1)"),
        ("decoder.layers.2.self.o.bias", "decoder.layers.2.self (new, behind layer 1)"),
        ("decoder.layers.4.ffn.down.weight", "decoder.layers.4.ffn (new, behind layer 2)"),
        ("decoder.layers.4.ffn.down.bias", "decoder.layers.4.ffn (new, behind layer 2)"),
    ],
)
def test_a_copy_that_is_not_silent_is_found_and_named(tensor: str, where: str) -> None:
    before = trained()
    grown = grow(before, larger(layers=5), seed=1)
    assert not grown.read(f"weights/{tensor}").any()
    layer = int(tensor.split(".")[2])
    origin = tensor.replace(f".{layer}.", f".{source(layer, 3, 5)[0]}.")
    wrong = changed(grown, **{tensor: before.read(f"weights/{origin}")})
    found = proof.prove(before, wrong, PROBES)
    assert not found["kept"] and found["differs_at"].startswith(where)


def test_columns_that_are_not_zero_are_found_and_named() -> None:
    before = trained()
    grown = grow(before, larger(layers=5, ffn=96), seed=1)
    name = "decoder.layers.3.ffn.down.weight"  # old layer 2
    values = grown.read(f"weights/{name}")
    assert not values[:, 64:].any()
    # not all alike: a constant added to the stream is taken out by every norm, the function is kept
    values[:, 64:] = torch.linspace(-0.02, 0.02, 32)[:, None]
    found = proof.prove(before, changed(grown, **{name: values}), PROBES)
    assert not found["kept"]
    assert found["differs_at"].startswith("decoder.layers.3.ffn (was layer 2)")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("embed.positions.weight", "the embeddings"),
        ("decoder.final_norm.bias", "decoder.final_norm"),
    ],
)
def test_a_difference_outside_the_layers_is_named(name: str, where: str) -> None:
    before = trained()
    grown = grow(before, larger(layers=4), seed=1)
    wrong = changed(grown, **{name: grown.read(f"weights/{name}") + 0.01})
    found = proof.prove(before, wrong, PROBES)
    assert not found["kept"] and found["differs_at"].startswith(where)


def test_a_nan_is_no_proof() -> None:
    before = trained()
    name = "decoder.layers.1.ffn.up.bias"
    wrong = changed(before, **{name: torch.full((64,), float("nan"))})
    found = proof.prove(before, wrong, PROBES)
    assert not found["kept"] and found["differs_at"].startswith("decoder.layers.1.ffn")


def test_layers_are_spread_evenly_and_the_first_stays_first() -> None:
    for old in range(1, 13):
        for new in range(old, 40):
            places = [place(i, old, new) for i in range(old)]
            gaps = [b - a for a, b in zip(places, [*places[1:], new], strict=True)]
            assert places[0] == 0 and max(gaps) - min(gaps) <= 1 and min(gaps) >= 1
            origins = [source(i, old, new) for i in range(new)]
            assert [i for i, (_, is_new) in enumerate(origins) if not is_new] == places
            assert [o for o, _ in origins] == sorted(o for o, _ in origins)


def test_nothing_new_is_dead() -> None:
    """The silent halves get a gradient at the first step, the other halves from the second on."""
    grown = grow(trained(), larger(layers=4, ffn=96), seed=1)
    config = larger(layers=4, ffn=96, dropout=0.0, attention_dropout=0.0)
    model = CPM(config).double()
    model.load_state_dict({n: grown.read(f"weights/{n}").double() for n in grown.names()})
    parameters = dict(model.named_parameters())
    positions = torch.arange(PROBES.shape[1]).expand_as(PROBES)

    def gradient() -> None:
        model.zero_grad()
        logits = model.logits(model(PROBES, positions))[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), PROBES[:, 1:].flatten()).backward()

    new = "decoder.layers.3"
    gradient()
    assert parameters[f"{new}.self.o.weight"].grad.abs().min() > 0
    assert parameters[f"{new}.ffn.down.weight"].grad.abs().min() > 0
    assert parameters["decoder.layers.0.ffn.down.weight"].grad[:, 64:].abs().min() > 0
    assert not parameters[f"{new}.self.v.weight"].grad.any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    gradient()
    for name in ("self.q.weight", "self.k.weight", "self.v.weight", "ffn.up.weight"):
        assert parameters[f"{new}.{name}"].grad.abs().max() > 0
    assert parameters["decoder.layers.0.ffn.up.weight"].grad[64:].abs().min() > 0


def test_new_rows_are_a_function_of_seed_and_name_and_never_repeat() -> None:
    def rows(seed: int, *sizes: int) -> torch.Tensor:
        grown = trained()
        for ffn in sizes:
            grown = grow(grown, larger(ffn=ffn), seed)
        return grown.read("weights/decoder.layers.0.ffn.up.weight")[64:]

    once = rows(1, 128)
    assert torch.equal(once, rows(1, 128))
    assert not torch.isclose(once, rows(2, 128)).any()
    twice = rows(1, 96, 128)
    assert not torch.isclose(twice[:32], twice[32:]).any()
    old = trained().read("weights/decoder.layers.0.ffn.up.weight")
    # as large as the old ones: 2,048 draws, cut at 3 sigma, lie within 10 % of their deviation
    assert float(once.std() / old.std()) == pytest.approx(1, abs=0.1)


def test_a_fresh_models_biases_stay_zero() -> None:
    grown = grow(fresh(TINY, 1), larger(ffn=96), 1)
    assert not grown.read("weights/decoder.layers.0.ffn.up.bias").any()
    assert "optim/exp_avg/embed.tokens.weight" not in grown.entries


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (larger(hidden=24), ["hidden would shrink from 32 to 24", "hidden=32", "layers=3"]),
        (larger(layers=2), ["shrink from 3 to 2", "layers=3"]),
        (
            larger(layers=6, heads=2, positions=100),
            ["heads would shrink from 4 to 2", "positions is 48", "layers=6", "heads=4"],
        ),
        (larger(norm_eps=1e-6), ["norm_eps is 1e-05", "norm_eps=1e-05"]),
        (T5PegasusConfig("t5_pegasus", 97, 32, 3, 4, 8, 64), ["t5_pegasus", "cpm"]),
    ],
)
def test_other_sizes_are_refused_in_one_sentence(target: ModelConfig, words: list[str]) -> None:
    with pytest.raises(GrowthError) as caught:
        grow(trained(), target, seed=1)
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words)


def test_nothing_is_read_before_it_is_asked_for_and_one_tensor_at_a_time() -> None:
    state, read = trained(), []

    def counted(key: str, entry: Entry) -> Entry:
        def act() -> torch.Tensor:
            read.append(key)
            return entry.read()

        return Entry(entry.shape, entry.dtype, act)

    watched = State({k: counted(k, e) for k, e in state.entries.items()}, state.record)
    grown = grow(watched, larger(layers=5, ffn=96), seed=1)
    assert read == []
    for key in grown.entries:
        read.clear()
        assert tuple(grown.read(key).shape) == grown.entries[key].shape
        assert len(read) <= 1


def test_the_proof_holds_one_module_at_a_time() -> None:
    state = trained()
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def fresh_copy(entry: Entry) -> Entry:
        def act() -> torch.Tensor:
            nonlocal most
            values = entry.read().clone()
            alive.append(weakref.ref(values))
            most = max(most, sum(ref() is not None for ref in alive))
            return values

        return Entry(entry.shape, entry.dtype, act)

    watched = State({k: fresh_copy(e) for k, e in state.entries.items()}, state.record)
    assert torch.equal(
        proof.logits(watched, PROBES, torch.float32), proof.logits(state, PROBES, torch.float32)
    )
    assert most <= 2  # a weight and its bias
    assert len(alive) == len(state.names()) + 1  # the tied embedding serves twice


def test_probes_are_fixed() -> None:
    assert torch.equal(proof.probes(None, TINY), PROBES)
    assert PROBES.shape == (4, 48) and int(PROBES.max()) < TINY.vocab
    assert held(torch.zeros(2)).shape == (2,)
