"""The table of tensors: published counts, split shapes and growth's axes come from it alone."""

from dataclasses import replace
from math import prod

import pytest

from configs.model import (
    CPMConfig,
    ModelConfig,
    RoFormerConfig,
    T5PegasusConfig,
    axis_size,
    init_std,
    local_shape,
    parameter_count,
    shape,
    split_dim,
    split_problems,
    tensors,
)


def cpm(hidden: int, layers: int, heads: int, head_dim: int) -> CPMConfig:
    return CPMConfig("cpm", 30000, hidden, layers, heads, head_dim, 4 * hidden, 1024)


SMALL, MEDIUM, LARGE = cpm(768, 12, 12, 64), cpm(1024, 24, 16, 64), cpm(2560, 32, 32, 80)
T5_SMALL = T5PegasusConfig("t5_pegasus", 50000, 512, 8, 6, 64, 1024)
T5_BASE = T5PegasusConfig("t5_pegasus", 50000, 768, 12, 12, 64, 2048)
ROFORMER = RoFormerConfig("roformer", 1, 50000, 768, 12, 12, 64, 3072)
ROFORMER_V2 = RoFormerConfig("roformer", 2, 12000, 768, 12, 12, 64, 3072)
ALL = [SMALL, MEDIUM, LARGE, T5_SMALL, T5_BASE, ROFORMER, ROFORMER_V2]


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (SMALL, 108_882_432),
        (MEDIUM, 334_080_000),
        (LARGE, 2_597_073_920),
        (T5_SMALL, 95_262_080),
        (T5_BASE, 275_029_248),
    ],
)
def test_published_counts(config: ModelConfig, published: int) -> None:
    assert parameter_count(config) == published


def test_roformers_by_hand() -> None:
    """BERT base without positions: 12 layers of 7,087,872, the embeddings, the head of v1."""
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    head = 768 * 768 + 768 + 2 * 768 + 50000
    assert parameter_count(ROFORMER) == 50000 * 768 + 2 * 768 + 2 * 768 + 12 * layer + head
    # v2: no bias, no gain, no head of its own
    layer = 4 * 768 * 768 + 2 * 768 * 3072
    assert parameter_count(ROFORMER_V2) == 12000 * 768 + 2 * 768 + 12 * layer


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.family}-{c.hidden}")
def test_names_are_unique_and_axes_known(config: ModelConfig) -> None:
    table = tensors(config)
    assert len({t.name for t in table}) == len(table)
    for tensor in table:
        assert all(axis_size(config, axis) > 0 for axis in tensor.out + tensor.in_)
        assert (f".layers.{tensor.layer}." in tensor.name) == (tensor.layer is not None)
        assert init_std(config, tensor) > 0 or tensor.init in ("zeros", "ones")


def test_cpm_in_two_parts() -> None:
    """Megatron's shapes at TP=2: rows of q, k, v, up and the vocabulary; columns of o and down."""
    at = "decoder.layers.3"
    expected = {
        "embed.tokens.weight": (15000, 768),
        "embed.positions.weight": (1024, 768),
        f"{at}.self_norm.weight": (768,),
        f"{at}.self.q.weight": (384, 768),
        f"{at}.self.k.bias": (384,),
        f"{at}.self.v.weight": (384, 768),
        f"{at}.self.o.weight": (768, 384),
        f"{at}.self.o.bias": (768,),
        f"{at}.ffn.up.weight": (1536, 768),
        f"{at}.ffn.up.bias": (1536,),
        f"{at}.ffn.down.weight": (768, 1536),
        f"{at}.ffn.down.bias": (768,),
        "decoder.final_norm.bias": (768,),
    }
    found = {t.name: local_shape(SMALL, t, 2) for t in tensors(SMALL)}
    assert {name: found[name] for name in expected} == expected


