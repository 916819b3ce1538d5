"""Growth: a trained state in, a larger state that computes the same function out.

    state (4 layers, ffn 1024) --depth--> (6, 1024) --width--> (6, 1536) --one rounding--> float32
          entries: name -> how to read it         entries: name -> how to compute it

An operator is a function from one logical state to another. It is driven by the table of tensors
(configs/model.py): which tensors belong to a layer, which write the residual stream and which read
it, which axes they have. Nothing is read or computed until an entry of the result is read, so that
growing holds one tensor at a time, whatever the model's size; operators compose in any order.

depth.py adds layers; width.py widens feed-forward layers, heads, the stream and the vocabulary, by
axis.py and copies.py; moments.py carries Adam's moments; configs/grown.py knows the methods and
which numbers of the config must follow. Sources: GROWTH of record (the project's own derivations:
gain shift, rotary heads, exact moments); LEMON (Wang et al., ICLR 2024), LLaMA-Pro (Wu et al.,
2024), Net2Net (Chen et al., ICLR 2016), HyperCloning (Samragh et al., 2024), bert4keras (Su,
kexue.fm/archives/8444).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

from configs.grown import CARRIED, EXACT, PRESERVING, Growing, carried, completed, said, times
from configs.load import from_dict, to_dict
from configs.model import ModelConfig, RoFormerConfig, tensors
from pretrain.growth import width
from pretrain.growth.depth import deeper
from pretrain.growth.moments import (
    COLUMNS,
    ROWS,
    factored,
    settled,
    slots,
    unfactored,
    unknown,
)
from pretrain.mixing import Mixture
from pretrain.state import Entry, State

Operator = Callable[[State, ModelConfig, ModelConfig, int, Growing], State]

OPERATORS: dict[str, Operator] = {
    "layers": deeper,
    "heads": width.more_heads,
    "head_dim": width.larger_heads,
    "ffn": width.more_units,
    "hidden": width.wider,
    "vocab": width.more_words,
}
"""What can be enlarged, and by which operator, in the order of application."""
GROWS = tuple(OPERATORS)
FOLLOWS = {
    "hidden": ("norm_eps", "logit_scale"),
    "head_dim": ("rope_base",),
    "vocab": ("words_said",),
}
"""Numbers of the config that change together with a size."""
FREE = ("dropout", "attention_dropout", "init_std")
"""What may differ because it changes neither a tensor nor the function at inference."""
LARGEST_EPS_BEHIND = 1e-11
"""Layers behind a post-norm change the function by about their norms' eps; so much is rounding."""


class GrowthError(ValueError):
    """The target cannot be reached from the model at hand; the message names what can."""


def grow(
    state: State,
    to: ModelConfig,
    seed: int,
    how: Growing = EXACT,
    *,
    rounded: bool = True,
    pieces: Mixture | None = None,
) -> State:
    """The state enlarged to the config `to`; logits are the same in exact arithmetic, dropout off,
    under the methods of configs.grown.PRESERVING.

    Entries are computed when read. Old tensors keep their `born`, and their moments by the exact
    rule of moments.py; new tensors get moments of zero and are born at the present update, so that
    their Adam step starts at 0. Numbers that `to` leaves open are set (configs/grown.py). `seed`
    decides the random entries. The record gets the new config, the `scales` of tensors that the
    optimizer must treat by the rule (and over how many steps they return to 1, `rewarm`), and one
    more line in `growth`.

    Args:
        how: the method and its options.
        pieces: what new words are made of, from the first new row on; without, the mean of all.
        rounded: to float32, once; without, what needs rounding stays in float64, for proofs.

    Raises GrowthError for a target out of reach.
    """
    now = model_config(state)
    refused = refusal(now, to, how)
    if refused:
        raise GrowthError(refused)
    factors = (whole := unfactored(state)) is not state
    if left := unknown(whole):
        raise GrowthError(
            f"optim/{min(left)}: is of an optimizer whose state growth does not carry; grow the "
            "weights alone and start with `init: {what: weights}` (该优化器的状态不能随模型生长)"
        )
    to = completed(now, to, how)
    operators = OPERATORS | {"vocab": functools.partial(width.more_words, pieces=pieces)}
    names, grown, at = [], State(whole.entries, settled(state.record)), now
    for size, operator in operators.items():
        if getattr(at, size) == getattr(to, size):
            continue
        keys = [key for key in (size, *FOLLOWS.get(size, ())) if hasattr(to, key)]
        target = dataclasses.replace(at, **{key: getattr(to, key) for key in keys})
        grown = operator(grown, at, target, seed, how)
        names.append(f"{size} {getattr(at, size)} -> {getattr(to, size)}")
        at = target
    if said(at) != said(to):
        names.append(f"words said {said(at)} -> {said(to)}")
    step = state.record.get("step", 0)
    line = {
        "step": step,
        "updates": state.record.get("updates", 0),
        "from": to_dict(now),
        "to": to_dict(to),
        "operators": names,
        "seed": seed,
    }
    if options := {k: v for k, v in to_dict(how).items() if v != getattr(EXACT, k)}:
        line["how"] = options
    record = {**grown.record, "model": to_dict(to)}
    record["growth"] = [*state.record.get("growth", []), line]
    if how.rewarm_steps and record.get("scales"):
        record["rewarm"] = {"step": step, "steps": how.rewarm_steps}
    kinds = ("weights", *slots(grown), *((ROWS, COLUMNS) if factors else ()))
    entries = _ordered(factored(grown) if factors else grown, to, kinds)
    if rounded:
        entries = {key: _rounded(entry) for key, entry in entries.items()}
    return State(entries, record)


