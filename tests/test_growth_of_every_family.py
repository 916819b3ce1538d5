"""Every size of every family grows and keeps the function; each factor is needed for it.

Float64, of the growth without rounding: 1e-12 of the logits' deviation (another summation order
reaches 2e-14; a layer behind a post-norm changes a logit by up to eps / 2 = 5e-13 of itself).
Float32, as written: 3 times the small model's own rounding.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.grown import Growing, completed, refusal
from configs.load import to_dict
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig, tensors
from configs.positions import Rope
from pretrain import proof
from pretrain.growth import grow
from pretrain.state import State
from tests.growing import changed, trained

SIZES: dict[str, Any] = {"vocab": 97, "hidden": 32, "layers": 2, "heads": 4, "head_dim": 8}
FAMILIES: dict[str, ModelConfig] = {
    "cpm": CPMConfig("cpm", **SIZES, ffn=64, positions=48, init_std=0.1),
    "t5": T5PegasusConfig("t5_pegasus", **SIZES, ffn=48, init_std=0.1),
    "v1": RoFormerConfig("roformer", 1, **SIZES, ffn=64, init_std=0.1),
    "v2": RoFormerConfig("roformer", 2, **SIZES, ffn=64),
    "bert": RoFormerConfig("roformer", 1, **SIZES, ffn=64, positions=48, init_std=0.1),
}
POST_NORM = ("v1", "bert")
"""Those that widen by whole factors only."""
PROBES = proof.probes(None, FAMILIES["cpm"])[:2]
ALL = {"layers": 3, "heads": 6, "head_dim": 12, "ffn": 100, "hidden": 48, "vocab": 130}
TILED = {"layers": 3, "heads": 8, "head_dim": 16, "ffn": 128, "hidden": 96}
STEPS: list[dict[str, int]] = [
    {"layers": 5},
    {"ffn": 100},
    {"heads": 6},
    {"head_dim": 12},
    {"head_dim": 16},
    {"hidden": 64},
    {"hidden": 48},
    {"vocab": 120},
    ALL,
    TILED,
]


def small(family: str) -> State:
    return trained(FAMILIES[family])


def larger(family: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(FAMILIES[family], **changes)


def far(before: State, after: State) -> float:
    """Largest difference of the old words' logits in float64, over their deviation."""
    import torch

    exact = proof.logits(before, PROBES, torch.float64)
    grown = proof.logits(after, PROBES, torch.float64)[..., : exact.shape[-1]]
    return float((grown - exact).abs().max() / exact.std())


def under(state: State, **numbers: Any) -> State:
    """The state with other numbers in its model's config."""
    return State(state.entries, {**state.record, "model": {**state.record["model"], **numbers}})


