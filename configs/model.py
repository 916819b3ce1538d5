"""The architectures side by side, and for each the table of its tensors (AXES).

One table, four readers: `parallel` cuts by it, `growth` enlarges by it, `convert` lays formats out
by it, `plan` counts by it; a model checks itself against it. A tensor is its operation, its
factored axes and the residual stream that it reads or writes:

    embed.tokens.weight              lookup  vocab            x embed            -> dec
    decoder.layers.3.self.q.weight   linear  heads,head_dim   x embed       dec ->
    decoder.layers.3.self.o.weight   linear  embed            x heads,head_dim   -> dec

The distinction between a reader and a writer matters to growth: of two matrices of one shape the
writer is repeated and the reader is divided.

Sources: CPM-1 (Zhang et al. 2020); T5 PEGASUS, RoFormer, v2 (kexue.fm/archives/8209, 8265, 8998).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from configs.positions import PositionTable, Rope, bucket_problems, table_problems


@dataclass(frozen=True)
class CPMConfig:
    """A GPT-2 decoder as CPM-1 trained it: pre-LN, learned positions, tanh GELU, tied head."""

    family: Literal["cpm"]
    """The architecture."""
    vocab: int
    """Rows of the token embedding; at least the tokenizer's vocabulary."""
    hidden: int
    """Width of the residual stream."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads."""
    head_dim: int
    """Width of a head; free of hidden / heads."""
    ffn: int
    """Width of the feed-forward layer."""
    positions: int = 1024
    """Learned positions: the longest sequence."""
    position_table: PositionTable | None = None
    """How the table serves more positions than it has rows; null: it has a row for each."""
    norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    dropout: float = 0.1
    """On the embeddings and on what each sub-layer adds."""
    attention_dropout: float = 0.1
    """On the attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of a fresh matrix; outputs are divided by sqrt(2 x layers)."""
    softmax_scale: float | None = None
    """Attention scores are multiplied by this; null means head_dim ** -0.5."""
    logit_scale: float = 1.0
    """Logits are multiplied by this."""
    words_said: int | None = None
    """Ids from this one on are never said: rows of new words that wait (growth sets it)."""
    log_n: int = 0
    """Attention scores are multiplied by log n / log log_n, n the keys that a token sees; 0: not
    at all; 512: as published (kexue.fm/archives/8823), the same function at n = 512."""
    log_n_least: float = 0.0
    """That factor is at least this; 1: up to log_n keys nothing is multiplied."""

    def problems(self) -> list[str]:
        """Sizes that make no model."""
        return _size_problems(
            self, ("vocab", "hidden", "layers", "heads", "head_dim", "ffn", "positions")
        ) + table_problems(self.position_table, self.positions, causal=True)


@dataclass(frozen=True)
class T5PegasusConfig:
    """mT5.1.1 as T5 PEGASUS trained it; its three deviations from mesh-tensorflow are options."""

    family: Literal["t5_pegasus"]
    """The architecture."""
    vocab: int
    """Rows of the shared embedding and of the untied head."""
    hidden: int
    """Width of both residual streams."""
    layers: int
    """Blocks of the encoder, and of the decoder."""
    heads: int
    """Attention heads."""
    head_dim: int
    """Width of a head; T5's d_kv."""
    ffn: int
    """Width of the gated feed-forward layer."""
    buckets: int = 32
    """Relative-position buckets of each stack's bias table."""
    max_distance: int = 128
    """Distance from which the last bucket serves."""
    bucket_spans: int = 1
    """Logarithmic buckets are this many times those of the plain rule, which holds up to
    max_distance; the others lie beyond it, in the same ratio."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    dropout: float = 0.1
    """On embeddings, sub-layer outputs and the gated activation."""
    attention_dropout: float = 0.1
    """On the attention probabilities."""
    init_std: float | None = None
    """Standard deviation of a fresh matrix; null: T5's own, by the width that each one reads."""
    activation: Literal["gelu_erf", "gelu_tanh"] = "gelu_erf"
    """Deviation 1: bert4keras trained with erf, mT5 with tanh."""
    cross_position_bias: bool = True
    """Deviation 2: the decoder's self-attention bias is added to cross-attention too."""
    logit_scale: float | None = None
    """Deviation 3: the untied head is scaled; null means hidden ** -0.5, 1.0 is mT5's."""
    words_said: int | None = None
    """Ids from this one on are never said: rows of new words that wait (growth sets it)."""
    softmax_scale: float | None = 1.0
    """T5 does not scale attention scores."""
    log_n: int = 0
    """Attention scores are multiplied by log n / log log_n, n the keys that a token sees; 0: not
    at all; 512: as published (kexue.fm/archives/8823), the same function at n = 512."""
    log_n_least: float = 0.0
    """That factor is at least this; 1: up to log_n keys nothing is multiplied."""

    def problems(self) -> list[str]:
        """Sizes that make no model."""
        return _size_problems(
            self,
            ("vocab", "hidden", "layers", "heads", "head_dim", "ffn", "buckets", "bucket_spans"),
        ) + bucket_problems(self.buckets, self.bucket_spans, self.max_distance)


