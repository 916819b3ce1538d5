"""Wider: one function for each axis of the table, saying what its new entries are.

    axis       new OUTPUT entries (rows)            new INPUT entries (columns)
    ffn        random: units that compute           zero: nobody listens yet
    heads      random q, k, v; random T5 bias       zero in o
    both, `added: paired`: random in twos           opposite, so that a pair's two terms cancel
    head_dim   random q, v; zero k; q x scale       zero in o
    vocab      the mean of the rows, of its pieces' rows for a word made of several
    hidden     see below

The zero side gets a gradient from the first step on, the random side from the second; zero on both
sides would never wake up. Of pairs both sides get one from the first (depth.py); two heads of a
pair are dropped apart by dropout of attention, which adds noise of mean zero in training.

In head_dim, q takes up the change of the score's scale; under rotary positions the old pair i goes
to pair k i for a whole factor k, where the same base turns it by the same angles; for other sizes
the base changes (configs/grown.py) and every pair stays.

The hidden width by a whole factor k is tiled, the stream becomes [x; ..; x]: what writes it is
repeated, what reads it is divided by k, and the norm before a tied head too, because that head
reads as well. To any other width, pre-norm families and RoFormer v2 are padded:

    T5        [x; 0]         writers zero rows, gains x sqrt(d / D), norm_eps x d / D
    CPM       [x; mean(x)]   writers the mean of their rows, the same gains and norm_eps (LEMON)
    v2        c [x; 0], c = sqrt(D / d): writers x c, readers / c; its norm has no gain

where readers get random new columns, which read zeros of the normalised stream.

Tiled width, and units and heads that are `copied`, consist of copies (copies.py): locked to each
other until dropout, noise or an unequal split parts them. Other methods, for comparison:

    su           hidden by a whole factor k: what a reader or a writer has / sqrt(k), norm_eps / k,
                 gains / sqrt(k) (Su, kexue.fm/archives/8444, its second feed-forward bias and its
                 eps put right); units copied. CPM and T5. Preserving.
    bert2bert    hidden, units, heads as copies drawn at random, readers divided by their number;
                 its norms then see other statistics: NOT preserving (Chen et al., ACL 2022; FPI)
    bert2bert_aki  the same with the rows that leave a layer's axis taken from the layer above
    random       everything new is random on both sides: NOT preserving
"""

from configs.grown import Growing, averages, scale_of_scores, times
from configs.model import ModelConfig, RoFormerConfig, Tensor, tensors
from pretrain.growth.axis import Fill, Rule, longer
from pretrain.growth.copies import Copies, drawn, evenly
from pretrain.mixing import Mixture
from pretrain.state import State


def more_units(state: State, now: ModelConfig, to: ModelConfig, seed: int, how: Growing) -> State:
    """to.ffn units in each feed-forward layer, gated or not."""
    rule = _inner(_copies(now.ffn, to.ffn, "ffn", seed, how), how)
    return longer(state, now, to, seed, "ffn", rule)


def more_heads(state: State, now: ModelConfig, to: ModelConfig, seed: int, how: Growing) -> State:
    """to.heads heads in each attention."""
    rule = _inner(_copies(now.heads, to.heads, "heads", seed, how), how)
    return longer(state, now, to, seed, "heads", rule)


def _copies(old: int, new: int, axis: str, seed: int, how: Growing) -> Copies:
    if how.draws_copies:
        return drawn(old, new, seed, axis)
    return evenly(old, new, how.split)


def _inner(copies: Copies, how: Growing) -> Rule:
    """An axis within a layer: what leaves it is read by the layer's output."""
    copied = how.added == "copied" or how.method == "su" or how.draws_copies

    def rule(tensor: Tensor, dim: int) -> Fill:
        reads = _reads(tensor, dim)
        if how.added == "paired" and not copied:
            return Fill("paired", divided=reads)
        if not copied:
            return Fill("zero" if reads and how.method != "random" else "random")
        if reads:
            return Fill("copies", copies=copies, divided=True, noise=how.noise)
        return Fill("copies", copies=copies, above=how.method == "bert2bert_aki" and dim == 0)

    return rule


def larger_heads(state: State, now: ModelConfig, to: ModelConfig, seed: int, how: Growing) -> State:
    """to.head_dim values in each head."""
    ratio = scale_of_scores(now) / scale_of_scores(to)

    def rule(tensor: Tensor, dim: int) -> Fill:
        part = tensor.name.split(".")[-2]
        if part == "q":
            return Fill("random", ratio)
        silent = part in ("k", "o") and how.method != "random"
        return Fill("zero" if silent else "random")

    factor, places = times(now.head_dim, to.head_dim), None
    rotary = isinstance(now, RoFormerConfig) and now.positions is None
    if rotary and getattr(now, "rope_base", None) == getattr(to, "rope_base", None):
        assert factor is not None, "rotary heads of another size need another rope_base"
        pairs = [2 * factor * i for i in range(now.head_dim // 2)]
        at = tuple(place for pair in pairs for place in (pair, pair + 1))
        turned = [t.name for t in tensors(to) if t.name.split(".")[-2] in ("q", "k")]
        places = dict.fromkeys(turned, at)
    return longer(state, now, to, seed, "head_dim", rule, places)


def wider(state: State, now: ModelConfig, to: ModelConfig, seed: int, how: Growing) -> State:
    """to.hidden values in the residual stream: tiled by a whole factor, else padded."""
    copies = _copies(now.hidden, to.hidden, "embed", seed, how)
    if how.method == "random":
        rule: Rule = _filled
    elif how.draws_copies or copies.times is not None:
        rule = _tiled(now, copies, how)
    else:
        rule = _padded(now, to)
    return longer(state, now, to, seed, "embed", rule)


def _filled(tensor: Tensor, dim: int) -> Fill:
    return Fill("mean" if tensor.op == "norm" else "random")


def _reads(tensor: Tensor, dim: int) -> bool:
    return dim == 1 and tensor.op == "linear"


def _tiled(now: ModelConfig, copies: Copies, how: Growing) -> Rule:
    """The stream as copies of itself: s [x; ..; x], s = 1, for Su's form k ** -0.5."""
    table = tensors(now)
    last = [t.name.rpartition(".")[0] for t in table if t.op == "norm"][-1:]
    before_head = last if any(t.tied_to == "head" for t in table) else []
    root = (copies.times or 1) ** 0.5 if how.method == "su" else 1.0

    def rule(tensor: Tensor, dim: int) -> Fill:
        module = tensor.name.rpartition(".")[0]
        if _reads(tensor, dim):
            return Fill("copies", root, copies=copies, divided=True, noise=how.noise)
        divided = module in before_head and how.method != "su"
        return Fill("copies", 1 / root, copies=copies, divided=divided)

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


def more_words(
    state: State,
    now: ModelConfig,
    to: ModelConfig,
    seed: int,
    how: Growing,
    pieces: Mixture | None = None,
) -> State:
    """to.vocab rows: the first are means of their `pieces`, the others of all. Old logits stay.

    The log-probability of an old word falls, where new ones are means of all by at most log(1 + new
    / old); not at all where they are masked (`words_said`; pretrain/models/words.py).
    """
    return longer(state, now, to, seed, "vocab", lambda tensor, dim: Fill("mean", pieces=pieces))
