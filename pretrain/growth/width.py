"""Wider: one function for each axis of the table, saying what its new entries are.

    axis       new OUTPUT entries (rows)            new INPUT entries (columns)
    ffn        random: units that compute           zero: nobody listens yet
    heads      random q, k, v; random T5 bias       zero in o
    head_dim   random q, v; zero k; q x scale       zero in o
    vocab      the mean of the rows, or masked
    hidden     see below

The zero side gets a gradient from the first step on, the random side from the second; zero on both
sides would never wake up. In head_dim, q takes up the change of the score's scale; under rotary
positions the old pair i goes to pair k i for a whole factor k, where the same base turns it by the
same angles; for other sizes the base changes (configs/grown.py) and every pair stays.

The hidden width by a whole factor k is tiled, the stream becomes [x; ..; x]: what writes it is
repeated, what reads it is divided by k, and the norm before a tied head too, because that head
reads as well. To any other width, pre-norm families and RoFormer v2 are padded:

    T5        [x; 0]         writers zero rows, gains x sqrt(d / D), norm_eps x d / D
    CPM       [x; mean(x)]   writers the mean of their rows, the same gains and norm_eps (LEMON)
    v2        c [x; 0], c = sqrt(D / d): writers x c, readers / c; its norm has no gain

where readers get random new columns, which read zeros of the normalised stream. A copy is locked to
its twin until dropout, noise or data part them (GROWTH of record 4.3).
"""

from configs.grown import averages, scale_of_scores, times
from configs.model import ModelConfig, RoFormerConfig, Tensor, tensors
from pretrain.growth.axis import Fill, Rule, longer
from pretrain.state import State

MASKED = -1e4
"""A logit's bias under which a token is never said: exp of it is 0 in every precision."""


def more_units(state: State, now: ModelConfig, to: ModelConfig, seed: int) -> State:
    """to.ffn units in each feed-forward layer, gated or not."""
    return longer(state, now, to, seed, "ffn", _silent)


def more_heads(state: State, now: ModelConfig, to: ModelConfig, seed: int) -> State:
    """to.heads heads in each attention."""
    return longer(state, now, to, seed, "heads", _silent)


def _silent(tensor: Tensor, dim: int) -> Fill:
    return Fill("zero" if dim == 1 and tensor.op == "linear" else "random")


def larger_heads(state: State, now: ModelConfig, to: ModelConfig, seed: int) -> State:
    """to.head_dim values in each head."""
    ratio = scale_of_scores(now) / scale_of_scores(to)

    def rule(tensor: Tensor, dim: int) -> Fill:
        part = tensor.name.split(".")[-2]
        if part == "q":
            return Fill("random", ratio)
        return Fill("zero" if part in ("k", "o") else "random")

    factor, places = times(now.head_dim, to.head_dim), None
    if isinstance(now, RoFormerConfig) and now.rope_base == getattr(to, "rope_base", None):
        assert factor is not None, "rotary heads of another size need another rope_base"
        pairs = [2 * factor * i for i in range(now.head_dim // 2)]
        at = tuple(place for pair in pairs for place in (pair, pair + 1))
        turned = [t.name for t in tensors(to) if t.name.split(".")[-2] in ("q", "k")]
        places = dict.fromkeys(turned, at)
    return longer(state, now, to, seed, "head_dim", rule, places)


def wider(state: State, now: ModelConfig, to: ModelConfig, seed: int) -> State:
    """to.hidden values in the residual stream: tiled by a whole factor, else padded."""
    factor = times(now.hidden, to.hidden)
    rule = _padded(now, to) if factor is None else _tiled(now, factor)
    return longer(state, now, to, seed, "embed", rule)


def _reads(tensor: Tensor, dim: int) -> bool:
    return dim == 1 and tensor.op == "linear"


def _tiled(now: ModelConfig, factor: int) -> Rule:
    table = tensors(now)
    last = [t.name.rpartition(".")[0] for t in table if t.op == "norm"][-1:]
    before_head = last if any(t.tied_to == "head" for t in table) else []

    def rule(tensor: Tensor, dim: int) -> Fill:
        divided = _reads(tensor, dim) or tensor.name.rpartition(".")[0] in before_head
        return Fill("tile", 1 / factor if divided else 1.0)

    return rule


def _padded(now: ModelConfig, to: ModelConfig) -> Rule:
    root = (to.hidden / now.hidden) ** 0.5
    free_of_gain = not any(t.op == "norm" for t in tensors(now))

    def rule(tensor: Tensor, dim: int) -> Fill:
        if tensor.op == "norm":
            return Fill("zero") if tensor.name.endswith(".bias") else Fill("mean", 1 / root)
        if _reads(tensor, dim):
            return Fill("random", 1 / root if free_of_gain else 1.0)
        return Fill("mean" if averages(now) else "zero", root if free_of_gain else 1.0)

    return rule


def more_words(state: State, now: ModelConfig, to: ModelConfig, seed: int) -> State:
    """to.vocab rows; a new word begins as the mean of all: the old logits stay as they are.

    The log-probability of an old word falls by at most log(1 + new / old).
    """
    return longer(state, now, to, seed, "vocab", lambda tensor, dim: Fill("mean"))


def masked_words(state: State, now: ModelConfig, to: ModelConfig, seed: int) -> State:
    """The same with a bias under which no new word is ever said: for rows that only fill up."""

    def rule(tensor: Tensor, dim: int) -> Fill:
        return Fill("constant", 1.0, MASKED) if tensor.op == "vector" else Fill("mean")

    return longer(state, now, to, seed, "vocab", rule)
