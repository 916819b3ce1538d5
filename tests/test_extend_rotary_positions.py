"""Rotary positions at longer rows: the published frequencies, exact where a method promises it.

Frequencies against transformers' to 1e-6 (it computes them in float32), everything else in float64:
1e-12 of the logits' deviation; a score against the definition of ReRoPE, pair by pair, to 1e-12.
"""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.extended import ROTARY, Extend, extended, promise
from configs.load import ConfigError
from configs.model import RoFormerConfig
from configs.positions import Rope
from pretrain import proof, proof_of_length
from pretrain.generate import load_model
from pretrain.growth.positions import extend
from pretrain.models import layers
from pretrain.models.longer import amplitude, document_lengths, frequencies, growth_of
from pretrain.models.positions import turn_of
from pretrain.state import State
from tests.growing import trained

SIZES: dict[str, Any] = {"vocab": 97, "hidden": 32, "layers": 2, "heads": 4, "head_dim": 8}
V1 = RoFormerConfig("roformer", 1, **SIZES, ffn=64, init_std=0.1)
V2 = RoFormerConfig("roformer", 2, **SIZES, ffn=64)
KNOWN, LONG = 32, 128


def longer(
    before: State, method: str, config: RoFormerConfig = V1, **how: Any
) -> tuple[State, RoFormerConfig]:
    page = Extend(method, known=KNOWN, **how)  # type: ignore[arg-type]
    to = extended(config, LONG, page)
    assert isinstance(to, RoFormerConfig)
    return extend(before, to, page, LONG, 1), to


def far(before: State, after: State, length: int) -> float:
    tokens = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(length))
    exact = proof.logits(before, tokens, torch.float64)
    return float((proof.logits(after, tokens, torch.float64) - exact).abs().max() / exact.std())


@pytest.mark.parametrize(
    ("method", "theirs", "length"),
    [("linear", "linear", None), ("yarn", "yarn", None), ("ntk", "dynamic", 2048)],
)
def test_frequencies_are_those_of_transformers(
    method: str, theirs: str, length: int | None
) -> None:
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    numbers = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
    if length is not None:
        numbers["factor"] = 1.0
    config = SimpleNamespace(
        rope_parameters={**numbers, "rope_type": theirs},
        head_dim=64,
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=512,
        standardize_rope_params=lambda: None,
    )
    expected, factor = functions[theirs](config, torch.device("cpu"), seq_len=length)
    rope = Rope(method, 512, numbers["factor"], dynamic=length is not None)  # type: ignore[arg-type]
    growth = growth_of(rope, None if length is None else torch.tensor([[length]]))
    found = frequencies(rope, 64, 10000.0, growth).flatten()
    assert torch.allclose(found, expected.double(), rtol=1e-6)
    scale = amplitude(rope, growth)
    assert factor == pytest.approx(1.0 if scale is None else float(scale), rel=1e-6)
    plain = frequencies(None, 64, 10000.0)
    assert not torch.allclose(found, plain, rtol=1e-3)  # so that this can fail


def test_ntk_is_the_known_bases() -> None:
    """NTK-aware: base 20452, 41829, 85550 for 2, 4 and 8 times the length at 64 wide heads."""
    for times, base in ((2.0, 20452), (4.0, 41829), (8.0, 85550)):
        found = frequencies(Rope("ntk", 512, times), 64, 10000.0)
        assert torch.allclose(found, frequencies(None, 64, float(base)), rtol=2e-5)
        lowest = frequencies(None, 64, 10000.0)[-1] / times
        assert float(found[-1]) == pytest.approx(float(lowest), rel=1e-12)
    fixed = frequencies(Rope("ntk_fixed", 512, 8.0), 64, 10000.0)
    share = fixed / frequencies(None, 64, 10000.0)
    assert torch.allclose(share, 8.0 ** (-(torch.arange(32).double() + 1) / 32))
    mixed = frequencies(Rope("ntk_mixed", 512, 8.0), 64, 10000.0)[-1]
    assert float(mixed) == pytest.approx(float(fixed[-1]), rel=1e-12)


