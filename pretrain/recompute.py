"""Recompute: keep less of the forward, run parts of it again in the backward.

    none       everything is kept
    full       a block keeps its input only
    sublayer   attention and FFN each keep their input only (bert4keras; kexue.fm/archives/7367)

Applied from outside: a block is any module with `self_sublayer` and `ffn_sublayer`. Parameter
names, values and the random numbers of dropout stay, so the loss is the same to the last bit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "full", "sublayer"]
SUBLAYERS = ("self_sublayer", "cross_sublayer", "ffn_sublayer")


def apply(model: nn.Module, how: str) -> nn.Module:
    """Make the blocks of a model recompute `how`: none, full or sublayer; again to change it."""
    if how not in ("none", "full", "sublayer"):
        raise ValueError(
            f"recompute: is {how!r}, must be none, full or sublayer; set `recompute` "
            "(重计算方式只能是 none, full 或 sublayer)"
        )
    wrapped = {"none": (), "full": ("forward",), "sublayer": SUBLAYERS}[how]
    for block in model.modules():
        if not all(hasattr(block, name) for name in ("self_sublayer", "ffn_sublayer")):
            continue
        for name in ("forward", *SUBLAYERS):
            block.__dict__.pop(name, None)
            if name in wrapped and hasattr(block, name):
                # A partial of the class's function: a deep copy of the model binds to the copy.
                block.__dict__[name] = partial(_again, getattr(type(block), name), block)
    return model


def _again(function: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(block, *args, **kwargs)
    return checkpoint(function, block, *args, use_reentrant=False, **kwargs)
