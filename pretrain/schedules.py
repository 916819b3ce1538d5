"""The learning rate of an update: a pure function of the step.

wsd             /-----\\        warm up, stay, decay         (Hu et al. 2024; Haegele et al. 2024)
cosine          /--.__          warm up, half a cosine       (Loshchilov and Hutter 2017)
inverse_root    /\\_____        warm up, 1 / sqrt(step)      (Vaswani et al. 2017; T5)
piecewise       /\\  /\\         lines between given points   (bert4keras, RoFormer v2)
constant        /-------        warm up, stay                (RoFormer v1)
"""

import math
from typing import Any


def schedule(step: int, section: Any, lr: float, steps: int) -> float:
    """The learning rate of an update.

    Args:
        step: updates before this one; the first update is step 0.
        section: configs.optimizers.Schedule.
        lr: the peak.
        steps: updates that the schedule spans; under wsd and cosine the last one
            (step = steps - 1) has lr x min_ratio.

    Returns lr x (step + 1) / warmup_steps while it warms up. wsd stays at the peak until
    decay_steps before the end (1 - sqrt of the progress, or linear); cosine falls from the end of
    the warm-up; inverse_root is lr x sqrt(warmup_steps / (step + 1)), the peak at the end of the
    warm-up. piecewise reads its points at step + 1 updates: a line from (0, 0) to the first, lines
    between them, the last share from there on; so the steps of an article are those of the points
    where it counts updates (bert4keras counts micro-batches: divide by the accumulation).
    """
    if section.name == "piecewise":
        return float(lr * _between(step + 1, section.points))
    if step < section.warmup_steps:
        return float(lr * (step + 1) / section.warmup_steps)
    if section.name == "inverse_root":
        return float(lr * math.sqrt(max(1, section.warmup_steps) / (step + 1)))
    if section.name == "cosine":
        part = _progress(step, section.warmup_steps, steps)
        falling = 0.5 * (1 + math.cos(math.pi * part))
    elif section.name == "wsd" and section.decay_steps:
        part = _progress(step, max(section.warmup_steps, steps - section.decay_steps), steps)
        falling = 1 - math.sqrt(part) if section.decay == "sqrt" else 1 - part
    else:
        return float(lr)
    return float(lr * (section.min_ratio + (1 - section.min_ratio) * falling))


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from `start` (exclusive) to the last step before `end` (inclusive)."""
    return min(1.0, max(0.0, (step + 1 - start) / max(1, end - start)))


def _between(updates: int, points: tuple[tuple[int, float], ...]) -> float:
    """The share of the peak on the line between the points around `updates`."""
    before, share = 0, 0.0
    for at, value in points:
        if updates < at:
            return share + (value - share) * (updates - before) / (at - before)
        before, share = at, value
    return share
