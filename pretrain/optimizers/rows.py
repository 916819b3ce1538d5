"""AdamW for embeddings whose unused rows stay as they are: weights, moments and decay.

A row is used if any value of its gradient is not zero, on any rank: the rows that no sample of the
step has touched are skipped. bert4keras' lazy optimizer leaves their weights and still decays their
moments; here the moments wait too, so that a rare word moves by the gradients that it has seen.
Only a table that is not tied to the head has such rows: a softmax reaches them all.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.model import split_dim
from pretrain.optimizers.fragments import Fragment
from pretrain.optimizers.update import Update


class LazyRows:
    """Updates the groups of part `rows`."""

    slots: Mapping[str, str] = {"exp_avg": "zeros", "exp_avg_sq": "zeros"}
    part = "rows"
    masks = False

    def begin(self, update: Update) -> None:
        """Where the rows of each table lie in one vector of all."""
        logical = update.logical
        self.places: dict[str, int] = {}
        self.rows = 0
        mine = {n for group in update.groups if group["part"] == self.part for n in group["names"]}
        for name in (name for name in logical.names if name in mine):
            self.places[name] = self.rows
            self.rows += logical.shapes[name][0]

    def apply(self, update: Update, grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """Which rows were used, on any rank; then Adam for those."""
        logical = update.logical
        used = torch.zeros(self.rows, device=logical.device)
        mine = [f for f in logical.fragments if f.name in self.places]
        for f in mine:
            at, width = self._at(update, f)
            values = f.view(grads[f.flat])
            row = (torch.arange(f.length, device=values.device) + f.start % width) // width
            used[at].index_add_(0, row.to(used.device), (values != 0).float().to(used.device))
        (used,) = logical.reduced(used)
        for f in mine:
            at, width = self._at(update, f)
            seen = (used[at] > 0).to(f.flat.device).repeat_interleave(width)
            self._step(update, f, f.view(grads[f.flat]), seen.narrow(0, f.start % width, f.length))

    def _at(self, update: Update, f: Fragment) -> tuple[slice, int]:
        """The rows that a fragment touches, and the width of a row."""
        logical = update.logical
        local, cut = logical.local[f.name], split_dim(logical.tables[f.name])
        first = self.places[f.name] + (logical.mesh.tensor_rank * local[0] if cut == 0 else 0)
        rows = slice(first + f.start // local[1], first + (f.start + f.length - 1) // local[1] + 1)
        return rows, local[1]

    def _step(self, update: Update, f: Fragment, grad: Tensor, seen: Tensor) -> None:
        group, state = update.group_of[f.flat], update.state[f.flat]
        beta1, beta2 = group["betas"]
        weight, step = f.view(f.flat), state["step"].double()
        m, v = f.view(state["exp_avg"]), f.view(state["exp_avg_sq"])
        m.copy_(torch.where(seen, torch.lerp(m, grad, 1 - beta1), m))
        v.copy_(torch.where(seen, v * beta2 + (1 - beta2) * grad * grad, v))
        root = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
        change = m / (1 - beta1**step) / root
        moved = weight * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * change
        weight.copy_(torch.where(seen, moved, weight))
