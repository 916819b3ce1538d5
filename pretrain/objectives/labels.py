"""Classification: the label of each document of a row, out of what the encoder makes of its [CLS].

    batch -> model -> hidden [B, T, D] -> the N places of [CLS] -> head -> logits [N, L] -> (sum, N)

The logits of labels are whole on every rank, however the vocabulary is cut, so their loss is taken
here and not by the `token_losses` that is handed in. A step's loss is the mean over all documents
of all ranks, as every objective's is over what it counts.

Legend: B rows, T tokens, D hidden, N documents of the batch, L labels.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objectives.causal import LogitsFn, TokenLosses


class LabelBatch(Protocol):
    """What this objective asks of a batch (pretrain.batches.Batch)."""

    tokens_BT: Tensor
    targets_BT: Tensor
    loss_mask_BT: Tensor
    positions_BT: Tensor
    document_ids_BT: Tensor | None
    loss_at_N: Tensor | None
    segments_BT: Tensor | None


class LabelModel(Protocol):
    """What this objective asks of a model."""

    logits: LogitsFn

    def __call__(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        segments_BT: Tensor | None,
    ) -> Tensor:
        """Hidden states [B, T, D]."""
        ...


class Labels:
    """The label at each place of `loss_mask_BT`, where a document's [CLS] stands."""

    def loss(
        self, model: LabelModel, batch: LabelBatch, token_losses: TokenLosses
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses: a scalar that carries gradients, their number: int64 scalar)."""
        at_N = places(batch)
        # An empty micro-batch runs one place at weight 0: every collective still happens.
        chosen_N = at_N if len(at_N) else at_N.new_zeros(1)
        logits_NL, targets_N = logits_at(model, batch, chosen_N)
        targets_N = targets_N if len(at_N) else targets_N * 0
        losses_N = F.cross_entropy(logits_NL, targets_N, reduction="none")
        count = torch.full((), len(at_N), dtype=torch.int64, device=losses_N.device)
        return losses_N.sum() * (1.0 if len(at_N) else 0.0), count


def places(batch: LabelBatch) -> Tensor:
    """Where [CLS] stands, flat: int64 [N]."""
    if batch.loss_at_N is not None:
        return batch.loss_at_N
    return batch.loss_mask_BT.flatten().nonzero().flatten()


def logits_at(model: LabelModel, batch: LabelBatch, at_N: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, L] in fp32 or finer, and targets [N], at flat places."""
    given = (batch.tokens_BT, batch.positions_BT, batch.document_ids_BT, batch.segments_BT)
    logits_NL = model.logits(model(*given).flatten(0, 1)[at_N])
    exact = torch.promote_types(logits_NL.dtype, torch.float32)
    return logits_NL.to(exact), batch.targets_BT.flatten()[at_N]


def right(model: LabelModel, batch: LabelBatch) -> int:
    """How many documents of a batch get their own label."""
    at_N = places(batch)
    chosen_N = at_N if len(at_N) else at_N.new_zeros(1)  # all ranks make the same calls
    logits_NL, targets_N = logits_at(model, batch, chosen_N)
    return int((logits_NL.argmax(-1) == targets_N).sum()) if len(at_N) else 0
