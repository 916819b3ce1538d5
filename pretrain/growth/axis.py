r"""One axis of a tensor made longer: where its old entries go, and what stands between them.

    [pre, old, post] --places, x factor--> [pre, new, post], the rest filled:

        zero       nobody listens yet, or nothing is said
        random     as large as the old entries: what computes something that nobody reads
        paired     the same in twos, alike (a writer) or opposite (a reader): what cancels itself
        mean       of the old ones along the axis, or of some of them
        copies     the old ones again: copies.py

A factored axis (heads x head_dim) is one dimension of the tensor; `pre` and `post` hold what lies
before and behind the axis. Nothing is computed before it is read, and one tensor at a time. What
needs rounding (a factor that is no power of two, a mean) is computed in float64 and stays so:
grow() rounds once, at the end of all operators.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import frexp, prod
from typing import Literal

import torch

from configs.model import ModelConfig, Tensor, axis_size, shape, tensors
from pretrain.growth.copies import Copies, zero_sum
from pretrain.growth.moments import power, rescaled, slots
from pretrain.mixing import Mixture, mixed
from pretrain.state import Entry, State, draw

How = Literal["zero", "random", "paired", "mean", "copies"]


@dataclass(frozen=True)
class Fill:
    """What a dimension's new entries are, and what the old ones are multiplied by."""

    how: How
    factor: float = 1.0
    copies: Copies | None = None
    """Of `copies`: which is whose."""
    divided: bool = False
    """Of `copies`: they have their share each (a reader), or are all the same (a writer). Of
    `paired`: they are opposite, or the same."""
    noise: float = 0.0
    """Of `copies`: zero-sum noise, as a share of what each has."""
    pieces: Mixture | None = None
    """Of `mean`: what the first of the new entries are the mean of, where not of all."""
    above: bool = False
    """Of `copies`: the new ones are those of the layer above (bert2BERT's AKI)."""

    def change(self) -> tuple[float, int]:
        """(amplitude, copies) of the exact rule; (1, 1) where the copies of entries differ."""
        if self.copies is None:
            return self.factor, 1
        times = self.copies.times
        if times is None:
            return 1.0, 1
        return self.factor / (times if self.divided else 1), times

    def weights(self) -> tuple[float, ...]:
        """What each copy is multiplied by."""
        assert self.copies is not None
        share = self.copies.share
        return tuple(self.factor * s if self.divided else self.factor for s in share)

    def of_gradient(self, power: int) -> "Fill":
        """How a moment that goes with the gradient's `power` follows."""
        if self.copies is None:
            how: How = "mean" if power == 2 else "zero"
            return Fill(how, self.factor**-power)
        share = (1.0,) * len(self.copies.of) if self.divided else self.copies.share
        parts = Copies(self.copies.old, self.copies.of, tuple(s**power for s in share))
        return Fill("copies", self.factor**-power, copies=parts, divided=True, above=self.above)


Rule = Callable[[Tensor, int], Fill]
"""(tensor, dimension that has the axis) -> how it grows."""


@dataclass(frozen=True)
class _Longer:
    """One dimension of one tensor, and how it grows."""

    size: tuple[int, ...]
    pre: int
    old: int
    new: int
    post: int
    places: tuple[int, ...]
    label: str
    seed: int


def longer(
    state: State,
    now: ModelConfig,
    to: ModelConfig,
    seed: int,
    axis: str,
    rule: Rule,
    places: Mapping[str, tuple[int, ...]] | None = None,
) -> State:
    """`state` with every `axis` as long as in `to`; moments, `scales` by moments.py.

    places: tensor name -> where its old entries go along the axis; without one, in front. Random
    entries are drawn from (seed, tensor, axis, both sizes), so that a model which grows twice with
    one seed does not get the same numbers twice.
    """
    old, new = axis_size(now, axis), axis_size(to, axis)
    entries, changes = dict(state.entries), {}
    for tensor in tensors(to):
        dims = [dim for dim, axes in enumerate((tensor.out, tensor.in_)) if axis in axes]
        if not dims:
            continue
        at = (places or {}).get(tensor.name, tuple(range(old)))
        fills = [rule(tensor, dim) for dim in dims]
        parts = [fill.change() for fill in fills]
        changes[tensor.name] = (prod(a for a, _ in parts), prod(n for _, n in parts))
        for kind in ("weights", *slots(state)):
            key, size = f"{kind}/{tensor.name}", shape(now, tensor)
            if key not in entries:
                continue
            for dim, fill in zip(dims, fills, strict=True):
                label = f"{tensor.name}.growth.{axis}.{dim}.{old}-{new}"
                cut = _cut(now, to, tensor, dim, axis, size, at, label, seed)
                above = state.entries.get(f"{kind}/{_above(tensor)}") if fill.above else None
                used = fill.of_gradient(power(kind)) if power(kind) else fill
                entries[key] = _grown(entries[key], cut, used, above)
                size = cut.size
    scales = rescaled(state.record.get("scales", {}), changes)
    return State(entries, {**state.record, "scales": scales} if scales else state.record)


