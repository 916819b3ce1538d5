"""Su's form keeps the function; stacking, copies and random layers do not, and are not called so.

Tolerances as in test_growth_of_every_family.py.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from configs.grown import PRESERVING, Growing, completed, refusal, rescales
from configs.load import ConfigError, dump, from_dict, to_dict
from launch.cli import main
from pretrain import checkpoint, proof
from pretrain.growth import grow, remarks
from pretrain.growth.copies import drawn
from pretrain.state import State, fresh, seed_of
from tests.growing import changed, held
from tests.test_growth_of_every_family import FAMILIES, PROBES, far, larger, small, under

SU, STACK = Growing(method="su"), Growing(method="stack")
COPIES, AKI, RANDOM = (Growing(method=m) for m in ("bert2bert", "bert2bert_aki", "random"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "factor"), [("cpm", 2), ("cpm", 3), ("t5", 2)])
def test_su_s_form_is_exact_once_mended(family: str, factor: int) -> None:
    ffn = FAMILIES[family].ffn
    to = larger(family, hidden=32 * factor, ffn=ffn * factor + 4, heads=6, layers=3)
    before = small(family)
    found = proof.prove(before, grow(before, to, 1, SU), PROBES)
    assert found["kept"] and found["means_to_keep"] and found["method"] == "su"
    assert found["to"]["norm_eps"] == pytest.approx(FAMILIES[family].norm_eps / factor)


def test_su_s_published_errors_are_errors() -> None:
    """eps as it was; the second feed-forward bias over k instead of its root."""
    before = small("cpm")
    grown = grow(before, larger("cpm", hidden=64, ffn=128), 1, SU, rounded=False)
    assert far(before, grown) <= 1e-12
    assert far(before, under(grown, norm_eps=1e-5)) > 1e-7
    name = "decoder.layers.0.ffn.down.bias"
    wrong = grown.read(f"weights/{name}") / 2**0.5
    assert far(before, changed(grown, **{name: wrong})) > 0.01


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("v2", {"hidden": 64}, "v2 has none"),
        ("v1", {"hidden": 64}, "an eps of its own"),
        ("cpm", {"hidden": 48}, "hidden=64"),
        ("t5", {"hidden": 80}, "hidden=64"),
    ],
)
def test_what_su_s_form_cannot_reach(family: str, sizes: dict[str, int], said: str) -> None:
    assert said in (refusal(FAMILIES[family], larger(family, **sizes), SU) or "")


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_layers_are_the_layers_again(family: str) -> None:
    before = small(family)
    grown = grow(before, larger(family, layers=5), 1, STACK)
    for name in grown.names():
        if ".layers." in name:
            layer = int(name.split(".")[2])
            origin = name.replace(f".layers.{layer}.", f".layers.{layer % 2}.")
            assert torch.equal(grown.read(f"weights/{name}"), before.read(f"weights/{origin}"))
            assert grown.record["born"][name] == (0 if layer < 2 else 7)
    told = proof.prove(before, grown, PROBES)
    assert not told["kept"] and not told["means_to_keep"] and told["not_as_computed"] is None
    assert told["moved"] > 0.01 and proof.holds(told)


@pytest.mark.parametrize("how", [STACK, COPIES, AKI, RANDOM], ids=lambda how: how.method)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_others_reach_every_size_and_say_how_far_they_moved(family: str, how: Growing) -> None:
    hidden = 64 if how is STACK else 48
    to = larger(family, hidden=hidden, layers=3, heads=6, ffn=100, head_dim=12, vocab=101)
    before = small(family)
    told = proof.prove(before, grow(before, to, 1, how), PROBES)
    assert how.method not in PRESERVING and not told["means_to_keep"] and not told["kept"]
    assert told["moved"] > 0.01 and told["loss"]["after"] != told["loss"]["before"]
    assert f"function NOT kept, as method {how.method} does not" in proof.sentence(told)


def test_bert2bert_s_copies_share_what_reads_them() -> None:
    """Without a norm in the way (units and heads) its copies keep the function."""
    before = small("cpm")
    inner = grow(before, larger("cpm", ffn=100, heads=6), 1, COPIES, rounded=False)
    assert far(before, inner) <= 1e-12
    grown = grow(before, larger("cpm", hidden=48), 1, COPIES)
    of = drawn(32, 48, 1, "embed").of
    q, old = (s.read("weights/decoder.layers.0.self.q.weight") for s in (grown, before))
    for entry in range(48):
        count = of.count(of[entry])
        torch.testing.assert_close(q[:, entry], old[:, of[entry]] / count)


def test_aki_takes_its_new_rows_from_above() -> None:
    before = small("cpm")
    grown = grow(before, larger("cpm", ffn=100), 1, AKI)
    of = torch.tensor(drawn(64, 100, 1, "ffn").of[64:])
    for layer, source in ((0, 1), (1, 1)):  # the last layer has none above
        new = grown.read(f"weights/decoder.layers.{layer}.ffn.up.weight")[64:]
        above = before.read(f"weights/decoder.layers.{source}.ffn.up.weight")
        assert torch.equal(new, above[of])


def test_random_layers_are_fresh_ones() -> None:
    before, to = small("cpm"), larger("cpm", layers=4)
    grown = grow(before, to, 5, RANDOM)
    plain = fresh(to, seed_of(5, "layers", 2, 4))
    for layer, old in ((0, 0), (1, None), (2, 1), (3, None)):
        name = f"weights/decoder.layers.{layer}.self.o.weight"
        origin = plain if old is None else before
        key = name if old is None else name.replace(f".{layer}.", f".{old}.")
        assert torch.equal(grown.read(name), origin.read(key))


def test_the_command_does_not_fail_for_what_does_not_mean_to_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.write_state(tmp_path / "small", small("cpm"))
    (tmp_path / "page.yaml").write_text(dump({"model": to_dict(FAMILIES["cpm"])}), "utf-8")

    def call(out: str, *words: str) -> int:
        line = ["grow", str(tmp_path / "small"), "--to", str(tmp_path / "page.yaml")]
        return main([*line, "--out", str(tmp_path / out), *words])

    assert call("stacked", "--set", "layers=4", "--method", "stack") == 0
    said = capsys.readouterr()
    assert "NOT kept, as method stack does not" in said.out and not said.err
    told: dict[str, Any] = json.loads((tmp_path / "stacked/proof.json").read_text("utf-8"))
    assert told["method"] == "stack" and told["kept"] is False and told["moved"] > 0.01
    words = ["--added", "copied", "--noise", "0.02", "--split", "0.6", "--rewarm-steps", "9"]
    assert call("noisy", "--set", "hidden=64", "--set", "ffn=128", *words) == 0
    assert "function         kept" in capsys.readouterr().out
    record = checkpoint.read(tmp_path / "noisy").record
    how = {"added": "copied", "noise": 0.02, "split": 0.6, "rewarm_steps": 9}
    assert record["growth"][-1]["how"] == how and record["rewarm"] == {"step": 9, "steps": 9}
    assert call("wrong", "--set", "layers=4", "--noise", "2") == 2
    assert "noise: is 2.0, must lie in [0, 1]" in capsys.readouterr().err


def test_options_outside_their_range_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Growing, {"noise": -1, "split": 0.3, "rewarm_steps": -1})
    assert all(word in str(caught.value) for word in ("noise: is -1", "split: is 0.3", "rewarm"))
    with pytest.raises(ConfigError, match="random draws all that is new"):
        from_dict(Growing, {"method": "random", "added": "copied"})
    wider = dataclasses.replace(FAMILIES["cpm"], hidden=48)
    assert refusal(FAMILIES["cpm"], wider, COPIES) is None


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ({"hidden": 48}, {"noise": 0.1}, "noise: 0.1, but nothing is a copy"),
        ({"hidden": 48}, {"split": 0.6}, "split: 0.6, but no copies share"),
        ({"layers": 3}, {"rewarm_steps": 9}, "rewarm_steps: 9, but no learning rate"),
        ({"hidden": 48}, {"new_layers": "paired"}, "new_layers: paired, but there are no new"),
        ({"layers": 3}, {"added": "copied"}, "added: copied, but neither ffn nor heads"),
        ({"hidden": 48}, {"added": "paired"}, "added: paired, but neither ffn nor heads"),
        ({"layers": 3}, {"new_words": "masked"}, "new_words: masked, but there are no"),
    ],
)
def test_an_option_without_effect_is_told(
    sizes: dict[str, int], options: dict[str, Any], said: str
) -> None:
    """And it has none: the states are the same to the last bit."""
    how, to, before = Growing(**options), larger("cpm", **sizes), small("cpm")
    plain, grown = grow(before, to, 1), grow(before, to, 1, how)
    (sentence,) = remarks(before, grown, how)
    assert said in sentence
    assert all(torch.equal(grown.entries[k].read(), e.read()) for k, e in plain.entries.items())
    assert grown.record.get("rewarm") is None


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"ffn": 128}, {"noise": 0.1, "added": "copied"}),
        ({"ffn": 128}, {"split": 0.7, "added": "copied"}),
        ({"ffn": 128}, {}),  # random units
        ({"hidden": 64, "layers": 4}, {"new_layers": "paired"}),
        ({"hidden": 64}, {"method": "bert2bert", "noise": 0.1}),
    ],
)
def test_copies_that_nothing_parts_are_told(sizes: dict[str, int], options: dict[str, Any]) -> None:
    """They stay locked (test_growth_parts_the_copies.py); those with one of these options do not.
    Dropout parts a width, not the units of a CPM."""
    parted, before = Growing(**options), small("cpm")
    locked = Growing(added="copied" if "ffn" in sizes else "random")
    to = dataclasses.replace(larger("cpm", **sizes), dropout=0.0, attention_dropout=0.0)
    wider = dataclasses.replace(to, layers=before.record["model"]["layers"])
    (sentence,) = remarks(before, grow(before, wider, 1, locked), locked)
    (size,) = sizes.keys() - {"layers"}
    assert sentence.startswith(f"noise: 0, and no dropout falls between the copies of {size}")
    assert remarks(before, grow(before, to, 1, parted), parted) == []
    drops = dataclasses.replace(wider, dropout=0.1)
    assert len(remarks(before, grow(before, drops, 1, locked), locked)) == ("ffn" in sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_page_knows_which_growth_divides_a_learning_rate(family: str) -> None:
    """What check and plan say of rewarm_steps is what the state says, whatever grows and how."""
    now, before, seen = FAMILIES[family], small(family), set()
    sizes = {"hidden": (48, 64), "ffn": (100, 128), "heads": (8,), "head_dim": (16,)}
    sizes |= {"layers": (3,), "vocab": (120,)}
    ways = [get_args(get_type_hints(Growing)[key]) for key in ("method", "added")]
    for size, values in sizes.items():
        for value, method, added in itertools.product(values, *ways):
            how, to = Growing(method=method, added=added), larger(family, **{size: value})
            if refusal(now, to, how) or how.problems():
                continue
            scales = grow(before, to, 1, how).record.get("scales", {}).values()
            real = any(scale["lr"] != 1 or scale["wd"] != 1 for scale in scales)
            assert rescales(now, completed(now, to, how), how) == real, (how, size, value)
            seen.add(real)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"hidden": 64}, {"noise": 0.1, "split": 0.6, "rewarm_steps": 9}),
        ({"ffn": 128}, {"added": "copied", "noise": 0.1, "split": 0.6, "rewarm_steps": 9}),
        ({"layers": 3}, {"new_layers": "paired"}),
        ({"ffn": 128}, {"added": "paired"}),
        ({"layers": 3}, {"noise": 0.1}),
        ({"vocab": 120}, {"new_words": "masked"}),
    ],
)
def test_an_option_with_effect_is_not(sizes: dict[str, int], options: dict[str, Any]) -> None:
    how, to, before = Growing(**options), larger("cpm", **sizes), small("cpm")
    plain, grown = grow(before, to, 1), grow(before, to, 1, how)
    assert remarks(before, grown, how) == []
    same = [torch.equal(grown.entries[k].read(), e.read()) for k, e in plain.entries.items()]
    assert not all(same) or grown.record["model"] != plain.record["model"]


def test_split_is_told_to_part_nothing_in_silent_layers() -> None:
    how = Growing(added="copied", split=0.6)
    before, to = small("cpm"), larger("cpm", layers=3, ffn=128)
    (sentence,) = remarks(before, grow(before, to, 1, how), how)
    assert "silent layers read nothing; noise" in sentence
    for sizes, more in (({"ffn": 128}, {}), ({"layers": 3, "ffn": 128}, {"noise": 0.1})):
        to, noisy = larger("cpm", **sizes), dataclasses.replace(how, **more)  # type: ignore[arg-type]
        assert remarks(before, grow(before, to, 1, noisy), noisy) == []


def test_noise_on_paired_layers_is_told() -> None:
    before, to, paired = small("cpm"), larger("cpm", layers=3), Growing(new_layers="paired")
    noisy = dataclasses.replace(paired, noise=0.1)
    plain, grown = grow(before, to, 1, paired), grow(before, to, 1, noisy)
    (sentence,) = remarks(before, grown, noisy)
    assert "of layers only silent ones are" in sentence and remarks(before, plain, paired) == []
    assert all(torch.equal(grown.entries[k].read(), e.read()) for k, e in plain.entries.items())


@pytest.mark.parametrize("value", [float("nan"), 7.0])
def test_what_was_written_wrong_does_not_pass_under_any_method(value: float) -> None:
    """A method that moves the function is still held to what it computed."""
    before, name = small("cpm"), "decoder.layers.0.ffn.up.weight"
    after = grow(before, larger("cpm", layers=4), 1, STACK)
    good = proof.prove(before, after, PROBES)
    assert proof.holds(good) and not good["kept"]
    damaged = after.read(f"weights/{name}").clone()
    damaged[0, 0] = value
    found = proof.prove(before, changed(after, **{name: damaged}), PROBES)
    assert found["not_as_computed"] == name and not proof.holds(found)
    assert f"WRITTEN WRONG at {name}" in proof.sentence(found)


@pytest.mark.parametrize("how", [Growing(), STACK], ids=lambda how: how.method)
def test_a_moment_that_was_written_wrong_is_found_too(how: Growing) -> None:
    before, to = small("cpm"), larger("cpm", layers=4)
    after, key = grow(before, to, 1, how), "optim/exp_avg_sq/decoder.layers.3.ffn.up.weight"
    assert proof.holds(proof.prove(before, after, PROBES))
    nan = held(torch.full(after.entries[key].shape, float("nan")))
    found = proof.prove(before, State({**after.entries, key: nan}, after.record), PROBES)
    assert found["not_as_computed"] == key and not proof.holds(found)


def test_a_run_says_what_the_command_says_of_the_function() -> None:
    before, wider = small("cpm"), larger("cpm", ffn=128)
    kept = proof.prove(before, grow(before, wider, 1, COPIES), PROBES)
    assert kept["kept"] and "function kept;" in proof.sentence(kept)
    words = larger("cpm", vocab=194)
    fallen = proof.prove(before, grow(before, words, 1), PROBES)
    assert "NOT in their probabilities" in proof.sentence(fallen)
