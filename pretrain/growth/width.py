"""Wider: more units in the feed-forward layer, which say nothing yet.

                 old units | new units
    up   [ffn, embed]   W  /  R            new rows: random, as large as the old ones
    up   bias [ffn]     b  /  r            the same
    down [embed, ffn]   W  |  0            new columns: zero, so the output is unchanged

The table says which tensors have the axis: where it is an OUTPUT axis the new entries are random
(a unit that computes something), where it is an INPUT axis they are zero (nobody listens yet).
The zero columns receive a gradient from the first step on, the random rows from the second. Zero
on both sides would never wake up. Under Net2Net's other form the units are copied and their
columns split; that is an option of a later operator.
"""

from collections.abc import Callable

import torch

from configs.model import ModelConfig, shape, tensors
from pretrain.growth.moments import extended, slots
from pretrain.state import Entry, State, draw

AXIS = "ffn"


def wider(state: State, now: ModelConfig, to: ModelConfig, seed: int) -> State:
    """`state` with to.ffn feed-forward units; new rows are drawn from (seed, name, both sizes).

    The sizes belong to the draw so that a model which is widened twice with one seed does not get
    the same units twice.
    """
    entries = dict(state.entries)
    for tensor in tensors(to):
        size = shape(to, tensor)
        for dim, axes in enumerate((tensor.out, tensor.in_)):
            if AXIS not in axes:
                continue
            assert axes == (AXIS,), f"{tensor.name}: {axes} is no plain feed-forward axis"
            label = f"{tensor.name}.growth.{now.ffn}-{to.ffn}"
            old = state.entries[f"weights/{tensor.name}"]
            read = _random_rows(old, size, label, seed) if dim == 0 else _zero_columns(old, size)
            entries[f"weights/{tensor.name}"] = Entry(size, old.dtype, read)
            for slot in slots(state):
                key = f"{slot}/{tensor.name}"
                entries[key] = extended(slot, state.entries[key], size, dim)
    return State(entries, state.record)


def _random_rows(
    old: Entry, size: tuple[int, ...], label: str, seed: int
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        values = old.read()
        grown = values.new_empty(size)
        grown[: values.shape[0]] = values
        grown[values.shape[0] :] = _like(values, grown[values.shape[0] :].shape, label, seed)
        return grown

    return read


def _like(
    values: torch.Tensor, size: tuple[int, ...] | torch.Size, label: str, seed: int
) -> torch.Tensor:
    """Random numbers of the root mean square of `values`: zeros (a fresh bias) beget zeros."""
    # in float64, so that the float32 that is drawn from it does not depend on the thread count
    rms = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / values.numel() ** 0.5
    return draw(label, seed, tuple(size), rms) if rms > 0 else values.new_zeros(size)


def _zero_columns(old: Entry, size: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        values = old.read()
        grown = values.new_zeros(size)
        grown[:, : values.shape[1]] = values
        return grown

    return read