def _ordered(state: State, model: ModelConfig, kinds: Sequence[str]) -> dict[str, Entry]:
    """In the table's order, so that the files' bytes do not depend on the way that led here."""
    keys = [f"{kind}/{t.name}" for kind in kinds for t in tensors(model)]
    keys += [key for key in state.entries if key.startswith("buffers/")]
    return {key: state.entries[key] for key in keys if key in state.entries}


def told(line: dict[str, Any]) -> Growing:
    """How a line of a record's `growth` says that the model was enlarged."""
    options = {key: line[key] for key in ("new_words",) if key in line} | line.get("how", {})
    return from_dict(Growing, options)


def _rounded(entry: Entry) -> Entry:
    if entry.dtype != "float64":
        return entry
    return Entry(entry.shape, "float32", lambda: entry.read().float())


def model_config(state: State) -> ModelConfig:
    """The config of the model that a state holds."""
    return cast(ModelConfig, from_dict(cast(Any, ModelConfig), state.record["model"], "model"))


def refusal(now: ModelConfig, to: ModelConfig, how: Growing = EXACT) -> str | None:
    """Why `to` cannot be reached from `now`, in one sentence with the nearest sizes; or None."""
    if type(now) is not type(to):
        return (
            f"family: a {now.family} cannot be grown to a {to.family}; "
            f"it can be grown to a larger {now.family} (不能变成另一模型族)"
        )
    to, wrong = completed(now, to, how), []
    needed, nearest = carried(now, to, how), {}
    for key in (field.name for field in dataclasses.fields(to)):
        old, new = getattr(now, key), getattr(to, key)
        if key in GROWS:
            nearest[key] = max(old, new)
            if new < old:
                wrong.append(f"{key} would shrink from {old} to {new}")
        elif key == "words_said":
            if said(to) < said(now):
                nearest[key] = needed[key]
                wrong.append(f"words_said is {new}, {said(now)} words are said and would be masked")
        elif key in CARRIED:
            other = now.rope_base ** (to.head_dim / now.head_dim) if key == "rope_base" else None  # type: ignore[union-attr]
            if new not in (needed[key], other):
                nearest[key] = needed[key]
                wrong.append(f"{key} is {old}, the function needs {needed[key]}, not {new}")
        elif key not in FREE and new != old:
            nearest[key] = old
            wrong.append(f"{key} is {old} and the target has {new}")
    if isinstance(now, RoFormerConfig):
        wrong += _post_norm(now, to, how, nearest)
    if how.method == "su":
        wrong += _repeated(now, to, nearest)
    if not wrong:
        return None
    sizes = ", ".join(f"{key}={value}" for key, value in nearest.items())
    return (
        f"model: {'; '.join(wrong)}; {', '.join(GROWS)} can grow, and only upwards: the nearest "
        f"target that can be reached has {sizes} (只能加大，最近的可行尺寸见上)"
    )


def _repeated(now: ModelConfig, to: ModelConfig, nearest: dict[str, Any]) -> list[str]:
    """What Su's form cannot do; `nearest` is corrected."""
    wrong = []
    for key in ("hidden", "ffn"):
        old, new = getattr(now, key), getattr(to, key)
        if new > old and times(old, new) is None:
            nearest[key] = old * max(1, round(new / old))
            wrong.append(f"{key} {old} cannot become {new} by method su, which repeats it")
    if isinstance(now, RoFormerConfig) and to.hidden > now.hidden:
        nearest["hidden"] = now.hidden
        wrong.append(
            "method su needs a norm with a gain, RoFormer v2 has none"
            if now.version == 2
            else "method su would need an eps of its own for the norm behind the head's GELU"
        )
    return wrong


def _post_norm(
    now: RoFormerConfig, to: ModelConfig, how: Growing, nearest: dict[str, Any]
) -> list[str]:
    """What a post-norm cannot do; `nearest` is corrected."""
    wrong: list[str] = []
    if how.method not in (*PRESERVING, "stack"):
        return wrong
    if now.version == 1 and to.hidden > now.hidden and times(now.hidden, to.hidden) is None:
        nearest["hidden"] = now.hidden * max(1, round(to.hidden / now.hidden))
        wrong.append(
            f"hidden {now.hidden} cannot become {to.hidden}, RoFormer v1 widens by whole factors "
            f"only (its norms stand behind the sum)"
        )
    kept = how.method in PRESERVING
    if kept and to.layers > now.layers and now.norm_eps > LARGEST_EPS_BEHIND:
        nearest["layers"] = now.layers
        wrong.append(
            f"layers cannot be added under norm_eps {now.norm_eps:g}: each changes the stream by "
            f"about as much, at most {LARGEST_EPS_BEHIND:g} is rounding"
        )
    return wrong