@dataclass(frozen=True)
class RoFormerConfig:
    """A masked-LM encoder; v1 is post-LN BERT, v2 gain-free; positions are rotary or learned."""

    family: Literal["roformer"]
    """The architecture."""
    version: Literal[1, 2]
    """1: LayerNorm, biases, GELU, MLM head; 2: RMSNorm without gain, no bias, ReLU, bare head."""
    vocab: int
    """Rows of the token embedding, tied to the head."""
    hidden: int
    """Width of the residual stream."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads."""
    head_dim: int
    """Width of a head; even where positions are rotary: the rotation turns pairs."""
    ffn: int
    """Width of the feed-forward layer."""
    segments: int = 2
    """Rows of the segment embedding."""
    positions: int | None = None
    """Learned positions, the longest sequence (BERT, WoBERT, SimBERT: v1 only); null: rotary."""
    position_table: PositionTable | None = None
    """How the table serves more positions than it has rows; null: it has a row for each."""
    labels: int = 0
    """Classes that a head over [CLS] tells apart, in the place of the head over words; 0: words."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope: Rope | None = None
    """How rotary positions serve rows longer than those learnt on; null: as they are."""
    ramp_steps: int = 0
    """Steps over which what a sub-layer adds grows from nothing to all of it; 0: all at once."""
    norm_eps: float = 1e-12
    """Epsilon of every norm."""
    dropout: float = 0.1
    """On the embeddings and on what each sub-layer adds."""
    attention_dropout: float = 0.1
    """On the attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of a fresh matrix (v1; v2 has its own rule, kexue.fm/archives/8998)."""
    softmax_scale: float | None = None
    """Attention scores are multiplied by this; null means head_dim ** -0.5."""
    logit_scale: float = 1.0
    """Logits are multiplied by this."""
    words_said: int | None = None
    """Ids from this one on are never said: rows of new words that wait (growth sets it)."""
    log_n: int = 0
    """Attention scores are multiplied by log n / log log_n, n the keys that a token sees; 0: not
    at all; 512: as published (kexue.fm/archives/8823), the same function at n = 512."""
    log_n_least: float = 0.0
    """That factor is at least this; 1: up to log_n keys nothing is multiplied."""

    def problems(self) -> list[str]:
        """Sizes that make no model."""
        found = _size_problems(
            self, ("vocab", "hidden", "layers", "heads", "head_dim", "ffn", "segments")
        )
        if self.labels < 0 or self.labels == 1:
            found.append(f"labels: is {self.labels}, must be 0 (a head over words) or at least 2")
        if self.ramp_steps < 0:
            found.append(f"ramp_steps: is {self.ramp_steps}, must not be negative")
        if self.positions is not None and self.positions < 1:
            found.append(f"positions: is {self.positions}, must be null (rotary) or at least 1")
        if self.positions is not None and self.version == 2:
            found.append("positions: RoFormer v2 has rotary ones, must be null (仅 v1 可学习)")
        if self.positions is None and (size := self.head_dim) % 2:
            found.append(f"head_dim: is {size}, must be even: {size - 1} or {size + 1} (须为偶数)")
        if self.rope_base <= 1:
            found.append(f"rope_base: is {self.rope_base:g}, must be above 1")
        if self.rope is not None and self.positions is not None:
            found.append("rope: positions are learned, nothing is turned; leave it out (非旋转)")
        return found + table_problems(self.position_table, self.positions)


ModelConfig = CPMConfig | T5PegasusConfig | RoFormerConfig


@dataclass(frozen=True)
class Tensor:
    """One logical tensor of an architecture."""

    name: str
    """Its name in the model and in every checkpoint."""
    op: Literal["lookup", "linear", "vector", "table", "norm"]
    """What it does."""
    out: tuple[str, ...]
    """Factored axes of dimension 0."""
    in_: tuple[str, ...] = ()
    """Factored axes of dimension 1; empty for a one-dimensional tensor."""
    reads: str | None = None
    """The residual stream that it reads: enc or dec."""
    writes: str | None = None
    """The residual stream that it writes."""
    tied_to: str | None = None
    """The operation that uses the same tensor a second time ("head": it also reads the stream)."""
    init: Literal["normal", "output", "zeros", "ones"] = "normal"
    """How a fresh one is drawn; see init_std()."""
    decay: bool = True
    """Whether weight decay applies."""
    partial: bool = False
    """Replicated but used where tensor parallelism splits: its gradients are summed."""
    layer: int | None = None
    """The block that it belongs to."""


SPLIT_AXES = frozenset({"heads", "ffn", "vocab"})
HEADS = ("heads", "head_dim")
EMBED = ("embed",)


def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Every logical tensor of the architecture, in the model's own order."""
    if isinstance(config, CPMConfig):
        return tuple(_cpm(config))
    if isinstance(config, T5PegasusConfig):
        return tuple(_t5_pegasus(config))
    return tuple(_roformer(config))


