"""What a model costs to compute, counted from its table of tensors. No torch.

    matrices x the tokens that go through each + attention --> FLOPs of a row

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
