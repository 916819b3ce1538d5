"""The loss of each corpus of the mixture, gathered where the losses are, without waiting for them.

    token_losses -> losses [N] --sum--> the loss that is learnt from
                       +--add()--> sums by corpus, positions by corpus   (float64, on the device)

A row is of one corpus (Batch.sources_B), and a position of one row; so its place says whose it is.

Legend: B rows, T tokens of a row, N positions whose loss counts, S corpora.
"""

from typing import Any

import torch
from torch import Tensor


class BySource:
    """Sums of losses and their numbers by corpus, of the batches since the last take().

    Args:
        sources: corpora of the mixture; of a single one nothing is gathered.
        device: where the losses are.
    """

    def __init__(self, sources: int, device: torch.device) -> None:
        self.sources = sources if sources > 1 else 0
        self._sums_2S = torch.zeros(2, self.sources, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, batch: Any, losses_N: Tensor) -> None:
        """The losses of a batch's counted positions, in their order."""
        rows_B = batch.sources_B
        if not self.sources or rows_B is None:
            return
        at_N = batch.loss_at_N
        if at_N is None:
            at_N = batch.loss_mask_BT.flatten().nonzero().flatten()
        if not len(at_N):
            return  # a rank without samples left runs one position that does not count
        source_N = rows_B[at_N // batch.loss_mask_BT.shape[1]]
        both_2N = torch.stack([losses_N.detach().double(), torch.ones_like(losses_N).double()])
        self._sums_2S.index_add_(1, source_N, both_2N)

    def take(self) -> Tensor:
        """[2, S]: summed losses and positions of each corpus; the next ones start from nothing."""
        taken, self._sums_2S = self._sums_2S, torch.zeros_like(self._sums_2S)
        return taken
