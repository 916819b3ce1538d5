"""Promise: T5 PEGASUS is mT5.1.1 of `transformers`, logits and every gradient, and with its three
published deviations it is what bert4keras trained: erf GELU, scaled head, bias in cross-attention.

Tolerances, in standard deviations of what is compared: float64 2e-6 against the stock model, whose
norms compute in float32, and 1e-12 against the same with its norms in float64; fp32 1e-5. It is the
largest difference that must be within, but for gradients where either side computes in float32: the
largest of 100,000 rounding errors says nothing, there it is their root mean square.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.model import T5PegasusConfig, parameter_count
from pretrain import recompute
from pretrain.models.layers import KeyValueCache, attention_matmul, attention_sdpa, check, gelu_erf
from pretrain.models.part import Part
from pretrain.models.positions import RelativeBias, buckets_of
from pretrain.models.t5_pegasus import T5Pegasus
from tests.test_cpm_equals_gpt2 import random_weights

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.mt5.modeling_mt5")

OFF = {"dropout": 0.0, "attention_dropout": 0.0}
MT5 = {"activation": "gelu_tanh", "cross_position_bias": False, "logit_scale": 1.0}
TINY = T5PegasusConfig("t5_pegasus", 97, 48, 3, 4, 12, 80, **OFF)
# The heads of the published sizes, on one layer with a small FFN and vocabulary.
SMALL_HEADS = T5PegasusConfig("t5_pegasus", 211, 512, 1, 6, 64, 96, **OFF)
BASE_HEADS = T5PegasusConfig("t5_pegasus", 211, 768, 1, 12, 64, 96, **OFF)

Side = tuple[Tensor, Tensor, Tensor]


def build(config: T5PegasusConfig, dtype: torch.dtype = torch.float64) -> T5Pegasus:
    model = T5Pegasus(config).to(dtype).eval()
    random_weights(model, 0)
    for name, p in model.named_parameters():  # at T5's own scale
        if name.endswith(".q.weight"):
            p.data.mul_(config.head_dim**-0.5)
        elif "embed" in name:
            p.data.mul_(2)
    return model


def to_mt5(ours: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our names (of weights or gradients) -> theirs; every layout is the same."""
    out = {"shared.weight": ours["embed.tokens.weight"], "lm_head.weight": ours["head.weight"]}
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for stack in ("encoder", "decoder"):
        out[f"{stack}.{bias}"] = ours[f"{stack}.position_bias.weight"]
        out[f"{stack}.final_layer_norm.weight"] = ours[f"{stack}.final_norm.weight"]
        parts = {"self": "SelfAttention", "cross": "EncDecAttention", "ffn": "DenseReluDense"}
        if stack == "encoder":
            del parts["cross"]
        for i in range(layers):
            for number, (part, theirs) in enumerate(parts.items()):
                at, to = f"{stack}.layers.{i}.{part}", f"{stack}.block.{i}.layer.{number}"
                inner = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
                for mine, other in (inner if part == "ffn" else {n: n for n in "qkvo"}).items():
                    out[f"{to}.{theirs}.{other}.weight"] = ours[f"{at}.{mine}.weight"]
                out[f"{to}.layer_norm.weight"] = ours[f"{at}_norm.weight"]
    return out


