"""Parameter groups: which tensors are updated alike.

    table of tensors + born + scales + section --groups()--> [Group(key, names)]

A group is keyed by everything that may make two tensors differ in their update. `born` is the
number of updates the run had made when a tensor came into being (growth adds tensors later): Adam's
bias correction counts from there. At first all scales are 1; growth only sets numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.model import ModelConfig, Tensor, tensors
from configs.optimizers import orthogonalised


@dataclass(frozen=True, order=True)
class GroupKey:
    """What tensors of one group share."""

    decay: bool
    """Weight decay applies."""
    lr_scale: float = 1.0
    """Growth's factor on the learning rate."""
    wd_scale: float = 1.0
    """Growth's factor on the weight decay."""
    eps_scale: float = 1.0
    """Growth's factor on Adam's epsilon."""
    clip_weight: float = 1.0
    """Weight of the squared gradient in the global norm."""
    born: int = 0
    """Updates made before the tensor came into being."""
    layer_scale: float = 1.0
    """Factor on the learning rate by depth (optimizer.layer_decay)."""
    part: str = ""
    """Who updates it where not all are updated by one rule: `matrix` (muon), `rows` (lazy)."""


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
    """The factors that a record keeps by tensor name."""
    return {
        name: Scales(lr=given["lr"], wd=given["wd"], eps=given["eps"], clip=given["clip"])
        for name, given in (scales or {}).items()
    }


def groups(
    config: ModelConfig,
    born: Mapping[str, int] | None = None,
    scales: Mapping[str, Scales] | None = None,
    section: Any = None,
) -> list[Group]:
    """Groups of tensor names, decayed ones first, names in the table's order.

    The order is a function of the arguments alone, hence the same on every rank. `section` is the
    run's optimizer section; without one every tensor is updated by one rule.
    """
    born, scales = born or {}, scales or {}
    members: dict[GroupKey, list[str]] = {}
    for tensor in tensors(config):
        scale = scales.get(tensor.name, Scales())
        key = GroupKey(
            tensor.decay if section is None or section.decay == "table" else True,
            scale.lr,
            scale.wd,
            scale.eps,
            scale.clip,
            born.get(tensor.name, 0),
            1.0 if section is None else section.layer_decay ** _height(config, tensor),
            "" if section is None else _part(tensor, section),
        )
        members.setdefault(key, []).append(tensor.name)
    ordered = sorted(members.items(), key=lambda item: (not item[0].decay, item[0]))
    return [Group(key, tuple(names)) for key, names in ordered]


def _height(config: ModelConfig, tensor: Tensor) -> int:
    """Layers above a tensor in its stack: 0 for what stands behind the last, all for embeddings."""
    if tensor.layer is not None:
        return config.layers - tensor.layer
    return config.layers + 1 if tensor.name.startswith("embed.") else 0


def _part(tensor: Tensor, section: Any) -> str:
    if section.name == "muon" and orthogonalised(tensor):
        return "matrix"
    if section.lazy_rows and tensor.op == "lookup" and tensor.tied_to is None:
        return "rows"
    return ""
