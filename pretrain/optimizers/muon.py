r"""Muon: momentum, orthogonalised, for the matrices of the layers (Jordan et al. 2024).

    M <- mu M + (1 - mu) g,   N = mu M + (1 - mu) g,   O = Newton-Schulz(N) ~ U V^T of N = U S V^T
    w <- (1 - lr wd) w - lr scale O      rms: 0.2 sqrt(max(out, in)), as long as AdamW's step
                                         (Liu et al. 2025); spectral: sqrt(out / in)

The momentum lies like the weights; O needs the whole matrix. Each has one owner: the rank that
holds most of it, in turn where several hold as much. What others hold of it travels to the owner
and their part of O back: two all-to-alls of fp32 values. Under ZeRO 1 and 2 only matrices that a
border of the partitions cuts travel, ranks - 1 at most in a group; under ZeRO 3 (ranks - 1) / ranks
of all values, each way; under ZeRO 0 nothing, every rank computes all. Tensor parallelism cuts
every matrix: parts then lie on the ranks of all data-parallel groups (ZeRO 0: of one), and all
but the owner's part travel. Newton-Schulz costs about 10 x rows x columns x min(rows, columns) x 2
FLOPs a matrix, shared by the owners.

A matrix tiled in n copies has the same O in n copies / sqrt(n); with the spectral length the grown
run then goes on as the small one at the same lr, whichever side was tiled (GROWTH of record 4.1).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.model import split_dim
from pretrain.optimizers.adam import lr_of
from pretrain.optimizers.fragments import Fragment, Logical
from pretrain.optimizers.update import Update

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic, steepest at 0 (Jordan et al.)."""
ITERATIONS = 5


class Muon:
    """Args: decay of the momentum; `rms` or `spectral` length of a step."""

    slots: Mapping[str, str] = {"momentum": "zeros"}
    part = "matrix"
    masks = False

    def __init__(self, momentum: float, scale: str) -> None:
        self.momentum, self.scale = momentum, scale

    def begin(self, update: Update) -> None:
        """Who owns which matrix, and which pieces travel."""
        logical = update.logical
        self.mine = {
            f.name: f for f in logical.fragments if update.group_of[f.flat]["part"] == self.part
        }
        held = [(f.name, _start(logical, f), f.length) for f in self.mine.values()]
        self.group, self.rank, self.ranks = _peers(logical)
        everyone: list[list[tuple[str, int, int]]] = [held]
        if self.ranks > 1:
            everyone = [[] for _ in range(self.ranks)]
            dist.all_gather_object(everyone, held, group=self.group)
        owner = owners(everyone, logical.names)
        self.owned = [name for name in logical.names if owner.get(name) == self.rank]
        self.sent = [
            [self.mine[name] for name, _, _ in held if owner[name] == rank != self.rank]
            for rank in range(self.ranks)
        ]
        self.received = [
            [piece for piece in pieces if owner[piece[0]] == self.rank != rank]
            for rank, pieces in enumerate(everyone)
        ]

    def apply(self, update: Update, grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """Momentum, exchange, orthogonalise, exchange back, the change."""
        for flat, grad in grads.items():
            if update.group_of[flat]["part"] == self.part:
                momentum = update.state[flat]["momentum"]
                momentum.lerp_(grad, 1 - self.momentum)
                grad.lerp_(momentum, self.momentum)
        here = [f.view(grads[f.flat]) for pieces in self.sent for f in pieces]
        there = self._exchange(update, here, self._lengths_sent(), self._lengths_received())
        self._orthogonalise(update, grads, there)
        back = self._exchange(update, list(there), self._lengths_received(), self._lengths_sent())
        for values, piece in zip(here, back, strict=True):
            values.copy_(piece)
        for f in self.mine.values():
            group = update.group_of[f.flat]
            step = lr_of(group) * self._length(update.logical.shapes[f.name])
            f.view(f.flat).mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                f.view(grads[f.flat]), alpha=step
            )

    def _orthogonalise(
        self, update: Update, grads: dict[Tensor, Tensor], pieces: list[Tensor]
    ) -> None:
        """Every matrix that this rank owns, its pieces put together and taken apart again."""
        arrived: dict[str, list[tuple[int, Tensor]]] = {}
        told = [piece for each in self.received for piece in each]
        for (name, start, _), values in zip(told, pieces, strict=True):
            arrived.setdefault(name, []).append((start, values))
        for name in self.owned:
            f = self.mine[name]
            start = _start(update.logical, f)
            parts = [(start, f.view(grads[f.flat])), *arrived.get(name, [])]
            whole = parts[0][1]
            if len(parts) > 1:
                whole = torch.cat([values for _, values in sorted(parts, key=lambda p: p[0])])
            made = _cut(update.logical, name, orthogonal(_joined(update.logical, name, whole)))
            for start, values in parts:
                values.copy_(made.narrow(0, start, len(values)))

    def _exchange(
        self, update: Update, values: list[Tensor], sent: list[list[int]], wanted: list[list[int]]
    ) -> list[Tensor]:
        """One all-to-all: pieces by rank out, pieces by rank in."""
        if self.ranks == 1:
            return []
        device = update.logical.device
        out = torch.cat([torch.zeros(0, device=device), *(v.to(device) for v in values)])
        into = out.new_empty(sum(map(sum, wanted)))
        dist.all_to_all_single(
            into,
            out,
            [sum(lengths) for lengths in wanted],
            [sum(lengths) for lengths in sent],
            group=self.group,
        )
        return list(into.split([length for lengths in wanted for length in lengths]))

    def _lengths_sent(self) -> list[list[int]]:
        return [[f.length for f in pieces] for pieces in self.sent]

    def _lengths_received(self) -> list[list[int]]:
        return [[length for _, _, length in pieces] for pieces in self.received]

    def _length(self, size: tuple[int, ...]) -> float:
        if self.scale == "spectral":
            return math.sqrt(size[0] / size[1])
        return 0.2 * math.sqrt(max(size))


