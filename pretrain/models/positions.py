"""How a model knows where a token stands: T5's relative bias, rotary positions, log-n scaling.

    positions [B, T], [B, S] -> distances -> buckets -> bias_BNTS, added to the scores   (T5)
    positions [B, T] -> angles -> Turn(cos, sin) -> q, k turned by it                   (RoFormer)
    keys that a query sees -> log n / log base -> q multiplied by it                   (any family)

Positions are given, never counted here: in a packed row they begin anew with each document.

Sources: Raffel et al. 2020 (T5; buckets as in mesh-tensorflow); Su et al. 2021, RoFormer
(kexue.fm/archives/8265); Su, entropy-invariant attention (kexue.fm/archives/8823).

Legend: B rows, T queries, S keys, N heads, H head_dim.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.positions import Rope
from pretrain.models.longer import (
    amplitude,
    document_lengths,
    far_positions,
    frequencies,
    growth_of,
)
from pretrain.models.part import WHOLE, Part

FEWEST_KEYS = 16
"""Log-n scaling takes a query with fewer keys for one with so many, as bert4keras does."""


# ---------------------------------------------------------------- relative bias


class RelativeBias(nn.Module):
    """A learned number for each bucket of distances and each head; one table serves a stack."""

    def __init__(
        self, buckets: int, heads: int, max_distance: int, two_sided: bool, spans: int = 1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.max_distance, self.two_sided, self.spans = max_distance, two_sided, spans

    def forward(self, queries_BT: Tensor, keys_BS: Tensor, part: Part = WHOLE) -> Tensor:
        """Positions [B, T] and [B, S] (B or 1 rows each) -> bias_BNTS of this rank's heads."""
        weight = self.weight[:, part.heads(self.weight.shape[1])]
        distance_BTS = keys_BS[:, None, :] - queries_BT[:, :, None]
        numbers = (self.weight.shape[0], self.max_distance, self.spans)
        ids_BTS = buckets_of(distance_BTS, self.two_sided, *numbers)
        if ids_BTS.is_cuda:  # whose backward sorts, and so gives the same sums every time
            return F.embedding(ids_BTS, weight).permute(0, 3, 1, 2).contiguous()
        return weight.t()[:, ids_BTS.flatten()].unflatten(1, ids_BTS.shape).transpose(0, 1)


def buckets_of(
    distance: Tensor, two_sided: bool, buckets: int, max_distance: int, spans: int = 1
) -> Tensor:
    """Bucket of each distance (key position - query position), int64.

    Near distances have a bucket each, farther ones share logarithmically wider ones, all from
    max_distance on share the last. Two-sided: half of the buckets for keys behind the query;
    one-sided: keys behind the query count as distance 0. The logarithm is taken in float32, as the
    published models took it. With `spans` above 1 the rule has so many times its logarithmic
    buckets, in the same ratio: a bucket that the plain rule gives stays the same.
    """
    first = torch.zeros_like(distance)
    if two_sided:
        buckets //= 2
        first = (distance > 0) * buckets
        far = distance.abs()
    else:
        far = (-distance).clamp(min=0)
    exact = buckets // (1 + spans)
    steps = torch.log(far.float() / exact) / math.log(max_distance / exact)
    steps = steps * ((buckets - exact) // spans)
    # log 0 is -inf, whose integer is anything: those distances are near ones
    wide = exact + steps.clamp(min=0).long()
    return first + torch.where(far < exact, far, wide.clamp(max=buckets - 1))


def shared_positions(positions_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
    """Positions of one row [1, T] that give every row its distances, or the same if there are none.

    Where each document is one run of consecutive positions, the distance of two of its tokens is
    that of their places in the row, so that one bias serves all rows. Whether that holds is asked
    on a CPU only: a GPU would have to be waited for.
    """
    if positions_BT.shape[0] == 1 or positions_BT.device.type != "cpu":
        return positions_BT
    places_T = torch.arange(positions_BT.shape[1])
    if documents_BT is None:
        return positions_BT[:1] if bool((positions_BT == positions_BT[:1]).all()) else positions_BT
    real = documents_BT >= 0
    changes = documents_BT[:, 1:] != documents_BT[:, :-1]
    steps = positions_BT[:, 1:] - positions_BT[:, :-1] == 1
    new = documents_BT[:, 1:] > documents_BT.cummax(1).values[:, :-1]
    runs = torch.where(changes, new, steps) | ~real[:, 1:]
    return places_T[None] if bool(runs.all()) else positions_BT


def same_positions(positions_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
    """One row [1, T] where all rows have the same positions but for padding; CPU only, as above."""
    if positions_BT.shape[0] == 1 or positions_BT.device.type != "cpu":
        return positions_BT
    filled_BT = positions_BT
    if documents_BT is not None:
        places_T = torch.arange(positions_BT.shape[1])
        filled_BT = torch.where(documents_BT >= 0, positions_BT, places_T)
    return filled_BT[:1] if bool((filled_BT == filled_BT[:1]).all()) else positions_BT


# ---------------------------------------------------------------- rotary positions


@dataclass(frozen=True)
class Turn:
    """By how much each pair of a head's values is turned, for each token."""

    cos_BTNP: Tensor
    """[B, T, 1, H / 2]."""
    sin_BTNP: Tensor
    """[B, T, 1, H / 2]."""
    far: "tuple[Turn, Turn, Turn] | None" = None
    """Beyond ReRoPE's window: of queries whose key is behind, ahead, and of keys."""


def turn_of(
    positions_BT: Tensor,
    head_dim: int,
    base: float,
    dtype: torch.dtype,
    rope: Rope | None = None,
    documents_BT: Tensor | None = None,
    part: Part = WHOLE,
) -> Turn:
    """The turn at given positions: pair i by position x base ** (-2 i / head_dim), or as the
    section `rope` of the config says (models/longer.py), of the documents' lengths where dynamic.
    Of a part of the rows' tokens, the turn is of those.

    Angles are computed in float64: at position 100,000 a float32 angle is off by 0.4 degrees.
    """
    growth = None
    if rope is not None:
        lengths = document_lengths(positions_BT, documents_BT) if rope.dynamic else None
        growth = growth_of(rope, lengths, positions_BT.device)
    pair_P = frequencies(rope, head_dim, base, growth, positions_BT.device)
    more = None if growth is None else amplitude(rope, growth)

    def at(places_BT: Tensor) -> Turn:
        angle_BTP = places_BT[:, :, None] * pair_P
        cos, sin = angle_BTP.cos(), angle_BTP.sin()
        if more is not None:
            cos, sin = cos * more, sin * more
        cos, sin = (part.tokens(by[:, :, None].to(dtype)) for by in (cos, sin))
        return Turn(cos, sin)

    turn = at(positions_BT)
    if rope is None or not rope.windowed:
        return turn
    behind, ahead, keys = (at(places) for places in far_positions(positions_BT, rope))
    return replace(turn, far=(behind, ahead, keys))


def turned(x_BTNH: Tensor, turn: Turn) -> Tensor:
    """Queries or keys with each pair (x0, x1), (x2, x3) ... turned (the interleaved convention).

    The pairs' first values come out before their second ones: the product of queries and keys does
    not see an order that both have.
    """
    first, second = x_BTNH.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.cos_BTNP, turn.sin_BTNP
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# ---------------------------------------------------------------- log n


def log_n(keys: Tensor, base: int) -> Tensor:
    """Factor of a query that sees n `keys`: log n / log base, float32; 1 where n is the base."""
    return keys.clamp(min=FEWEST_KEYS).float().log() / math.log(base)