@pytest.mark.parametrize("config", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("method", ROTARY)
def test_what_promises_it_is_unchanged(config: RoFormerConfig, method: str) -> None:
    before = trained(config)
    after, to = longer(before, method, config)
    windowed = method.endswith("rerope")
    assert promise(config, to, LONG) == (KNOWN // 2 if windowed else KNOWN)
    assert far(before, after, KNOWN // 2 if windowed else KNOWN) <= 1e-12
    assert far(before, after, LONG) > 1e-4  # the method does something beyond
    found = proof_of_length.prove(before, after, None)
    assert found["kept"] and found["promised"] == (KNOWN // 2 if windowed else KNOWN)


def test_what_does_not_promise_says_so() -> None:
    before = trained(V1)
    for method in ("linear", "ntk", "yarn"):
        after, to = longer(before, method, dynamic=False)
        assert promise(V1, to, LONG) == 0 and far(before, after, KNOWN) > 1e-3
        found = proof_of_length.prove(before, after, None)
        assert found["kept"] and found["promised"] == 0
        assert not found["lengths"][0]["float64"]["within"]
        assert "no length keeps its logits" in proof_of_length.sentence(found)
    whole = Extend("rerope", window=KNOWN, known=KNOWN)
    assert promise(V1, extended(V1, LONG, whole), LONG) == KNOWN


@pytest.mark.parametrize(("method", "leak"), [("rerope", 16.0), ("leaky_rerope", 4.0)])
def test_rerope_is_its_definition(method: str, leak: float) -> None:
    """Every score from one turn by the cut distance, both ways."""
    T, window, H, base = 11, 4, 8, 100.0
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, T, 1, H, generator=generator, dtype=torch.float64) for _ in "qkv")
    rope = Rope(method, 6, window=window, leak=leak)  # type: ignore[arg-type]
    positions = torch.arange(T)[None]
    turn = turn_of(positions, H, base, torch.float64, rope)
    assert turn.far is not None
    queries = [layers.turned(q, t) for t in (turn, turn.far[0], turn.far[1])]
    keys = [layers.turned(k, t) for t in (turn, turn.far[2])]
    regions = layers.Regions(
        (positions[:, :, None] - positions[:, None]).abs() < window,
        positions[:, :, None] > positions[:, None],
    )
    found = layers.windowed_scores(torch.cat(queries, -1), torch.cat(keys, -1), regions)[0, 0]
    slope = 0.0 if method == "rerope" else 1 / leak
    angles = base ** (-torch.arange(0, H, 2).double() / H)
    for m in range(T):
        for n in range(T):
            distance = float(abs(m - n))
            if distance >= window:
                distance = window + (distance - window) * slope
            angle = math.copysign(distance, m - n) * angles
            x, y = q[0, m, 0].unflatten(-1, (-1, 2)), k[0, n, 0].unflatten(-1, (-1, 2))
            dot, cross = (x * y).sum(-1), x[:, 1] * y[:, 0] - x[:, 0] * y[:, 1]
            expected = float((dot * angle.cos() - cross * angle.sin()).sum())
            assert float(found[m, n]) == pytest.approx(expected, abs=1e-12), (m, n)
    see = layers.Visibility(False, regions=regions)
    got = layers.attention_by_device(torch.cat(queries, -1), torch.cat(keys, -1), v, see, 0.5, 0.0)
    weights = torch.softmax(found * 0.5, -1)
    assert (got[0, :, 0] - weights @ v[0, :, 0]).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["ntk", "yarn", "linear", "rerope", "leaky_rerope"])
def test_a_document_in_a_pack_is_what_it_is_alone(method: str) -> None:
    after, _ = longer(trained(V1), method)
    model = load_model(after).double()
    tokens = torch.randint(97, (1, 110), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(70), torch.arange(30), torch.zeros(10).long()])[None]
    documents = torch.tensor([0] * 70 + [1] * 30 + [-1] * 10)[None]
    together = model(tokens, positions, documents)
    for begin, end in ((0, 70), (70, 100)):
        alone = model(tokens[:, begin:end], torch.arange(end - begin)[None])
        assert (together[:, begin:end] - alone).abs().max() < 1e-12
    assert document_lengths(positions, documents)[0, [0, 69, 70, 99, 105]].tolist() == [
        70, 70, 30, 30, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("method", [m for m in ROTARY if not m.endswith("rerope")])
def test_frequencies_keep_the_fast_kernel(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    after, _ = longer(trained(V1), method)
    model = load_model(after)
    seen = []

    def spy(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(q.shape[-1])
        return layers.attention_sdpa(q, *rest)

    for block in model.encoder.layers:  # type: ignore[union-attr]
        monkeypatch.setattr(block.self, "attention", spy)
    model(torch.randint(97, (1, LONG)), torch.arange(LONG)[None])
    assert seen == [V1.head_dim] * V1.layers


def test_the_default_is_rerope_with_log_n() -> None:
    to = extended(V1, LONG, Extend(known=KNOWN))
    assert isinstance(to, RoFormerConfig) and to.rope is not None
    assert (to.rope.method, to.rope.window) == ("rerope", KNOWN // 2)
    assert (to.log_n, to.log_n_least) == (KNOWN, 1.0)
    plain = extended(V1, LONG, Extend("rerope", known=KNOWN, log_n=False))
    assert plain.log_n == 0
    again = extended(to, 4 * LONG, Extend("rerope"))
    assert again == to  # nothing of ReRoPE depends on the length
    narrow = extended(V1, LONG, Extend("leaky_rerope", window=9, leak=4.0, known=KNOWN))
    assert extended(narrow, 4 * LONG, Extend("leaky_rerope")) == narrow  # its own numbers
    wide = extended(narrow, LONG, Extend("leaky_rerope", window=20))
    assert promise(narrow, wide, LONG) == promise(wide, narrow, LONG) == 9
    grown = extended(V1, LONG, Extend("linear", known=KNOWN, dynamic=False))
    twice = extended(grown, 2 * LONG, Extend("linear"))
    assert isinstance(twice, RoFormerConfig) and twice.rope is not None
    assert (twice.rope.known, twice.rope.factor) == (KNOWN, 8.0)
    only = extended(V1, LONG, Extend("as_it_is", known=KNOWN, log_n=True))
    assert isinstance(only, RoFormerConfig) and only.rope is None and only.log_n == KNOWN


def test_what_cannot_be_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="known: must be given"):
        extended(V1, LONG, Extend("yarn"))
    with pytest.raises(ConfigError, match="the model knows 200 already"):
        extended(V1, LONG, Extend("yarn", known=200))
    with pytest.raises(ConfigError, match="can be extended by linear, ntk"):
        extended(V1, LONG, Extend("hierarchical", known=KNOWN))
    yarn = extended(V1, LONG, Extend("yarn", known=KNOWN))
    with pytest.raises(ConfigError, match="was extended by yarn before"):
        extended(yarn, 2 * LONG, Extend("linear"))
    with pytest.raises(ConfigError, match="dynamic: is false, the model was extended with true"):
        extended(yarn, 2 * LONG, Extend("yarn", dynamic=False))
    for rope, said in (
        (Rope("rerope", 32), "window: is 0"),
        (Rope("linear", 32, 0.5), "factor: is 0.5"),
        (Rope("linear", 1), "known: is 1"),
        (Rope("rerope", 32, window=3, dynamic=True), "has no dynamic form"),
        (Rope("yarn", 32, beta_slow=40.0), "beta_fast must"),
        (Rope("leaky_rerope", 32, window=3, leak=0.5), "leak: is 0.5"),
    ):
        assert any(said in sentence for sentence in rope.problems())
    bert = dataclasses.replace(V1, positions=64, rope=Rope("linear", 32, 4.0))
    assert "positions are learned, nothing is turned" in " ".join(bert.problems())