def test_t5_pegasus_and_roformer_in_two_parts() -> None:
    """The bias tables by heads, T5's own head and RoFormer's bias by the vocabulary."""
    cross = "decoder.layers.3.cross"
    t5 = {t.name: local_shape(T5_BASE, t, 2) for t in tensors(T5_BASE)}
    expected = {
        "embed.tokens.weight": (25000, 768),
        "encoder.position_bias.weight": (32, 6),
        "decoder.position_bias.weight": (32, 6),
        f"{cross}.k.weight": (384, 768),
        f"{cross}.o.weight": (768, 384),
        "decoder.layers.3.cross_norm.weight": (768,),
        "encoder.layers.3.ffn.gate.weight": (1024, 768),
        "encoder.layers.3.ffn.down.weight": (768, 1024),
        "head.weight": (25000, 768),
    }
    assert {name: t5[name] for name in expected} == expected
    roformer = {t.name: local_shape(ROFORMER, t, 2) for t in tensors(ROFORMER)}
    expected = {
        "embed.tokens.weight": (25000, 768),
        "embed.segments.weight": (2, 768),
        "embed.norm.weight": (768,),
        "encoder.layers.3.self.q.bias": (384,),
        "encoder.layers.3.ffn.up.bias": (1536,),
        "head.dense.weight": (768, 768),
        "head.bias": (25000,),
    }
    assert {name: roformer[name] for name in expected} == expected


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.family}-{c.hidden}")
def test_the_parts_make_the_whole(config: ModelConfig) -> None:
    for tensor in tensors(config):
        whole, part, cut = shape(config, tensor), local_shape(config, tensor, 2), split_dim(tensor)
        assert prod(whole) == prod(part) * (1 if cut is None else 2)
        if tensor.op == "norm":
            assert cut is None


def test_heads_stay_whole_when_split() -> None:
    """LARGE: 32 heads of 80; a cut of q is a cut between heads, also where heads < ranks' share."""
    query = next(t for t in tensors(LARGE) if t.name.endswith("0.self.q.weight"))
    assert query.out == ("heads", "head_dim") and local_shape(LARGE, query, 4)[0] == 8 * 80
    assert [s.split(":")[0] for s in split_problems(LARGE, 3)] == ["ffn", "heads"]
    assert "the nearest that is: 33" in split_problems(LARGE, 3)[1]


@pytest.mark.parametrize(
    ("small", "large", "grown"),
    [(SMALL, MEDIUM, {"embed", "heads", "ffn"}), (T5_SMALL, T5_BASE, {"embed", "heads", "ffn"})],
)
def test_small_and_large_differ_only_along_axes(
    small: ModelConfig, large: ModelConfig, grown: set[str]
) -> None:
    """What growth relies on: the same tensors a layer, larger where an axis is larger."""
    first = {t.name: t for t in tensors(small)}
    second = {t.name: t for t in tensors(large)}
    assert set(first) < set(second)
    changed: set[str] = set()
    for name, tensor in first.items():
        assert (tensor.op, tensor.out, tensor.in_) == (
            second[name].op,
            second[name].out,
            second[name].in_,
        )
        for axis in tensor.out + tensor.in_:
            if axis_size(small, axis) != axis_size(large, axis):
                changed.add(axis)
    assert changed == grown


def test_writers_are_what_adds_to_the_stream() -> None:
    writers = {t.name.split(".", 3)[-1] for t in tensors(SMALL) if t.writes and t.layer == 0}
    assert writers == {
        f"{part}.{kind}" for part in ("self.o", "ffn.down") for kind in ("weight", "bias")
    }
    cross = {t.name for t in tensors(T5_SMALL) if t.writes and t.layer == 0 and "cross" in t.name}
    assert cross == {"decoder.layers.0.cross.o.weight"}


def test_outputs_are_drawn_smaller() -> None:
    table = {t.name: t for t in tensors(SMALL)}
    assert init_std(SMALL, table["decoder.layers.0.self.q.weight"]) == 0.02
    assert init_std(SMALL, table["decoder.layers.0.ffn.down.weight"]) == 0.02 / 24**0.5


def test_t5_is_drawn_as_mesh_tensorflow_draws_it() -> None:
    """transformers states the same rule: MT5PreTrainedModel._init_weights, its head apart, which it
    ties; scores are not scaled, so queries are drawn smaller by sqrt(head_dim)."""
    table = {t.name: t for t in tensors(T5_SMALL)}

    def std(name: str) -> float:
        return init_std(T5_SMALL, table[name])

    assert T5_SMALL.init_std is None
    assert std("embed.tokens.weight") == 1.0
    assert std("encoder.layers.0.self.q.weight") == (512 * 64) ** -0.5
    assert std("decoder.layers.0.cross.k.weight") == 512**-0.5
    assert std("decoder.layers.0.self.o.weight") == (6 * 64) ** -0.5
    assert std("encoder.layers.0.ffn.down.weight") == 1024**-0.5
    scaled = replace(T5_SMALL, softmax_scale=None)
    assert init_std(scaled, table["encoder.layers.0.self.q.weight"]) == 512**-0.5
    assert init_std(replace(T5_SMALL, init_std=0.02), table["head.weight"]) == 0.02
