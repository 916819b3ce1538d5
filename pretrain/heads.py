"""The head of an encoder exchanged: words for labels before fine-tuning, and back.

    checkpoint  embed.* encoder.*  head.dense head.norm head.bias        init.what: weights
                     |       |
    run         embed.* encoder.*  head.pooler head.classifier, drawn anew

What both models have is taken over to the last bit; a head belongs to what it was trained to say.
"""

import dataclasses
from collections.abc import Sequence

from configs.load import to_dict
from configs.model import ModelConfig, RoFormerConfig, tensors
from pretrain.growth import model_config
from pretrain.state import State, fresh


def with_head(state: State, to: ModelConfig, seed: int) -> State:
    """The weights of a state with the head that `to` has; as they are if it has that already.

    Nothing but the number of labels is changed; a fresh head is drawn from `seed`.
    """
    now = model_config(state)
    if not isinstance(now, RoFormerConfig) or not isinstance(to, RoFormerConfig):
        return state
    if now.labels == to.labels:
        return state
    config = dataclasses.replace(now, labels=to.labels)
    new, entries = fresh(config, seed), {}
    for tensor in tensors(config):
        key = f"weights/{tensor.name}"
        source = new if tensor.name.startswith("head.") else state
        entries[key] = source.entries[key]
    entries |= {key: e for key, e in state.entries.items() if key.startswith("buffers/")}
    return State(entries, state.record | {"model": to_dict(config)})


def problems(model: ModelConfig, labels: Sequence[str]) -> list[str]:
    """A head for another number of labels than the corpus has."""
    number = getattr(model, "labels", 0)
    if number == len(labels):
        return []
    some = ", ".join(labels[:8]) + (" ..." if len(labels) > 8 else "")
    said = f"model.labels: is {number}, the corpus has {len(labels)} labels ({some})"
    return [f"{said}; set it to that (标签数不符)"]
