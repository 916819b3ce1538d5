r"""Adam's family: adamw, and two that scale its step by what a whole tensor is.

    m, v --> d = m / (sqrt(v) + eps), bias-corrected
    adamw       w <- (1 - lr wd) w - lr d                          Loshchilov and Hutter 2019
    rms_adamw   w <- (1 - lr wd) w - lr max(floor, rms(w)) d       nanoT5 (Nawrot 2023)
    lamb        u = d + wd w,  w <- w - lr (|w| / |u|) u           You et al. 2020, bert4keras

|w|, |u| and rms(w) are those of the logical tensor, whatever range of it a rank holds: all norms of
an update travel in one message. Where |w| or |u| is 0, lamb's ratio is 1.

Growth (GROWTH of record 4.1): a tensor that became a x itself has lr x a, decay / a. A rule that
scales by |w| has the factor a already, so it takes a out of lr again. A tensor that growth added
begins near zero, and a rule that scales by |w| would keep it there (lamb: 5 % of the needed norm
after 400 steps, measured for the record): its size counts as at least the mean of the older tensors
of its kind, until it has grown past it, under lamb, rms_adamw and adafactor.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.optimizers.fragments import Logical
from pretrain.optimizers.groups import GroupKey
from pretrain.optimizers.update import Update

Keys = Mapping[str, GroupKey]
MOMENTS = {"exp_avg": "zeros", "exp_avg_sq": "zeros"}


class AdamW:
    """torch's fused AdamW."""

    slots: Mapping[str, str] = MOMENTS
    masks = True
    part = ""

    def begin(self, update: Update) -> None:
        """Nothing depends on the layout."""

    def apply(self, update: Update, grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """One fused kernel for each group."""
        for group, flats in update.by_group():
            states = [update.state[flat] for flat in flats]
            torch._fused_adamw_(
                flats,
                [grads[flat] for flat in flats],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=None if sick is None else sick.to(flats[0].device),
            )


class RmsAdamW:
    """AdamW whose step is as large as the tensor that it changes."""

    slots: Mapping[str, str] = MOMENTS
    masks = False
    part = ""

    def __init__(self, keys: Keys, floor: float) -> None:
        self.keys, self.floor = keys, floor

    def begin(self, update: Update) -> None:
        """A tensor that growth made a x itself has a floor of a x the others'."""
        made = {name: key.lr_scale for name, key in self.keys.items()}
        self.grown = update.logical.vector(made)
        self.elders = elders(update.logical, self.keys)

    def apply(self, update: Update, grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """Directions, the tensors' root mean squares, the change."""
        logical = update.logical
        directions(update, grads, bias_correction=True, decay=False)
        (squares,) = logical.reduced(logical.squares(lambda f: f.view(f.flat)))
        size = rms(logical, squares, self.floor * self.grown, self.elders)
        for group, flats in update.by_group():
            for flat in flats:
                flat.mul_(1 - group["lr"] * group["weight_decay"])
        move(update, grads, size)


class Lamb:
    """Every tensor moves by lr times its own norm.

    Args:
        keys: group key by tensor name.
        bias_correction: as the paper; RoFormer v2 and bert4keras' LAMB go without.
        adapt: all, or only tensors that decay.
    """

    slots: Mapping[str, str] = MOMENTS
    masks = False
    part = ""

    def __init__(self, keys: Keys, bias_correction: bool, adapt: str) -> None:
        self.keys, self.bias_correction, self.adapt = keys, bias_correction, adapt

    def begin(self, update: Update) -> None:
        """What is adapted, and whose norm stands for a young tensor's."""
        logical = update.logical
        every = self.adapt == "all"
        adapted = {name: float(every or key.decay) for name, key in self.keys.items()}
        self.adapted = logical.vector(adapted) > 0
        self.elders = elders(logical, self.keys)

    def apply(self, update: Update, grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """Directions with decay, both norms in one message, the change."""
        logical = update.logical
        directions(update, grads, bias_correction=self.bias_correction, decay=True)
        weight, change = logical.reduced(
            logical.squares(lambda f: f.view(f.flat)),
            logical.squares(lambda f: f.view(grads[f.flat])),
        )
        weight, change = weight.sqrt(), change.sqrt()
        if self.elders is not None:
            weight = torch.maximum(weight, self.elders @ weight)
        usable = (weight > 0) & (change > 0) & self.adapted
        ratio = weight / change.clamp(min=1e-300)
        move(update, grads, torch.where(usable, ratio, update.growth_lr()))


def directions(
    update: Update, grads: dict[Tensor, Tensor], *, bias_correction: bool, decay: bool
) -> None:
    """Adam's moments take the gradients in, which become m / (sqrt(v) + eps), plus wd x weight."""
    for group, flats in update.by_group():
        beta1, beta2 = group["betas"]
        for flat in flats:
            state, grad = update.state[flat], grads[flat]
            m, v = state["exp_avg"], state["exp_avg_sq"]
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            torch.sqrt(v, out=grad)
            if bias_correction:
                step = state["step"].double()
                grad.div_((1 - beta2**step).sqrt())
            grad.add_(group["eps"])
            torch.div(m, grad, out=grad)
            if bias_correction:
                grad.div_(1 - beta1**step)
            if decay and group["weight_decay"]:
                grad.add_(flat.detach(), alpha=group["weight_decay"])


def move(update: Update, grads: dict[Tensor, Tensor], factors: Tensor) -> None:
    """weight <- weight - lr x factor of its tensor x direction; factors: [tensors].

    The lr is that of the layer, without growth's factor: a rule that scales by the weights has it.
    """
    logical = update.logical
    for f, factor in zip(logical.fragments, logical.each(factors), strict=True):
        lr = lr_of(update.group_of[f.flat])
        f.view(f.flat).addcmul_(f.view(grads[f.flat]), factor, value=-lr)


def lr_of(group: Mapping[str, Any]) -> float:
    """A group's learning rate without growth's factor; 0 where it is frozen."""
    scale = group["lr_scale"]
    return float(group["lr"] / scale * group["layer_scale"]) if scale else 0.0


def rms(
    logical: Logical, squares: Tensor, floor: Tensor | float, elders: Tensor | None = None
) -> Tensor:
    """Root mean square by tensor, at least `floor`, a young one's at least that of its elders."""
    found = (squares / logical.sizes).sqrt()
    if elders is not None:
        found = torch.maximum(found, elders @ found)
    return torch.maximum(found, torch.as_tensor(floor, dtype=found.dtype, device=found.device))


def elders(logical: Logical, keys: Mapping[str, Any]) -> Tensor | None:
    """[tensors, tensors]: times the norms, the mean norm of the older tensors of a tensor's kind.

    0 where there is none; None if no tensor is younger than another of its kind. A kind is a name
    without the number of its layer.
    """
    kinds = {name: re.sub(r"\.layers\.\d+\.", ".layers.*.", name) for name in logical.names}
    found = torch.zeros(len(kinds), len(kinds), dtype=torch.float64)
    for i, name in enumerate(logical.names):
        older = [
            j
            for j, other in enumerate(logical.names)
            if kinds[other] == kinds[name] and keys[other].born < keys[name].born
        ]
        found[i, older] = 1.0 / max(1, len(older))
    return found.to(logical.device) if bool(found.any()) else None
