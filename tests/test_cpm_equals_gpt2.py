"""Promise: CPM is GPT-2 as CPM-1 trained it: logits and every gradient equal `transformers`' GPT-2.

Tolerances, in standard deviations of what is compared: float64 1e-12, fp32 1e-5 (rounding of sums
of a few thousand products in another order).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from configs.model import CPMConfig, parameter_count
from pretrain.models.cpm import CPM
from pretrain.models.layers import (
    FeedForward,
    attention_by_device,
    attention_matmul,
    attention_sdpa,
    check,
)

transformers = pytest.importorskip("transformers")

TINY = CPMConfig("cpm", 97, 48, 3, 4, 12, 80, 32, dropout=0.0, attention_dropout=0.0)
# The heads of the published 2.6 B model, on one layer with a small FFN and vocabulary.
LARGE_HEADS = CPMConfig("cpm", 211, 2560, 1, 32, 80, 256, 64, dropout=0.0, attention_dropout=0.0)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def random_weights(model: nn.Module, seed: int) -> None:
    """Weights at which every path matters: biases and gains far from their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        spread = 0.5 if p.ndim == 1 or "embed" in name else p.shape[-1] ** -0.5
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * spread)
            if "norm.weight" in name:
                p.add_(1.0)


def build(config: CPMConfig, dtype: torch.dtype, seed: int = 0) -> CPM:
    model = CPM(config).to(dtype).eval()
    random_weights(model, seed)
    return model


def gpt2_of(ours: CPM, attention: str = "eager") -> nn.Module:
    """transformers' model on the same weights, in their own dtype."""
    c = ours.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab,
            n_positions=c.positions,
            n_embd=c.hidden,
            n_layer=c.layers,
            n_head=c.heads,
            n_inner=c.ffn,
            activation_function="gelu_new",
            layer_norm_epsilon=c.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation=attention,
        )
    )
    first = next(ours.parameters())
    theirs = theirs.to(first.device, first.dtype).eval()
    theirs.load_state_dict(
        {f"transformer.{k}": v for k, v in to_gpt2(dict(ours.named_parameters()), c.layers).items()}
        | {"lm_head.weight": ours.embed.tokens.weight}
    )
    return theirs


def to_gpt2(ours: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our names and layouts (weights or gradients) -> theirs: [in, out] matrices, q|k|v fused."""
    out = {
        "wte.weight": ours["embed.tokens.weight"],
        "wpe.weight": ours["embed.positions.weight"],
        "ln_f.weight": ours["decoder.final_norm.weight"],
        "ln_f.bias": ours["decoder.final_norm.bias"],
    }
    for i in range(layers):
        at, to = f"decoder.layers.{i}", f"h.{i}"
        for kind in ("weight", "bias"):
            part = {
                name: ours[f"{at}.{name}.{kind}"].t()
                for name in ("self.q", "self.k", "self.v", "self.o", "ffn.up", "ffn.down")
            }
            out[f"{to}.ln_1.{kind}"] = ours[f"{at}.self_norm.{kind}"]
            out[f"{to}.ln_2.{kind}"] = ours[f"{at}.ffn_norm.{kind}"]
            fused = [part["self.q"], part["self.k"], part["self.v"]]
            out[f"{to}.attn.c_attn.{kind}"] = torch.cat(fused, dim=-1)
            out[f"{to}.attn.c_proj.{kind}"] = part["self.o"]
            out[f"{to}.mlp.c_fc.{kind}"] = part["ffn.up"]
            out[f"{to}.mlp.c_proj.{kind}"] = part["ffn.down"]
    return out


def packed(config: CPMConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, positions, document ids) of 3 rows: documents packed, padded left, padded right."""
    T = 24
    tokens = torch.randint(config.vocab, (3, T), generator=torch.Generator().manual_seed(5))
    lengths = [[7, 12, 5], [-4, 20], [16, -8]]
    positions, documents = torch.zeros(3, T, dtype=torch.long), torch.zeros(3, T, dtype=torch.long)
    for row, parts in enumerate(lengths):
        at = 0
        for number, length in enumerate(parts):
            span = slice(at, at + abs(length))
            positions[row, span] = torch.arange(abs(length))
            documents[row, span] = number if length > 0 else -1
            at += abs(length)
    return tokens, positions, documents


def compare(
    ours: CPM, theirs: nn.Module, plain: bool = False
) -> tuple[float, float, dict[str, float]]:
    """Largest differences in standard deviations: (logits, worst gradient, each gradient)."""
    tokens, positions, documents = packed(ours.config)
    T = tokens.shape[1]
    if plain:
        positions = torch.arange(T).expand_as(tokens)
        documents_given, real = None, torch.ones_like(tokens, dtype=torch.bool)
        mask = torch.ones(3, 1, T, T, dtype=torch.bool).tril()
    else:
        documents_given, real = documents, documents >= 0
        mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    weight = torch.randn(real.sum(), ours.config.vocab, generator=torch.Generator().manual_seed(1))

    dtype = next(ours.parameters()).dtype
    additive = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    logits = ours.logits(ours(tokens, positions, documents_given))[real]
    expected = theirs(input_ids=tokens, position_ids=positions, attention_mask=additive).logits
    expected = expected[real]
    (logits * weight.to(dtype)).sum().backward()
    (expected * weight.to(dtype)).sum().backward()
    mine = to_gpt2({n: p.grad for n, p in ours.named_parameters()}, ours.config.layers)
    gradients = {}
    for name, value in mine.items():
        reference = theirs.get_parameter(f"transformer.{name}").grad
        gradients[name] = ((value - reference).abs().max() / reference.std()).item()
    return (
        ((logits - expected).abs().max() / expected.std()).item(),
        max(gradients.values()),
        gradients,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "fp32"])
