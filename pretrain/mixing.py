"""Rows of a table as weighted sums of other rows: new words out of the old words' rows.

bert4keras' compound_tokens (Su; WoBERT began so: kexue.fm/archives/7758). `revocab` makes a whole
table so, `grow` the rows that a table gets more.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Where each row comes from."""

    rows: tuple[tuple[int, ...], ...]
    """Rows of the old table."""
    weights: tuple[tuple[float, ...], ...]
    """Their shares, 1 together."""


def mixed(table: Tensor, made: Mixture) -> Tensor:
    """The rows [len(made.rows), D] of an old table [V, D]: sums in float64, copies as they are."""
    first = torch.tensor([one[0] for one in made.rows], dtype=torch.int64)  # there may be none
    new = table[first].double()
    several = [number for number, one in enumerate(made.rows) if len(one) > 1]
    if several:
        parts = [made.rows[number] for number in several]
        sizes = np.array([len(one) for one in parts])
        shares = [share for number in several for share in made.weights[number]]
        new[torch.tensor(several)] = torch.nn.functional.embedding_bag(
            torch.tensor([i for one in parts for i in one]),
            table.double(),
            torch.from_numpy(sizes.cumsum() - sizes),
            mode="sum",
            per_sample_weights=torch.tensor(shares, dtype=torch.float64),
        )
    return new
