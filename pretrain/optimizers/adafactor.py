r"""Adafactor: second moments of a matrix by row and by column (Shazeer and Stern 2018).

    g  --squares, by row and column--> one message --> R [rows], C [columns]   of the whole matrix
    u = g / sqrt(R_i C_j / mean(R)),    u <- u / max(1, rms(u))
    w <- (1 - lr wd) w - lr max(floor, rms(w)) u         lr at most 1 / sqrt(step) (relative_step)

R and C decay by 1 - step ** -0.8; a tensor with one dimension keeps its squares whole. They are
small, so every rank has them for every tensor, and only the sums travel: (rows + columns) values a
matrix. A second message brings the norms of u and w. With beta1 above 0 the change itself is
averaged, as in mesh-tensorflow; T5 was trained with beta1 = 0, without clipping the gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.model import split_dim
from pretrain.optimizers.adam import Keys, elders, lr_of, rms
from pretrain.optimizers.fragments import Fragment
from pretrain.optimizers.update import Update

TINY = 1e-30
"""Added to squares, as published."""
EXPONENT = -0.8
CLIP_RMS = 1.0


class Adafactor:
    """Args: group keys by name; beta1; the least rms of a tensor; whether lr <= 1 / sqrt(step)."""

    masks = False
    part = ""

    def __init__(self, keys: Keys, beta1: float, floor: float, relative_step: bool) -> None:
        self.keys, self.beta1 = keys, beta1
        self.floor, self.relative_step = floor, relative_step
        self.slots: Mapping[str, str] = {"exp_avg": "zeros"} if beta1 else {}

    def begin(self, update: Update) -> None:
        """One vector for all factors; where each tensor's rows and columns lie in it."""
        logical = update.logical
        made = {name: key.lr_scale for name, key in self.keys.items()}
        self.grown = logical.vector(made)
        self.elders = elders(logical, self.keys)
        self.places: dict[str, tuple[int, int]] = {}
        counts, end = [], 0
        for name in logical.names:
            size = logical.shapes[name]
            self.places[name] = end, end + size[0]
            counts += [(size[0], size[1] if len(size) == 2 else 1)]
            counts += [(size[1], size[0])] if len(size) == 2 else []
            end += sum(size)
        lengths = torch.tensor([length for length, _ in counts])
        divisors = torch.tensor([float(count) for _, count in counts])
        self.divisor = divisors.repeat_interleave(lengths).to(logical.device)
        self.factors = torch.zeros(end, device=logical.device)
        group_of = {name: i for i, group in enumerate(update.groups) for name in group["names"]}
        whose = torch.tensor([group_of[name] for name in logical.names])
        sizes = torch.tensor([sum(logical.shapes[name]) for name in logical.names])
        self.group_of_tensor = whose.to(logical.device)
        self.group_of_factor = whose.repeat_interleave(sizes).to(logical.device)
        for name in logical.names:
            rows, columns = self._factors(self.factors, name, logical.shapes[name])
            if columns is None:
                update.whole[f"optim/exp_avg_sq/{name}"] = rows
            else:
                update.whole[f"optim/exp_avg_sq_row/{name}"] = rows
                update.whole[f"optim/exp_avg_sq_col/{name}"] = columns

    def _factors(
        self, of: Tensor, name: str, size: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        row, column = self.places[name]
        rows = of[row : row + size[0]]
        return rows, of[column : column + size[1]] if len(size) == 2 else None

    def apply(self, update: Update, grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """Factors, directions, the change."""
        logical = update.logical
        sums = torch.zeros_like(self.factors)
        for f, part in zip(logical.fragments, logical.parts, strict=True):
            rows, columns = self._local(update, sums, f)
            square = _padded(f.view(grads[f.flat]).square(), f.start, len(rows), columns)
            rows.add_(square.sum(1).to(rows.device), alpha=part)
            if columns is not None:
                columns.add_(square.sum(0).to(rows.device), alpha=part)
        (sums,) = logical.reduced(sums)
        steps = [update.state[update.flat_of[id(group)]]["step"] for group in update.groups]
        step = torch.stack([s.to(logical.device) for s in steps])
        rate = step.double() ** EXPONENT
        mean = sums.div_(self.divisor).add_(TINY)
        self.factors.lerp_(mean, rate[self.group_of_factor].float())
        for f in logical.fragments:
            f.view(grads[f.flat]).mul_(self._root(update, f).to(f.flat.device))
        weight, change = logical.reduced(
            logical.squares(lambda f: f.view(f.flat)),
            logical.squares(lambda f: f.view(grads[f.flat])),
        )
        size = rms(logical, weight, self.floor * self.grown, self.elders)
        size /= rms(logical, change, CLIP_RMS) / CLIP_RMS
        self._move(update, grads, size, step.double()[self.group_of_tensor])

    def _move(
        self, update: Update, grads: dict[Tensor, Tensor], size: Tensor, step: Tensor
    ) -> None:
        logical = update.logical
        for group, flats in update.by_group():
            for flat in flats:
                flat.mul_(1 - group["lr"] * group["weight_decay"])
        for f in logical.fragments:
            lr, number = lr_of(update.group_of[f.flat]), logical.number[f.name]
            rate = size[number] * lr
            if self.relative_step:
                rate = size[number] * torch.clamp(step[number].rsqrt(), max=lr)
            change = f.view(grads[f.flat]).mul_(rate.float().to(f.flat.device))
            if self.beta1:
                kept = f.view(update.state[f.flat]["exp_avg"])
                change = kept.lerp_(change, 1 - self.beta1)
            f.view(f.flat).sub_(change)

    def _local(self, update: Update, of: Tensor, f: Fragment) -> tuple[Tensor, Tensor | None]:
        """The rows that a fragment touches and its columns, in a vector laid out like factors."""
        logical, mesh = update.logical, update.logical.mesh
        rows, columns = self._factors(of, f.name, logical.shapes[f.name])
        local, cut = logical.local[f.name], split_dim(logical.tables[f.name])
        width = local[1] if len(local) == 2 else 1
        if cut == 0:
            rows = rows[mesh.tensor_rank * local[0] :]
        if cut == 1 and columns is not None:
            columns = columns[mesh.tensor_rank * width :][:width]
        return rows[f.start // width : (f.start + f.length - 1) // width + 1], columns

    def _root(self, update: Update, f: Fragment) -> Tensor:
        """1 / sqrt(second moment) of a fragment's values."""
        rows, columns = self._local(update, self.factors, f)
        if columns is None:
            return rows.rsqrt()
        whole, _ = self._factors(self.factors, f.name, update.logical.shapes[f.name])
        roots = ((rows / whole.mean())[:, None] * columns).rsqrt_().view(-1)
        return roots.narrow(0, f.start % len(columns), f.length)


def _padded(values: Tensor, start: int, rows: int, columns: Tensor | None) -> Tensor:
    """A range of a matrix as its rows, [rows, columns]; 0 where the range does not reach."""
    width = 1 if columns is None else len(columns)
    if start % width == 0 and len(values) == rows * width:
        return values.view(rows, width)
    made = values.new_zeros(rows * width)
    made.narrow(0, start % width, len(values)).copy_(values)
    return made.view(rows, width)
