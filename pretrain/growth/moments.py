"""How an optimizer's state goes on in a grown model: the exact rule, a beginning for what is new.

    p' = a x p, in n copies:   the loss as a function is the same, so the gradient of each copy is
                               1 / (a n) of the old one. Hence  exp_avg     x 1 / (a n)
                                                                exp_avg_sq  x 1 / (a n)^2
    and the update is the small model's under     lr x a,  decoupled decay x 1 / a,  eps x 1 / (a n)
    and the global gradient norm, if a tensor's squared norm weighs a^2 n in it (GROWTH of record
    4.1; derived for this project). Those four are kept in the record's `scales` by tensor name. lr
and decay may return to 1 over some steps (`rewarm`): the rate that the larger model trains with.

Averages of weights (EMA, Lookahead) grow as the weights do, Muon's momentum as exp_avg.

A moment of 0 under an old step counter overshoots: with beta2 = 0.999 the first updates are up to
6.6 times the learning rate. Hence

    a new tensor               m = 0, v = 0, and its own step count: it is `born` now
    new entries in an old one  m = 0, v = the mean of the old v along the grown axis, because
                               the tensor has one step count: a row's new columns take its mean
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pretrain.state import Entry, State

Scales = dict[str, dict[str, float]]
"""By tensor name: lr, wd, eps, clip; what is not named has 1 for each."""


POWERS = {"weights": 0, "ema": 0, "slow": 0, "exp_avg": 1, "momentum": 1, "exp_avg_sq": 2}
"""The power of the gradient that each goes with; 0: it follows the weight itself."""


def power(kind: str) -> int:
    """Of a key prefix such as `optim/exp_avg`."""
    return POWERS[kind.rpartition("/")[2]]


def slots(state: State) -> list[str]:
    """What an optimizer keeps in a state, as key prefixes; empty for a state of weights alone."""
    found = {key.split("/")[1] for key in state.entries if key.startswith("optim/")}
    assert found <= set(POWERS), f"growth knows {sorted(POWERS)}, the state has {sorted(found)}"
    return [f"optim/{name}" for name in POWERS if name in found]


def unknown(state: State) -> set[str]:
    """What an optimizer keeps that growth does not know how to carry (Adafactor's factors)."""
    found = {key.split("/")[1] for key in state.entries if key.startswith("optim/")}
    return found - set(POWERS)


def zeros(size: tuple[int, ...]) -> Entry:
    """A tensor of zeros that takes no memory before it is read."""
    return Entry(size, "float32", lambda: torch.zeros(size))


def rescaled(scales: Scales, changes: Mapping[str, tuple[float, int]]) -> Scales:
    """`scales` after tensors became `copies` x (amplitude x themselves), by the exact rule."""
    found = {name: dict(scale) for name, scale in scales.items()}
    for name, (amplitude, copies) in changes.items():
        if amplitude == 1.0 and copies == 1:
            continue
        scale = found.setdefault(name, {"lr": 1.0, "wd": 1.0, "eps": 1.0, "clip": 1.0})
        scale["lr"] *= amplitude
        scale["wd"] /= amplitude
        scale["eps"] /= amplitude * copies
        scale["clip"] *= amplitude**2 * copies
    return found


def rewarmed(scale: float, back: float) -> float:
    """A factor that is `back` (0 to 1) of the way from `scale` to 1."""
    return scale + (1.0 - scale) * back


def rewarm(
    groups: list[dict[str, Any]], keys: Sequence[Any], plan: dict[str, int], step: int
) -> None:
    """Bring an optimizer's groups to where `plan` (a record's `rewarm`) wants them at `step`.

    keys: what each group shares, with lr_scale and wd_scale (pretrain.optimizer.GroupKey).
    """
    back = min(1.0, max(0.0, (step - plan["step"]) / plan["steps"]))
    for group, key in zip(groups, keys, strict=True):
        if not key.lr_scale:
            continue  # the stage keeps it frozen
        lr, decay = group.setdefault("as_grown", (group["lr_scale"], group["weight_decay"]))
        group["lr_scale"] = lr / key.lr_scale * rewarmed(key.lr_scale, back)
        group["weight_decay"] = decay / key.wd_scale * rewarmed(key.wd_scale, back)


def settled(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose `scales` are what they are at its step, on their way back to 1 or there."""
    rewarm = record.get("rewarm")
    if rewarm is None:
        return record
    back = min(1.0, (record.get("step", 0) - rewarm["step"]) / rewarm["steps"])
    scales = {
        name: scale | {key: rewarmed(scale[key], back) for key in ("lr", "wd")}
        for name, scale in record.get("scales", {}).items()
    }
    return {k: v for k, v in record.items() if k != "rewarm"} | {"scales": scales}
