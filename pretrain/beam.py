"""Beam search: the outputs of highest probability, several kept beside each other.

    hypotheses of all prompts -> one forward of a token each -> the best continuations of each
        -> a prompt's own best -> as published: ended ones win or are dropped
                               -> with a length penalty: ended ones are set aside, the best wins
        -> the cache follows those that live on -> ...

As published (bert4keras, AutoRegressiveDecoder): the score is the sum of log(p + 1e-12), whatever
the length; if the best of the k has ended it is the output, otherwise all ended ones are dropped
and as many fewer go on. With a length penalty the definitions are those of transformers: the score
is log p / length ** penalty, ended outputs are kept, k go on until k have ended and none that lives
promises more (`patient`: could reach more).

Legend: N hypotheses, C candidates, V vocabulary, B rows of a cache, S places in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.allowed import AllowedOutputs, Node
from pretrain.decoding import Decoding, Written
from pretrain.models.layers import KeyValueCache

FLOOR = 1e-12
"""Added to a probability before its logarithm, as published."""


class Ahead(Protocol):
    """A forward by one token."""

    def __call__(self, next_B: Tensor | None, kept_B: Tensor | None = None) -> Tensor:
        """The hidden states [B, D] that predict the next tokens: first of the rows `kept_B` of
        before (None: all) those are chosen, then `next_B` is put behind each."""
        ...


class BranchingCache(KeyValueCache):
    """Keys and values whose rows may be dropped, repeated and put in another order."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._source_B: Tensor | None = None

    def select(self, kept_B: Tensor) -> None:
        """Go on with these rows."""
        for layer, pair in enumerate(self._layers):
            keys, values = (_chosen(part, kept_B, kept_B, self.length) for part in pair)
            self._layers[layer] = keys, values
        if self.documents_BS is not None:
            self.documents_BS = _chosen(self.documents_BS, kept_B, kept_B, self.length)
        if self.positions_BS is not None:
            self.positions_BS = _chosen(self.positions_BS, kept_B, kept_B, self.length)
        if not self._across:
            return
        # What a decoder looks across at belongs to the prompt: most rows have theirs already.
        rows = self._across[0][0].shape[0]
        before_B = torch.arange(rows) if self._source_B is None else self._source_B
        self._source_B = before_B[kept_B.cpu()]
        same = len(self._source_B) <= rows
        stays_B = self._source_B == before_B[: len(kept_B)] if same else None
        wanted_B = kept_B
        if stays_B is not None:
            places_B = torch.arange(len(kept_B), device=kept_B.device)
            wanted_B = torch.where(stays_B.to(kept_B.device), places_B, kept_B)
        for layer, pair in enumerate(self._across):
            keys, values = (_chosen(part, wanted_B, kept_B, part.shape[1]) for part in pair)
            self._across[layer] = keys, values


def _chosen(x_BS: Tensor, wanted_B: Tensor, kept_B: Tensor, length: int) -> Tensor:
    """The wanted rows of a buffer [B, S, ...], of which `length` places are filled; in place."""
    count = len(wanted_B)
    if count > x_BS.shape[0]:
        # Laid out as it was: heads before positions in memory.
        strides = x_BS.stride()
        order = sorted(range(1, x_BS.ndim), key=lambda dim: -strides[dim])
        room = x_BS.new_empty(count, *(x_BS.shape[dim] for dim in order))
        back = [0, *(1 + order.index(dim) for dim in range(1, x_BS.ndim))]
        out_BS = room.permute(back)
        out_BS[:, :length] = x_BS[kept_B, :length]
        return out_BS
    moved_B = (wanted_B != torch.arange(count, device=wanted_B.device)).nonzero()[:, 0]
    if len(moved_B):
        x_BS[moved_B, :length] = x_BS[wanted_B[moved_B], :length]
    return x_BS[:count]


@dataclass
class _Hypothesis:
    """An output so far."""

    ids: list[int]
    score: float
    """Sum of log-probabilities."""
    place: int
    """Its row in the last forward."""
    node: Node = field(default_factory=dict)
    """Where it stands in the tree of allowed outputs."""
    ended: bool = False


@dataclass
class _Row:
    """The search behind one prompt."""

    room: int
    width: int
    live: list[_Hypothesis]
    finished: list[tuple[float, _Hypothesis]] = field(default_factory=list)
    """Ended outputs with their scores, the best one first."""


