"""What a model costs to compute and to hold, counted from its table of tensors. No torch.

    matrices x the tokens that go through each + attention --> FLOPs of a row
    what each kind of sub-layer keeps for its backward pass --> bytes of a row

A row is seq_len tokens; for an encoder-decoder seq_len tokens of the encoder and target_len of the
decoder, and "per token" is per token of the encoder, as a run counts its tokens.
"""

from dataclasses import dataclass
from math import prod

from configs.model import (
    CPMConfig,
    ModelConfig,
    RoFormerConfig,
    T5PegasusConfig,
    Tensor,
    parameter_count,
    shape,
)
from configs.model import tensors as table_of

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an activation or of a working weight."""


@dataclass(frozen=True)
class Row:
    """What a row is made of."""

    seq_len: int
    """Tokens; of the encoder where there is one."""
    target_len: int | None = None
    """Tokens of a decoder over an encoder; null: a third of seq_len, as T5 PEGASUS was trained."""
    predicted: float = 1.0
    """Share of the tokens of the side with the head that the head sees (masked LM)."""

    @property
    def targets(self) -> int:
        """Tokens of the decoder of an encoder-decoder."""
        return self.seq_len // 3 if self.target_len is None else self.target_len


def flops_per_token(config: ModelConfig, row: Row | int) -> tuple[float, float]:
    """FLOPs of forward and backward for one token: (attention in full, attention causal).

    The causal count leaves out what a causal mask throws away; an encoder has no such mask.
    Recomputed work is not counted. For CPM 6 N + 12 L H Q T as nanoGPT and llm.c count, N with
    biases and norms; for the others matrix products alone. An int is a row of so many tokens.
    """
    row = Row(row) if isinstance(row, int) else row
    T, inner = row.seq_len, config.heads * config.head_dim
    if isinstance(config, CPMConfig):
        looked_up = [t for t in table_of(config) if t.op in ("lookup", "table") and not t.tied_to]
        in_products = parameter_count(config) - sum(prod(shape(config, t)) for t in looked_up)
        attention = 12.0 * config.layers * inner * T
        return 6.0 * in_products + attention, 6.0 * in_products + attention * (T + 1) / (2 * T)
    products = 6.0 * sum(
        _passing(t, config, row) * prod(shape(config, t)) for t in table_of(config)
    )
    if isinstance(config, RoFormerConfig):
        full = products / T + 12.0 * config.layers * inner * T
        return full, full
    U = row.targets
    across, own = (
        12.0 * config.layers * inner * (T * T + U * T),
        12.0 * config.layers * inner * U * U,
    )
    both = products + across
    return (both + own) / T, (both + own * (U + 1) / (2 * U)) / T


def _passing(tensor: Tensor, config: ModelConfig, row: Row) -> float:
    """Tokens of a row that are multiplied by a tensor; 0 for what is no matrix of a product."""
    if tensor.op == "linear" and not isinstance(config, T5PegasusConfig):
        at_head = tensor.name.startswith("head.")
        return row.seq_len * (row.predicted if at_head else 1.0)
    if tensor.op == "linear":
        if tensor.name.startswith("head."):
            return row.targets * row.predicted
        keys = ".cross.k." in tensor.name or ".cross.v." in tensor.name
        return row.seq_len if keys or tensor.name.startswith("encoder.") else row.targets
    return row.seq_len * row.predicted if tensor.tied_to == "head" else 0.0


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the model; they add up to parameter_count()."""
    parts: dict[str, int] = {}
    for tensor in table_of(config):
        parts[_part(tensor)] = parts.get(_part(tensor), 0) + prod(shape(config, tensor))
    assert sum(parts.values()) == parameter_count(config)
    return parts


def _part(tensor: Tensor) -> str:
    if tensor.op == "norm":
        return "norms"
    if tensor.layer is None:
        return tensor.name.removesuffix(".weight").removesuffix(".bias")
    inner = tensor.name.split(".layers.")[1].split(".")[1]
    return {"self": "attention", "cross": "cross-attention", "ffn": "feed-forward"}[inner]


