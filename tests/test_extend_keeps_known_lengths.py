"""A model that reads longer rows computes, at every length it knew, what it did.

Float64 is 1e-12 of the logits' deviation for whatever promises it; most are exact to the last bit,
because up to the known length the same rows are added.
"""

import dataclasses

import pytest
import torch

from configs.extended import ROWS, Extend, extended, promise
from configs.grown import Growing
from configs.load import ConfigError, to_dict
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from configs.positions import PositionTable
from pretrain import proof, proof_of_length
from pretrain.generate import load_model, write
from pretrain.growth import grow, model_config
from pretrain.growth.positions import TABLE, extend
from pretrain.models.longer import LearnedPositions
from pretrain.state import State
from tests.growing import TINY, changed, trained

KNOWN, LONG = TINY.positions, 4 * TINY.positions
LEARNED = ("interpolated", "hierarchical", *ROWS)
BERT = RoFormerConfig(
    "roformer", 1, vocab=97, hidden=32, layers=2, heads=4, head_dim=8, ffn=64, positions=48,
    init_std=0.1,
)  # fmt: skip
T5 = T5PegasusConfig("t5_pegasus", 97, hidden=32, layers=2, heads=4, head_dim=8, ffn=48)
FAMILIES: dict[str, ModelConfig] = {"cpm": TINY, "bert": BERT}


def longer(state: State, method: str, seq_len: int = LONG, *, rounded: bool = True) -> State:
    now, how = model_config(state), Extend(method)  # type: ignore[arg-type]
    return extend(state, extended(now, seq_len, how), how, seq_len, 1, rounded=rounded)


