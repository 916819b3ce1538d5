"""What autograd keeps of a forward pass, counted by hooks as a GPU would keep it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs.model import ModelConfig, T5PegasusConfig
from pretrain import models
from pretrain.costs import Row
from pretrain.models.layers import Visibility


class _Fused(torch.autograd.Function):
    """Attention that keeps what a fused kernel with a bias keeps on a GPU."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[:3]), bias)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("only what is kept is looked at")


def fused(config: ModelConfig, dtype: torch.dtype) -> tuple[nn.Module, dict[int, Tensor]]:
    """A model whose attention keeps what a fused kernel keeps; the biases that it has met."""
    biases: dict[int, Tensor] = {}

    def attention(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *_: float) -> Tensor:
        if see.bias is not None:
            biases[see.bias.data_ptr()] = see.bias
        bias = see.bias if see.bias is not None else see.additive(q[:1, :1].transpose(1, 2))
        return _Fused.apply(q, k, v, bias)  # type: ignore[no-any-return]

    model = models.build(config).to(dtype)
    for module in model.modules():
        if hasattr(module, "attention"):
            module.attention = attention
    return model, biases


def rows_of(config: ModelConfig, row: Row, rows: int) -> list[Tensor | None]:
    """What the model of a family is called with."""

    def side(length: int) -> list[Tensor | None]:
        tokens = torch.randint(config.vocab, (rows, length))
        return [tokens, torch.arange(length).expand_as(tokens), torch.zeros_like(tokens)]

    encoder = side(row.seq_len)
    return side(row.targets) + encoder if isinstance(config, T5PegasusConfig) else encoder


def saved_bytes(
    model: nn.Module, forward: Callable[[], Any], held: Mapping[int, Tensor] | None = None
) -> int:
    """Bytes of the storages that a forward saves for its backward, parameters left out.

    held: tensors that live as long, and would not be seen where a checkpoint saves them later.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(values: Tensor) -> Tensor:
        kept[values.untyped_storage().data_ptr()] = values
        return values

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        result = forward()
    assert result.requires_grad
    kept |= {t.untyped_storage().data_ptr(): t for t in (held or {}).values()}
    return sum(v.untyped_storage().nbytes() for at, v in kept.items() if at not in own)
