r"""Deeper: layers that add nothing yet, so that the function is kept.

    3 layers      0   1       2            old layer i of L goes to place i * L' // L;
                  |   | \     | \          the places after it, up to the next, are new
    5 layers      0   1   n   2   n

    silent    a copy of the layer before it, with zeros in every tensor that WRITES the stream (the
              table's `writes`): it adds exactly 0, its outputs receive a gradient from the
              first step on, the rest from the second
    paired    a fresh layer of the final sizes, matrices as large as those of the layer before it,
              norms the same as its, whose units stand in twins: alike in what they read, opposite
              in what they write, u(x) w - u(x) w = 0. It adds 0 but for rounding, and the twins'
              gradients are opposite where they read and equal where they write: the first step
              parts them, at full size (q, k and the layer's norms, whose twins stand behind them,
              learn from the second on). Twins are neighbours along ffn, and along head_dim in v
              and o (under one attention: T5's position bias differs by head); an odd one is silent

Pairs are the antisymmetric initialization of Zhang et al. 2020 ("A type of generalization error
induced by initialization in deep neural networks"), layer by layer. Under pre-norm they learn
better than silent and random layers, behind post-norms worse (measured: docs/growth.md). Dropout
between twins (T5's within the gated layer) tells them apart: noise of mean zero while training.

Pre-norm (CPM, T5, both stacks) adding 0 keeps the function. Behind a post-norm without a gain
(RoFormer v2) x + 0 is normalised again, which changes nothing but eps. With a gain and bias
(RoFormer v1) they move: an old layer hands those of its last norm to its last new one, and what is
in between has 1 and 0, because a normalised stream that is normalised again is the same.

    old       x -> norm(g, b) -> next layer
    deeper    x -> norm(1, 0) -> + 0 -> norm(1, 0) -> + 0 -> norm(g, b) -> next layer

Two silent copies of one layer get the same first update; noise on what they do not say yet parts
them, and the copies of units and heads in them. Other methods, for comparison, none preserving:

    stack     0 1 2 0 1     the layers once more from the first on, nothing silenced (StackBERT,
                            Gong et al., ICML 2019; G_stack, Du et al., NeurIPS 2024)
    random    0 1 . 2 .     new layers as in a fresh model (zero/one-layer expansion)
"""

from dataclasses import replace

import torch

from configs.grown import PRESERVING, Growing
from configs.model import ModelConfig, RoFormerConfig, Tensor, axis_size, shape, tensors
from pretrain.growth.moments import power, slots, zeros
from pretrain.state import Entry, State, draw, fresh, seed_of


def place(layer: int, old_layers: int, new_layers: int) -> int:
    """Where old layer `layer` stands in the deeper model; the first stays first."""
    return layer * new_layers // old_layers


def source(layer: int, old_layers: int, new_layers: int) -> tuple[int, bool]:
    """The old layer that a layer of the deeper model is or stands behind, and whether it is new."""
    old = max(i for i in range(old_layers) if place(i, old_layers, new_layers) <= layer)
    return old, place(old, old_layers, new_layers) != layer


def deeper(state: State, now: ModelConfig, to: ModelConfig, seed: int, how: Growing) -> State:
    """`state` with to.layers layers; `seed` decides noise and what is drawn."""
    updates = state.record.get("updates", 0)
    old_born, old_scales = state.record.get("born", {}), state.record.get("scales", {})
    entries: dict[str, Entry] = {}
    born, scales = {}, {}
    # two growths with one seed do not draw the same numbers
    plain = fresh(to, seed_of(seed, "layers", now.layers, to.layers)).entries
    for prefix in ("weights", *slots(state)):
        for tensor in tensors(to):
            origin, is_new = _origin(tensor, now, to, how)
            key, source_key = f"{prefix}/{tensor.name}", f"{prefix}/{origin}"
            if source_key not in state.entries:  # not every rule keeps it for every tensor
                continue
            if is_new and power(prefix):
                entries[key] = zeros(shape(to, tensor))
            elif is_new and not how.stacks_layers:
                # an average of weights (EMA, Lookahead) begins as the weights that it is of
                drawn = plain[f"weights/{tensor.name}"]
                copied = state.entries[source_key]
                entries[key] = _begun(tensor, drawn, copied, now, to, seed, how)
            else:
                entries[key] = state.entries[source_key]
            born[tensor.name] = updates if is_new else old_born.get(origin, 0)
            if origin in old_scales and not (is_new and how.draws_layers):
                scales[tensor.name] = old_scales[origin]
    buffers = {key: entry for key, entry in state.entries.items() if key.startswith("buffers/")}
    record = {**state.record, "born": born}
    return State({**entries, **buffers}, {**record, "scales": scales} if scales else record)