def tokens(length: int, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(97, (rows, length), generator=generator)


def far(before: State, after: State, length: int) -> float:
    exact = proof.logits(before, tokens(length), torch.float64)
    return float((proof.logits(after, tokens(length), torch.float64) - exact).abs().max())


def under(state: State, **numbers: object) -> State:
    return State(state.entries, {**state.record, "model": {**state.record["model"], **numbers}})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", LEARNED)
def test_every_known_length_is_unchanged(family: str, method: str) -> None:
    before = trained(FAMILIES[family])
    after = longer(before, method)
    found = proof_of_length.prove(before, after, None)
    if (family, method) == ("cpm", "interpolated"):  # stretched for all alike: it sees no future
        assert found["kept"] and found["promised"] == 0 and far(before, after, KNOWN) > 1e-3
        return
    assert found["kept"] and found["promised"] == KNOWN
    assert [part["tokens"] for part in found["lengths"]] == [KNOWN]
    for length in (1, 2, 17, KNOWN - 1):
        assert far(before, after, length) == 0.0
    assert proof.logits(after, tokens(LONG), torch.float64).isfinite().all()


def test_another_position_is_found() -> None:
    """Negative controls: a stretch of all lengths, one row too few, a row that was not computed."""
    before = trained(BERT)
    stretched = longer(before, "interpolated")
    always = under(stretched, position_table=to_dict(PositionTable("interpolated", KNOWN - 1)))
    always = changed(always, **{TABLE: before.read(f"weights/{TABLE}")[: KNOWN - 1]})
    assert far(before, always, KNOWN) > 0.01
    found = proof_of_length.prove(before, always, None)
    assert not found["kept"] and found["not_as_computed"] == TABLE
    table = before.read(f"weights/{TABLE}").clone()
    table[3, 5] *= 1 + 2e-7
    found = proof_of_length.prove(before, changed(stretched, **{TABLE: table}), None)
    assert not found["kept"] and found["not_as_computed"] == TABLE


def test_masked_words_widen_no_tolerance() -> None:
    """The deviation that a difference is measured by is that of the words that are said."""
    config = dataclasses.replace(TINY, vocab=2 * TINY.vocab)
    masked = grow(trained(), config, 1, Growing(new_words="masked"))
    found, plain = (
        proof_of_length.prove(state, longer(state, "hierarchical"), None)
        for state in (masked, trained())
    )
    assert found["kept"]
    deviations = [one["lengths"][0]["float64"]["std"] for one in (found, plain)]
    assert deviations[0] == pytest.approx(deviations[1], rel=1e-9)  # the masked are at -1e4


def test_hierarchical_is_the_published_formula() -> None:
    """u_i = (p_i - a p_0) / (1 - a), q = a u_i + (1 - a) u_j (bert4keras), up to n x n."""
    p = torch.randn(7, 5, dtype=torch.float64)
    module = LearnedPositions(7, 5, PositionTable("hierarchical", 7, 0.4), 49).double()
    module.weight.data = p
    at = torch.arange(49)
    u = (p - 0.4 * p[:1]) / 0.6
    assert (module(at[None])[0] - (0.4 * u[at // 7] + 0.6 * u[at % 7])).abs().max() < 1e-14
    assert torch.equal(module(at[None])[0, :7], p)
    distinct = torch.cdist(module(at[None])[0], module(at[None])[0]) + 9 * torch.eye(49)
    assert distinct.min() > 0.01
    with pytest.raises(ConfigError, match="reach 2304 at most"):
        extended(TINY, KNOWN**2 + 1, Extend("hierarchical"))
    with pytest.raises(ConfigError, match=r"not be 0\.5"):
        from_page = {**to_dict(TINY), "position_table": {"method": "hierarchical", "rows": 9}}
        from_page["position_table"]["alpha"] = 0.5
        model_config(State({}, {"model": from_page}))


def test_interpolated_reads_between_two_rows() -> None:
    p = torch.randn(7, 5, dtype=torch.float64)
    for dynamic in (True, False):
        table = PositionTable("interpolated", 7, dynamic=dynamic)
        module = LearnedPositions(7, 5, table, 30).double()
        module.weight.data = p
        for length in (3, 7, 8, 13, 30):
            whole = length if dynamic else 30
            for position in range(length):
                place = position * 6 / (whole - 1) if whole > 7 else float(position)
                low = min(int(place + 1e-12), 6)
                expected = p[low] + (place - low) * (p[min(low + 1, 6)] - p[low])
                row = module(torch.arange(length)[None])[0, position]
                assert (row - expected).abs().max() < 1e-13, (dynamic, length, position)


@pytest.mark.parametrize("method", LEARNED)
def test_a_causal_model_sees_no_future(method: str) -> None:
    """What a token's logits are does not depend on how long its document will be."""
    after = longer(trained(), method)
    text = tokens(LONG, 1)
    whole = proof.logits(after, text, torch.float64)
    for length in (1, KNOWN, KNOWN + 1, 100):
        cut = proof.logits(after, text[:, :length], torch.float64)
        assert (whole[:, :length] - cut).abs().max() < 1e-12, length
    if method == "interpolated":  # negative control: a stretch by each document's own length
        assert (
            "will be"
            in dataclasses.replace(
                model_config(after), position_table=PositionTable("interpolated", KNOWN)
            ).problems()[0]
        )


@pytest.mark.parametrize("method", ["interpolated", "hierarchical"])
def test_a_document_in_a_pack_is_what_it_is_alone(method: str) -> None:
    model = load_model(longer(trained(BERT), method)).double()
    long, short = tokens(120, 1), tokens(30, 1)
    packed = torch.cat([long, short, tokens(10, 1)], 1)
    positions = torch.cat([torch.arange(120), torch.arange(30), torch.zeros(10).long()])[None]
    documents = torch.tensor([0] * 120 + [1] * 30 + [-1] * 10)[None]
    together = model(packed, positions, documents)
    alone = model(long, torch.arange(120)[None])
    assert (together[:, :120] - alone).abs().max() < 1e-12
    brief = model(short, torch.arange(30)[None])
    assert (together[:, 120:150] - brief).abs().max() < 1e-12
    if method == "interpolated":  # the lengths of the documents matter, so that this can fail
        other = model(packed, positions, torch.zeros_like(documents))
        assert (other[:, :120] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["interpolated", "hierarchical"])
def test_writing_with_a_cache_equals_writing_without(method: str) -> None:
    from pretrain.decoding import Decoding

    model = load_model(longer(trained(), method))
    prompts = [tokens(60, 1)[0].tolist(), tokens(20, 1)[0].tolist()]
    decoding = Decoding(max_new_tokens=40, min_new_tokens=40, greedy=True)
    slow = write(model, prompts, decoding, 0, 1, cache=False)
    assert write(model, prompts, decoding, 0, 1) == slow
    assert write(model, prompts[:1], decoding, 0, 1) == slow[:1]


def test_extended_again() -> None:
    """On by the same method, and from a decomposition to any other: its positions are written out.

    The written rows are rounded, so float64 is asked of the rows before rounding.
    """
    first = longer(trained(), "hierarchical")
    again = longer(first, "hierarchical", 2000)
    assert far(first, again, LONG) == 0.0 and again.record["model"]["positions"] == 2000
    for method in ("last", "hierarchical_rows"):
        exact = longer(first, method, 2 * LONG, rounded=False)
        assert far(first, exact, LONG) < 1e-13
        written = longer(first, method, 2 * LONG)
        found = proof_of_length.prove(first, written, None)
        assert found["kept"] and found["promised"] == LONG
        assert [part["tokens"] for part in found["lengths"]] == [64, LONG]
        rounding = far(first, written, LONG)
        assert 0.0 < rounding < 1e-5
    stretched = longer(trained(BERT), "interpolated")
    assert far(stretched, longer(stretched, "interpolated", 400), LONG) == 0.0
    with pytest.raises(ConfigError, match="extended by interpolated before"):
        longer(stretched, "hierarchical", 400)
    with pytest.raises(ConfigError, match="dynamic: is false, the model was extended with true"):
        extended(model_config(stretched), 400, Extend("interpolated", dynamic=False))
    narrow = extended(TINY, LONG, Extend("hierarchical", alpha=0.3))
    assert isinstance(narrow, CPMConfig) and narrow.position_table is not None
    for dynamic in (True, False):  # which decomposition does not read
        table = dataclasses.replace(narrow.position_table, dynamic=dynamic)
        own = dataclasses.replace(narrow, position_table=table)
        again_too = extended(own, 400, Extend())  # by the numbers that it has
        assert again_too == dataclasses.replace(own, positions=400)
    with pytest.raises(ConfigError, match=r"alpha: is 0\.4, the model was extended with 0\.3"):
        extended(narrow, 400, Extend(alpha=0.4))


@pytest.mark.parametrize("method", LEARNED)
def test_moments_go_with_their_rows(method: str) -> None:
    before = trained()
    after = longer(before, method)
    for slot in ("exp_avg", "exp_avg_sq"):
        old, new = before.read(f"optim/{slot}/{TABLE}"), after.read(f"optim/{slot}/{TABLE}")
        assert torch.equal(new[:KNOWN], old)
        if method in ROWS:
            fill = old.mean(0) if slot == "exp_avg_sq" else torch.zeros(32)
            assert new.shape == (LONG, 32) and torch.allclose(new[KNOWN:], fill.expand(144, -1))
        else:
            assert new.shape == old.shape
    assert after.record["born"] == before.record["born"]
    assert after.record["extensions"][0]["method"] == method


@pytest.mark.parametrize("family", ["cpm", "t5"])
@pytest.mark.parametrize("slot", ["ema", "slow"])
def test_averages_of_weights_grow_as_the_weights_do(family: str, slot: str) -> None:
    before = trained(TINY if family == "cpm" else T5)
    averages = {
        f"optim/{slot}/{name}": before.entries[f"weights/{name}"] for name in before.names()
    }
    before = State({**before.entries, **averages}, before.record)
    for method in (*ROWS, "hierarchical") if family == "cpm" else ("buckets",):
        after = longer(before, method, LONG if family == "cpm" else 1024)
        for name in after.names():
            assert torch.equal(after.read(f"optim/{slot}/{name}"), after.read(f"weights/{name}"))


def test_new_rows_are_those_named() -> None:
    before = trained()
    p = before.read(f"weights/{TABLE}")
    last = longer(before, "last").read(f"weights/{TABLE}")[KNOWN:]
    assert torch.equal(last, p[-1:].expand(144, -1))
    assert torch.equal(longer(before, "repeat").read(f"weights/{TABLE}"), p.repeat(4, 1))
    drawn = longer(before, "random").read(f"weights/{TABLE}")[KNOWN:]
    assert 0.08 < float(drawn.std()) < 0.11  # init_std is 0.1
    rows = longer(before, "hierarchical_rows")
    served = longer(before, "hierarchical")
    same = proof.logits(rows, tokens(LONG), torch.float64)
    assert (same - proof.logits(served, tokens(LONG), torch.float64)).abs().max() < 1e-6


def test_what_cannot_be_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="48 positions already"):
        extended(TINY, 48, Extend())
    with pytest.raises(ConfigError, match="method: is yarn, this cpm can be extended by hier"):
        extended(TINY, 99, Extend("yarn"))
    config = dataclasses.replace(BERT, position_table=PositionTable("interpolated", 48))
    assert not config.problems()
    rotary = dataclasses.replace(config, positions=None)
    assert "positions are rotary" in rotary.problems()[0]
    table = PositionTable("hierarchical", 64)
    assert "the table alone has 64" in dataclasses.replace(TINY, position_table=table).problems()[0]


def test_log_n_leaves_known_lengths_alone() -> None:
    before, how = trained(), Extend("hierarchical", log_n=True)
    to = extended(TINY, LONG, how)
    assert isinstance(to, CPMConfig) and (to.log_n, to.log_n_least) == (KNOWN, 1.0)
    after = extend(before, to, how, LONG, 1)
    assert promise(TINY, to, LONG) == KNOWN and far(before, after, KNOWN) == 0.0
    plain = longer(before, "hierarchical")
    assert far(plain, after, LONG) > 1e-3
    assert far(before, under(after, log_n_least=0.0), KNOWN) > 1e-3
