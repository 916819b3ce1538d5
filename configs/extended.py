"""What becomes of a model's config when its rows get longer: `extend`, and stages with a seq_len.

    config + seq_len + Extend --extended()--> config with position_table | rope | bucket_spans
                              --promise()--> up to how many tokens the logits stay what they were

    learned positions   hierarchical   Su's decomposition; the table stays the parameter
      (CPM, BERT)       interpolated   the table stretched: BERT's by each document that is longer,
                                       CPM's for all alike (a document's length is its future)
                        hierarchical_rows, random, last, repeat: rows are added to the table
    rotary (RoFormer)   the methods of configs/positions.py, static or dynamic; log n
    T5's buckets        buckets        logarithmic buckets appended, each stack by its own rule

No tensor is touched here; pretrain/growth/positions.py does that.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from configs.load import ConfigError, from_dict, to_dict
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig, longest_row
from configs.positions import PositionTable, Rope, RopeMethod

ROWS = ("hierarchical_rows", "random", "last", "repeat")
"""Methods that add rows to a table of positions."""
LEARNED = ("hierarchical", "interpolated", *ROWS)
ROTARY = get_args(RopeMethod)
Method = Literal[
    "auto", "interpolated", "hierarchical", "hierarchical_rows", "random", "last", "repeat",
    "linear", "ntk", "ntk_fixed", "ntk_mixed", "by_parts", "yarn", "rerope", "leaky_rerope",
    "buckets", "as_it_is",
]  # fmt: skip


READS = {"hierarchical": ("alpha",), "rerope": ("window",), "leaky_rerope": ("window", "leak")}
"""Which of their numbers the methods read."""


@dataclass(frozen=True)
class Extend:
    """How a model is taken to longer rows."""

    method: Method = "auto"
    """auto: hierarchical (CPM), interpolated (BERT), rerope with log n (rotary), buckets (T5). rows
    that are added to a table: hierarchical_rows, random, last (copies of the last), repeat (the
    table again). as_it_is: nothing but log n."""
    alpha: float = 0.0
    """Of hierarchical: see position_table.alpha; 0: the model's own, else 0.4."""
    dynamic: bool | None = None
    """Of the methods that change rotary frequencies, of interpolated: by each document's length, so
    that short ones stay as they were; false: for all alike; null: the model's own, else true.
    ReRoPE needs no length, and CPM must not know it: false."""
    window: int = 0
    """Of ReRoPE: distances beyond it count as it; 0: the model's own, else half of the length that
    it knew."""
    leak: float = 0.0
    """Of leaky ReRoPE: tokens beyond the window that count as one; 0: the model's own, else 16."""
    log_n: bool | None = None
    """Scores x max(1, log n / log known); null: with ReRoPE only."""
    known: int | None = None
    """The length that the model learnt on; null: its positions, or the run's rows (原训练长度)."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        numbers = {"alpha": self.alpha, "window": self.window, "leak": self.leak}
        found = [f"{k}: is {v}, must not be negative" for k, v in numbers.items() if not v >= 0]
        if self.known is not None and self.known < 2:
            found.append(f"known: is {self.known}, must be at least 2")
        return found


def extended(now: ModelConfig, seq_len: int, how: Extend, known: int | None = None) -> ModelConfig:
    """The config of the model that reads rows of `seq_len` tokens.

    known: the length of the rows so far, where neither `how` nor the model says it. Raises
    ConfigError with a sentence for a method that the model cannot use.
    """
    if seq_len < 2:
        raise ConfigError(f"seq_len: is {seq_len}, must be at least 2 (至少为二)")
    given, how = how, resolved(now, how)
    if unread := _unread(now, how.method, given):
        raise ConfigError(unread)
    room = longest_row(now)
    rope = getattr(now, "rope", None)
    length = rope.known if rope else how.known or room or known
    if room is not None and seq_len <= room and not how.log_n:
        raise ConfigError(
            f"seq_len: is {seq_len}, the model has {room} positions already (无需扩展)"
        )
    if length is None and (how.log_n or not isinstance(now, T5PegasusConfig)):
        raise ConfigError(
            "known: must be given, the checkpoint does not say on rows of how many tokens it was "
            "trained (--known, 原训练长度)"
        )
    if room is not None:
        to = _learned(now, seq_len, how)
    elif isinstance(now, T5PegasusConfig):
        to = _buckets(now, seq_len) if how.method == "buckets" else now
    else:
        to = _rotary_config(now, seq_len, how, length or 0)
    if how.log_n and not now.log_n:
        to = dataclasses.replace(to, log_n=length or 0, log_n_least=1.0)
    checked = from_dict(cast(Any, ModelConfig), to_dict(to), "model")
    return cast(ModelConfig, checked)


def resolved(now: ModelConfig, how: Extend) -> Extend:
    """`how` with what it leaves open decided, and refused where the family has no such method."""
    allowed = LEARNED if longest_row(now) is not None else ROTARY
    allowed = ("buckets",) if isinstance(now, T5PegasusConfig) else allowed
    method = how.method
    if method == "auto":
        method = cast(Method, "rerope" if allowed is ROTARY else allowed[0])
        if allowed is LEARNED and not isinstance(now, CPMConfig):
            method = "interpolated"
    if method not in (*allowed, "as_it_is"):
        raise ConfigError(
            f"method: is {method}, this {now.family} can be extended by {', '.join(allowed)} "
            "(该模型不能用此方法)"
        )
    by_itself = method in ("rerope", "leaky_rerope")
    log_n = (by_itself if how.log_n is None else how.log_n) and not now.log_n
    table, rope = getattr(now, "position_table", None), getattr(now, "rope", None)
    own = table or rope
    dynamic = own.dynamic if own is not None and how.dynamic is None else how.dynamic is not False
    return dataclasses.replace(
        how,
        method=method,
        log_n=log_n,
        alpha=how.alpha or (table.alpha if table else 0.4),
        leak=how.leak or (rope.leak if rope else 16.0),
        window=how.window or (rope.window if rope else 0),
        dynamic=dynamic and not by_itself and not isinstance(now, CPMConfig),
    )


def _unread(now: ModelConfig, method: Method, given: Extend) -> str | None:
    """What is said of a number that the method does not read; `dynamic: false` is true of all."""
    read = READS.get(method, ())
    unread = [key for key in ("alpha", "window", "leak") if getattr(given, key) and key not in read]
    table = method == "interpolated" and not isinstance(now, CPMConfig)
    by_length = table or (method in ROTARY and method not in READS)
    if given.dynamic and not by_length:
        unread.append("dynamic")
    if not unread:
        return None
    value = json.dumps(getattr(given, unread[0]))
    of = [name for name, keys in READS.items() if unread[0] in keys]
    why = f", {' and '.join(of)} would" if of else f" in a {now.family}"
    return (
        f"{unread[0]}: is {value}, which {method} does not read{why}; leave it out (该方法不读此项)"
    )


def _learned(now: ModelConfig, seq_len: int, how: Extend) -> ModelConfig:
    assert isinstance(now, CPMConfig | RoFormerConfig)
    table, rows = now.position_table, longest_row(now) or 0
    if how.method == "as_it_is" or how.method in ROWS:
        if table is not None and table.method == "interpolated":
            raise ConfigError(_fixed("position_table", "interpolated", how.method))
        if how.method == "as_it_is" and seq_len > rows:
            raise ConfigError(
                f"seq_len: is {seq_len}, as_it_is the model has {rows} positions (位置不足)"
            )
        kept = table if how.method == "as_it_is" else None
        return dataclasses.replace(now, positions=max(seq_len, rows), position_table=kept)
    key = "dynamic" if how.method == "interpolated" else "alpha"  # what the method reads
    if table is not None and table.method == how.method:
        if getattr(how, key) != getattr(table, key):
            raise ConfigError(_own(key, getattr(how, key), getattr(table, key)))
        return dataclasses.replace(now, positions=seq_len)
    if table is not None and table.method == "interpolated":
        raise ConfigError(_fixed("position_table", "interpolated", how.method))
    made = PositionTable(how.method, rows, **{key: getattr(how, key)})  # type: ignore[arg-type]
    return dataclasses.replace(now, positions=seq_len, position_table=made)


def _rotary_config(now: ModelConfig, seq_len: int, how: Extend, known: int) -> ModelConfig:
    assert isinstance(now, RoFormerConfig)
    if how.method == "as_it_is":
        return now
    if seq_len <= known:
        raise ConfigError(f"seq_len: is {seq_len}, the model knows {known} already (无需扩展)")
    windowed = how.method in ("rerope", "leaky_rerope")
    dynamic = bool(how.dynamic)
    factor = 1.0 if dynamic or windowed else seq_len / known
    window = (how.window or max(known // 2, 1)) if windowed else 0
    rope = Rope(how.method, known, factor, dynamic, window, how.leak)  # type: ignore[arg-type]
    before = now.rope
    if before is not None and before.method != rope.method:
        raise ConfigError(_fixed("rope", before.method, how.method))
    if before is not None and before.dynamic != dynamic:
        raise ConfigError(_own("dynamic", dynamic, before.dynamic))
    return dataclasses.replace(now, rope=rope)


def _fixed(section: str, old: str, new: str) -> str:
    return (
        f"method: is {new}, the model was extended by {old} before ({section}.method), which no "
        f"other can take over; go on with {old} (只能沿用原方法)"
    )


def _own(key: str, new: Any, old: Any) -> str:
    new, old = (json.dumps(value) for value in (new, old))
    return f"{key}: is {new}, the model was extended with {old} before; leave it out (须沿用原值)"


def _buckets(now: T5PegasusConfig, seq_len: int) -> T5PegasusConfig:
    """As many spans of logarithmic buckets as let both stacks tell distances below seq_len."""
    plain = 2 * now.buckets // (1 + now.bucket_spans)
    decoder = plain // 2  # of one direction; its first half is exact, one bucket a distance
    reach = math.log(seq_len / decoder) / math.log(now.max_distance / decoder)
    spans = max(now.bucket_spans, math.ceil(reach - 1e-9))
    return dataclasses.replace(now, buckets=plain * (1 + spans) // 2, bucket_spans=spans)


def promise(now: ModelConfig, to: ModelConfig, seq_len: int) -> int:
    """Up to how many tokens a row's logits are what they were; 0: at no length."""
    longest = longest_row(now) or seq_len
    if to.log_n and not now.log_n:
        longest = min(longest, to.log_n)
    table = getattr(to, "position_table", None)
    if table and table.method == "interpolated" and not table.dynamic and longest < seq_len:
        return 0
    rope, before = getattr(to, "rope", None), getattr(now, "rope", None)
    if rope is None or rope == before:
        return longest
    if rope.windowed:
        return min(longest, rope.window, before.window if before else rope.window)
    if rope.dynamic:
        return longest if before else min(longest, rope.known)
    return longest if rope.factor == 1.0 else 0
