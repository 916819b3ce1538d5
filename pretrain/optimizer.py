"""What a run's `optimizer` section names, built.

    table of tensors + born + scales --groups()--> groups of names that are updated alike
                                     --build()---> Update: DeepSpeed's client optimizer
    step --schedule()--> lr --set_lr()--> each group's lr x lr_scale x layer_scale

The rules are in pretrain/optimizers/, the learning rate in pretrain/schedules.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pretrain.optimizers.adafactor import Adafactor
from pretrain.optimizers.adam import AdamW, Lamb, RmsAdamW
from pretrain.optimizers.averages import Ema, Lookahead
from pretrain.optimizers.groups import Group, GroupKey, Scales, groups, recorded
from pretrain.optimizers.muon import Muon
from pretrain.optimizers.rows import LazyRows
from pretrain.optimizers.update import Rule, Update

__all__ = ["Group", "GroupKey", "Scales", "build", "groups", "recorded", "set_lr"]


def build(groups: Sequence[Group], parameters: Mapping[str, nn.Parameter], section: Any) -> Update:
    """The optimizer that `section` (configs.optimizers.Optimizer) describes.

    Nothing is compiled; where torch has a fused kernel, it is used.
    """
    made = [
        {
            "params": [parameters[name] for name in group.names],
            "lr": section.lr * group.key.lr_scale * group.key.layer_scale,
            "lr_scale": group.key.lr_scale * group.key.layer_scale,
            "layer_scale": group.key.layer_scale,
            "names": group.names,
            "betas": (section.beta1, section.beta2),
            "eps": section.eps * group.key.eps_scale,
            "weight_decay": section.weight_decay * group.key.wd_scale if group.key.decay else 0.0,
            "born": group.key.born,
            "part": group.key.part,
        }
        for group in groups
    ]
    keys = {name: group.key for group in groups for name in group.names}
    weights = {name: key.clip_weight for name, key in keys.items()}
    return Update(made, _rules(section, keys), section.clip_norm, weights)


def _rules(section: Any, keys: Mapping[str, GroupKey]) -> list[Rule]:
    """What changes the weights, and what looks at them afterwards."""
    floor = section.rms_floor
    rules: list[Rule] = []
    if section.name == "lamb":
        rules.append(Lamb(keys, section.bias_correction, section.adapt))
    elif section.name == "rms_adamw":
        rules.append(RmsAdamW(keys, floor))
    elif section.name == "adafactor":
        rules.append(Adafactor(keys, section.beta1, floor, section.relative_step))
    else:
        rules.append(AdamW())
    if section.name == "muon":
        rules.append(Muon(section.momentum, section.muon_scale))
    if section.lazy_rows:
        rules.append(LazyRows())
    if section.lookahead_every:
        rules.append(Lookahead(section.lookahead_every, section.lookahead_share))
    return [*rules, Ema(section.ema)] if section.ema else rules


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate for the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