def _begun(
    tensor: Tensor,
    drawn: Entry,
    copied: Entry,
    now: ModelConfig,
    to: ModelConfig,
    seed: int,
    how: Growing,
) -> Entry:
    """What a tensor of a new layer begins as, of a fresh layer's and the layer's before it."""
    if how.method == "random" or _shifts(to, tensor):
        return drawn
    if how.new_layers == "paired":
        return copied if tensor.op == "norm" else _paired(_as_large(drawn, copied), tensor, to)
    if tensor.writes is not None:
        return zeros(drawn.shape)
    label = f"{tensor.name}.growth.copy.{now.layers}-{to.layers}"
    return _noisy(copied, tensor, label, seed, how.noise)


def _as_large(entry: Entry, like: Entry) -> Entry:
    """A drawn matrix with the root mean square of another, which training may have made a hundredth
    of what a fresh one has; as drawn where that one is zero."""

    def read() -> torch.Tensor:
        values = entry.read()
        norms = (torch.linalg.vector_norm(v, dtype=torch.float64) for v in (like.read(), values))
        size, drawn = (float(norm) for norm in norms)
        return values * (size / drawn) if size and drawn else values

    return replace(entry, read=read)


def _paired(entry: Entry, tensor: Tensor, config: ModelConfig) -> Entry:
    """A fresh tensor, its units as twins: alike in what they read, opposite in what they write."""
    units, sign = (tensor.in_, -1) if tensor.writes is not None else (tensor.out, 1)
    if units[-1:] not in (("ffn",), ("head_dim",)) or tensor.name.split(".")[-2] in ("q", "k"):
        return entry  # norms and biases of what is written are neutral as drawn
    size = axis_size(config, units[-1])
    twins = size // 2 * 2

    def read() -> torch.Tensor:
        values = entry.read()
        by_unit = values.movedim(-1, 0) if sign < 0 else values
        by_unit = by_unit.unflatten(0, (-1, size))
        by_unit[:, 1:twins:2] = sign * by_unit[:, 0:twins:2]
        if sign < 0:
            by_unit[:, twins:] = 0.0
        return values

    return replace(entry, read=read)


def _noisy(entry: Entry, tensor: Tensor, label: str, seed: int, noise: float) -> Entry:
    """A matrix of a silent copy, with noise of a share of its size."""
    if not noise or tensor.op != "linear":
        return entry

    def read() -> torch.Tensor:
        values = entry.read()
        rms = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / values.numel() ** 0.5
        if rms == 0:
            return values
        return values + draw(label, seed, entry.shape, noise * rms)

    return replace(entry, read=read)


def _origin(tensor: Tensor, now: ModelConfig, to: ModelConfig, how: Growing) -> tuple[str, bool]:
    """The name of the tensor that this one comes from, and whether it is new."""
    if tensor.layer is None:
        return tensor.name, False
    if how.stacks_layers:
        old, is_new = tensor.layer % now.layers, tensor.layer >= now.layers
    else:
        old, is_new = source(tensor.layer, now.layers, to.layers)
    shifts = how.method in PRESERVING and _shifts(to, tensor)
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
