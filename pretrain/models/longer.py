"""Rows longer than those that a model learnt on: what positions become there.

    positions [B, T] -> rows of the table, mixed -> x_BTD                        (learned positions)
    lengths -> s -> frequencies [B, T, P] -> angles -> turn                      (rotary positions)
    positions -> distances cut at a window -> two turns, chosen by distance      (ReRoPE)

The sections of a config that say how are in configs/positions.py. Whatever follows a length follows
that of a token's own document, so that a document in a packed row is what it is alone.

Sources: Su, kexue.fm/archives/7947; its closed form here is q = p_j + r (p_i - p_0). Frequencies:
Chen et al. 2023 (position interpolation), bloc97 2023 (NTK-aware, NTK-by-parts), Su, 9675 and 9706
(NTK fixed and mixed), Peng et al. 2023 (YaRN); ReRoPE: Su, 9708.

Legend: B rows, T tokens, D hidden, P pairs of a head, N heads, S keys.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.positions import PositionTable, Rope
from pretrain.models.part import WHOLE, Part


def document_lengths(positions_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
    """Tokens of the document that each token stands in, int64 [B, T]; [B, 1] without documents.

    A document that a row cuts has the length that lies before the cut; padding has one of its own.
    """
    if documents_BT is None:
        return positions_BT.amax(1, keepdim=True) + 1
    ids_BT = documents_BT + 1  # padding is document -1
    rooms = int(positions_BT.shape[1]) + 1
    longest = positions_BT.new_zeros(ids_BT.shape[0], rooms)
    longest = longest.scatter_reduce(1, ids_BT, positions_BT + 1, "amax")
    return longest.gather(1, ids_BT)


# ---------------------------------------------------------------- learned positions


class LearnedPositions(nn.Module):
    """A row for each position; or, with a PositionTable, rows that positions are made of."""

    def __init__(self, rows: int, hidden: int, table: PositionTable | None, positions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden))
        self.table, self.positions = table, positions

    def forward(
        self,
        positions_BT: Tensor,
        documents_BT: Tensor | None = None,
        part: Part = WHOLE,
    ) -> Tensor:
        """positions_BT -> x_BTD. Of a part of the rows' tokens, x_BTD is of those."""
        if self.table is None:
            return F.embedding(part.tokens(positions_BT), self.weight)
        if self.table.method == "hierarchical":
            rows, positions_BT = self.weight.shape[0], part.tokens(positions_BT)
            blocks_BT = positions_BT.div(rows, rounding_mode="floor")
            block_BTD = F.embedding(blocks_BT, self.weight) - self.weight[0]
            # in the first block this is p_0 - p_0: nothing is added to what was learnt
            return F.embedding(positions_BT % rows, self.weight) + self.table.ratio * block_BTD
        if self.table.dynamic:
            lengths_BT = document_lengths(positions_BT, documents_BT)
        else:
            lengths_BT = torch.full_like(positions_BT[:, :1], self.positions)
        places = stretched(positions_BT, lengths_BT, self.weight.shape[0])
        low_BT, share_BT = (part.tokens(of_BT) for of_BT in places)
        share_BTD = share_BT.to(self.weight.dtype)[..., None]
        high_BT = (low_BT + 1).clamp(max=self.weight.shape[0] - 1)
        low_BTD, high_BTD = (F.embedding(at, self.weight) for at in (low_BT, high_BT))
        return low_BTD * (1 - share_BTD) + high_BTD * share_BTD


def stretched(positions: Tensor, lengths: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Where a document of `lengths` tokens reads a table of `rows`: (row below, share of the next).

    Whole steps where the document is no longer than the table. Computed in float64: in float32 the
    share would be off by 1e-4 at position 2,000.
    """
    step = (rows - 1) / (lengths - 1).clamp(min=rows - 1).double()
    place = (positions * step).clamp(max=rows - 1)  # padding may stand behind its document
    low = place.floor()
    return low.long(), place - low


# ---------------------------------------------------------------- rotary positions


def growth_of(
    rope: Rope, lengths: Tensor | None, device: torch.device | str | None = None
) -> Tensor:
    """s: rope.factor, float64 [1]; of a dynamic method that of each length, [B, T, 1]."""
    if not rope.dynamic or lengths is None:
        # made where it is used: a copy from the host would wait for the device
        return torch.full((1,), rope.factor, dtype=torch.float64, device=device)
    share = lengths[..., None].double() / rope.known
    return (rope.factor * share - (rope.factor - 1)).clamp(min=1.0)


@lru_cache(maxsize=64)
def _pairs(rope: Rope, head_dim: int, base: float, device: torch.device | str | None) -> Tensor:
    """rope.pairs() on a device [P, 3], copied there once: each copy would wait for the device."""
    return torch.tensor(rope.pairs(head_dim, base), dtype=torch.float64, device=device)


def frequencies(
    rope: Rope | None,
    head_dim: int,
    base: float,
    growth: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Radians a token by which each pair turns, float64 [..., P], for growths s [..., 1]."""
    if rope is None:
        pair_P = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
        return base ** (-pair_P / head_dim)
    s = growth if growth is not None else growth_of(rope, None)
    plain_P, exponent_P, kept_P = _pairs(rope, head_dim, base, device).unbind(1)
    return plain_P * (kept_P + (1 - kept_P) * s ** (-exponent_P))


def amplitude(rope: Rope | None, growth: Tensor) -> Tensor | None:
    """What queries and keys are multiplied by as well, [..., 1]: yarn's 0.1 ln s + 1; or None."""
    if rope is None or rope.method != "yarn":
        return None
    return 0.1 * growth.log() + 1


# ---------------------------------------------------------------- ReRoPE


@dataclass(frozen=True)
class Regions:
    """Which of three products is the score of a query and a key; of ReRoPE."""

    near_BTS: Tensor
    """bool: the distance lies within the window."""
    behind_BTS: Tensor
    """bool: else, the key stands behind the query (it was written earlier)."""


def regions_of(queries_BT: Tensor, keys_BS: Tensor, window: int) -> Regions:
    """By positions of queries and keys [B or 1, T], [B or 1, S]."""
    distance_BTS = queries_BT[:, :, None] - keys_BS[:, None, :]
    return Regions((distance_BTS.abs() < window), distance_BTS > 0)


def windowed_scores(q_BTNH: Tensor, k_BSNH: Tensor, regions: Regions) -> Tensor:
    """Scores [B, N, T, S]: one product near by, another far away.

    q [B, T, N, 3 H]: turned for near keys, far ones behind, far ones ahead; k [B, S, N, 2 H].
    """
    near, behind, ahead = q_BTNH.transpose(1, 2).chunk(3, -1)
    by_near, by_far = k_BSNH.permute(0, 2, 3, 1).chunk(2, 2)
    near_BNTS, behind_BNTS = regions.near_BTS[:, None], regions.behind_BTS[:, None]
    far_BNTS = torch.where(behind_BNTS, behind @ by_far, ahead @ by_far)
    return torch.where(near_BNTS, near @ by_near, far_BNTS)


def far_positions(positions_BT: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Where queries (key behind, key ahead) and keys stand beyond the window, float64.

    With slope l the distance d is w + l (d - w): query l m + w (1 - l), key l n; ahead, -w.
    """
    shift = rope.window * (1 - rope.slope)
    scaled_BT = positions_BT.double() * rope.slope
    return scaled_BT + shift, scaled_BT - shift, scaled_BT
