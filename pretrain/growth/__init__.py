"""Growth: a trained state in, a larger state that computes the same function out.

    state (4 layers, ffn 1024) --depth--> (6, 1024) --width--> (6, 1536)
          entries: name -> how to read it         entries: name -> how to compute it

An operator is a function from one logical state to another. It is driven by the table of tensors
(configs/model.py): which tensors belong to a layer, which write the residual stream, which axes
they have. Nothing is read or computed until an entry of the result is read, so that growing holds
one tensor at a time, whatever the model's size; operators compose.

Today: deeper by zero-output layers (depth.py) and a wider feed-forward layer by zero columns
(width.py), for pre-norm CPM; moments.py says how Adam's moments begin. Sources: LEMON (Wang et al.,
ICLR 2024), LLaMA-Pro (Wu et al., 2024), Net2Net (Chen et al., ICLR 2016).
"""

import dataclasses
from typing import Any, cast

from configs.load import from_dict, to_dict
from configs.model import CPMConfig, ModelConfig, tensors
from pretrain.growth.depth import deeper
from pretrain.growth.moments import slots
from pretrain.growth.width import wider
from pretrain.state import State

GROWS = ("layers", "ffn")
"""What can be enlarged."""
FREE = ("dropout", "attention_dropout", "init_std")
"""What may differ because it changes neither a tensor nor the function at inference."""


class GrowthError(ValueError):
    """The target cannot be reached from the model at hand; the message names what can."""


def grow(state: State, to: ModelConfig, seed: int) -> State:
    """The state enlarged to the config `to`; logits are the same in exact arithmetic, dropout off.

    Entries are computed when read. Old tensors keep their moments and their `born`; new tensors
    get moments of zero and are born at the present update, so that their Adam step starts at 0;
    new entries inside old tensors follow moments.py. `seed` decides the new random rows. The
    record gets the new config and one more line in `growth`. Raises GrowthError for a target out
    of reach.
    """
    now = model_config(state)
    refused = refusal(now, to)
    if refused:
        raise GrowthError(refused)
    operators, grown, at = [], state, now
    for operator, size in ((deeper, "layers"), (wider, "ffn")):
        if getattr(at, size) != getattr(to, size):
            target = dataclasses.replace(at, **{size: getattr(to, size)})  # type: ignore[type-var]
            grown = operator(grown, at, target, seed)
            operators.append(f"{size} {getattr(at, size)} -> {getattr(to, size)}")
            at = target
    line = {
        "step": state.record.get("step", 0),
        "updates": state.record.get("updates", 0),
        "from": to_dict(now),
        "to": to_dict(to),
        "operators": operators,
        "seed": seed,
    }
    history = [*state.record.get("growth", []), line]
    # in the table's order, so that the files' bytes do not depend on the way that led here
    keys = [f"{kind}/{t.name}" for kind in ("weights", *slots(grown)) for t in tensors(to)]
    keys += [key for key in grown.entries if key.startswith("buffers/")]
    entries = {key: grown.entries[key] for key in keys}
    return State(entries, {**grown.record, "model": to_dict(to), "growth": history})


def model_config(state: State) -> ModelConfig:
    """The config of the model that a state holds."""
    return cast(ModelConfig, from_dict(cast(Any, ModelConfig), state.record["model"], "model"))


def refusal(now: ModelConfig, to: ModelConfig) -> str | None:
    """Why `to` cannot be reached from `now`, in one sentence with the nearest sizes; or None."""
    if not isinstance(now, CPMConfig) or not isinstance(to, CPMConfig):
        return (
            f"family: a {now.family} cannot be grown to a {to.family}; "
            "a cpm can be grown to a larger cpm (此模型族暂不能扩大)"
        )
    wrong, nearest = [], {}
    for key in (field.name for field in dataclasses.fields(to)):
        old, new = getattr(now, key), getattr(to, key)
        if key in GROWS:
            nearest[key] = max(old, new)
            if new < old:
                wrong.append(f"{key} would shrink from {old} to {new}")
        elif key not in FREE and new != old:
            nearest[key] = old
            wrong.append(f"{key} is {old} and the target has {new}")
    if not wrong:
        return None
    sizes = ", ".join(f"{key}={value}" for key, value in nearest.items())
    return (
        f"model: {'; '.join(wrong)}; only {' and '.join(GROWS)} can grow, and only upwards: the "
        f"nearest target that can be reached has {sizes} (只能加层或加宽 ffn)"
    )