def _cpm(config: CPMConfig) -> Iterator[Tensor]:
    yield Tensor("embed.tokens.weight", "lookup", ("vocab",), EMBED, writes="dec", tied_to="head")
    yield Tensor("embed.positions.weight", "lookup", ("positions",), EMBED, writes="dec")
    for i in range(config.layers):
        at = f"decoder.layers.{i}"
        yield from _norm(f"{at}.self_norm", "dec", True, i)
        yield from _attention(f"{at}.self", "dec", "dec", True, i)
        yield from _norm(f"{at}.ffn_norm", "dec", True, i)
        yield from _ffn(f"{at}.ffn", "dec", ("up",), True, i)
    yield from _norm("decoder.final_norm", "dec", True, None)


def _t5_pegasus(config: T5PegasusConfig) -> Iterator[Tensor]:
    yield Tensor("embed.tokens.weight", "lookup", ("vocab",), EMBED, writes="enc+dec")
    for stack, stream in (("encoder", "enc"), ("decoder", "dec")):
        yield Tensor(
            f"{stack}.position_bias.weight", "table", ("buckets",), ("heads",), decay=False
        )
        for i in range(config.layers):
            at = f"{stack}.layers.{i}"
            yield from _norm(f"{at}.self_norm", stream, False, i)
            yield from _attention(f"{at}.self", stream, stream, False, i)
            if stack == "decoder":
                yield from _norm(f"{at}.cross_norm", "dec", False, i)
                yield from _attention(f"{at}.cross", "dec", "enc", False, i)
            yield from _norm(f"{at}.ffn_norm", stream, False, i)
            yield from _ffn(f"{at}.ffn", stream, ("gate", "up"), False, i)
        yield from _norm(f"{stack}.final_norm", stream, False, None)
    yield Tensor("head.weight", "linear", ("vocab",), EMBED, reads="dec")


