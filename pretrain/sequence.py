"""Rows shared by several devices: sequence parallelism as DeepSpeed-Ulysses does it.

    rank 0 holds tokens [0, T/2)   q k v [B, T/2, N, H] --all-to-all--> [B, T, N/2, H]
    rank 1 holds tokens [T/2, T)                                             | attention
                                   out   [B, T/2, N, H] <--all-to-all-- [B, T, N/2, H]

Everything but attention looks at a token alone, so that a rank computes it for its own tokens. In
attention a rank has all tokens of a row and some of the heads, so who sees whom, positions, biases
and the fused kernels stay what they are. Batches arrive whole and alike on all ranks of a group;
Engine takes a rank's tokens of them (Batch.part). Weights are whole on every rank of a group: to
ZeRO a group's ranks are data-parallel ones, whose gradients add up to that of the rows.

The exchange is torch's all_to_all_single, which NCCL and gloo have: DeepSpeed's own
(deepspeed.sequence.layer) asks for the same, but takes one tensor at a time; here a layer's
queries, keys and values travel as one. Source: Jacobs et al. 2023, "DeepSpeed Ulysses".

Random numbers: each rank of a group draws its own dropout (Engine seeds it so), for its tokens and,
in attention, for its heads.

Legend: P ranks of a group, B rows, T tokens of a row, t = T / P, N heads, n = N / P, H head_dim.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.models.layers import Attention, Visibility
from pretrain.models.part import Part
from pretrain.parallel import Mesh


class Slice(Part):
    """The tokens and heads of one rank of a group."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.ranks, self.group = mesh.sequence_rank, mesh.sequence, mesh.sequence_group
        self.off = False
        """For now every rank computes whole rows, as if it were alone."""

    def tokens(self, x_BT: Tensor) -> Tensor:
        """Of values [B, T, ...] those of this rank's tokens, as a copy: the rest can be freed."""
        return x_BT if self.off else x_BT.chunk(self.ranks, 1)[self.rank].contiguous()

    def heads(self, count: int) -> slice:
        """This rank's heads of `count`."""
        if self.off:
            return slice(0, count)
        share = count // self.ranks
        return slice(self.rank * share, (self.rank + 1) * share)

    def over_all_tokens(self, attention: Attention) -> Attention:
        """Attention whose queries, keys and values are of this rank's tokens, as is what it gives;
        within, it is of all tokens and this rank's heads."""

        @functools.wraps(attention)
        def exchanged(
            q_BtNH: Tensor, k_BsNH: Tensor, v_BsNH: Tensor, see: Visibility, *numbers: float
        ) -> Tensor:
            if self.off:
                return attention(q_BtNH, k_BsNH, v_BsNH, see, *numbers)
            if q_BtNH.shape[1] == k_BsNH.shape[1]:
                q_BTnH, k_BSnH, v_BSnH = self._all_tokens(q_BtNH, k_BsNH, v_BsNH)
            else:
                (q_BTnH,), (k_BSnH, v_BSnH) = (
                    self._all_tokens(q_BtNH),
                    self._all_tokens(k_BsNH, v_BsNH),
                )
            return self._all_heads(attention(q_BTnH, k_BSnH, v_BSnH, see, *numbers))

        return exchanged

    def _all_tokens(self, *parts_BtNH: Tensor) -> tuple[Tensor, ...]:
        """[B, t, N, H] each -> [B, T, n, H], in one message."""
        widths = [part.shape[-1] for part in parts_BtNH]
        x_BtNH = parts_BtNH[0] if len(parts_BtNH) == 1 else torch.cat(parts_BtNH, -1)
        x_PBtnH = x_BtNH.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4)
        x_PBtnH = _exchanged(x_PBtnH, self.group)
        return tuple(x_PBtnH.permute(1, 0, 2, 3, 4).flatten(1, 2).split(widths, -1))

    def _all_heads(self, x_BTnH: Tensor) -> Tensor:
        """[B, T, n, H] -> [B, t, N, H]"""
        x_PBtnH = x_BTnH.unflatten(1, (self.ranks, -1)).permute(1, 0, 2, 3, 4)
        return _exchanged(x_PBtnH, self.group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def share(model: nn.Module, mesh: Mesh) -> None:
    """Make a model that parallel.shard() has cut work on this rank's tokens; nothing for one rank.

    It then takes tokens of this rank, positions and document ids of whole rows, and gives hidden
    states of this rank's tokens.
    """
    if mesh.sequence == 1:
        return
    part = Slice(mesh)
    assert isinstance(getattr(model, "part", None), Part), f"{type(model).__name__}: has no part"
    model.part = part  # type: ignore[assignment]
    for module in model.modules():
        if callable(attention := vars(module).get("attention")):
            vars(module)["attention"] = part.over_all_tokens(attention)


@contextlib.contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """Inside, every rank computes whole rows by itself: texts that are written fit no slices."""
    part = getattr(model, "part", None)
    if not isinstance(part, Slice):
        yield
        return
    part.off = True
    try:
        yield
    finally:
        part.off = False


class _Exchange(torch.autograd.Function):
    """x [P, ...] -> y [P, ...]: what this rank has for rank p goes there; its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        y = torch.empty_like(x)
        dist.all_to_all_single(y, x, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        back: Tensor = _Exchange.apply(gradient, ctx.group)
        return back, None


def _exchanged(x: Tensor, group: Any) -> Tensor:
    y: Tensor = _Exchange.apply(x, group)
    return y