@dataclass(frozen=True)
class _Kept:
    """Bytes that sub-layers keep a token."""

    config: ModelConfig
    width: int
    tensor: int
    sequence: int = 1

    @property
    def stream(self) -> int:
        return self.width * self.config.hidden

    @property
    def norm(self) -> int:
        return 2 * self.stream + 8

    @property
    def cut(self) -> int:
        """Dropout's mask on the stream."""
        return self.config.hidden if self.config.dropout else 0

    @property
    def inner(self) -> int:
        return self.width * self.config.heads // self.tensor * self.config.head_dim

    @property
    def attention(self) -> int:
        """q, k, v, output and log-sums; the output in both orders where rows are shared."""
        inner = (4 if self.sequence == 1 else 5) * self.inner
        return self.norm + inner + 4 * self.config.heads // self.tensor + self.cut

    @property
    def feed_forward(self) -> int:
        ffn = self.config.ffn // self.tensor
        matrices = 2
        if isinstance(self.config, T5PegasusConfig):
            matrices = 4
            ffn_cut = ffn if self.config.dropout else 0
            return self.norm + self.width * matrices * ffn + ffn_cut + self.cut
        if isinstance(self.config, RoFormerConfig) and self.config.version == 2:
            matrices = 1  # ReLU needs its output only, which the next matrix keeps
        return self.norm + self.width * matrices * ffn + self.cut


def activation_bytes(
    config: ModelConfig,
    row: Row | int,
    rows: int,
    precision: str,
    recompute: str,
    tensor: int = 1,
    masked: bool = True,
    sequence: int = 1,
) -> float:
    """Bytes kept on a GPU for the backward pass of a micro-batch of `rows` rows, without logits.

    A block keeps, a token: the stream twice, both norms' outputs and statistics, q, k, v, the
    attention's output and its log-sums, the feed-forward layer before and after its activation (a
    gated one: gate, its activation, up and their product), and a byte for each value that dropout
    may have cut (Korthikanti et al. 2022: 34 s b h). With document boundaries (`masked`) there is
    one mask of [T, T] a row for all layers; T5's position bias is one tensor for a stack, and has a
    gradient of its size. Of the `sequence` devices that share a row each keeps its tokens, in
    attention its heads (and their bias), and the whole of the mask.
    """
    row = Row(row) if isinstance(row, int) else row
    kept, T = _Kept(config, WIDTH[precision], tensor, sequence), row.seq_len
    if isinstance(config, T5PegasusConfig):
        return rows * _two_stacks(config, kept, row, recompute)
    attention = kept.attention
    a_layer, once = {
        "none": (attention + kept.feed_forward, 0),
        "sublayer": (2 * kept.stream, max(attention, kept.feed_forward)),
        "full": (kept.stream, attention + kept.feed_forward),
    }[recompute]
    outside = kept.norm + kept.cut  # final (or first) norm, embeddings' dropout
    a_token = config.layers * a_layer + once + outside
    # what is recomputed keeps the Boolean that the mask was made of as well
    mask = T * T * (kept.width + (recompute != "none")) if masked else 0
    return float(rows * (T // sequence * a_token + mask))


def _two_stacks(config: T5PegasusConfig, kept: _Kept, row: Row, recompute: str) -> float:
    whole_T, whole_U = row.seq_len, row.targets
    T, U = whole_T // kept.sequence, whole_U // kept.sequence
    own, ffn = kept.attention, kept.feed_forward
    # a decoder's token keeps its norm, its query and what comes out, an encoder's its key and value
    across = U * (own - 2 * kept.inner) + T * 2 * kept.inner
    encoder, decoder = T * (own + ffn), U * (own + ffn) + across
    if recompute == "none":
        blocks: float = config.layers * (encoder + decoder)
    elif recompute == "sublayer":
        inputs = config.layers * kept.stream * (2 * T + 3 * U)
        blocks = inputs + max(T * own, T * ffn, U * ffn, across)
    else:
        blocks = config.layers * kept.stream * (T + U) + max(encoder, decoder)
    heads = config.heads // (kept.tensor * kept.sequence)
    own_pairs, across_pairs = whole_T**2 + whole_U**2, whole_U * whole_T
    biased = own_pairs + (across_pairs if config.cross_position_bias else 0)
    # a bias keeps its buckets (int64) and what was hidden in it; without one there is a mask
    masks = 9 * biased + kept.width * (own_pairs + across_pairs - biased)
    outside = (T + U) * (
        kept.norm + 2 * kept.cut
    )  # final norms; dropout behind them, on embeddings
    return blocks + outside + 2 * kept.width * heads * biased + masks