@pytest.mark.parametrize("sizes", STEPS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_kept(family: str, sizes: dict[str, int]) -> None:
    if family in POST_NORM and sizes.get("hidden") == 48:
        sizes = {**sizes, "hidden": 64}
    before = small(family)
    found = proof.prove(before, grow(before, larger(family, **sizes), seed=1), PROBES)
    assert found["float64"]["max_difference"] <= 1e-12 * found["float64"]["std"]
    assert found["float32"]["max_difference"] <= found["float32"]["tolerance"]
    assert found["kept"] and found["not_as_computed"] is None


@pytest.mark.parametrize("layers", [3, 5])
@pytest.mark.parametrize("family", ["v1", "v2", "bert"])
def test_new_layers_behind_post_norms_change_a_logit_by_a_share_of_eps(
    family: str, layers: int
) -> None:
    """A trained model is sure of some words: their logits lie many deviations out, and eps shows in
    them. A norm behind a norm rescales what it reads by less than eps / 2, once at each old layer;
    what follows makes less than eps of it."""
    moved = {}
    for eps in (1e-12, 1e-14):
        plain = under(small(family), norm_eps=eps)
        rows = plain.read("weights/embed.tokens.weight").clone()
        rows[5] *= 20
        before = changed(plain, embed__tokens__weight=rows)
        peak = float(proof.logits(before, PROBES, torch.float64).abs().max())
        grown = grow(before, larger(family, layers=layers, norm_eps=eps), 1)
        found = proof.prove(before, grown, PROBES)["float64"]
        granted = min(layers - 2, 2) * eps * peak  # two old layers
        assert found["within"] and found["of_norm_eps"] == pytest.approx(granted)
        moved[eps] = found["max_difference"] / peak
        # what is granted is far from what a fault does
        said = torch.full_like(grown.read("weights/encoder.layers.1.ffn.down.weight"), 1e-9)
        wrong = changed(grown, encoder__layers__1__ffn__down__weight=said)
        assert not proof.prove(before, wrong, PROBES)["kept"]
    assert 0.005e-12 < moved[1e-12] < 0.5e-12 and moved[1e-14] < moved[1e-12] / 20


@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_and_again(family: str) -> None:
    """Size by size, backwards, twice over: the function is that of the first model."""
    before = grown = small(family)
    first = {"vocab": 120, "hidden": 64 if family in POST_NORM else 40, "ffn": 80, "head_dim": 10}
    then = {"heads": 5, "hidden": 128 if family in POST_NORM else 44, "head_dim": 20, "layers": 3}
    for step in (first, then):
        for size, number in step.items():
            now = from_record(grown)
            grown = grow(grown, dataclasses.replace(now, **{size: number}), 2, rounded=False)
    assert far(before, grown) <= 1e-12
    assert len(grown.record["growth"]) == 8


def from_record(state: State) -> ModelConfig:
    from pretrain.growth import model_config

    return model_config(state)


@pytest.mark.parametrize(
    ("family", "sizes", "wrong", "least"),
    [
        ("cpm", {"hidden": 48}, {"norm_eps": 1e-5}, 1e-7),
        ("t5", {"hidden": 48}, {"norm_eps": 1e-6}, 1e-8),
        ("t5", {"hidden": 48}, {"logit_scale": None}, 0.1),
        ("t5", {"hidden": 64}, {"logit_scale": None}, 0.1),
        ("v2", {"hidden": 48}, {"logit_scale": 1.0}, 0.1),
        ("v2", {"hidden": 64}, {"logit_scale": 1.0}, 0.1),
        ("cpm", {"head_dim": 12}, {"softmax_scale": 8**-0.5}, 0.01),
        ("t5", {"head_dim": 12}, {"softmax_scale": None}, 0.01),
        ("v1", {"head_dim": 12}, {"rope_base": 1e4}, 0.01),
        ("v2", {"head_dim": 12}, {"rope_base": 1e4}, 0.01),
        ("v1", {"head_dim": 16}, {"rope_base": 1e8}, 0.01),
    ],
)
def test_each_number_is_needed(
    family: str, sizes: dict[str, int], wrong: dict[str, Any], least: float
) -> None:
    """Negative controls: with the number that a page would have had, the function is another."""
    before = small(family)
    grown = grow(before, larger(family, **sizes), 1, rounded=False)
    assert far(before, grown) <= 1e-12
    assert far(before, under(grown, **wrong)) > least
    if least >= 0.01:
        assert not proof.prove(before, under(grown, **wrong), PROBES)["kept"]


def test_a_gain_that_is_not_shifted_is_found() -> None:
    before, name = small("v1"), "encoder.layers.{}.ffn_norm.{}"
    grown = grow(before, larger("v1", layers=4), 1)
    wrong = {}
    for part in ("weight", "bias"):  # the old layer 0 stands at 0, its copy at 1
        own, last = (grown.read(f"weights/{name.format(layer, part)}") for layer in (0, 1))
        wrong |= {name.format(0, part): last, name.format(1, part): own}
        assert float(own.std()) == 0 < float(last.std())
    bad = changed(grown, **wrong)
    assert far(before, grown) <= 1e-12 < 0.01 < far(before, bad)
    found = proof.prove(before, bad, PROBES)
    assert not found["kept"] and "encoder.layers" in found["differs_at"]


def test_a_norm_before_a_tied_head_reads_too() -> None:
    before = small("cpm")
    grown = grow(before, larger("cpm", hidden=64), 1)
    gain = grown.read("weights/decoder.final_norm.weight")
    assert far(before, changed(grown, **{"decoder.final_norm.weight": 2 * gain})) > 0.1


def test_a_value_that_is_not_the_growth_s_rounding_is_no_proof() -> None:
    before = small("t5")
    grown = grow(before, larger("t5", hidden=48), 1)
    name = "encoder.layers.1.self_norm.weight"
    off = grown.read(f"weights/{name}").clone()
    off[3] *= 1 + 2e-7  # far below what logits in float32 would show
    found = proof.prove(before, changed(grown, **{name: off}), PROBES)
    assert not found["kept"] and found["not_as_computed"] == name


@pytest.mark.parametrize("family", FAMILIES)
def test_new_words_begin_as_the_mean_or_are_never_said(family: str) -> None:
    import torch

    def chances(state: State) -> torch.Tensor:
        return proof.logits(state, PROBES, torch.float64).log_softmax(-1)

    before, how = small(family), Growing(new_words="masked")
    exact = chances(before)
    masked = grow(before, larger(family, vocab=128), 1, how=how)
    kept = chances(masked)
    assert not kept[..., 97:].exp().any()
    assert float((kept[..., :97] - exact).abs().max()) < 1e-12
    found = proof.prove(before, masked, PROBES)
    assert found["kept"] and found["loss"]["after"] == pytest.approx(found["loss"]["before"], 1e-14)
    # unmasked, they have the mean's logit, and the old words' logits are what they were
    free = grow(masked, larger(family, vocab=128, words_said=128), 1)
    assert proof.prove(masked, free, PROBES)["kept"]
    assert free.record["growth"][-1]["operators"] == ["words said 97 -> 128"]
    lost = exact - chances(free)[..., :97]
    # Jensen: a mean row is said no more often than the average word
    assert 0 < float(lost.max()) <= torch.tensor(128 / 97).log()
    assert torch.equal(
        chances(free), chances(grow(before, larger(family, vocab=128), 1))
    )  # as if never masked


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_words_stay_masked_as_the_model_grows(family: str) -> None:
    before, how = small(family), Growing(new_words="masked")
    grown = grow(before, larger(family, vocab=110), 1, how=how)
    again = {"layers": 3, "vocab": 128, "hidden": 64, "ffn": 80}
    grown = grow(grown, dataclasses.replace(from_record(grown), **again), 1, how=how)
    assert grown.record["model"]["words_said"] == 97 and far(before, under(grown)) <= 1e-12
    sentence = refusal(from_record(grown), dataclasses.replace(from_record(grown), words_said=90))
    assert sentence and "97 words are said" in sentence and "words_said=97" in sentence


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("v1", {"hidden": 48}, ["hidden 32 cannot become 48", "hidden=64"]),
        ("v1", {"hidden": 97}, ["whole factors", "hidden=96"]),
        ("v2", {"hidden": 48, "logit_scale": 0.3}, ["logit_scale is 1.0", "not 0.3"]),
        ("t5", {"head_dim": 4}, ["head_dim would shrink from 8 to 4"]),
        ("v1", {"head_dim": 12, "rope_base": 5e3}, ["rope_base is 10000.0", "not 5000.0"]),
        ("v1", {"version": 2}, ["version is 1 and the target has 2"]),
    ],
)
def test_what_cannot_be_is_one_sentence(
    family: str, changes: dict[str, Any], said: list[str]
) -> None:
    sentence = refusal(FAMILIES[family], larger(family, **changes))
    assert sentence and "\n" not in sentence
    assert all(word in sentence for word in said), sentence


