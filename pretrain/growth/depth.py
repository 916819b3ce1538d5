r"""Deeper: copies of layers that add nothing yet, so that the function is kept.

    3 layers      0   1       2            old layer i of L goes to place i * L' // L;
                  |   | \     | \          the places after it, up to the next, are its copies
    5 layers      0   1   1'  2   2'

In a copy every tensor is the source layer's, except that those which WRITE the stream (the table's
`writes`: attention and feed-forward outputs and their biases) are zero: the copy adds 0, and its
outputs receive a gradient from the first step on, the rest from the second.

Pre-norm (CPM, T5, both stacks) this keeps the function to the last bit. Behind a post-norm without
a gain (RoFormer v2) x + 0 is normalised again, which changes nothing but eps. With a gain and bias
(RoFormer v1) they move: an old layer hands those of its last norm to its last copy, and what is in
between has 1 and 0, because a normalised stream that is normalised again is the same.

    old       x -> norm(g, b) -> next layer
    deeper    x -> norm(1, 0) -> + 0 -> norm(1, 0) -> + 0 -> norm(g, b) -> next layer
"""

from configs.model import ModelConfig, RoFormerConfig, Tensor, shape, tensors
from pretrain.growth.moments import slots, zeros
from pretrain.state import Entry, State, fresh


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
    old_born, old_scales = state.record.get("born", {}), state.record.get("scales", {})
    entries: dict[str, Entry] = {}
    born, scales = {}, {}
    plain = fresh(to, 0).entries
    for prefix in ("weights", *slots(state)):
        for tensor in tensors(to):
            origin, is_new = _origin(tensor, now, to)
            key = f"{prefix}/{tensor.name}"
            if is_new and (prefix != "weights" or tensor.writes is not None):
                entries[key] = zeros(shape(to, tensor))
            elif is_new and _shifts(to, tensor):
                entries[key] = plain[key]
            else:
                entries[key] = state.entries[f"{prefix}/{origin}"]
            born[tensor.name] = updates if is_new else old_born.get(origin, 0)
            if origin in old_scales:
                scales[tensor.name] = old_scales[origin]
    buffers = {key: entry for key, entry in state.entries.items() if key.startswith("buffers/")}
    record = {**state.record, "born": born}
    return State({**entries, **buffers}, {**record, "scales": scales} if scales else record)


def _origin(tensor: Tensor, now: ModelConfig, to: ModelConfig) -> tuple[str, bool]:
    """The name of the tensor that this one comes from, and whether it is new."""
    if tensor.layer is None:
        return tensor.name, False
    old, is_new = source(tensor.layer, now.layers, to.layers)
    if _shifts(to, tensor) and tensor.name.rpartition(".")[0] == _last_norm(to, tensor.layer):
        is_new = tensor.layer + 1 != place(old + 1, now.layers, to.layers)
    return tensor.name.replace(f".layers.{tensor.layer}.", f".layers.{old}.", 1), is_new


def _shifts(config: ModelConfig, tensor: Tensor) -> bool:
    """Whether it is a gain or bias behind a layer of a post-norm family."""
    return isinstance(config, RoFormerConfig) and tensor.op == "norm"


def _last_norm(config: ModelConfig, layer: int) -> str:
    """The module of a layer's last norm."""
    norms = [t for t in tensors(config) if t.op == "norm" and t.layer == layer]
    return norms[-1].name.rpartition(".")[0]
