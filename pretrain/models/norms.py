"""RMSNorm, with a gain (T5) or without (RoFormer v2).

Source: Zhang and Sennrich 2019. Legend: D hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), times a gain."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return rms_norm(x, self.eps, self.weight)


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the last dimension, times `weight` if there is one."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    scaled: Tensor = _RMSNorm.apply(x, eps)
    return scaled if weight is None else scaled * weight


class _RMSNorm(torch.autograd.Function):
    """PyTorch's own is made of many passes on a CPU: this takes a third of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(scaled := (x * inverse).to(x.dtype), inverse)
        return scaled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        scaled, inverse = ctx.saved_tensors
        along = (gradient * scaled).mean(-1, keepdim=True, dtype=inverse.dtype)
        return ((gradient - scaled * along) * inverse).to(gradient.dtype), None
