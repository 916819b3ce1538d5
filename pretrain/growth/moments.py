"""How Adam's moments begin for what growth has added.

A moment of 0 under an old step counter overshoots: with beta2 = 0.999 the first updates are up to
6.6 times the learning rate. Hence

    a new tensor               m = 0, v = 0, and its own step count: it is `born` now
    new entries in an old one  m = 0, v = the mean of the old v along the grown axis, because
                               the tensor has one step count: a row's new columns take its mean
"""

import torch

from pretrain.state import MOMENTS, Entry, State


def slots(state: State) -> list[str]:
    """The moments that a state holds, as key prefixes; empty for a state of weights alone."""
    found = {key.rsplit("/", 1)[0] for key in state.entries if key.startswith("optim/")}
    known = [f"optim/{name}" for name in MOMENTS]
    assert found <= set(known), f"growth knows {known}, the state holds {sorted(found)}"
    return [slot for slot in known if slot in found]


def zeros(size: tuple[int, ...]) -> Entry:
    """A tensor of zeros that takes no memory before it is read."""
    return Entry(size, "float32", lambda: torch.zeros(size))


def extended(slot: str, old: Entry, size: tuple[int, ...], dim: int) -> Entry:
    """A moment of an old tensor whose dimension `dim` grew."""

    def read() -> torch.Tensor:
        values = old.read()
        grown = values.new_zeros(size)
        grown.narrow(dim, 0, values.shape[dim]).copy_(values)
        if slot.endswith("exp_avg_sq"):
            mean = values.mean(dim, keepdim=True, dtype=torch.float64).to(values.dtype)
            grown.narrow(dim, values.shape[dim], size[dim] - values.shape[dim]).copy_(mean)
        return grown

    return Entry(size, old.dtype, read)