def _roformer(config: RoFormerConfig) -> Iterator[Tensor]:
    v1, tied = config.version == 1, None if config.labels else "head"
    yield Tensor("embed.tokens.weight", "lookup", ("vocab",), EMBED, writes="enc", tied_to=tied)
    yield Tensor("embed.segments.weight", "lookup", ("segments",), EMBED, writes="enc")
    if config.positions is not None:
        yield Tensor("embed.positions.weight", "lookup", ("positions",), EMBED, writes="enc")
    if v1:
        yield from _norm("embed.norm", "enc", True, None)
    for i in range(config.layers):
        at = f"encoder.layers.{i}"
        yield from _attention(f"{at}.self", "enc", "enc", v1, i)
        if v1:
            yield from _norm(f"{at}.self_norm", "enc", True, i)
        yield from _ffn(f"{at}.ffn", "enc", ("up",), v1, i)
        if v1:
            yield from _norm(f"{at}.ffn_norm", "enc", True, i)
    if config.labels:
        stream = "enc"
        if v1:
            stream = "head"
            yield Tensor("head.pooler.weight", "linear", EMBED, EMBED, reads="enc", writes=stream)
            yield Tensor(
                "head.pooler.bias", "vector", EMBED, writes=stream, init="zeros", decay=False
            )
        yield Tensor("head.classifier.weight", "linear", ("labels",), EMBED, reads=stream)
        yield Tensor("head.classifier.bias", "vector", ("labels",), init="zeros", decay=False)
    elif v1:
        yield Tensor("head.dense.weight", "linear", EMBED, EMBED, reads="enc", writes="head")
        yield Tensor("head.dense.bias", "vector", EMBED, writes="head", init="zeros", decay=False)
        yield from _norm("head.norm", "head", True, None)
        yield Tensor("head.bias", "vector", ("vocab",), init="zeros", decay=False)


def _norm(at: str, stream: str, bias: bool, layer: int | None) -> Iterator[Tensor]:
    yield Tensor(f"{at}.weight", "norm", EMBED, (), stream, init="ones", decay=False, layer=layer)
    if bias:
        yield Tensor(
            f"{at}.bias", "norm", EMBED, (), stream, init="zeros", decay=False, layer=layer
        )


def _linear(
    at: str,
    out: tuple[str, ...],
    in_: tuple[str, ...],
    bias: bool,
    layer: int,
    *,
    reads: str | None = None,
    writes: str | None = None,
) -> Iterator[Tensor]:
    init: Literal["output", "normal"] = "output" if writes else "normal"
    yield Tensor(f"{at}.weight", "linear", out, in_, reads, writes, init=init, layer=layer)
    if bias:
        yield Tensor(
            f"{at}.bias", "vector", out, (), None, writes, init="zeros", decay=False, layer=layer
        )


def _attention(at: str, queries: str, keys: str, bias: bool, layer: int) -> Iterator[Tensor]:
    yield from _linear(f"{at}.q", HEADS, EMBED, bias, layer, reads=queries)
    yield from _linear(f"{at}.k", HEADS, EMBED, bias, layer, reads=keys)
    yield from _linear(f"{at}.v", HEADS, EMBED, bias, layer, reads=keys)
    yield from _linear(f"{at}.o", EMBED, HEADS, bias, layer, writes=queries)


def _ffn(at: str, stream: str, inward: tuple[str, ...], bias: bool, layer: int) -> Iterator[Tensor]:
    for name in inward:
        yield from _linear(f"{at}.{name}", ("ffn",), EMBED, bias, layer, reads=stream)
    yield from _linear(f"{at}.down", EMBED, ("ffn",), bias, layer, writes=stream)


def axis_size(config: ModelConfig, axis: str) -> int:
    """Length of a factored axis."""
    table = getattr(config, "position_table", None)
    if axis == "positions" and table is not None:
        return int(table.rows)
    return int(getattr(config, "hidden" if axis == "embed" else axis))


def shape(config: ModelConfig, tensor: Tensor) -> tuple[int, ...]:
    """Logical shape: one number a dimension, factored axes multiplied."""
    dims = (tensor.out, tensor.in_) if tensor.in_ else (tensor.out,)
    return tuple(prod(axis_size(config, axis) for axis in axes) for axes in dims)


