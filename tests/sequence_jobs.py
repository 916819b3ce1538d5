"""Jobs of the tests of rows that several devices share."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.model import ModelConfig, T5PegasusConfig
from pretrain import models, parallel, recompute, sequence
from pretrain.batches import Batch
from pretrain.models.layers import Attention, Visibility, attention_sdpa
from tests.run_jobs import go


def go_wrong(config: dict[str, Any], what: str) -> dict[str, Any]:
    """Train in this world with an exchange that is none: "tokens" nowhere, "gradient" backwards."""
    right, backward = sequence._exchanged, sequence._Exchange.backward
    if what == "tokens":
        sequence._exchanged = lambda x, group: x
    else:
        sequence._Exchange.backward = staticmethod(lambda ctx, gradient: (gradient, None))
    try:
        return go(config)
    finally:
        sequence._exchanged, sequence._Exchange.backward = right, backward


def kept(
    config: ModelConfig, seq_len: int, target_len: int, rows: int, how: str, documents: bool
) -> int:
    """Bytes that autograd keeps on this rank for the backward pass of a micro-batch in fp32, and
    T5's biases again, for their gradients; parameters left out."""
    mesh = parallel.make_mesh(1, dist.get_world_size())
    model = recompute.apply(models.build(config), how)
    biases: dict[int, Tensor] = {}
    for module in model.modules():
        if "attention" in vars(module):
            fused = fused_with_bias(biases) if isinstance(config, T5PegasusConfig) else None
            vars(module)["attention"] = fused or attention_sdpa
    sequence.share(model, mesh)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.02)
    batch = _rows(config, seq_len, target_len, rows, documents).part(mesh.sequence_rank, mesh.world)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Tensor] = {}

    def keep(values: Tensor) -> Tensor:
        storages[values.untyped_storage().data_ptr()] = values
        return values

    given = [batch.tokens_BT, batch.positions_BT, batch.document_ids_BT]
    if isinstance(config, T5PegasusConfig):
        given += [batch.encoder_tokens_BT, batch.encoder_positions_BT]
        given += [batch.encoder_document_ids_BT]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        keep(model(*given))  # the head keeps it
    gradients = sum(bias.untyped_storage().nbytes() for bias in biases.values())
    kept = (v.untyped_storage().nbytes() for at, v in storages.items() if at not in own)
    return gradients + sum(kept)


def fused_with_bias(biases: dict[int, Tensor]) -> Attention:
    """Attention that keeps what a fused kernel keeps on a GPU; on a CPU none takes a bias that
    learns. Notes the biases that it is given."""

    def attention(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *_: float) -> Tensor:
        bias = see.additive(q[:1, :1].transpose(1, 2))
        if see.bias is not None:
            biases[see.bias.data_ptr()] = see.bias
        return _Fused.apply(q, k, v, bias)  # type: ignore[no-any-return]

    return attention


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.zeros(q.shape)  # not of the strides of q, a part of a message
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[:3]), bias)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("only what is kept is looked at")


def _rows(config: ModelConfig, seq_len: int, target_len: int, rows: int, documents: bool) -> Batch:
    def side(length: int) -> list[Tensor | None]:
        tokens = torch.randint(config.vocab, (rows, length))
        ids = torch.zeros_like(tokens) if documents else None
        return [tokens, torch.arange(length).expand_as(tokens), ids]

    encoder = side(seq_len)
    if not isinstance(config, T5PegasusConfig):
        tokens, positions, ids = encoder
        return Batch(tokens, tokens, tokens > 0, positions, ids)
    tokens, positions, ids = side(target_len)
    return Batch(tokens, tokens, tokens > 0, positions, ids, None, *encoder)
