"""Encoder and decoder: predict a target out of a source; one loss for every kind of pair.

    encoder_tokens [B, S], tokens [B, T] -> model -> decoder's hidden [B, T, D]
        -> the N positions of targets -> token_losses -> (sum, N)

Gap sentences, corrupted spans, prefixes and named fields differ in what the loader writes
(pretrain/contents.py), not here.

Legend: B rows, S and T tokens of an encoder's and a decoder's row, D hidden, N counted positions.
"""

from typing import Protocol

from torch import Tensor

from pretrain.objectives.causal import LogitsFn, TokenLosses, summed


class PairBatch(Protocol):
    """What this objective asks of a batch (pretrain.batches.Batch)."""

    tokens_BT: Tensor
    targets_BT: Tensor
    loss_mask_BT: Tensor
    positions_BT: Tensor
    document_ids_BT: Tensor
    loss_at_N: Tensor | None
    encoder_tokens_BT: Tensor
    encoder_positions_BT: Tensor
    encoder_document_ids_BT: Tensor


class PairModel(Protocol):
    """What this objective asks of a model."""

    logits: LogitsFn

    def __call__(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor,
        encoder_tokens_BT: Tensor,
        encoder_positions_BT: Tensor,
        encoder_document_ids_BT: Tensor,
    ) -> Tensor:
        """The decoder's hidden states [B, T, D]."""
        ...


class Seq2Seq:
    """Prediction of the next token of the decoder's rows, over the positions of `loss_mask_BT`."""

    def loss(
        self, model: PairModel, batch: PairBatch, token_losses: TokenLosses
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses: a scalar that carries gradients, their number: int64 scalar)."""
        hidden_BTD = model(
            batch.tokens_BT,
            batch.positions_BT,
            batch.document_ids_BT,
            batch.encoder_tokens_BT,
            batch.encoder_positions_BT,
            batch.encoder_document_ids_BT,
        )
        return summed(model.logits, hidden_BTD, batch, token_losses)
