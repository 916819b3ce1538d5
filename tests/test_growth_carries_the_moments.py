"""Growth carries Adam's moments: old ones untouched, new ones by rule, against brute force."""

import dataclasses

import pytest
import torch

from configs.grown import EXACT, Growing
from configs.load import to_dict
from pretrain.growth import GrowthError, grow
from pretrain.state import State
from tests.growing import TINY, UPDATES, trained
from tests.test_growth_of_every_family import FAMILIES

# 3 -> 5 layers: old layer 0 stays, 1 is followed by a copy, 2 too
OLD_TO_NEW = {0: 0, 1: 1, 2: 3}
COPIES = {2: 1, 4: 2}
PAIRED = Growing(new_layers="paired")
BOTH = dataclasses.replace(TINY, layers=5, ffn=96)


@pytest.fixture(scope="module", params=[EXACT, PAIRED], ids=["silent", "paired"])
def pair(request: pytest.FixtureRequest) -> tuple[State, State]:
    before = trained()
    return before, grow(before, BOTH, 5, request.param)


def renamed(name: str, old: int, new: int) -> str:
    return name.replace(f"layers.{old}.", f"layers.{new}.")


def test_old_tensors_keep_weights_moments_and_birth(pair: tuple[State, State]) -> None:
    before, grown = pair
    for kind in ("weights", "optim/exp_avg", "optim/exp_avg_sq"):
        for name in before.names():
            moved = name
            if ".layers." in name:
                old = int(name.split(".")[2])
                moved = renamed(name, old, OLD_TO_NEW[old])
            assert grown.record["born"][moved] == 0
            old_values, new_values = before.read(f"{kind}/{name}"), grown.read(f"{kind}/{moved}")
            corner = tuple(slice(0, n) for n in old_values.shape)
            assert torch.equal(new_values[corner], old_values)


def test_new_tensors_begin_at_zero_and_silent_ones_are_copies(pair: tuple[State, State]) -> None:
    before, grown = pair
    for new, old in COPIES.items():
        for name in (n for n in grown.names() if n.startswith(f"decoder.layers.{new}.")):
            assert grown.record["born"][name] == UPDATES
            for slot in ("exp_avg", "exp_avg_sq"):
                moments = grown.read(f"optim/{slot}/{name}")
                assert moments.shape == grown.entries[f"weights/{name}"].shape
                assert not moments.any()
            if "how" in grown.record["growth"][-1]:
                continue  # paired: test_growth_in_pairs.py
            values = grown.read(f"weights/{name}")
            if ".self.o." in name or ".ffn.down." in name:
                assert not values.any()
            else:
                # beyond the source's rows come new ones, drawn for the copy alone
                source = before.read(f"weights/{renamed(name, new, old)}")
                assert torch.equal(values[: source.shape[0]], source)
    assert set(grown.record["born"]) == set(grown.names())


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_new_entries_of_old_tensors(pair: tuple[State, State], layer: int) -> None:
    grown = pair[1]
    at = f"decoder.layers.{layer}.ffn"
    old_at = f"decoder.layers.{ {v: k for k, v in OLD_TO_NEW.items()}[layer] }.ffn"

    def read(state: State, key: str) -> list[list[float]]:
        values = state.read(key)
        return values.reshape(values.shape[0], -1).tolist()

    for name in ("up.weight", "up.bias", "down.weight"):
        m = grown.read(f"optim/exp_avg/{at}.{name}")
        assert not (m[:, 64:] if name == "down.weight" else m[64:]).any()
    # row by row and column by column, in plain Python
    old_up, new_up = (
        read(s, f"optim/exp_avg_sq/{a}.up.weight") for s, a in _both(pair, old_at, at)
    )
    for column in range(TINY.hidden):
        mean = sum(row[column] for row in old_up) / 64
        assert all(new_up[row][column] == pytest.approx(mean, rel=1e-6) for row in range(64, 96))
    old_down, new_down = (
        read(s, f"optim/exp_avg_sq/{a}.down.weight") for s, a in _both(pair, old_at, at)
    )
    for row in range(TINY.hidden):
        mean = sum(old_down[row]) / 64
        assert all(value == pytest.approx(mean, rel=1e-6) for value in new_down[row][64:])
    old_bias, new_bias = (
        read(s, f"optim/exp_avg_sq/{a}.up.bias") for s, a in _both(pair, old_at, at)
    )
    mean = sum(value for (value,) in old_bias) / 64
    assert all(value == pytest.approx(mean, rel=1e-6) for (value,) in new_bias[64:])


def _both(pair: tuple[State, State], old: str, new: str) -> list[tuple[State, str]]:
    return [(pair[0], old), (pair[1], new)]


