"""Promise: RoFormer v1 is `transformers`' RoFormer, logits and every gradient; v2, which no library
has, is what its description says, written out once more below.

Tolerances, in standard deviations of what is compared: float64 2e-6 against the stock model, whose
table of positions is float32, and 1e-12 against the same with a float64 table, and for v2; fp32
1e-5. It is the largest difference that must be within, but for gradients where either side computes
in float32: there it is their root mean square.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import RoFormerConfig, parameter_count
from pretrain import recompute
from pretrain.models import roformer
from pretrain.models.layers import attention_matmul, attention_sdpa, check, gelu_tanh
from pretrain.models.positions import turn_of, turned
from pretrain.models.roformer import RoFormer
from tests.test_cpm_equals_gpt2 import random_weights
from tests.test_t5_pegasus_equals_mt5 import Side, side

transformers = pytest.importorskip("transformers")

OFF = {"dropout": 0.0, "attention_dropout": 0.0}
TINY = RoFormerConfig("roformer", 1, 97, 48, 3, 4, 12, 80, **OFF)
TINY_V2 = replace(TINY, version=2)
# The heads of the published base size, on one layer with a small FFN and vocabulary.
BASE_HEADS = RoFormerConfig("roformer", 1, 211, 768, 1, 12, 64, 96, **OFF)
PACKED = [[7, 12, 5], [20, -4], [-8, 16]]
PADDED = [[24], [20, -4], [9, -15]]
LONG = [[150]]


def build(config: RoFormerConfig, dtype: torch.dtype = torch.float64) -> RoFormer:
    model = RoFormer(config).to(dtype).eval()
    random_weights(model, 0)
    return model


def rows(lengths: list[list[int]], vocab: int) -> tuple[Side, Tensor]:
    """((tokens, positions, document ids), segments); no token is 0, which theirs does not train."""
    tokens, positions, documents = side(lengths, vocab - 1, 5)
    return (tokens + 1, positions, documents), (positions > 5).long()


def to_hf(ours: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our names (of weights or gradients) -> theirs; every layout is the same."""
    modules = {
        "embed.norm": "roformer.embeddings.LayerNorm",
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
    }
    inner = {
        "self.q": "attention.self.query",
        "self.k": "attention.self.key",
        "self.v": "attention.self.value",
        "self.o": "attention.output.dense",
        "self_norm": "attention.output.LayerNorm",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
        "ffn_norm": "output.LayerNorm",
    }
    for i in range(layers):
        at, to = f"encoder.layers.{i}", f"roformer.encoder.layer.{i}"
        modules |= {f"{at}.{mine}": f"{to}.{theirs}" for mine, theirs in inner.items()}
    kinds = ("weight", "bias")
    return {
        "roformer.embeddings.word_embeddings.weight": ours["embed.tokens.weight"],
        "roformer.embeddings.token_type_embeddings.weight": ours["embed.segments.weight"],
        "cls.predictions.bias": ours["head.bias"],
        **{f"{to}.{k}": ours[f"{at}.{k}"] for at, to in modules.items() for k in kinds},
    }


def hf_of(ours: RoFormer, exact: bool) -> nn.Module:
    """transformers' model on the same weights; its table of positions in float64 where exact."""
    c = ours.config
    theirs = transformers.RoFormerForMaskedLM(
        transformers.RoFormerConfig(
            vocab_size=c.vocab, hidden_size=c.hidden, embedding_size=c.hidden,
            num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.ffn,
            hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            max_position_embeddings=160, type_vocab_size=c.segments, layer_norm_eps=c.norm_eps,
            pad_token_id=0, rotary_value=False, attn_implementation="eager",
        )
    ).to(next(ours.parameters()).dtype).eval()  # fmt: skip
    weights = {n: p.detach().clone() for n, p in ours.named_parameters()}
    missing, unknown = theirs.load_state_dict(to_hf(weights, c.layers), strict=False)
    assert not unknown and {name.rsplit(".", 2)[-2] for name in missing} <= {
        "decoder", "embed_positions",
    }  # fmt: skip
    theirs.tie_weights()
    if exact:
        angle = torch.arange(160.0, dtype=torch.float64)[:, None] * 10000.0 ** (
            -torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
        )
        table = torch.cat([angle.sin(), angle.cos()], -1)
        theirs.roformer.encoder.embed_positions.weight = nn.Parameter(table, requires_grad=False)
    return theirs


