r"""Deeper: copies of layers that add nothing yet, so that the function is kept to the last bit.

    3 layers      0   1       2            old layer i of L goes to place i * L' // L;
                  |   | \     | \          the places after it, up to the next, are its copies
    5 layers      0   1   1'  2   2'

A pre-norm layer adds f(norm(x)) to the stream x. In a copy every tensor is the source layer's,
except that those which WRITE the stream (the table's `writes`: attention and feed-forward outputs
and their biases) are zero: the copy adds 0, and its outputs receive a gradient from the first
step on, the rest from the second. Post-norm layers need more (a gain shift) and are not handled
here.
"""

from configs.model import ModelConfig, Tensor, shape, tensors
from pretrain.growth.moments import slots, zeros
from pretrain.state import State


def place(layer: int, old_layers: int, new_layers: int) -> int:
    """Where old layer `layer` stands in the deeper model; the first stays first."""
    return layer * new_layers // old_layers


def source(layer: int, old_layers: int, new_layers: int) -> tuple[int, bool]:
    """The old layer that layer `layer` of the deeper model comes from, and whether it is a copy."""
    old = max(i for i in range(old_layers) if place(i, old_layers, new_layers) <= layer)
    return old, place(old, old_layers, new_layers) != layer


def deeper(state: State, now: ModelConfig, to: ModelConfig, seed: int) -> State:
    """`state` with to.layers layers. Nothing is random; `seed` is every operator's argument."""
    updates = state.record.get("updates", 0)
    old_born = state.record.get("born", {})
    entries, born = {}, {}
    for prefix in ("weights", *slots(state)):
        for tensor in tensors(to):
            origin, is_copy = _origin(tensor, now, to)
            key = f"{prefix}/{tensor.name}"
            silent = is_copy and tensor.writes is not None
            if silent or (is_copy and prefix != "weights"):
                entries[key] = zeros(shape(to, tensor))
            else:
                entries[key] = state.entries[f"{prefix}/{origin}"]
            born[tensor.name] = updates if is_copy else old_born.get(origin, 0)
    buffers = {key: entry for key, entry in state.entries.items() if key.startswith("buffers/")}
    return State({**entries, **buffers}, {**state.record, "born": born})


def _origin(tensor: Tensor, now: ModelConfig, to: ModelConfig) -> tuple[str, bool]:
    """The name of the tensor that this one comes from, and whether it belongs to a new layer."""
    if tensor.layer is None:
        return tensor.name, False
    old, is_copy = source(tensor.layer, now.layers, to.layers)
    return tensor.name.replace(f".layers.{tensor.layer}.", f".layers.{old}.", 1), is_copy
