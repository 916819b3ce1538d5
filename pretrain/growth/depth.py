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

Two copies of one layer get the same first update; noise on what they do not say yet parts them.
Other methods, for comparison, none preserving:

    stack     0 1 2 0 1     the layers once more from the first on, nothing silenced (StackBERT,
                            Gong et al., ICML 2019; G_stack, Du et al., NeurIPS 2024)
    random    0 1 . 2 .     new layers as in a fresh model (zero/one-layer expansion)
"""

from dataclasses import replace

import torch

from configs.grown import Growing
from configs.model import ModelConfig, RoFormerConfig, Tensor, shape, tensors
from pretrain.growth.moments import power, slots, zeros
from pretrain.state import Entry, State, draw, fresh

STACKED = ("stack", "bert2bert", "bert2bert_aki")
"""Methods that add layers by stacking."""


def place(layer: int, old_layers: int, new_layers: int) -> int:
    """Where old layer `layer` stands in the deeper model; the first stays first."""
    return layer * new_layers // old_layers


def source(layer: int, old_layers: int, new_layers: int) -> tuple[int, bool]:
    """The old layer that layer `layer` of the deeper model comes from, and whether it is a copy."""
    old = max(i for i in range(old_layers) if place(i, old_layers, new_layers) <= layer)
    return old, place(old, old_layers, new_layers) != layer


def deeper(state: State, now: ModelConfig, to: ModelConfig, seed: int, how: Growing) -> State:
    """`state` with to.layers layers; `seed` decides noise and random layers."""
    updates = state.record.get("updates", 0)
    old_born, old_scales = state.record.get("born", {}), state.record.get("scales", {})
    entries: dict[str, Entry] = {}
    born, scales = {}, {}
    plain = fresh(to, seed).entries
    for prefix in ("weights", *slots(state)):
        for tensor in tensors(to):
            origin, is_new = _origin(tensor, now, to, how)
            key, source_key = f"{prefix}/{tensor.name}", f"{prefix}/{origin}"
            if source_key not in state.entries:  # not every rule keeps it for every tensor
                continue
            if is_new and power(prefix):
                entries[key] = zeros(shape(to, tensor))
            elif is_new and how.method not in STACKED:
                random = how.method == "random" or _shifts(to, tensor)
                silent = zeros(shape(to, tensor)) if tensor.writes is not None else None
                copy = silent or _noisy(state.entries[source_key], tensor, seed, how.noise)
                # an average of weights (EMA, Lookahead) begins as the weights that it is of
                entries[key] = plain[f"weights/{tensor.name}"] if random else copy
            else:
                entries[key] = state.entries[source_key]
            born[tensor.name] = updates if is_new else old_born.get(origin, 0)
            if origin in old_scales:
                scales[tensor.name] = old_scales[origin]
    buffers = {key: entry for key, entry in state.entries.items() if key.startswith("buffers/")}
    record = {**state.record, "born": born}
    return State({**entries, **buffers}, {**record, "scales": scales} if scales else record)


def _noisy(entry: Entry, tensor: Tensor, seed: int, noise: float) -> Entry:
    """A matrix of a silent copy, with noise of a share of its size."""
    if not noise or tensor.op != "linear":
        return entry

    def read() -> torch.Tensor:
        values = entry.read()
        rms = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / values.numel() ** 0.5
        if rms == 0:
            return values
        return values + draw(f"{tensor.name}.growth.copy", seed, entry.shape, noise * rms)

    return replace(entry, read=read)


def _origin(tensor: Tensor, now: ModelConfig, to: ModelConfig, how: Growing) -> tuple[str, bool]:
    """The name of the tensor that this one comes from, and whether it is new."""
    if tensor.layer is None:
        return tensor.name, False
    if how.method in STACKED:
        old, is_new = tensor.layer % now.layers, tensor.layer >= now.layers
    else:
        old, is_new = source(tensor.layer, now.layers, to.layers)
    shifts = how.method not in (*STACKED, "random") and _shifts(to, tensor)
    if shifts and tensor.name.rpartition(".")[0] == _last_norm(to, tensor.layer):
        is_new = tensor.layer + 1 != place(old + 1, now.layers, to.layers)
    return tensor.name.replace(f".layers.{tensor.layer}.", f".layers.{old}.", 1), is_new


def _shifts(config: ModelConfig, tensor: Tensor) -> bool:
    """Whether it is a gain or bias behind a layer of a post-norm family."""
    return isinstance(config, RoFormerConfig) and tensor.op == "norm"


def _last_norm(config: ModelConfig, layer: int) -> str:
    """The module of a layer's last norm."""
    norms = [t for t in tensors(config) if t.op == "norm" and t.layer == layer]
    return norms[-1].name.rpartition(".")[0]