@torch.no_grad()
def search(
    model: Any,
    ahead: Ahead,
    rooms: Sequence[int],
    decoding: Decoding,
    eod_id: int,
    vocab: int | None,
    allowed: AllowedOutputs | None = None,
) -> list[Written]:
    """The best output behind each prompt, of at most as many tokens as its room.

    Raises ValueError if an allowed output does not fit in a room.
    """
    if allowed is not None and decoding.min_ends > 1:
        raise ValueError(
            f"min_ends: is {decoding.min_ends}, allowed outputs end once; leave it out (二者冲突)"
        )
    root = {} if allowed is None else allowed.root
    rows = [
        _Row(room, decoding.beams, [_Hypothesis([], 0.0, place, root)])
        for place, room in enumerate(rooms)
    ]
    was_training = model.training
    model.eval()
    try:
        hidden_ND = ahead(None)
        while True:
            logits_NV = model.logits(hidden_ND)[:, :vocab]
            found = _best(logits_NV, rows, decoding, eod_id, allowed)
            for row in (row for row in rows if row.live):
                candidates = _candidates(row, found, decoding, eod_id)
                advance = _published if decoding.length_penalty is None else _penalised
                advance(row, candidates, decoding, allowed is not None)
            live = [hypothesis for row in rows for hypothesis in row.live]
            if not live:
                break
            device = hidden_ND.device
            kept_B = torch.tensor([hypothesis.place for hypothesis in live], device=device)
            next_B = torch.tensor([hypothesis.ids[-1] for hypothesis in live], device=device)
            for place, hypothesis in enumerate(live):
                hypothesis.place = place
            hidden_ND = ahead(next_B, kept_B)
    finally:
        model.train(was_training)
    return [_written(row) for row in rows]


def _written(row: _Row) -> Written:
    score, best = row.finished[0]
    return Written(best.ids[:-1] if best.ended else best.ids, best.ended, score)


def _best(
    logits_NV: Tensor,
    rows: Sequence[_Row],
    decoding: Decoding,
    eod_id: int,
    allowed: AllowedOutputs | None,
) -> tuple[list[list[int]], list[list[float]]]:
    """The likeliest next tokens of each live hypothesis, and what they add to its score.

    Of a prompt's k best continuations none is outside the k best of its own hypothesis.
    """
    live = [hypothesis for row in rows for hypothesis in row.live]
    count = decoding.beams * (1 if decoding.length_penalty is None else 2)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    whole_N1 = logits_NV.logsumexp(-1, keepdim=True)
    if allowed is not None:
        logits_NV = allowed.only(logits_NV, [hypothesis.node for hypothesis in live])
    if len(live[0].ids) < decoding.min_new_tokens:
        logits_NV = logits_NV.clone()
        logits_NV[:, eod_id] = -torch.inf
    top = logits_NV.topk(min(count, logits_NV.shape[-1]), -1)
    gain_NC = top.values - whole_N1
    if decoding.length_penalty is None:
        floored_NC = (gain_NC.exp() + FLOOR).log()
        gain_NC = torch.where(top.values == -torch.inf, top.values, floored_NC)
    return top.indices.tolist(), gain_NC.tolist()


def _candidates(
    row: _Row,
    found: tuple[list[list[int]], list[list[float]]],
    decoding: Decoding,
    eod_id: int,
) -> list[_Hypothesis]:
    """The best continuations of a prompt's hypotheses, the best one first."""
    scored = [
        (hypothesis.score + gain, token, hypothesis)
        for hypothesis in row.live
        for token, gain in zip(*(part[hypothesis.place] for part in found), strict=True)
        if gain > -torch.inf
    ]
    scored.sort(key=lambda one: -one[0])
    count = row.width * (1 if decoding.length_penalty is None else 2)
    out = []
    for score, token, before in scored[:count]:
        ids = [*before.ids, token]
        ended = token == eod_id and ids.count(eod_id) >= decoding.min_ends
        out.append(_Hypothesis(ids, score, before.place, before.node.get(token, {}), ended))
    return out


def _published(row: _Row, candidates: list[_Hypothesis], decoding: Decoding, bound: bool) -> None:
    """The best one ends the search if it has ended; if not, all that have are dropped."""
    row.live = []
    if not candidates:
        raise nothing_left()
    best = candidates[0]
    if best.ended or len(best.ids) == row.room:
        row.finished = [(best.score, best)]
        return
    row.live = [candidate for candidate in candidates if not candidate.ended]
    row.width -= len(candidates) - len(row.live)


def _penalised(row: _Row, candidates: list[_Hypothesis], decoding: Decoding, bound: bool) -> None:
    """Set aside the best that have ended; the best that have not go on, while they may win.

    bound: outputs that were not ended by the model are none.
    """
    penalty = decoding.length_penalty
    assert penalty is not None
    length = len(candidates[0].ids) if candidates else row.room
    row.live = []
    for rank, candidate in enumerate(candidates):
        if candidate.ended or (length == row.room and not bound):
            if rank < row.width:  # the others were candidates so that enough go on
                row.finished.append((candidate.score / length**penalty, candidate))
        elif len(row.live) < row.width and length < row.room:
            row.live.append(candidate)
    row.finished.sort(key=lambda one: -one[0])
    row.finished = row.finished[: row.width]
    if not row.live:
        if not row.finished:
            raise nothing_left()
        return
    reach = row.room if decoding.patient and penalty > 0 else length
    promise = row.live[0].score / reach**penalty
    if len(row.finished) == row.width and promise <= row.finished[-1][0]:
        row.live = []


def nothing_left() -> ValueError:
    """Every allowed output is shorter than min_new_tokens."""
    return ValueError(
        "min_new_tokens: forbids the end where an allowed output has it; lower it (没有可写的输出)"
    )
