"""How an optimizer's state goes on in a grown model: the exact rule, a beginning for what is new.

    p' = a x p, in n copies:   the loss as a function is the same, so the gradient of each copy is
                               1 / (a n) of the old one. Hence  exp_avg     x 1 / (a n)
                                                                exp_avg_sq  x 1 / (a n)^2
    and the update is the small model's under     lr x a,  decoupled decay x 1 / a,  eps x 1 / (a n)
    and the global gradient norm, if a tensor's squared norm weighs a^2 n in it (GROWTH of record
    4.1; derived for this project). Those four are kept in the record's `scales` by tensor name. lr
and decay may return to 1 over some steps (`rewarm`): the rate that the larger model trains with.

Averages of weights (EMA, Lookahead) grow as the weights do, Muon's momentum as exp_avg. Adafactor's
rows R and columns C stand for the matrix R_i C_j / mean(R) of exp_avg_sq: that matrix grows, and
its means by row and by column are the grown factors. A matrix tiled in n copies is still a product
of rows and columns, so this is the exact rule; its average of changes goes with the weights, a x.

A moment of 0 under an old step counter overshoots: with beta2 = 0.999 the first updates are up to
6.6 times the learning rate. Hence

    a new tensor               m = 0, v = 0, and its own step count: it is `born` now
    new entries in an old one  m = 0, v = the mean of the old v along the grown axis, because
                               the tensor has one step count: a row's new columns take its mean
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from pretrain.state import Entry, State

Scales = dict[str, dict[str, float]]
"""By tensor name: lr, wd, eps, clip; what is not named has 1 for each."""


POWERS = {"weights": 0, "ema": 0, "slow": 0, "exp_avg": 1, "momentum": 1, "exp_avg_sq": 2}
"""The power of the gradient that each goes with; 0: it follows the weight itself."""


ROWS, COLUMNS, SQUARES = (f"optim/exp_avg_sq{end}" for end in ("_row", "_col", ""))
"""Of Adafactor's second moments, and of anybody else's."""


def power(kind: str) -> int:
    """Of a key prefix such as `optim/exp_avg`."""
    return POWERS[kind.rpartition("/")[2]]


def slots(state: State) -> list[str]:
    """What an optimizer keeps in a state, as key prefixes; empty for a state of weights alone."""
    found = {key.split("/")[1] for key in state.entries if key.startswith("optim/")}
    assert found <= set(POWERS), f"growth knows {sorted(POWERS)}, the state has {sorted(found)}"
    return [f"optim/{name}" for name in POWERS if name in found]


def unknown(state: State) -> set[str]:
    """What an optimizer keeps that growth does not know how to carry."""
    found = {key.split("/")[1] for key in state.entries if key.startswith("optim/")}
    return found - set(POWERS)


def unfactored(state: State, *, weighed: bool = True) -> State:
    """A state of Adafactor with its second moments as matrices, computed when read, and what it
    averages as a gradient's average would stand beside them; any other as it is.

    weighed=False leaves the averages alone, where no scale changes before factored()."""
    if not state.names(ROWS):
        return state
    entries = dict(state.entries)
    for name in state.names(ROWS):
        rows, columns = entries.pop(f"{ROWS}/{name}"), entries.pop(f"{COLUMNS}/{name}")
        size = (*rows.shape, *columns.shape)
        entries[f"{SQUARES}/{name}"] = Entry(size, "float64", partial(_product, rows, columns))
    return State(_weighed(entries, state.record, -1) if weighed else entries, state.record)


def factored(state: State, *, weighed: bool = True) -> State:
    """The inverse of unfactored(), of matrices that may have grown meanwhile."""
    entries = dict(state.entries)
    for name in state.names(SQUARES):
        whole = entries[f"{SQUARES}/{name}"]
        if len(whole.shape) == 2:
            del entries[f"{SQUARES}/{name}"]
            for key, side in ((ROWS, 0), (COLUMNS, 1)):
                mean = partial(_mean, whole, 1 - side)
                entries[f"{key}/{name}"] = Entry((whole.shape[side],), "float32", mean)
    return State(_weighed(entries, state.record, 1) if weighed else entries, state.record)


def _product(rows: Entry, columns: Entry) -> torch.Tensor:
    r, c = rows.read().double(), columns.read().double()
    return torch.outer(r, c).div_(r.mean().clamp(min=torch.finfo(torch.float64).tiny))


def _mean(whole: Entry, over: int) -> torch.Tensor:
    return whole.read().double().mean(over).float()


def _weighed(entries: dict[str, Entry], record: dict[str, Any], power: int) -> dict[str, Entry]:
    """Averages of changes by what a tensor weighs in the norm, a^2 n: 1 / (a n) becomes a."""
    for name, scale in record.get("scales", {}).items():
        key = f"optim/exp_avg/{name}"
        if key in entries and scale["clip"] != 1.0:
            old, factor = entries[key], scale["clip"] ** power
            entries[key] = Entry(old.shape, "float64", partial(_times, old, factor))
    return entries


def _times(entry: Entry, factor: float) -> torch.Tensor:
    return entry.read().double() * factor


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
    """A record whose `scales` are what they are at its step, on their way back to 1 or there; a
    `rewarm` that is not over goes on from there, in the steps that are left of it."""
    rewarm = record.get("rewarm")
    if rewarm is None:
        return record
    step = record.get("step", 0)
    left = max(0, rewarm["step"] + rewarm["steps"] - step)
    scales = {
        name: scale | {k: rewarmed(scale[k], 1 - left / rewarm["steps"]) for k in ("lr", "wd")}
        for name, scale in record.get("scales", {}).items()
    }
    rest = {"rewarm": {"step": step, "steps": left}} if left else {}
    return {k: v for k, v in record.items() if k != "rewarm"} | {"scales": scales} | rest
