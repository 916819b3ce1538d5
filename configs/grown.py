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
    head_dim h -> h', RoFormer         rope_base ** (h' / h) where h' / h is not whole (or rope is
                                       by_parts or yarn), so that old pairs keep their frequencies
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
GROWS = ("heads", "head_dim", "ffn", "hidden", "vocab", "layers")
"""The sizes that can be enlarged, in the order of application: new layers have their full size, so
that noise on a silent copy tells the copies in it apart too."""
MATRICES = ("heads", "head_dim", "ffn", "hidden")
"""Those by which the matrices of a layer become larger."""
FREE = ("dropout", "attention_dropout", "init_std")
"""What may differ because it changes neither a tensor nor the function at inference."""
LARGEST_EPS_BEHIND = 1e-12
"""Layers behind a post-norm change the function by about their norms' eps (proof_places.py)."""
BY_PAIR = ("ntk", "ntk_fixed", "ntk_mixed")
"""Forms of longer rotary positions in which a pair's frequency depends on the number of pairs."""
BY_TURNS = ("by_parts", "yarn")
"""Those in which it depends on how often the pair turns: the old base ** (h' / h) keeps it."""


@dataclass(frozen=True)
class Growing:
    """How a model is enlarged: a stage's `grow:`, and the options of the command."""

    method: Literal["exact", "su", "stack", "bert2bert", "bert2bert_aki", "random"] = "exact"
    """exact and su (the stream divided by sqrt(k)) keep the function; stack (layers again),
    bert2bert (copies) and random (fresh layers) do not, they are for comparison (不保持函数)."""
    added: Literal["random", "copied", "paired"] = "random"
    """New units and heads: random ones that nobody reads yet, copies that share the reading, or
    random ones in twos that are read with opposite signs (随机、副本，或成对抵消)."""
    noise: float = 0.0
    """Noise on what reads copies, a share of its size; it adds up to zero (打破对称)."""
    split: float = 0.5
    """The first copy's share of what two copies are read with; 0.5 leaves them equal."""
    new_layers: Literal["silent", "paired"] = "silent"
    """silent: copies whose outputs are zero; paired: fresh ones whose units cancel each other in
    twos, which learn at full size from the first step (新层：输出为零，或成对抵消)."""
    new_words: Literal["mean", "masked"] = "mean"
    """New rows of the vocabulary begin as the mean of all; masked: and are not said before a stage
    (or page) sets words_said to the whole vocabulary (新词先屏蔽)."""
    rewarm_steps: int = 0
    """Steps over which the learning rate of what was divided among copies goes from the exact
    rule's (1 / k of the others') to that of the others; 0: it stays, or goes along with an earlier
    way back that is not over. Rules that size their steps by the matrix divide no rate, only the
    decay (恢复学习率)."""

    @property
    def draws_layers(self) -> bool:
        """Whether new layers are fresh ones; else they are copies of old ones."""
        return self.method == "random" or (
            self.method in PRESERVING and self.new_layers == "paired"
        )

    @property
    def draws_copies(self) -> bool:
        """Whether it is drawn which old unit a new one is a copy of (bert2BERT)."""
        return self.method in ("bert2bert", "bert2bert_aki")

    @property
    def stacks_layers(self) -> bool:
        """Whether new layers are the old ones once more, from the first on."""
        return self.method == "stack" or self.draws_copies

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if not 0 <= self.noise <= 1:
            found.append(f"noise: is {self.noise}, must lie in [0, 1]")
        if not 0.5 <= self.split < 1:
            found.append(f"split: is {self.split}, must lie in [0.5, 1)")
        if self.rewarm_steps < 0:
            found.append(f"rewarm_steps: is {self.rewarm_steps}, must not be negative")
        if self.method == "random" and (self.added, self.noise, self.split) != ("random", 0, 0.5):
            found.append(
                "method: random draws all that is new; leave added, noise and split out "
                "(全部随机，去掉这些选项)"
            )
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
        turns = now.rope is not None and now.rope.method in BY_TURNS
        if now.positions is None and (turns or times(now.head_dim, to.head_dim) is None):
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


def rescales(now: ModelConfig, to: ModelConfig, how: Growing) -> bool:
    """Whether the exact rule gives a tensor another learning rate: where copies share what reads
    them, and where a wider stream or other scores are made up for."""
    if scale_of_scores(now) != scale_of_scores(to):
        return True
    if how.method not in (*PRESERVING, "stack"):
        return False
    copied = how.added == "copied" or how.method == "su"
    units = [(now.ffn, to.ffn), (now.heads, to.heads)]
    return to.hidden > now.hidden or (
        copied and any(new > old and times(old, new) is not None for old, new in units)
    )


