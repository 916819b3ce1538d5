"""How a model grows, and the numbers of its config that must follow so that its function is kept.

    config now + larger config --completed()--> larger config, norm_eps / logit_scale / rope_base
                                                set to what keeps the function

A page for a larger model says sizes. What it leaves at the default, or as it was, is filled in
here; what it sets to something else is left for growth to refuse. `stages:` of a run and `grow`
both read it, so that a run's page, its checkpoints and its models agree.

    hidden d -> D, not a whole factor  norm_eps x d / D      the new dimensions add no variance
    the same, RoFormer v2              logit_scale x d / D   its norm has no gain to take it up
    hidden, Su's form, CPM and T5      norm_eps / k          the stream is divided by sqrt(k)
    hidden, T5                         logit_scale = the small model's number, d ** -0.5 if null
    head_dim h -> h', RoFormer         rope_base ** (h' / h) where h' / h is not whole, so that the
                                       old pairs keep their frequencies
    vocab, new_words: masked           words_said = the old vocabulary: the logits of the others are
                                       -1e4, so that every probability is kept
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig

CARRIED = ("norm_eps", "logit_scale", "softmax_scale", "rope_base", "words_said")
"""What growth carries over, changed or not."""
PRESERVING = ("exact", "su")
"""Methods that keep the function; the others are there to be compared with."""


@dataclass(frozen=True)
class Growing:
    """How a model is enlarged: a stage's `grow:`, and the options of the command."""

    method: Literal["exact", "su", "stack", "bert2bert", "bert2bert_aki", "random"] = "exact"
    """exact and su (the stream divided by sqrt(k)) keep the function; stack (layers again),
    bert2bert (copies) and random (fresh layers) do not, they are for comparison (不保持函数)."""
    added: Literal["random", "copied"] = "random"
    """New units and heads: random ones that nobody reads yet, or copies that share the reading."""
    noise: float = 0.0
    """Noise on what reads copies, a share of its size; it adds up to zero (打破对称)."""
    split: float = 0.5
    """The first copy's share of what two copies are read with; 0.5 leaves them equal."""
    new_words: Literal["mean", "masked"] = "mean"
    """New rows of the vocabulary begin as the mean of all; masked: and are not said before a stage
    (or page) sets words_said to the whole vocabulary (新词先屏蔽)."""
    rewarm_steps: int = 0
    """Steps over which the learning rate of what was divided among copies goes from the exact
    rule's (1 / k of the others') to that of the others; 0: it stays (恢复学习率)."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if not 0 <= self.noise <= 1:
            found.append(f"noise: is {self.noise}, must lie in [0, 1]")
        if not 0.5 <= self.split < 1:
            found.append(f"split: is {self.split}, must lie in [0.5, 1)")
        if self.rewarm_steps < 0:
            found.append(f"rewarm_steps: is {self.rewarm_steps}, must not be negative")
        return found


EXACT = Growing()


def completed(now: ModelConfig, to: ModelConfig, how: Growing = EXACT) -> ModelConfig:
    """`to` with the numbers that keep the function of `now`, where it does not set its own.

    Left as they are: numbers that differ from the default, from those of `now` and from what is
    needed; and configs of two families.
    """
    if type(now) is not type(to):
        return to
    defaults = {field.name: field.default for field in dataclasses.fields(to)}
    needed = carried(now, to, how)
    unsaid = {
        key: value
        for key, value in needed.items()
        if getattr(to, key) in (defaults[key], getattr(now, key))
    }
    return dataclasses.replace(to, **unsaid)


def carried(now: ModelConfig, to: ModelConfig, how: Growing = EXACT) -> dict[str, Any]:
    """Each number of CARRIED that the family has, as it must be at the sizes of `to`."""
    share = now.hidden / max(to.hidden, 1)
    found: dict[str, Any] = {
        "norm_eps": now.norm_eps,
        "logit_scale": now.logit_scale,
        "softmax_scale": now.softmax_scale,
        "words_said": None if said(now) == now.vocab else now.words_said,
    }
    if to.vocab > now.vocab and how.new_words == "masked":
        found["words_said"] = said(now)
    v2 = isinstance(now, RoFormerConfig) and now.version == 2
    if to.hidden != now.hidden:
        if isinstance(now, T5PegasusConfig) and now.logit_scale is None:
            found["logit_scale"] = now.hidden**-0.5
        if v2:
            found["logit_scale"] = (now.logit_scale or 1.0) * share
        elif how.method == "su" or (
            times(now.hidden, to.hidden) is None and how.method in ("exact", "stack")
        ):
            found["norm_eps"] = now.norm_eps * share
    if isinstance(now, RoFormerConfig):
        found["rope_base"] = now.rope_base
        if times(now.head_dim, to.head_dim) is None:
            found["rope_base"] = now.rope_base ** (to.head_dim / now.head_dim)
    return found


def times(old: int, new: int) -> int | None:
    """The whole factor from `old` to `new`, or None where there is none."""
    return new // old if new >= old >= 1 and new % old == 0 else None


def said(config: ModelConfig) -> int:
    """How many words a head can say: the vocabulary without what `words_said` masks."""
    return config.vocab if config.words_said is None else config.words_said


def scale_of_scores(config: ModelConfig) -> float:
    """What attention scores are multiplied by."""
    scale = config.softmax_scale
    return float(config.head_dim**-0.5 if scale is None else scale)


def averages(config: ModelConfig) -> bool:
    """Whether its norms take the mean off (LayerNorm): new dimensions then hold the mean."""
    return isinstance(config, CPMConfig) or (
        isinstance(config, RoFormerConfig) and config.version == 1
    )