@pytest.mark.parametrize(
    ("config", "plain"),
    [(TINY, False), (TINY, True), (LARGE_HEADS, False)],
    ids=["tiny, packed and padded", "tiny, plain", "large heads, packed and padded"],
)
def test_logits_and_gradients_equal_gpt2(
    config: CPMConfig, dtype: torch.dtype, plain: bool
) -> None:
    ours = build(config, dtype)
    logits, worst, gradients = compare(ours, gpt2_of(ours), plain)
    assert logits < TOLERANCE[dtype]
    assert worst < TOLERANCE[dtype], gradients


def erf(model: CPM) -> None:
    for block in model.decoder.layers:
        block.ffn.activation = nn.functional.gelu


def no_final_norm(model: CPM) -> None:
    model.decoder.final_norm = nn.Identity()


def post_norm(model: CPM) -> None:
    block = model.decoder.layers[0]
    block.ffn_sublayer = lambda x: block.ffn_norm(x + block.ffn(x))


def scaled_head(model: CPM) -> None:
    for block in model.decoder.layers:
        block.self.scale = 1.0


def blind_to_documents(model: CPM) -> None:
    for block in model.decoder.layers:
        block.self.attention = lambda q, k, v, see, scale, p: attention_matmul(
            q, k, v, type(see)(causal=True), scale, p
        )


@pytest.mark.parametrize("fault", [erf, no_final_norm, post_norm, scaled_head, blind_to_documents])
def test_a_fault_is_seen(fault: Callable[[CPM], None]) -> None:
    """Negative controls: each well-known mistake lies far outside the fp32 tolerance.

    The erf GELU is the nearest: 4e-4 standard deviations away.
    """
    ours = build(TINY, torch.float64)
    theirs = gpt2_of(ours)
    fault(ours)
    tokens, positions, documents = packed(TINY)
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    additive = torch.zeros(mask.shape, dtype=torch.float64)
    additive = additive.masked_fill(~mask, torch.finfo(torch.float64).min)
    with torch.no_grad():
        logits = ours.logits(ours(tokens, positions, documents))
        expected = theirs(input_ids=tokens, position_ids=positions, attention_mask=additive).logits
    real = documents >= 0
    difference = ((logits - expected)[real].abs().max() / expected.std()).item()
    assert difference > 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("attention", [attention_matmul, attention_sdpa])
@pytest.mark.parametrize("boundaries", [True, False])
def test_both_attentions_are_one_function(attention: Callable, boundaries: bool) -> None:
    model = build(TINY, torch.float64)
    tokens, positions, documents = packed(TINY)
    given = documents if boundaries else None
    expected = model(tokens, positions, given)
    for block in model.decoder.layers:
        block.self.attention = attention
    assert (model(tokens, positions, given) - expected).abs().max() < 1e-12


def test_a_packed_document_equals_the_document_alone() -> None:
    model = build(TINY, torch.float64)
    tokens, positions, documents = packed(TINY)
    together = model(tokens, positions, documents)
    for row in range(3):
        for number in documents[row].unique():
            mine = documents[row] == number
            alone = model(tokens[row, mine][None], torch.arange(int(mine.sum()))[None])
            assert (together[row, mine] - alone[0]).abs().max() < 1e-12
    # Negative control: without document ids the rows are one stream.
    assert (model(tokens, positions, None) - together).abs().max() > 1e-3


def test_scales_of_softmax_and_logits_come_from_the_config() -> None:
    model = build(TINY, torch.float64)
    tokens, positions, documents = packed(TINY)
    twin = CPM(
        CPMConfig(**{**vars(TINY), "softmax_scale": 12**-0.5 / 2, "logit_scale": 0.25})
    ).double()
    twin.load_state_dict(model.state_dict())
    for block in twin.decoder.layers:  # queries twice as long undo half the scale
        for part in (block.self.q.weight, block.self.q.bias):
            part.data.mul_(2)
    expected = model.logits(model(tokens, positions, documents)) * 0.25
    assert (twin.logits(twin(tokens, positions, documents)) - expected).abs().max() < 1e-12


def test_bf16_runs_forward_and_backward_near_fp32() -> None:
    model = build(TINY, torch.float32)
    tokens, positions, documents = packed(TINY)
    expected = model(tokens, positions, documents)
    low = build(TINY, torch.bfloat16)
    low.train()
    got = low(tokens, positions, documents)
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())
    # bf16 has 8 bits: a few of its steps after 3 layers.
    assert (got - expected).abs().max() / expected.std() < 0.1


PUBLISHED = {
    "small": (CPMConfig("cpm", 30000, 768, 12, 12, 64, 3072), 108_882_432),
    "medium": (CPMConfig("cpm", 30000, 1024, 24, 16, 64, 4096), 334_080_000),
    "large": (CPMConfig("cpm", 30000, 2560, 32, 32, 80, 10240), 2_597_073_920),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_build_on_the_meta_device(size: str) -> None:
    config, count = PUBLISHED[size]
    with torch.device("meta"):
        model = CPM(config)
    check(model, config)
    assert sum(p.numel() for p in model.parameters()) == count == parameter_count(config)
    assert all(p.is_meta for p in model.parameters())


def test_a_model_that_differs_from_its_table_is_named() -> None:
    with torch.device("meta"):
        model = CPM(TINY)
        model.decoder.layers[1].ffn = FeedForward(48, 81, True, nn.functional.gelu)
    with pytest.raises(AssertionError, match=r"decoder\.layers\.1\.ffn\.up\.bias"):
        check(model, TINY)
    assert model.decoder.layers[0].self.attention is attention_by_device
