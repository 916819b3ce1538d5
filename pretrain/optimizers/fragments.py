"""Logical tensors out of the ranges that ranks hold: sums over each of them, in one message.

    rank 0   flat [ q.weight ......... | k.weight ...        a Fragment is a range of one tensor in
    rank 1   flat      ... k.weight | v.weight ......... ]   one flat fp32 tensor of this rank

    squares() --> float64 [tensors], this rank's part --reduced()--> the same, of whole tensors

ZeRO and tensor parallelism leave ranges of a tensor on several ranks, plain data parallelism and
replicated tensors leave whole copies: what several ranks hold counts with the inverse of how many
do. So a norm is right on every layout, and is one number a tensor on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from configs.model import ModelConfig, local_shape, shape, split_dim, tensors
from pretrain.parallel import Mesh

ROW = 16384
"""Values summed in fp32 at a time; the CPU's norm of 2e7 values in one go is off by 1e-3."""


@dataclass(frozen=True)
class Fragment:
    """A range of a local parameter that this rank holds."""

    name: str
    start: int
    """First value, in the flat order of the local parameter."""
    length: int
    flat: Tensor
    """The flat fp32 tensor that holds it, a key of the optimizer's state ..."""
    offset: int
    """... from here on."""
    copies: int
    """How many data-parallel ranks hold this very range: ZeRO 0 replicates."""

    def view(self, of: Tensor) -> Tensor:
        """Its values in a tensor laid out like `flat`: the master itself or a moment."""
        return of.detach().view(-1).narrow(0, self.offset, self.length)


class Logical:
    """The logical tensors of a model, as far as this rank holds them.

    Args:
        fragments: all that this rank holds.
        config, mesh: what the tensors are and how they are cut.
    """

    def __init__(self, fragments: Sequence[Fragment], config: ModelConfig, mesh: Mesh) -> None:
        self.fragments, self.mesh = list(fragments), mesh
        self.tables = {t.name: t for t in tensors(config)}
        self.names = list(self.tables)
        self.number = {name: i for i, name in enumerate(self.names)}
        self.shapes = {t.name: shape(config, t) for t in tensors(config)}
        self.local = {t.name: local_shape(config, t, mesh.tensor) for t in tensors(config)}
        self.device = mesh.device
        holders = [
            f.copies * (mesh.tensor if split_dim(self.tables[f.name]) is None else 1)
            for f in self.fragments
        ]
        self.alone = all(many == mesh.world for many in holders)
        """Every rank holds all: nothing has to travel."""
        self.parts = [1.0 if self.alone else 1.0 / many for many in holders]
        """How much of each fragment counts here."""
        self.part = torch.tensor(self.parts, dtype=torch.float64, device=self.device)
        at = [self.number[f.name] for f in self.fragments]
        self.at = torch.tensor(at, device=self.device)
        sizes = [float(torch.Size(self.shapes[name]).numel()) for name in self.names]
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device=self.device)

    def vector(self, values: Mapping[str, float], default: float = 1.0) -> Tensor:
        """float64 [tensors] of a number by name."""
        found = [float(values.get(name, default)) for name in self.names]
        return torch.tensor(found, dtype=torch.float64, device=self.device)

    def squares(self, values: Callable[[Fragment], Tensor]) -> Tensor:
        """This rank's part of the sum of squares of each logical tensor, float64 [tensors]."""
        found = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        if not self.fragments:
            return found
        each = squares_of([values(f) for f in self.fragments]).to(self.device)
        return found.index_add_(0, self.at, each * self.part)

    def reduced(self, *parts: Tensor) -> list[Tensor]:
        """The ranks' parts added up, in one message whatever their number."""
        if self.alone:
            return list(parts)
        together = torch.cat([part.reshape(-1).to(self.device) for part in parts])
        dist.all_reduce(together)
        return [
            piece.view(part.shape).to(part.device)
            for piece, part in zip(
                together.split([part.numel() for part in parts]), parts, strict=True
            )
        ]

    def each(self, vector: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """A number by tensor as a 0-d tensor for each fragment, beside its flat."""
        found = vector[self.at].to(dtype)
        return [
            value if value.device == f.flat.device else value.to(f.flat.device)
            for value, f in zip(found.unbind(), self.fragments, strict=True)
        ]


def squares_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of squares of each tensor, float64; accurate for any length, without waiting."""
    if values[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(values))).double().square()
    return torch.stack([_squares(value) for value in values])


def _squares(value: Tensor) -> Tensor:
    whole = value.numel() // ROW * ROW
    found = torch.linalg.vector_norm(value[whole:]).double().square()
    if whole:
        rows = value[:whole].view(-1, ROW)
        found += torch.linalg.vector_norm(rows, dim=1).double().square().sum()
    return found