@pytest.mark.parametrize("method", ["linear", "ntk", "ntk_fixed", "ntk_mixed", "by_parts", "yarn"])
@pytest.mark.parametrize("head_dim", [12, 16])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_heads_of_an_extended_model_grow_at_every_length_or_not_at_all(
    family: str, head_dim: int, method: str
) -> None:
    """Rows of three times the known length, where a dynamic method changes the frequencies."""
    rope = Rope(method, known=16, factor=2.0, dynamic=True)  # type: ignore[arg-type]
    now = larger(family, rope=rope)
    to = dataclasses.replace(now, head_dim=head_dim)
    sentence = refusal(now, to)
    if method.startswith("ntk"):
        assert sentence and "depend on it; grow the model before it is extended" in sentence
        assert "head_dim=8" in sentence
        return
    before = trained(now)
    grown = grow(before, to, 1, rounded=False)
    exact, after = (proof.logits(state, PROBES[:, :48], torch.float64) for state in (before, grown))
    assert not sentence and (after - exact).abs().max() <= 1e-12 * exact.std()
    if method != "linear":  # the control: as the pairs lie without `rope`
        as_ever = 1e4 if head_dim == 16 else 1e4**1.4
        wrong = proof.logits(under(grown, rope_base=as_ever), PROBES[:, :48], torch.float64)
        assert (wrong - exact).abs().max() > 1e-3 * exact.std()