def ours_on(model: RoFormer, lengths: Any) -> Tensor:
    """Logits of the positions that are not padding."""
    row, segments = rows(lengths, model.config.vocab)
    return model.logits(model(*row, segments)[row[2] >= 0])


def theirs_on(theirs: nn.Module, lengths: Any) -> Tensor:
    row, segments = rows(lengths, theirs.config.vocab_size)
    dtype = next(theirs.parameters()).dtype
    sees = row[2][:, None, :, None] == row[2][:, None, None, :]
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    given = {"input_ids": row[0], "token_type_ids": segments, "attention_mask": mask}
    return theirs(**given).logits[row[2] >= 0]


def apart(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], exact: bool
) -> tuple[float, dict[str, float]]:
    """Differences in standard deviations: the logits' largest, each gradient's (see the head)."""

    def of(value: Tensor, reference: Tensor, largest: bool) -> float:
        far = (value - reference).abs()
        return ((far.max() if largest else far.square().mean().sqrt()) / reference.std()).item()

    # but for the keys' bias in a block whose positions do not matter: its gradient is rounding
    gradients = {
        name: of(value, expected[1][name], exact)
        for name, value in found[1].items()
        if expected[1][name].std() > 1e-6
    }
    return of(found[0], expected[0], True), gradients


def with_gradients(logits: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(logits.shape, generator=generator).to(logits)
    (logits * weight).sum().backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("dtype", "exact", "tolerance"),
    [(torch.float64, False, 2e-6), (torch.float64, True, 1e-12), (torch.float32, False, 1e-5)],
    ids=["float64 against stock", "float64", "fp32"],
)
@pytest.mark.parametrize(
    ("config", "lengths"),
    [(TINY, PACKED), (TINY, PADDED), (BASE_HEADS, PACKED), (BASE_HEADS, LONG)],
    ids=["packed", "padded", "base heads, packed", "base heads, long"],
)
def test_v1_equals_roformer(
    config: RoFormerConfig, lengths: Any, dtype: torch.dtype, exact: bool, tolerance: float
) -> None:
    ours = build(config, dtype)
    theirs = hf_of(ours, exact)
    logits, expected = ours_on(ours, lengths), theirs_on(theirs, lengths)
    mine = to_hf(with_gradients(logits, dict(ours.named_parameters())), config.layers)
    other = with_gradients(expected, dict(theirs.named_parameters()))
    assert mine.keys() == other.keys()
    far, gradients = apart((logits, mine), (expected, other), exact)
    assert far < tolerance
    assert len(gradients) >= len(mine) - config.layers
    assert max(gradients.values()) < tolerance, gradients


# ---- v2, written out from its description ------------------------------------------------------