def _peers(logical: Logical) -> tuple[Any, int, int]:
    """(group, rank in it, ranks) of those that hold parts of the matrices that this rank holds."""
    mesh = logical.mesh
    if logical.alone:
        return None, 0, 1
    if mesh.tensor == 1:
        return mesh.data_group, mesh.data_rank, mesh.data
    if all(f.copies == mesh.data for f in logical.fragments):
        return mesh.tensor_group, mesh.tensor_rank, mesh.tensor
    return None, mesh.rank, mesh.world


def _start(logical: Logical, f: Fragment) -> int:
    """Where a fragment begins in the parts of its matrix, those of the tensor ranks in turn."""
    mesh = logical.mesh
    if mesh.tensor == 1:
        return f.start
    assert split_dim(logical.tables[f.name]) is not None, f"{f.name} is not cut"
    return mesh.tensor_rank * math.prod(logical.local[f.name]) + f.start


def _joined(logical: Logical, name: str, parts: Tensor) -> Tensor:
    """The matrix out of the parts of the tensor ranks, one behind the other."""
    if logical.mesh.tensor == 1 or split_dim(logical.tables[name]) == 0:
        return parts.view(logical.shapes[name])
    return torch.cat(list(parts.view(logical.mesh.tensor, *logical.local[name])), 1)


def _cut(logical: Logical, name: str, matrix: Tensor) -> Tensor:
    """The inverse."""
    if logical.mesh.tensor == 1 or split_dim(logical.tables[name]) == 0:
        return matrix.reshape(-1)
    return torch.stack(matrix.chunk(logical.mesh.tensor, 1)).reshape(-1)


def owners(everyone: list[list[tuple[str, int, int]]], names: list[str]) -> dict[str, int]:
    """The rank that orthogonalises each matrix: who holds most, then who owns least so far.

    everyone: (name, start, length) of every rank's pieces.
    """
    held: dict[str, dict[int, int]] = {}
    for rank, pieces in enumerate(everyone):
        for name, _, length in pieces:
            held.setdefault(name, {})[rank] = length
    load = [0] * len(everyone)
    found = {}
    for name in names:
        if name not in held:
            continue
        most = max(held[name].values())
        best = min((load[r], r) for r, length in held[name].items() if length == most)[1]
        found[name] = best
        load[best] += sum(held[name].values())
    return found


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T; in bf16 where there are tensor cores, fp32 on a CPU."""
    a, b, c = COEFFICIENTS
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