def split_dim(tensor: Tensor) -> int | None:
    """The dimension that tensor parallelism cuts, or None for a replicated tensor."""
    for dim, axes in enumerate((tensor.out, tensor.in_)):
        if SPLIT_AXES & set(axes) and not (dim == 0 and tensor.op == "table"):
            return dim
    return None


def local_shape(config: ModelConfig, tensor: Tensor, parallel: int) -> tuple[int, ...]:
    """Shape on one of `parallel` tensor-parallel ranks; axes must divide (split_problems)."""
    whole, cut = shape(config, tensor), split_dim(tensor)
    return tuple(n // parallel if dim == cut else n for dim, n in enumerate(whole))


def split_problems(config: ModelConfig, parallel: int) -> list[str]:
    """Why the model cannot be cut over `parallel` ranks; a sentence for each axis."""
    return [
        f"{axis}: is {axis_size(config, axis)}, not divisible by parallel.tensor={parallel}; "
        f"the nearest that is: {_nearest(axis_size(config, axis), parallel)} (不能整除)"
        for axis in sorted(SPLIT_AXES)
        if axis_size(config, axis) % parallel
    ]


def _nearest(size: int, divisor: int) -> int:
    return max(1, round(size / divisor)) * divisor


def longest_row(config: ModelConfig) -> int | None:
    """Tokens of the longest row that a model can read; None where nothing limits it."""
    return getattr(config, "positions", None)


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, tied tensors once."""
    return sum(prod(shape(config, tensor)) for tensor in tensors(config))


def init_std(config: ModelConfig, tensor: Tensor) -> float:
    """Standard deviation of a fresh `normal` or `output` tensor.

    GPT-2's rule for CPM (outputs / sqrt(2 layers)); RoFormer v2's 1 / sqrt(fan x layers), fan the
    input width (kexue.fm/archives/8998); T5's own; the plain value for the rest.
    """
    if isinstance(config, RoFormerConfig) and config.version == 2:
        rows, columns = shape(config, tensor)
        fan = rows if tensor.op == "lookup" and 10 <= rows <= 10000 else columns
        return float((fan * config.layers) ** -0.5)
    if isinstance(config, CPMConfig) and tensor.init == "output":
        return float(config.init_std * (2 * config.layers) ** -0.5)
    return _t5_std(config, tensor) if config.init_std is None else config.init_std


def _t5_std(config: ModelConfig, tensor: Tensor) -> float:
    """As mesh-tensorflow draws a T5: embeddings 1, matrices 1 / sqrt(fan-in), queries less by
    sqrt(head_dim) where the scores are not scaled (Raffel et al. 2020; kexue.fm/archives/8620)."""
    if tensor.op == "lookup":
        return 1.0
    if tensor.op == "table":
        return float(config.hidden**-0.5)
    unscaled = ".q." in tensor.name and config.softmax_scale == 1.0
    fan = shape(config, tensor)[-1] * (config.head_dim if unscaled else 1)
    return float(fan**-0.5)


def _size_problems(config: ModelConfig, names: tuple[str, ...]) -> list[str]:
    found = [
        f"{n}: is {getattr(config, n)}, must be at least 1" for n in names if getattr(config, n) < 1
    ]
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            found.append(f"{name}: is {getattr(config, name)}, must lie in [0, 1)")
    if config.log_n_least < 0:
        found.append(f"log_n_least: is {config.log_n_least}, must not be negative")
    if config.words_said is not None and not 1 <= config.words_said <= config.vocab:
        found.append(f"words_said: is {config.words_said}, must lie in [1, vocab] or be null")
    if config.log_n < 0 or config.log_n == 1:
        found.append(f"log_n: is {config.log_n}, must be 0 (off) or a number of keys from 2 on")
    for name in ("norm_eps", "init_std", "logit_scale", "softmax_scale"):
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            found.append(f"{name}: is {getattr(config, name)}, must be above 0")
    return found
