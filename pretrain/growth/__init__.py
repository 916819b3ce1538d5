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

from configs.grown import EXACT, GROWS, Growing, completed, idle, refusal, said
from configs.load import from_dict, to_dict
from configs.model import ModelConfig, tensors
from configs.optimizers import SIZES_ITS_STEPS
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
    "heads": width.more_heads,
    "head_dim": width.larger_heads,
    "ffn": width.more_units,
    "hidden": width.wider,
    "vocab": width.more_words,
    "layers": deeper,
}
"""What can be enlarged, and by which operator, in the order of GROWS."""
assert tuple(OPERATORS) == GROWS
FOLLOWS = {
    "hidden": ("norm_eps", "logit_scale"),
    "head_dim": ("rope_base",),
    "vocab": ("words_said",),
}
"""Numbers of the config that change together with a size."""


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
    progress = {key: state.record.get(key, 0) for key in ("step", "updates")}
    line = {**progress, "from": to_dict(now), "to": to_dict(to), "operators": names, "seed": seed}
    if options := {k: v for k, v in to_dict(how).items() if v != getattr(EXACT, k)}:
        line["how"] = options
    record = {**grown.record, "model": to_dict(to)}
    record["growth"] = [*state.record.get("growth", []), line]
    if how.rewarm_steps and record.get("scales"):
        record["rewarm"] = {"step": progress["step"], "steps": how.rewarm_steps}
    kinds = ("weights", *slots(grown), *((ROWS, COLUMNS) if factors else ()))
    entries = _ordered(factored(grown) if factors else grown, to, kinds)
    if rounded:
        entries = {key: _rounded(entry) for key, entry in entries.items()}
    return State(entries, record)


def remarks(before: State, after: State, how: Growing, left: int | None = None) -> list[str]:
    """What a page may not have meant by its `grow:`, a sentence each: options without effect (in
    the `left` updates of a run), a learning rate that goes back without having been asked to."""
    divided, rewarm = after.record.get("scales", {}), after.record.get("rewarm")
    was = settled(before.record).get("scales", {})
    any_divided = not all(s["lr"] == s["wd"] == 1 for s in divided.values())
    found = idle(model_config(before), model_config(after), how, any_divided, left)
    rule = _trained_by(before).get("name", "")
    if how.rewarm_steps and any_divided and rule in SIZES_ITS_STEPS:
        found.append(
            f"rewarm_steps: {how.rewarm_steps}, and under {rule}, which sizes its steps by the "
            "matrix, no rate was divided: only the decay comes back (只恢复权重衰减)"
        )
    elif (
        not how.rewarm_steps
        and rewarm
        and any(scale not in was.values() for scale in divided.values())
    ):
        found.append(
            f"rewarm_steps: 0, but an earlier way back has {rewarm['steps']} steps left and takes "
            "along what is divided now; give it steps of its own (随之前的恢复一同进行)"
        )
    new = model_config(after).layers - model_config(before).layers
    if new and (share := _trained_by(before).get("layer_decay", 1.0)) < 1:
        found.append(
            f"layer_decay: {share:g}, which counts layers from the last: what lies below {new} new "
            f"ones learns at up to {share**new:.2g} of its rate so far (旧层学习率随之降低)"
        )
    return found


def _trained_by(state: State) -> dict[str, Any]:
    """The optimizer section that a state was trained by, as far as its record tells."""
    return dict(state.record.get("config", {}).get("optimizer", {}))


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
