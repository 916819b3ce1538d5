"""Causal language modelling: predict each next token.

    batch -> model -> hidden [B, T, D] -> the N positions that count -> token_losses -> (sum, N)

The head sees the counted positions only. How losses come out of hidden states is handed in
(`token_losses`): on one device objectives/losses.py, over a split vocabulary the Megatron door.

Legend: B rows, T tokens, D hidden, N positions whose loss counts, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

LogitsFn = Callable[[Tensor], Tensor]
TokenLosses = Callable[[LogitsFn, Tensor, Tensor], Tensor]
"""(hidden [N, D] -> logits [N, V], hidden [N, D], targets [N]) -> losses [N], fp32 or finer."""


class CausalBatch(Protocol):
    """What this objective asks of a batch (pretrain.batches.Batch)."""

    tokens_BT: Tensor
    targets_BT: Tensor
    loss_mask_BT: Tensor
    positions_BT: Tensor
    document_ids_BT: Tensor | None
    loss_at_N: Tensor | None


class CausalModel(Protocol):
    """What this objective asks of a model."""

    def __call__(
        self, tokens_BT: Tensor, positions_BT: Tensor, document_ids_BT: Tensor | None
    ) -> Tensor:
        """Hidden states [B, T, D]."""
        ...

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V]."""
        ...


class Causal:
    """Next-token prediction over the positions of `loss_mask_BT`."""

    def loss(
        self, model: CausalModel, batch: CausalBatch, token_losses: TokenLosses
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses: a scalar that carries gradients, their number: int64 scalar)."""
        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.document_ids_BT)
        return summed(model.logits, hidden_BTD, batch, token_losses)


class Counted(Protocol):
    """What tells which positions count, and their targets."""

    targets_BT: Tensor
    loss_mask_BT: Tensor
    loss_at_N: Tensor | None


def summed(
    logits: LogitsFn, hidden_BTD: Tensor, batch: Counted, token_losses: TokenLosses
) -> tuple[Tensor, Tensor]:
    """(sum of the losses at the positions that count, their number); the head sees no others."""
    at_N = batch.loss_at_N
    if at_N is None:
        at_N = batch.loss_mask_BT.flatten().nonzero().flatten()
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch.targets_BT.flatten()
    counted = at_N.shape[0]
    if counted == 0:
        # An empty micro-batch runs one position at weight 0: every collective still happens.
        losses_N = token_losses(logits, hidden_ND[:1], targets_N[:1]) * 0.0
    elif counted == targets_N.shape[0]:
        losses_N = token_losses(logits, hidden_ND, targets_N)
    else:
        losses_N = token_losses(logits, hidden_ND[at_N], targets_N[at_N])
    count = torch.full((), counted, dtype=torch.int64, device=hidden_BTD.device)
    return losses_N.sum(), count