def test_heads_that_are_not_turned_need_no_pairs() -> None:
    """Learned positions (BERT): an odd width of a head, doubled."""
    now = larger("bert", head_dim=5)
    before = trained(now)
    to = dataclasses.replace(now, head_dim=10)
    found = proof.prove(before, grow(before, to, 1), PROBES)
    assert found["kept"] and completed(now, dataclasses.replace(now, head_dim=8)).rope_base == 1e4  # type: ignore[union-attr]


def test_masked_and_said_at_once_is_refused() -> None:
    to = larger("t5", vocab=128, words_said=128)
    assert refusal(FAMILIES["t5"], to) is None
    sentence = refusal(FAMILIES["t5"], to, Growing(new_words="masked"))
    assert sentence and "words_said is 128, new_words masked says 97" in sentence


def test_a_model_from_before_a_key_existed_is_told_about() -> None:
    """Its record names fewer numbers; the sentence of a proof names sizes all the same."""
    before = small("cpm")
    old = {
        k: v for k, v in before.record["model"].items() if k not in ("words_said", "logit_scale")
    }
    before = State(before.entries, {**before.record, "model": old})
    found = proof.prove(before, grow(before, larger("cpm", layers=3), 1), PROBES)
    assert found["kept"] and "layers 2 -> 3" in proof.sentence(found)


def test_a_layer_behind_a_large_eps_is_refused() -> None:
    now = larger("v2", norm_eps=1e-6)
    sentence = refusal(now, dataclasses.replace(now, layers=3))
    assert sentence and "norm_eps 1e-06" in sentence and "layers=2" in sentence
    assert refusal(now, dataclasses.replace(now, ffn=80)) is None


def test_a_page_need_not_know_the_numbers() -> None:
    """The default, the small model's number and the needed one all lead to the needed one."""
    now = FAMILIES["t5"]
    once = completed(now, larger("t5", hidden=48))
    assert isinstance(once, T5PegasusConfig)
    assert once.norm_eps == 1e-6 * 32 / 48 and once.logit_scale == 32**-0.5
    assert completed(now, once) == once
    deeper = dataclasses.replace(larger("t5", hidden=48), layers=4)  # a page with the defaults
    assert completed(once, deeper) == dataclasses.replace(once, layers=4)
    rotary = completed(FAMILIES["v2"], larger("v2", head_dim=12, hidden=64))
    assert to_dict(rotary)["rope_base"] == 1e4**1.5 and rotary.logit_scale == 0.5
    assert completed(FAMILIES["v2"], larger("v2", head_dim=16)) == larger("v2", head_dim=16)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_new_is_dead(family: str) -> None:
    """Every row and column of every matrix has had a gradient after three steps."""
    import torch

    from pretrain.models import build

    sizes = ALL | ({"hidden": 64} if family in POST_NORM else {})
    grown = grow(small(family), larger(family, **sizes, dropout=0.0, attention_dropout=0.0), 1)
    config = from_record(grown)
    with torch.device("meta"):
        model = build(config)
    model.to_empty(device="cpu").double()
    model.load_state_dict({n: grown.read(f"weights/{n}").double() for n in grown.names()})
    seen = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    sides = (PROBES, torch.arange(PROBES.shape[1]).expand_as(PROBES), None)
    for _ in range(3):
        model.zero_grad()
        logits = model.logits(model(*sides, *sides) if family == "t5" else model(*sides))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), PROBES.flatten()).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                seen[name] += parameter.grad.abs()
                parameter -= 0.1 * parameter.grad
    for tensor in tensors(config):
        gradient = seen[tensor.name]
        share = 0.9 if family == "v2" and ".ffn." in tensor.name else 1.0  # a ReLU may rest
        if tensor.op not in ("lookup", "table") and not tensor.name.endswith(".k.bias"):
            rows = gradient.reshape(gradient.shape[0], -1).amax(1)
            assert float((rows > 0).double().mean()) >= share, tensor.name
        if tensor.in_:
            assert float((gradient.amax(0) > 0).double().mean()) >= share, tensor.name