def test_the_record_tells_what_happened(pair: tuple[State, State]) -> None:
    before, grown = pair
    line = dict(grown.record["growth"][-1])
    line.pop("how", None)
    operators = ["ffn 64 -> 96", "layers 3 -> 5"]
    assert line == {
        "step": 9,
        "updates": UPDATES,
        "from": to_dict(TINY),
        "to": to_dict(BOTH),
        "operators": operators,
        "seed": 5,
    }
    assert grown.record["model"] == to_dict(BOTH)
    for key in ("step", "updates", "samples", "tokenizer"):
        assert grown.record[key] == before.record[key]
    assert "growth" not in before.record and before.record["model"] == to_dict(TINY)


def test_a_second_growth_keeps_the_first_ones_births(pair: tuple[State, State]) -> None:
    _, grown = pair
    later = State(grown.entries, {**grown.record, "updates": 20, "step": 25})
    twice = grow(later, dataclasses.replace(BOTH, layers=6), seed=5)
    born = twice.record["born"]
    assert len(twice.record["growth"]) == 2
    # 5 -> 6: places 0 1 2 3 4, the last layer is copied
    assert born["decoder.layers.4.self.q.weight"] == UPDATES
    assert born["decoder.layers.5.self.q.weight"] == 20
    assert born["decoder.layers.3.self.q.weight"] == 0


def test_a_first_update_of_a_new_tensor_is_no_kick(pair: tuple[State, State]) -> None:
    """With its own step count the first update is at most lr; under the old count it is 3.2 lr."""
    _, grown = pair
    name = "decoder.layers.4.self.o.weight"
    gradient = torch.full((4,), 0.1)
    updates = 5000

    def first(steps: int) -> float:
        weight = torch.nn.Parameter(torch.zeros(4))
        adam = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.999), eps=1e-12, weight_decay=0)
        zero = torch.zeros(4)
        adam.state[weight] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": zero.clone(),
            "exp_avg_sq": zero.clone(),
        }
        weight.grad = gradient
        adam.step()
        return float(weight.detach().abs().max())

    assert grown.record["born"][name] == grown.record["updates"]
    assert first(0) == pytest.approx(1.0, rel=1e-3)
    assert first(updates) > 3


@pytest.mark.parametrize("family", ["cpm", "t5", "v1", "v2", "bert"])
@pytest.mark.parametrize("method", ["exact", "random", "stack"])
@pytest.mark.parametrize("slot", ["ema", "slow"])
def test_averages_grow_as_the_weights_in_every_family(slot: str, method: str, family: str) -> None:
    """New layers too: of a post-norm family, or drawn, they begin as the weights they are of."""
    before = trained(FAMILIES[family])
    entries = {f"optim/{slot}/{n}": before.entries[f"weights/{n}"] for n in before.names()}
    state = State({**before.entries, **entries}, before.record)
    to = dataclasses.replace(FAMILIES[family], layers=5, ffn=96, heads=6)
    grown = grow(state, to, 5, Growing(method=method))  # type: ignore[arg-type]
    assert grown.names(f"optim/{slot}") == grown.names()
    for name in grown.names():
        assert torch.equal(grown.read(f"optim/{slot}/{name}"), grown.read(f"weights/{name}"))


def test_averages_grow_as_the_weights_and_momentum_as_the_gradient() -> None:
    before, entries = trained(), {}
    for name in before.names():
        entries[f"optim/ema/{name}"] = before.entries[f"weights/{name}"]
        if name.endswith("q.weight"):
            entries[f"optim/momentum/{name}"] = before.entries[f"optim/exp_avg/{name}"]
    state = State({**before.entries, **entries}, before.record)
    grown = grow(state, dataclasses.replace(TINY, hidden=64, layers=5, ffn=96), seed=5)
    for name in grown.names():
        assert torch.equal(grown.read(f"optim/ema/{name}"), grown.read(f"weights/{name}"))
    momentum = grown.names("optim/momentum")
    assert len(momentum) == 5
    for name in momentum:
        moment = grown.read(f"optim/exp_avg/{name}")
        assert torch.equal(grown.read(f"optim/momentum/{name}"), moment)


def test_a_state_that_growth_does_not_carry_is_named() -> None:
    before = trained()
    key = "optim/factors/embed.tokens.weight"
    odd = State({**before.entries, key: before.entries["weights/embed.tokens.weight"]}, {})
    with pytest.raises(GrowthError, match=r"optim/factors: is of an optimizer .* start with"):
        grow(State(odd.entries, before.record), BOTH, seed=5)
