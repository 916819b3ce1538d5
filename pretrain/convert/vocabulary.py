"""A checkpoint taken to another vocabulary: tokens that both have keep their rows, new ones begin
as the mean of what the old vocabulary makes of their text.

    old tokens, new tokens --plan--> for each new token: old rows and their weights
    weights/embed.tokens, head (T5), head.bias (RoFormer v1): every tensor with the axis `vocab`
       --applied--> the same tensor with the new rows; all others as they are, moments dropped

bert4keras' keep_tokens and compound_tokens (Su; WoBERT began so: kexue.fm/archives/7758). For
published() the plan is T5 PEGASUS' own way from mT5, order of the ids included (its train.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from configs.load import to_dict
from configs.model import ModelConfig, RoFormerConfig, shape, tensors
from pretrain.convert.rules import ConversionError, masked
from pretrain.labelled import label_names
from pretrain.mixing import Mixture, mixed
from pretrain.state import Entry, State

PUBLISHED_HEAD = 106
"""Entries of BERT's vocabulary that T5 PEGASUS keeps in place: [PAD], [unused1] ... <S>, <T>."""
MT5_UNKNOWN = 2
"""mT5's <unk>: what those begin as, and what a piece stands for that no token is."""


@dataclass(frozen=True)
class Vocabulary:
    """What is asked of a tokenizer."""

    style: Literal["##", "\u2581"]
    """How pieces are spelt: ## where one goes on in a word, or ▁ where one begins it."""
    tokens: tuple[str, ...]
    """The spelling of each id."""
    roles: Mapping[str, int]
    """unknown, pad, mask, bos, eod -> id, where there is one; unknown is always there."""
    controls: Mapping[str, int]
    """Spelling -> id of all tokens that stand for no text."""
    text: Callable[[int], str]
    """The text of a token."""
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    """Ids of texts."""


@dataclass(frozen=True)
class Plan(Mixture):
    """Where the row of each new token comes from."""

    kept: tuple[bool, ...]
    """Whether it is a token of the old vocabulary too: the copy of its row."""

    def said(self) -> dict[str, int]:
        """How many tokens came from where."""
        copies = sum(len(rows) == 1 for rows in self.rows) - sum(self.kept)
        return {
            "tokens": len(self.rows),
            "kept_tokens": sum(self.kept),
            "means": sum(len(rows) > 1 for rows in self.rows),
            "copies_of_another": copies,
        }


def plan(old: Vocabulary, new: Vocabulary, by_length: bool = False) -> Plan:
    """Kept tokens by their spelling, control tokens by what they are for, the others by pieces.

    by_length: a piece weighs as many characters as it has, otherwise all weigh the same.
    """
    ids = {token: number for number, token in enumerate(old.tokens)}
    roles = {number: role for role, number in new.roles.items()}
    found: dict[int, int] = {}
    unknown = old.roles["unknown"]
    rest: list[int] = []
    without: set[int] = set()
    for number, token in enumerate(new.tokens):
        if number in roles or token in new.controls:
            same = old.roles.get(roles.get(number, ""), old.controls.get(token))
            if same is None:
                without.add(number)
            else:
                found[number] = same
            continue
        texts = (ids[way] for way in spellings(token, old.style, new.style) if way in ids)
        same = next((i for i in texts if old.tokens[i] not in old.controls), None)
        if same is None:
            rest.append(number)
        else:
            found[number] = same
    pieces = dict(zip(rest, old.encode([new.text(number) for number in rest]), strict=True))
    rows = []
    for number in range(len(new.tokens)):
        one = (found[number],) if number in found else tuple(int(i) for i in pieces.get(number, ()))
        rows.append(one or (unknown,))
    weights = [_weights(one, old, by_length) for one in rows]
    kept = tuple(number in found for number in range(len(rows)))
    return Plan(tuple(rows), tuple(weights), kept)


def spellings(token: str, old: str, new: str) -> tuple[str, ...]:
    """How a token of the new vocabulary may be spelt in the old one, the likeliest way first."""
    if old == new:
        return (token,)
    if old == "\u2581":
        return (token[2:],) if token[:2] == "##" and len(token) > 2 else ("\u2581" + token, token)
    bare = token.removeprefix("\u2581")
    # A single hanzi is a word to BERT; its ##hanzi are never written.
    return (bare,) if bare != token else (bare, "##" + bare)