def _above(tensor: Tensor) -> str:
    """The same tensor one layer up; none for what belongs to no layer."""
    if tensor.layer is None:
        return ""
    return tensor.name.replace(f".layers.{tensor.layer}.", f".layers.{tensor.layer + 1}.", 1)


def _cut(
    now: ModelConfig,
    to: ModelConfig,
    tensor: Tensor,
    dim: int,
    axis: str,
    size: tuple[int, ...],
    places: tuple[int, ...],
    label: str,
    seed: int,
) -> _Longer:
    axes = (tensor.out, tensor.in_)[dim]
    before, behind = axes[: axes.index(axis)], axes[axes.index(axis) + 1 :]
    new = axis_size(to, axis)
    lead = prod(axis_size(now, a) for a in before)
    tail = prod(axis_size(now, a) for a in behind)
    grown = (*size[:dim], lead * new * tail, *size[dim + 1 :])
    pre, post = prod(size[:dim]) * lead, tail * prod(size[dim + 1 :])
    return _Longer(grown, pre, axis_size(now, axis), new, post, places, label, seed)


def _grown(old: Entry, cut: _Longer, fill: Fill, above: Entry | None) -> Entry:
    if fill.copies is not None:
        return _copied(old, cut, fill, fill.copies, above)
    rounds = fill.how == "mean" or _inexact(fill.factor)
    dtype = "float64" if rounds else old.dtype

    def read() -> torch.Tensor:
        values = old.read().reshape(cut.pre, cut.old, cut.post)
        values = values.double() * fill.factor if rounds else values * fill.factor
        grown = values.new_zeros(cut.pre, cut.new, cut.post)
        places = torch.tensor(cut.places)
        rest = torch.ones(cut.new, dtype=torch.bool).index_fill_(0, places, False).nonzero()[:, 0]
        if cut.places == tuple(range(cut.old)):  # no index: half the memory
            grown[:, : cut.old], new = values, grown[:, cut.old :]
            new.copy_(_new(values, tuple(new.shape), cut, fill))
        else:
            grown[:, places] = values
            size = (cut.pre, len(rest), cut.post)
            grown[:, rest] = _new(values, size, cut, fill).expand(size).to(grown.dtype)
        return grown.view(cut.size)

    return Entry(cut.size, dtype, read)


def _copied(old: Entry, cut: _Longer, fill: Fill, copies: Copies, above: Entry | None) -> Entry:
    weights = fill.weights()
    rounds = fill.noise > 0 or any(_inexact(w) for w in set(weights))
    dtype = "float64" if rounds else old.dtype

    def read() -> torch.Tensor:
        values = old.read().reshape(cut.pre, cut.old, cut.post)
        values = values.double() if rounds else values
        grown = values.index_select(1, torch.tensor(copies.of))
        if above is not None:
            upper = above.read().reshape(values.shape).to(values.dtype)
            grown[:, cut.old :] = upper.index_select(1, torch.tensor(copies.of[cut.old :]))
        if set(weights) != {1.0}:
            grown *= torch.tensor(weights, dtype=grown.dtype)[:, None]
        if fill.noise:
            grown += zero_sum(f"{cut.label}.noise", cut.seed, values, copies, fill.noise)
        return grown.view(cut.size)

    return Entry(cut.size, dtype, read)


def _inexact(factor: float) -> bool:
    """Whether a float32 times this needs rounding."""
    return abs(frexp(factor)[0]) != 0.5


def _new(values: torch.Tensor, size: tuple[int, ...], cut: _Longer, fill: Fill) -> torch.Tensor:
    if fill.how == "mean":
        mean = values.mean(1, keepdim=True)
        if fill.pieces is None:
            return mean
        grown = mean.repeat(1, size[1], 1)
        grown[0, : len(fill.pieces.rows)] = mixed(values[0], fill.pieces)
        return grown
    if fill.how == "paired":
        first = _new(values, (size[0], (size[1] + 1) // 2, size[2]), cut, Fill("random"))
        grown = first.expand(size[0], (size[1] + 1) // 2, size[2]).repeat_interleave(2, 1)
        if fill.divided:
            grown[:, 1::2] *= -1
            grown[:, size[1] // 2 * 2 :] = 0.0  # one without a twin is not read
        return grown[:, : size[1]]
    if fill.how == "random":
        # in float64, so that the float32 that is drawn from it does not depend on the thread count
        rms = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / values.numel() ** 0.5
        if rms > 0:  # zeros (a fresh bias) beget zeros
            return draw(cut.label, cut.seed, size, rms)
    return values.new_zeros(1, 1, 1)