def v2_by_hand(w: dict[str, Tensor], config: RoFormerConfig, lengths: Any, share: float) -> Tensor:
    """Logits row by row, document by document, head by head; no code of the model's."""
    row, segments = rows(lengths, config.vocab)

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()

    d = config.head_dim
    out = []
    for tokens, documents, kinds in zip(row[0], row[2], segments, strict=True):
        for number in documents.unique().tolist():
            if number < 0:
                continue
            mine = documents == number
            n = int(mine.sum())
            # the published table: sin and cos in turns, each repeated; x' = x cos + x_perp sin
            table = torch.zeros(n, d, dtype=torch.float64)
            for position in range(n):
                for i in range(d // 2):
                    angle = torch.tensor(position * 10000.0 ** (-2 * i / d), dtype=torch.float64)
                    table[position, 2 * i], table[position, 2 * i + 1] = angle.sin(), angle.cos()
            cos = table[:, 1::2].repeat_interleave(2, -1)
            sin = table[:, 0::2].repeat_interleave(2, -1)
            swap = [i + 1 if i % 2 == 0 else i - 1 for i in range(d)]
            sign = torch.tensor([-1.0, 1.0] * (d // 2), dtype=torch.float64)
            x = norm(
                w["embed.tokens.weight"][tokens[mine]] + w["embed.segments.weight"][kinds[mine]]
            )
            for layer in range(config.layers):
                at = f"encoder.layers.{layer}"
                q, k, v = (x @ w[f"{at}.self.{name}.weight"].T for name in "qkv")
                heads = []
                for h in range(config.heads):
                    part = slice(h * d, (h + 1) * d)
                    qh, kh = (y[:, part] * cos + y[:, part][:, swap] * sign * sin for y in (q, k))
                    heads.append(((qh @ kh.T) / d**0.5).softmax(-1) @ v[:, part])
                x = norm(x + share * (torch.cat(heads, -1) @ w[f"{at}.self.o.weight"].T))
                inner = (x @ w[f"{at}.ffn.up.weight"].T).clamp(min=0)
                x = norm(x + share * (inner @ w[f"{at}.ffn.down.weight"].T))
            out.append(x @ w["embed.tokens.weight"].T)
    return torch.cat(out)


@pytest.mark.parametrize("lengths", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("step", [None, 1, 30, 100, 500])
def test_v2_equals_its_description(lengths: Any, step: int | None) -> None:
    ours = build(replace(TINY_V2, ramp_steps=100))
    if step is not None:
        ours.set_progress(step)
    share = 1.0 if step is None else min(1.0, step / 100)
    copies = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters()}
    logits, expected = ours_on(ours, lengths), v2_by_hand(copies, TINY_V2, lengths, share)
    mine = with_gradients(logits, dict(ours.named_parameters()))
    far, gradients = apart((logits, mine), (expected, with_gradients(expected, copies)), True)
    assert far < 1e-12
    assert len(gradients) == len(mine) and max(gradients.values()) < 1e-12, gradients


# ---- negative controls -------------------------------------------------------------------------


def tanh_gelu(model: RoFormer, patch: pytest.MonkeyPatch) -> None:
    for block in model.encoder.layers:
        block.ffn.activation = gelu_tanh


def tanh_gelu_in_the_head(model: RoFormer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(roformer, "gelu_erf", gelu_tanh)


def half_split_rotation(model: RoFormer, patch: pytest.MonkeyPatch) -> None:
    def halves(x: Tensor, turn: Any) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = turn.cos_BTNP, turn.sin_BTNP
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    from pretrain.models import layers

    patch.setattr(layers, "turned", halves)


def pre_norm(model: RoFormer, patch: pytest.MonkeyPatch) -> None:
    block = model.encoder.layers[0]
    block.ffn_sublayer = lambda x: x + block.ffn(block.ffn_norm(x))


def no_head_bias(model: RoFormer, patch: pytest.MonkeyPatch) -> None:
    model.head.bias.data.zero_()


def gelu_for_relu(model: RoFormer, patch: pytest.MonkeyPatch) -> None:
    for block in model.encoder.layers:
        block.ffn.activation = F.gelu


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (TINY, tanh_gelu), (TINY, tanh_gelu_in_the_head), (TINY, half_split_rotation),
        (TINY, pre_norm), (TINY, no_head_bias), (TINY_V2, half_split_rotation),
        (TINY_V2, pre_norm), (TINY_V2, gelu_for_relu),
    ],
    ids=lambda value: getattr(value, "__name__", None) or f"v{value.version}",
)  # fmt: skip
def test_a_fault_is_seen(
    config: RoFormerConfig, fault: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each well-known mistake lies far outside the fp32 tolerance."""
    ours = build(config)
    with torch.no_grad():
        expected = ours_on(ours, PADDED)
        fault(ours, monkeypatch)
        found = ours_on(ours, PADDED)
    assert (found - expected).abs().max() / expected.std() > 10 * 1e-5


# ---- positions, packing, what changes nothing --------------------------------------------------


def test_a_turned_product_knows_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    at = lambda x, p: turned(x, turn_of(torch.tensor([[p]]), 64, 1e4, torch.float64))  # noqa: E731
    products = [(at(q, p) * at(k, p + 37)).sum() for p in (0, 5, 100_000)]
    assert max(products) - min(products) < 1e-9
    assert ((at(q, 0) * at(k, 38)).sum() - products[0]).abs() > 1e-3
    assert torch.equal(at(q, 0).sort().values, q.sort().values)  # nothing is turned at 0


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("log_n", [0, 512])
def test_a_packed_document_equals_the_document_alone(config: RoFormerConfig, log_n: int) -> None:
    model = build(replace(config, log_n=log_n))
    (tokens, positions, documents), segments = rows(PACKED, 97)
    together = model(tokens, positions, documents, segments)
    for row in range(3):
        for number in documents[row].unique().tolist():
            if number < 0:
                continue
            mine = documents[row] == number
            given = (part[row, mine][None] for part in (tokens, positions))
            alone = model(*given, None, segments[row, mine][None])
            assert (together[row, mine] - alone[0]).abs().max() < 1e-12
    # Negative control: without document ids the rows are one stream.
    assert (model(tokens, positions, None, segments) - together).abs().max() > 1e-3


def test_segments_left_out_are_segment_zero() -> None:
    model = build(TINY)
    row, _ = rows(PACKED, 97)
    assert torch.equal(model(*row), model(*row, torch.zeros_like(row[0])))


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["v1", "v2"])
def test_both_attentions_are_one_function(config: RoFormerConfig) -> None:
    found = []
    for attention in (attention_matmul, attention_sdpa):
        model = RoFormer(replace(config, log_n=512), attention).double()
        random_weights(model, 0)
        found.append(ours_on(model, PACKED))
    assert (found[0] - found[1]).abs().max() < 1e-11


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("how", ["full", "sublayer"])
def test_recompute_changes_nothing(config: RoFormerConfig, how: str) -> None:
    """Loss and gradients to the last bit, dropout, ramp and all."""
    found = []
    for kind in ("none", how):
        dropout = {"dropout": 0.1, "attention_dropout": 0.1}
        model = RoFormer(replace(config, **dropout, ramp_steps=10, log_n=512)).train()
        random_weights(model, 0)
        model.set_progress(3)
        recompute.apply(model, kind)
        torch.manual_seed(3)
        loss = ours_on(model, PACKED).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["v1", "v2"])
def test_dropout_falls_where_the_original_has_it(
    config: RoFormerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings, each sub-layer, the probabilities; v2 in front of its head too."""
    from pretrain.models import dropout, layers

    calls: list[float] = []
    for room in (layers, dropout):
        monkeypatch.setattr(room, "drop", lambda x, p: calls.append(p) or x)
    model = RoFormer(replace(config, dropout=0.25, attention_dropout=0.5)).train()
    random_weights(model, 0)
    ours_on(model, PADDED)
    assert calls.count(0.25) == 1 + 2 * config.layers + (config.version == 2)
    assert calls.count(0.5) == config.layers
    assert calls[0] == 0.25 and (calls[-1] == 0.25)
    calls.clear()
    ours_on(model.eval(), PADDED)
    assert set(calls) == {0.0}


@pytest.mark.parametrize("config", [TINY, TINY_V2], ids=["v1", "v2"])
def test_bf16_runs_forward_and_backward_near_fp32(config: RoFormerConfig) -> None:
    expected = ours_on(build(config, torch.float32), PACKED)
    low = build(config, torch.bfloat16).train()
    got = ours_on(low, PACKED)
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())
    # bf16 has 8 bits: a few of its steps after 3 layers.
    assert (got - expected).abs().max() / expected.std() < 0.2


PUBLISHED = {
    "v1 small": RoFormerConfig("roformer", 1, 50000, 384, 6, 6, 64, 1536),
    "v1 base": RoFormerConfig("roformer", 1, 50000, 768, 12, 12, 64, 3072),
    "v2 small": RoFormerConfig("roformer", 2, 12000, 384, 6, 6, 64, 1536),
    "v2 base": RoFormerConfig("roformer", 2, 12000, 768, 12, 12, 64, 3072),
    "v2 large": RoFormerConfig("roformer", 2, 12000, 1024, 24, 16, 64, 4096),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_build_on_the_meta_device(size: str) -> None:
    config = PUBLISHED[size]
    with torch.device("meta"):
        model = RoFormer(config)
    check(model, config)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)
    assert all(p.is_meta for p in model.parameters())
