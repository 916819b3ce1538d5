"""Parameter groups, optimizers and learning-rate schedules.

    table of tensors + born + scales --groups()--> groups of names that are updated alike
                                     --build()---> a torch optimizer (DeepSpeed's client optimizer)
    step --schedule()--> lr --set_lr()--> each group's lr x lr_scale

A group is keyed by everything that may make two tensors differ in their update. `born` is the
number of updates the run had made when a tensor came into being (growth adds tensors later): Adam's
bias correction counts from there. At first all scales are 1; growth only sets numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.model import ModelConfig, tensors


@dataclass(frozen=True, order=True)
class GroupKey:
    """What tensors of one group share."""

    decay: bool
    """Weight decay applies."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""
    wd_scale: float = 1.0
    """Factor on the weight decay."""
    eps_scale: float = 1.0
    """Factor on Adam's epsilon."""
    clip_weight: float = 1.0
    """Weight of the squared gradient in the global norm; only 1 is built."""
    born: int = 0
    """Updates made before the tensor came into being."""


@dataclass(frozen=True)
class Group:
    """Tensors that are updated alike."""

    key: GroupKey
    names: tuple[str, ...]


@dataclass(frozen=True)
class Scales:
    """A tensor's own factors; growth sets them."""

    lr: float = 1.0
    wd: float = 1.0
    eps: float = 1.0
    clip: float = 1.0


def recorded(scales: Mapping[str, Mapping[str, float]] | None) -> dict[str, Scales]:
    """The factors that a record keeps by tensor name, but for the clip weight, which is not built:
    a tensor that became copies weighs in the global norm as what it is now."""
    return {
        name: Scales(lr=given["lr"], wd=given["wd"], eps=given["eps"])
        for name, given in (scales or {}).items()
    }


def groups(
    config: ModelConfig,
    born: Mapping[str, int] | None = None,
    scales: Mapping[str, Scales] | None = None,
) -> list[Group]:
    """Groups of tensor names, decayed ones first, names in the table's order.

    The order is a function of the arguments alone, hence the same on every rank.
    """
    born, scales = born or {}, scales or {}
    members: dict[GroupKey, list[str]] = {}
    for tensor in tensors(config):
        scale = scales.get(tensor.name, Scales())
        assert scale.clip == 1.0, f"{tensor.name}: a clip weight of {scale.clip} is not built"
        key = GroupKey(
            tensor.decay, scale.lr, scale.wd, scale.eps, scale.clip, born.get(tensor.name, 0)
        )
        members.setdefault(key, []).append(tensor.name)
    ordered = sorted(members.items(), key=lambda item: (not item[0].decay, item[0]))
    return [Group(key, tuple(names)) for key, names in ordered]


def build(
    groups: Sequence[Group], parameters: Mapping[str, nn.Parameter], section: Any
) -> torch.optim.Optimizer:
    """The optimizer that `section.name` names, over parameters by name.

    Fused kernels of torch on every device; nothing is compiled. Adam: Kingma and Ba 2015; decoupled
    decay: Loshchilov and Hutter 2019.
    """
    assert section.name == "adamw", f"optimizer.name: {section.name} is not built"
    made = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": section.lr * group.key.lr_scale,
            "lr_scale": group.key.lr_scale,
            "eps": section.eps * group.key.eps_scale,
            "weight_decay": section.weight_decay * group.key.wd_scale if group.key.decay else 0.0,
            "born": group.key.born,
        }
        for group in groups
    ]
    return torch.optim.AdamW(made, betas=(section.beta1, section.beta2), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate for the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def fill_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, Any]:
    """Make Adam's state of one (flat) tensor exist, as the optimizer itself would lazily."""
    state: dict[str, Any] = optimizer.state[tensor]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        for slot in SLOTS["adamw"]:
            state[slot] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state


SLOTS = {"adamw": ("exp_avg", "exp_avg_sq")}
"""Moments by optimizer: one value for each value of the weight."""


def schedule(step: int, section: Any, lr: float, steps: int) -> float:
    """The learning rate of an update.

    Args:
        step: updates before this one; the first update is step 0.
        section: name (wsd, cosine, constant), warmup_steps, decay_steps, decay, min_ratio.
        lr: the peak.
        steps: updates of the whole run; the last one (step = steps - 1) has lr x min_ratio.

    Returns lr x (step + 1) / warmup_steps while it warms up. wsd (Hu et al. 2024, MiniCPM; the
    1 - sqrt shape: Haegele et al. 2024) stays at the peak until decay_steps before the end; cosine
    (Loshchilov and Hutter 2017) falls from the end of the warm-up.
    """
    if step < section.warmup_steps:
        return float(lr * (step + 1) / section.warmup_steps)
    if section.name == "cosine":
        part = _progress(step, section.warmup_steps, steps)
        falling = 0.5 * (1 + math.cos(math.pi * part))
    elif section.name == "wsd" and section.decay_steps:
        part = _progress(step, max(section.warmup_steps, steps - section.decay_steps), steps)
        falling = 1 - math.sqrt(part) if section.decay == "sqrt" else 1 - part
    else:
        return float(lr)
    return float(lr * (section.min_ratio + (1 - section.min_ratio) * falling))


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from `start` (exclusive) to the last step before `end` (inclusive)."""
    return min(1.0, max(0.0, (step + 1 - start) / max(1, end - start)))
