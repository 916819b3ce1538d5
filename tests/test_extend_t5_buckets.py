"""T5's buckets reach farther, and no distance that was told apart changes its bucket.

The bias is the same at every distance, so the logits are the same at every length: float64, to the
last bit, because the new buckets begin as copies of the last.
"""

import dataclasses
import math

import pytest
import torch

from configs.extended import Extend, extended, promise
from configs.load import ConfigError
from configs.model import T5PegasusConfig
from pretrain import proof, proof_of_length
from pretrain.corpora import changes
from pretrain.growth.positions import extend, unbound
from pretrain.models.positions import RelativeBias, buckets_of
from pretrain.state import State
from tests.growing import changed, trained

T5 = T5PegasusConfig(
    "t5_pegasus", vocab=97, hidden=32, layers=2, heads=4, head_dim=8, ffn=48, init_std=0.1
)
FAR = torch.arange(-3000, 3001)
TABLES = ("encoder.position_bias.weight", "decoder.position_bias.weight")


def test_each_stack_goes_on_by_its_own_rule() -> None:
    """Encoder: 8 exact and 16 logarithmic a side, to 2048; decoder: 16 and 32, to 1024."""
    for two_sided, exact, many, end in ((True, 8, 16, 2048), (False, 16, 32, 1024)):
        found = buckets_of(FAR, two_sided, 48, 128, spans=2)
        near = FAR.abs() if two_sided else (-FAR).clamp(min=0)
        steps = torch.log(near.float() / exact) / math.log(end / exact) * many
        wide = (exact + steps.clamp(min=0).long()).clamp(max=exact + many - 1)
        expected = torch.where(near < exact, near, wide)
        if two_sided:
            expected = expected + 24 * (FAR > 0)
        # float32 logarithms of two bases may part by one where a bucket begins
        assert int((found != expected).sum()) <= 4
        assert int(found.max()) == 47
        old = buckets_of(FAR, two_sided, 32, 128)
        inside = FAR.abs() < 128
        moved = found + (-8 if two_sided else 0) * (FAR > 0)
        assert torch.equal(moved[inside], old[inside])
        # the negative control: a table stretched to 1024 changes most distances
        stretched = buckets_of(FAR, two_sided, 32, 1024)
        assert int((stretched[inside] != old[inside]).sum()) > 100


def test_the_bias_is_the_same_at_every_distance_and_then_learns_more() -> None:
    before = trained(T5)
    to = extended(T5, 1024, Extend())
    assert isinstance(to, T5PegasusConfig) and (to.buckets, to.bucket_spans) == (48, 2)
    after = extend(before, to, Extend(), 1024, 1)
    for name, two_sided in zip(TABLES, (True, False), strict=True):
        old, new = RelativeBias(32, 4, 128, two_sided), RelativeBias(48, 4, 128, two_sided, 2)
        old.weight.data, new.weight.data = (s.read(f"weights/{name}") for s in (before, after))
        places = torch.arange(2500)[None]
        with torch.no_grad():
            assert torch.equal(old(places[:, :3], places), new(places[:, :3], places))
            assert torch.equal(old(places[:, -3:], places), new(places[:, -3:], places))
        ids = buckets_of(FAR, two_sided, 48, 128, 2)
        # a token cannot stand at +0, so one bucket of the encoder's other side is never read
        assert len(ids.unique()) == (47 if two_sided else 48)
    for slot, last in (("exp_avg", 0.0), ("exp_avg_sq", None)):
        for name in TABLES:
            old_m, new_m = (s.read(f"optim/{slot}/{name}") for s in (before, after))
            side = 16 if name.startswith("encoder") else 32
            assert torch.equal(new_m[:side], old_m[:side])
            fill = old_m.mean(0) if last is None else torch.zeros(4)
            assert torch.allclose(new_m[side : side + 8], fill.expand(8, -1))


def test_every_length_is_unchanged_and_proven() -> None:
    before = trained(T5)
    to = extended(T5, 1024, Extend())
    after = extend(before, to, Extend(), 1024, 1)
    found = proof_of_length.prove(before, after, None)
    assert found["kept"] and found["promised"] == promise(T5, to, 1024) == 1024
    assert [part["tokens"] for part in found["lengths"]] == [64, 1024]
    assert found["lengths"][1]["float64"]["max_difference"] == 0.0
    name = TABLES[0]
    table = after.read(f"weights/{name}").roll(1, 0)
    bad = proof_of_length.prove(before, changed(after, **{name: table}), None)
    assert not bad["kept"] and bad["not_as_computed"] == name
    again = extended(to, 4096, Extend())
    assert isinstance(again, T5PegasusConfig) and (again.buckets, again.bucket_spans) == (64, 3)
    tokens = torch.randint(97, (1, 300))
    farther = extend(after, again, Extend(), 4096, 1)
    one, two = (proof.logits(s, tokens, torch.float64) for s in (after, farther))
    assert torch.equal(one, two)


def test_log_n_for_t5_and_mistakes() -> None:
    to = extended(T5, 1024, Extend(known=512, log_n=True))
    assert (to.log_n, to.log_n_least) == (512, 1.0) and promise(T5, to, 1024) == 512
    with pytest.raises(
        ConfigError, match="method: is ntk, this t5_pegasus can be extended by buck"
    ):
        extended(T5, 1024, Extend("ntk", known=512))
    odd = dataclasses.replace(T5, buckets=44, bucket_spans=2)
    assert "bucket_spans=2 needs a multiple of 6" in " ".join(odd.problems())


def test_extended_rows_may_have_longer_targets() -> None:
    """A run that was not extended may not change them; of one that was, everything else is held."""
    learnt = {"name": "span_corruption", "ratio": 0.15, "target_len": 16}
    corpus = {"corpus": "c", "fingerprint": "f", "rows": 9, "weight": 1.0, "objective": learnt}
    state = State({}, {"data": [corpus]})
    (said,) = unbound(state).record["data"]
    longer = {**corpus, "rows": 2, "objective": {**learnt, "target_len": 56}}
    assert changes([said], [longer]) == [] and state.record["data"] == [corpus]
    other = {**longer, "objective": {**longer["objective"], "ratio": 0.3}}
    assert "ratio of c differ" in changes([said], [other])[0]
    assert "target_len of c differ" in changes([corpus], [{**longer, "rows": 9}])[0]
