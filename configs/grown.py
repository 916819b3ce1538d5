"""Numbers of a model's config that must follow when it grows, so that its function is kept.

    config now + larger config --completed()--> larger config, norm_eps / logit_scale / rope_base
                                                set to what keeps the function

A page for a larger model says sizes. What it leaves at the default, or as it was, is filled in
here; what it sets to something else is left for growth to refuse. `stages:` of a run and `grow`
both read it, so that a run's page, its checkpoints and its models agree.

    hidden d -> D, not a whole factor  norm_eps x d / D      the new dimensions add no variance
    the same, RoFormer v2              logit_scale x d / D   its norm has no gain to take it up
    hidden, T5                         logit_scale = the small model's number, d ** -0.5 if null
    head_dim h -> h', RoFormer         rope_base ** (h' / h) where h' / h is not whole, so that the
                                       old pairs keep their frequencies
"""

import dataclasses
from typing import Any

from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig

CARRIED = ("norm_eps", "logit_scale", "softmax_scale", "rope_base")
"""What growth carries over, changed or not."""


def completed(now: ModelConfig, to: ModelConfig) -> ModelConfig:
    """`to` with the numbers that keep the function of `now`, where it does not set its own.

    Left as they are: numbers that differ from the default, from those of `now` and from what is
    needed; and configs of two families.
    """
    if type(now) is not type(to):
        return to
    defaults = {field.name: field.default for field in dataclasses.fields(to)}
    needed = carried(now, to)
    unsaid = {
        key: value
        for key, value in needed.items()
        if getattr(to, key) in (defaults[key], getattr(now, key))
    }
    return dataclasses.replace(to, **unsaid)


def carried(now: ModelConfig, to: ModelConfig) -> dict[str, Any]:
    """Each number of CARRIED that the family has, as it must be at the sizes of `to`."""
    share = now.hidden / max(to.hidden, 1)
    found: dict[str, Any] = {
        "norm_eps": now.norm_eps,
        "logit_scale": now.logit_scale,
        "softmax_scale": now.softmax_scale,
    }
    v2 = isinstance(now, RoFormerConfig) and now.version == 2
    if to.hidden != now.hidden:
        if isinstance(now, T5PegasusConfig) and now.logit_scale is None:
            found["logit_scale"] = now.hidden**-0.5
        if v2:
            found["logit_scale"] = (now.logit_scale or 1.0) * share
        elif times(now.hidden, to.hidden) is None:
            found["norm_eps"] = now.norm_eps * share
    if isinstance(now, RoFormerConfig):
        found["rope_base"] = now.rope_base
        if times(now.head_dim, to.head_dim) is None:
            found["rope_base"] = now.rope_base ** (to.head_dim / now.head_dim)
    return found


def times(old: int, new: int) -> int | None:
    """The whole factor from `old` to `new`, or None where there is none."""
    return new // old if new >= old >= 1 and new % old == 0 else None


def scale_of_scores(config: ModelConfig) -> float:
    """What attention scores are multiplied by."""
    scale = config.softmax_scale
    return float(config.head_dim**-0.5 if scale is None else scale)


def averages(config: ModelConfig) -> bool:
    """Whether its norms take the mean off (LayerNorm): new dimensions then hold the mean."""
    return isinstance(config, CPMConfig) or (
        isinstance(config, RoFormerConfig) and config.version == 1
    )