def idle(
    now: ModelConfig, to: ModelConfig, how: Growing, divided: bool, left: int | None = None
) -> list[str]:
    """The options that change nothing between these sizes, and copies that nothing will part, a
    sentence each.

    divided: whether any learning rate is, by this growth or an earlier one; left: updates from here
    to the end of the run, where there is one.
    """
    more = {size for size in GROWS if getattr(to, size) > getattr(now, size)}
    drawn, units = how.draws_copies, bool(more & {"ffn", "heads"})
    tiled = "hidden" in more and (drawn or times(now.hidden, to.hidden) is not None)
    inner = units and (drawn or how.method == "su" or how.added == "copied")
    copies = tiled or inner
    begun = "layers" in more and how.method in PRESERVING
    silent = begun and how.new_layers == "silent"
    found = []
    if how.added != EXACT.added and not (units and how.method in ("exact", "stack")):
        why = "neither ffn nor heads grow" if not units else f"{how.method} copies in its own way"
        found.append(f"added: {how.added}, but {why}")
    if how.noise and not (copies or silent):
        found.append(f"noise: {how.noise}, but nothing is a copy (of layers only silent ones are)")
    if how.split != EXACT.split and (drawn or not copies):
        found.append(f"split: {how.split}, but no copies share a reading by it")
    elif how.split != EXACT.split and inner and not tiled and silent and not how.noise:
        found.append(
            f"split: {how.split}, but silent layers read nothing; noise parts copies there"
        )
    if how.new_layers != EXACT.new_layers and not begun:
        why = f"{how.method} adds its own" if "layers" in more else "there are no new layers"
        found.append(f"new_layers: {how.new_layers}, but {why}")
    if how.new_words == "masked" and "vocab" not in more:
        found.append("new_words: masked, but there are no new words")
    if how.rewarm_steps and not divided:
        found.append(f"rewarm_steps: {how.rewarm_steps}, but no learning rate was divided")
    found = [f"{sentence} (该选项不起作用)" for sentence in found]
    # Copies are parted by what falls on each of them alone: dropout of the stream on its width, of
    # probabilities on heads, of units in T5 only; fresh layers read every row of the stream alone.
    # bert2BERT's knowledge of the next layer makes other units, of the same width.
    units_drop = to.dropout if isinstance(to, T5PegasusConfig) else 0.0
    twins = inner and how.method != "bert2bert_aki"
    locked = {
        "hidden": tiled
        and how.method != "random"
        and not (to.dropout or (begun and how.draws_layers)),
        "ffn": twins and not units_drop,
        "heads": twins and not to.attention_dropout,
    }
    alike = " and ".join(size for size in locked if size in more and locked[size])
    if alike and not how.noise and (drawn or how.split == EXACT.split):
        mend = "set noise (0.05)" + ("" if drawn else " or split (0.7)")
        found.append(
            f"noise: 0, and no dropout falls between the copies of {alike}: they stay each other's "
            f"equals, so that the larger model remains the small one there; {mend} (副本永远相同)"
        )
    if divided and left is not None and how.rewarm_steps > left:
        why = f"the run ends {left} steps later"
        found.append(f"rewarm_steps: {how.rewarm_steps}, but {why} (学习率来不及恢复)")
    return found


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
            elif how.new_words == "masked" and said(to) > said(now) and to.vocab > now.vocab:
                nearest[key] = needed[key]
                wrong.append(
                    f"words_said is {new}, new_words masked says {needed[key]}: leave one out"
                )
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
        rope = now.rope.method if now.rope is not None else ""
        if rope in BY_PAIR and to.head_dim > now.head_dim:
            nearest["head_dim"] = now.head_dim
            wrong.append(
                f"head_dim cannot grow under rope.method {rope}, whose frequencies depend on it; "
                "grow the model before it is extended"
            )
    if how.method == "su":
        wrong += _repeated(now, to, nearest)
    units = to.ffn > now.ffn or to.heads > now.heads
    silent = to.layers > now.layers and how.method == "exact" and not how.draws_layers
    if how.added == "paired" and units and silent:
        nearest["layers"] = now.layers
        wrong.append(
            "grow.added: paired in layers that say nothing, whose twins would stay alike; take "
            "grow.new_layers: paired too"
        )
    if not wrong:
        return None
    said_so = {key: "null" if value is None else value for key, value in nearest.items()}
    sizes = ", ".join(f"{key}={value}" for key, value in said_so.items())
    return (
        f"model: {'; '.join(wrong)}; {', '.join(GROWS)} can grow, and only upwards: the nearest "
        f"target that can be reached has {sizes} (只能加大，最近的可行尺寸见上)"
    )


def _repeated(now: ModelConfig, to: ModelConfig, nearest: dict[str, Any]) -> list[str]:
    """What Su's form cannot do; `nearest` is corrected."""
    wrong = []
    if to.hidden > now.hidden and times(now.hidden, to.hidden) is None:
        nearest["hidden"] = now.hidden * max(1, round(to.hidden / now.hidden))
        wrong.append(
            f"hidden {now.hidden} cannot become {to.hidden} by method su, which repeats it"
        )
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
            f"about as much, at most {LARGEST_EPS_BEHIND:g} is granted"
        )
    return wrong