def mt5_of(ours: T5Pegasus) -> nn.Module:
    """transformers' model on the same weights; with our deviations where ours has them."""
    c = ours.config
    config = transformers.MT5Config(
        vocab_size=c.vocab, d_model=c.hidden, d_kv=c.head_dim, d_ff=c.ffn, num_layers=c.layers,
        num_decoder_layers=c.layers, num_heads=c.heads, dropout_rate=0.0,
        relative_attention_num_buckets=c.buckets, relative_attention_max_distance=c.max_distance,
        layer_norm_epsilon=c.norm_eps, feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )  # fmt: skip
    config.tie_word_embeddings = False  # mT5's head is its own; 5.x of transformers forces a tie
    if c.activation == "gelu_erf":
        config.dense_act_fn = "gelu"
    theirs = transformers.MT5ForConditionalGeneration(config)
    theirs = theirs.to(next(ours.parameters()).dtype).eval()
    weights = to_mt5({n: p.detach().clone() for n, p in ours.named_parameters()}, c.layers)
    weights |= {
        f"{s}.embed_tokens.weight": weights["shared.weight"] for s in ("encoder", "decoder")
    }
    theirs.load_state_dict(weights)
    theirs.logit_scale = c.hidden**-0.5 if c.logit_scale is None else c.logit_scale
    if c.cross_position_bias:
        first = theirs.decoder.block[0].layer[0].SelfAttention

        def with_bias(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
            lengths = args[0].shape[1], given["key_value_states"].shape[1]
            return args, given | {"position_bias": first.compute_bias(*lengths)}

        for block in theirs.decoder.block:
            block.layer[1].EncDecAttention.register_forward_pre_hook(with_bias, with_kwargs=True)
    return theirs


def exact_norm(self: Any, x: Tensor) -> Tensor:
    """MT5LayerNorm in the model's own precision."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def side(lengths: list[list[int]], vocab: int, seed: int) -> Side:
    """(tokens, positions, document ids) of rows of documents; a negative length is padding."""
    T = sum(map(abs, lengths[0]))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (len(lengths), T), generator=generator)
    positions, documents = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, parts in enumerate(lengths):
        at = 0
        for number, length in enumerate(parts):
            span = slice(at, at + abs(length))
            positions[row, span] = torch.arange(abs(length)) if length > 0 else 0
            documents[row, span] = number if length > 0 else -1
            at += abs(length)
    return tokens, positions, documents


PACKED = [[[7, 12, 5], [20, -4], [-8, 16]], [[4, 6, 4], [10, -4], [-3, 11]]]
PADDED = [[[24], [20, -4], [9, -15]], [[14], [10, -4], [13, -1]]]
LONG = [[[150]], [[40]]]
"""Beyond the last bucket's distance."""


def rows(lengths: list[list[list[int]]], vocab: int) -> tuple[Side, Side]:
    """(encoder's side, decoder's side)."""
    return side(lengths[0], vocab, 5), side(lengths[1], vocab, 6)


def ours_on(model: T5Pegasus, encoder: Side, decoder: Side) -> Tensor:
    return model.logits(model(*decoder, *encoder))


def theirs_on(theirs: nn.Module, scale: float, encoder: Side, decoder: Side) -> Tensor:
    """Their logits; masks are written out, because their model packs no rows."""
    dtype = next(theirs.parameters()).dtype
    sees = lambda q, k: q[2][:, None, :, None] == k[2][:, None, None, :]  # noqa: E731
    additive = lambda m: torch.zeros(m.shape, dtype=dtype).masked_fill(  # noqa: E731
        ~m, torch.finfo(dtype).min
    )
    memory = theirs.encoder(
        input_ids=encoder[0], attention_mask=additive(sees(encoder, encoder))
    ).last_hidden_state
    hidden = theirs.decoder(
        input_ids=decoder[0],
        attention_mask=additive(sees(decoder, decoder).tril()),
        encoder_hidden_states=memory,
        encoder_attention_mask=additive(sees(decoder, encoder)),
        use_cache=False,
    ).last_hidden_state
    return theirs.lm_head(hidden * scale)


def compare(
    ours: T5Pegasus, theirs: nn.Module, lengths: Any, exact: bool = False
) -> tuple[float, dict[str, float]]:
    """Differences in standard deviations: the logits' largest, each gradient's (see the head)."""
    encoder, decoder = rows(lengths, ours.config.vocab)
    real = decoder[2] >= 0
    logits = ours_on(ours, encoder, decoder)[real]
    expected = theirs_on(theirs, theirs.logit_scale, encoder, decoder)[real]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    mine = to_mt5({n: p.grad for n, p in ours.named_parameters()}, ours.config.layers)
    gradients = {}
    for name, value in mine.items():
        if name == "shared.weight":  # untied from their stacks along with the head
            tables = [stack.embed_tokens.weight.grad for stack in (theirs.encoder, theirs.decoder)]
            reference = sum(tables)
        else:
            reference = theirs.get_parameter(name).grad
        apart = (value - reference).abs()
        apart = apart.max() if exact else apart.square().mean().sqrt()
        gradients[name] = (apart / reference.std()).item()
    return ((logits - expected).abs().max() / expected.std()).item(), gradients


@pytest.mark.parametrize(
    ("dtype", "exact", "tolerance"),
    [(torch.float64, False, 2e-6), (torch.float64, True, 1e-12), (torch.float32, False, 1e-5)],
    ids=["float64 against stock", "float64", "fp32"],
)
@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        (replace(TINY, **MT5), PACKED),
        (replace(TINY, **MT5), PADDED),
        (TINY, PADDED),
        (replace(SMALL_HEADS, **MT5), PACKED),
        (BASE_HEADS, LONG),
    ],
    ids=["mt5 packed", "mt5 padded", "published", "mt5 small heads", "published base heads, long"],
)
def test_logits_and_gradients_equal_mt5(
    config: T5PegasusConfig, lengths: Any, dtype: torch.dtype, exact: bool, tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if exact:
        monkeypatch.setattr(modeling.MT5LayerNorm, "forward", exact_norm)
    ours = build(config, dtype)
    logits, gradients = compare(ours, mt5_of(ours), lengths, exact)
    assert logits < tolerance
    assert max(gradients.values()) < tolerance, gradients


def swapped_gelu(model: T5Pegasus) -> None:
    for stack in (model.encoder, model.decoder):
        for block in stack.layers:
            block.ffn.activation = gelu_erf


def bias_in_cross_attention(model: T5Pegasus) -> None:
    model.config = replace(model.config, cross_position_bias=True)


def scaled_head(model: T5Pegasus) -> None:
    model.config = replace(model.config, logit_scale=None)


def two_sided_decoder(model: T5Pegasus) -> None:
    model.decoder.position_bias.two_sided = True


def scaled_scores(model: T5Pegasus) -> None:
    for block in model.decoder.layers:
        block.self.scale = block.self.head_dim**-0.5


def no_final_norm(model: T5Pegasus) -> None:
    model.encoder.final_norm = nn.Identity()


def gate_and_up_swapped(model: T5Pegasus) -> None:
    ffn = model.encoder.layers[0].ffn
    ffn.gate, ffn.up = ffn.up, ffn.gate


FAULTS = [
    swapped_gelu, bias_in_cross_attention, scaled_head, two_sided_decoder, scaled_scores,
    no_final_norm, gate_and_up_swapped,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_seen(fault: Callable[[T5Pegasus], None]) -> None:
    """Negative controls: each well-known mistake lies far outside the fp32 tolerance."""
    ours = build(replace(TINY, **MT5))
    encoder, decoder = rows(PADDED, 97)
    with torch.no_grad():
        expected = ours_on(ours, encoder, decoder)
        fault(ours)
        found = ours_on(ours, encoder, decoder)
    real = decoder[2] >= 0
    assert ((found - expected)[real].abs().max() / expected[real].std()) > 10 * 1e-5


@pytest.mark.parametrize("change", [{"logit_scale": 1.0}, {"cross_position_bias": False}])
def test_a_missing_deviation_is_seen(change: dict[str, Any]) -> None:
    ours = build(TINY)
    theirs = mt5_of(ours)
    ours.config = replace(TINY, **change)
    logits, _ = compare(ours, theirs, PADDED)
    assert logits > 10 * 1e-5


@pytest.mark.parametrize("config", [TINY, replace(TINY, **MT5)], ids=["published", "mt5"])
@pytest.mark.parametrize("log_n", [0, 512])
def test_a_packed_document_equals_the_document_alone(config: T5PegasusConfig, log_n: int) -> None:
    model = build(replace(config, log_n=log_n))
    encoder, decoder = rows(PACKED, 97)
    together = model(*decoder, *encoder)
    for row in range(3):
        for number in decoder[2][row].unique().tolist():
            if number < 0:
                continue
            mine, source = decoder[2][row] == number, encoder[2][row] == number
            alone = model(
                *(decoder[i][row, mine][None] for i in (0, 1)), None,
                *(encoder[i][row, source][None] for i in (0, 1)), None,
            )  # fmt: skip
            assert (together[row, mine] - alone[0]).abs().max() < 1e-12
    # Negative control: without document ids the rows are one stream.
    blind = model(*decoder[:2], None, *encoder[:2], None)
    assert (blind - together).abs().max() > 1e-3


def test_buckets_are_those_of_mt5() -> None:
    distance = torch.arange(-3000, 3001)
    for two_sided in (True, False):
        theirs = modeling.MT5Attention._relative_position_bucket(distance, two_sided, 32, 128)
        assert torch.equal(buckets_of(distance, two_sided, 32, 128), theirs)


def test_one_bias_for_all_rows_is_the_same_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose documents are runs share one bias; it must equal the bias of each row's own."""
    from pretrain.models import t5_pegasus

    model = build(TINY)
    encoder, decoder = rows(PACKED, 97)
    shapes: list[tuple[int, ...]] = []
    forward = RelativeBias.forward

    def watched(self: RelativeBias, queries: Tensor, keys: Tensor, part: Part) -> Tensor:
        made = forward(self, queries, keys, part)
        shapes.append(tuple(made.shape))
        return made

    monkeypatch.setattr(RelativeBias, "forward", watched)
    quick = model(*decoder, *encoder)
    assert [shape[0] for shape in shapes] == [1, 1, 3]
    for name in ("shared_positions", "same_positions"):
        monkeypatch.setattr(t5_pegasus, name, lambda positions, documents: positions)
    real = decoder[2] >= 0
    assert (model(*decoder, *encoder) - quick)[real].abs().max() < 1e-12
    assert [shape[0] for shape in shapes[3:]] == [3, 3, 3]
    # Negative control: positions that skip share nothing.
    monkeypatch.undo()
    skipping = (decoder[0], decoder[1] * 2, decoder[2])
    assert (model(*skipping, *encoder) - quick)[real].abs().max() > 1e-3


@pytest.mark.parametrize("attention", [attention_matmul, attention_sdpa])
def test_both_attentions_are_one_function(attention: Callable) -> None:
    """Values and the bias tables' gradients."""
    found = {}
    for chosen in (attention_matmul, attention):
        model = T5Pegasus(replace(TINY, log_n=512), chosen).double()
        random_weights(model, 0)
        encoder, decoder = rows(PACKED, 97)
        hidden = model(*decoder, *encoder)[decoder[2] >= 0]
        hidden.square().sum().backward()
        found[chosen] = [hidden] + [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(found[attention_matmul], found[attention], strict=True):
        assert (one - other).abs().max() < 1e-11 * other.abs().max()


def test_a_decoder_with_a_cache_says_what_it_says_without() -> None:
    model = build(TINY)
    encoder, decoder = rows([[[24], [-4, 20]], [[9], [-2, 7]]], 97)
    whole = model(*decoder, *encoder)
    cache = KeyValueCache(9)
    memory = model.encode(*encoder)
    parts = [
        model.decode(*(part[:, at] for part in decoder), memory, *encoder[1:], cache)
        for at in (slice(0, 4), slice(4, 5), slice(5, 6), slice(6, 9))
    ]
    real = decoder[2] >= 0
    assert (torch.cat(parts, 1) - whole)[real].abs().max() < 1e-12


@pytest.mark.parametrize("how", ["full", "sublayer"])
def test_recompute_changes_nothing(how: str) -> None:
    """Loss and gradients to the last bit, dropout and all."""
    found = []
    for kind in ("none", how):
        config = replace(TINY, dropout=0.1, attention_dropout=0.1, log_n=512)
        model = T5Pegasus(config).train()
        random_weights(model, 0)
        recompute.apply(model, kind)
        torch.manual_seed(3)
        encoder, decoder = rows(PACKED, 97)
        loss = model.logits(model(*decoder, *encoder)).square().mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_falls_where_the_original_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, both final norms, each sub-layer and each gated activation; the probabilities."""
    from pretrain.models import dropout, layers

    calls: list[float] = []
    for room in (layers, dropout):
        monkeypatch.setattr(room, "drop", lambda x, p: calls.append(p) or x)
    model = T5Pegasus(replace(TINY, dropout=0.25, attention_dropout=0.5)).train()
    random_weights(model, 0)
    encoder, decoder = rows(PADDED, 97)
    model(*decoder, *encoder)
    layers_of = TINY.layers
    assert calls.count(0.25) == 4 + layers_of * (2 + 1) + layers_of * (3 + 1)
    assert calls.count(0.5) == 3 * layers_of
    calls.clear()
    model.eval()(*decoder, *encoder)
    assert set(calls) == {0.0}


def test_bf16_runs_forward_and_backward_near_fp32() -> None:
    """A few of bf16's 8-bit steps after 3 + 3 layers."""
    encoder, decoder = rows(PACKED, 97)
    real = decoder[2] >= 0
    expected = build(TINY, torch.float32)(*decoder, *encoder)[real]
    low = build(TINY, torch.bfloat16).train()
    got = low(*decoder, *encoder)
    assert got.dtype == torch.bfloat16
    low.logits(got).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())
    assert (got[real] - expected).abs().max() / expected.std() < 0.2


PUBLISHED = {
    "small": (T5PegasusConfig("t5_pegasus", 50000, 512, 8, 6, 64, 1024), 95_262_080),
    "base": (T5PegasusConfig("t5_pegasus", 50000, 768, 12, 12, 64, 2048), 275_029_248),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_build_on_the_meta_device(size: str) -> None:
    config, count = PUBLISHED[size]
    with torch.device("meta"):
        model = T5Pegasus(config)
    check(model, config)
    assert sum(p.numel() for p in model.parameters()) == count == parameter_count(config)
    assert all(p.is_meta for p in model.parameters())