@pytest.mark.parametrize("family", FAMILIES)
def test_tiling_by_two_in_bf16_is_the_small_models_rounding(family: str) -> None:
    """Doubling adds the same numbers in another order: most logits are equal to the last bit, the
    largest difference is far below what bf16 costs the small model; by three it is like that."""
    before = small(family)

    def precision(hidden: int) -> dict[str, Any]:
        grown = grow(before, larger(family, hidden=hidden), 1)
        return dict(proof.prove(before, grown, PROBES, precision="bf16")["precision"])

    doubled, tripled = precision(64), precision(96)
    assert doubled["name"] == "bf16" and doubled["median_difference"] == 0
    assert doubled["max_difference"] <= doubled["own_rounding"] / 4
    assert tripled["median_difference"] > 0  # the control: a third is rounded


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_doubling_in_bf16_is_within_two_units_a_layer(family: str, layers: int) -> None:
    """GROWTH of record, correction 1: median difference 0, the largest at most two units in the
    last place (2 ** -8 of the largest logit's power of two) for each layer of depth, counted on
    both sides of an encoder-decoder. By three it is more than 0: the control."""
    import torch

    config = larger(family, layers=layers)
    before = trained(config)
    depth = layers * (2 if family == "t5" else 1)
    grown = grow(before, dataclasses.replace(config, hidden=64), 1)
    old, new = (proof.logits(s, PROBES, torch.bfloat16).double() for s in (before, grown))
    unit = 2.0 ** (float(old.abs().max().log2().floor()) - 7)
    assert float((new - old).abs().median()) == 0
    assert float((new - old).abs().max()) <= 2 * depth * unit
    tripled = grow(before, dataclasses.replace(config, hidden=96), 1)
    third = proof.logits(tripled, PROBES, torch.bfloat16).double()
    assert float((third - old).abs().median()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_growth_sets_is_read_back(family: str, tmp_path: Path) -> None:
    """Moments, births, scales, norm_eps, rope_base, logit_scale, words_said: to the last bit."""
    import torch

    from pretrain import checkpoint

    sizes = ALL | ({"hidden": 64} if family in POST_NORM else {})
    how = Growing(new_words="masked", added="copied", noise=0.1, rewarm_steps=9)
    grown = grow(small(family), larger(family, **sizes), 1, how)
    checkpoint.write_state(tmp_path / "grown", grown)
    back = checkpoint.read(tmp_path / "grown")
    assert back.record == grown.record and from_record(back) == from_record(grown)
    assert {"born", "scales", "rewarm", "growth"} <= set(back.record)
    assert set(back.entries) == set(grown.entries) and len(grown.names("optim/exp_avg_sq")) > 9
    for key in grown.entries:
        assert torch.equal(back.read(key), grown.read(key)), key


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_a_head_over_labels_grows_too(family: str) -> None:
    config = larger(family, labels=3)
    before = trained(config)
    wider = dataclasses.replace(config, hidden=64, ffn=100, layers=3, heads=6)
    found = proof.prove(before, grow(before, wider, 1), PROBES)
    assert found["kept"] and found["to"]["labels"] == 3
