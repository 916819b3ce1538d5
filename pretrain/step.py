"""What one step is: the module that DeepSpeed calls, and what is told of it afterwards.

batch --Step--> objective --token losses--> summed loss --StepResult--> pretrain/monitor.py
                                  +-------> by corpus (pretrain/by_source.py)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pretrain.by_source import BySource
from pretrain.objectives.causal import LogitsFn


@dataclass(frozen=True)
class StepResult:
    """What a step did; tensors stay on the device until somebody reads them."""

    loss_sum: Tensor
    """Summed loss of all positions of all ranks, 0-d float64."""
    count: Tensor
    """Positions, 0-d int64."""
    grad_norm: Tensor | float
    """Global norm of the gradient before clipping; inf if the step was skipped."""
    skipped: Tensor | bool
    """A gradient was not finite: nothing was updated. A tensor where only the device knows."""
    by_source: Tensor
    """Summed losses and positions of each corpus, float64 [2, corpora]; of a single one [2, 0]."""
    measured: Tensor | None = None
    """Where it was asked for: Update.measured, by tensor."""


class Step(nn.Module):
    """What DeepSpeed calls a model: from a batch to the summed loss."""

    def __init__(
        self,
        model: nn.Module,
        objective: Any,
        losses: Callable[..., Tensor],
        by_source: BySource,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.losses, self.by_source = losses, by_source
        self.positions = 0

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(summed loss of a micro-batch, its positions)."""

        def losses(logits_fn: LogitsFn, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
            losses_N = self.losses(logits_fn, hidden_ND, targets_N, positions=self.positions)
            self.by_source.add(batch, losses_N)
            return losses_N

        loss_sum, count = self.objective.loss(self.model, batch, losses)
        return loss_sum, count