def _weights(rows: Sequence[int], old: Vocabulary, by_length: bool) -> tuple[float, ...]:
    sizes = [
        max(len(old.tokens[i].removeprefix("##").replace("\u2581", "")), 1) if by_length else 1
        for i in rows
    ]
    return tuple(size / sum(sizes) for size in sizes)


def published(old: Vocabulary, tokens: Sequence[str]) -> tuple[list[str], Plan]:
    """T5 PEGASUS from mT5: the tokens in their new order, and where their rows come from.

    tokens: the vocabulary that was counted, in its order, BERT's first entries at its head. First
    those (rows of <unk>), then what mT5's sentencepiece has, then the rest as means of its pieces,
    a piece that stands for no kept token counting as <unk>.
    """
    if len(tokens) <= PUBLISHED_HEAD or tokens[0] != "[PAD]":
        raise ConversionError(
            f"the vocabulary has {len(tokens)} tokens and begins with '{(*tokens, '')[0]}'; this "
            f"recipe needs BERT's first {PUBLISHED_HEAD} entries at its head (词表开头不符)"
        )
    ids = {token: number for number, token in enumerate(old.tokens)}
    head, rest = list(tokens[:PUBLISHED_HEAD]), []
    found: dict[str, int] = {}
    for token in tokens[PUBLISHED_HEAD:]:
        ways = (ids.get(way, MT5_UNKNOWN) for way in spellings(token, "\u2581", "##"))
        same = next((number for number in ways if number != MT5_UNKNOWN), None)
        if same is None:
            rest.append(token)
        else:
            found[token] = same
    kept = {MT5_UNKNOWN, *found.values()}
    pieces = [
        tuple(int(i) if int(i) in kept else MT5_UNKNOWN for i in one) or (MT5_UNKNOWN,)
        for one in old.encode(rest)
    ]
    rows = [(MT5_UNKNOWN,)] * len(head) + [(row,) for row in found.values()] + pieces
    weights = tuple((1 / len(one),) * len(one) for one in rows)
    place = range(len(rows))
    was = tuple(len(head) <= number < len(head) + len(found) for number in place)
    return [*head, *found, *rest], Plan(tuple(rows), weights, was)


def through(made: Plan, row_of: Sequence[int]) -> Plan:
    """The plan where piece i of the old vocabulary is row `row_of[i]` of the table (a pruned
    sentencepiece on the whole model's weights)."""
    rows = tuple(tuple(int(row_of[i]) for i in one) for one in made.rows)
    return replace(made, rows=rows)


def applied(state: State, config: ModelConfig, made: Plan) -> State:
    """The state with the new rows; weights and buffers only. ConversionError if a row is not there.

    Means are computed in float64 and rounded once.
    """
    last = max(max(one) for one in made.rows)
    if last >= config.vocab:
        raise ConversionError(
            f"the old vocabulary has a token {last}, model.vocab is {config.vocab}; the tokenizer "
            "does not belong to the checkpoint (分词器与模型不符)"
        )
    if wrong := masked(config):
        raise ConversionError(f"{wrong[0]} (先解除屏蔽)")
    to = replace(config, vocab=len(made.rows), words_said=None)
    if isinstance(to, RoFormerConfig) and int(state.record.get("step", 0)) >= to.ramp_steps:
        to = replace(to, ramp_steps=0)  # its steps are not those of what begins here
    entries = dict(state.weights_only().entries)
    for tensor in tensors(to):
        if "vocab" not in tensor.out:
            continue
        assert tensor.out == ("vocab",), f"{tensor.name}: the vocabulary is a part of an axis"
        key = f"weights/{tensor.name}"
        entries[key] = Entry(shape(to, tensor), "float32", _reader(entries[key], made))
    names = label_names(state.record)
    return State(entries, {"model": to_dict(to)} | ({"labels": names} if names else {}))


def _reader(entry: Entry, made: Plan) -> Callable[[], Tensor]:
    def read() -> Tensor:
        old = entry.read()
        table = old if old.ndim == 2 else old[:, None]
        return mixed(table, made).float().reshape(len(made.rows), *old.shape[1:])

    return read
