r"""Which entry of a longer axis is a copy of which, and how the copies share what is read of them.

    5 entries -> 12     evenly   0 1 2 3 4 0 1 2 3 4 0 1        one after the other
                        drawn    0 1 2 3 4 2 0 0 4 1 3 2        bert2BERT: the rest at random

    writers   the copies are equal:   x_c = x                   the stream becomes [x; x; x_01]
    readers   R_c = share_c R + N_c,  sum share_c = 1,  sum N_c = 0    so that sum R_c x_c = R x

Equal shares and no noise leave the copies locked to each other: what is equal and treated alike
stays equal, under every optimizer that treats entries alike (GROWTH of record 4.3). Unequal shares
(Net2Net, LEMON) and zero-sum noise part them and keep the function.
"""

import random
from collections import Counter
from dataclasses import dataclass

import torch

from pretrain.state import draw, seed_of


@dataclass(frozen=True)
class Copies:
    """An axis whose new entries are copies of old ones; the old ones stand first."""

    old: int
    """Entries before."""
    of: tuple[int, ...]
    """For each entry the old one that it is a copy of."""
    share: tuple[float, ...]
    """For each entry its part of what a reader adds up; 1 over the copies of one entry."""

    @property
    def times(self) -> int | None:
        """How many copies there are of each entry, if of all alike."""
        counts = set(Counter(self.of).values())
        return counts.pop() if len(counts) == 1 else None


def evenly(old: int, new: int, split: float = 0.5) -> Copies:
    """The old entries again and again. `split` is the first of two copies' share; of more, each
    has (1 - split) / split of the share of the one before it."""
    return _shared(old, tuple(i % old for i in range(new)), split)


def drawn(old: int, new: int, seed: int, axis: str) -> Copies:
    """The old entries once, then old entries at random, with equal shares (bert2BERT's g)."""
    dice = random.Random(seed_of(seed, "copies", axis, old, new))
    return _shared(old, (*range(old), *(dice.randrange(old) for _ in range(new - old))), 0.5)


def _shared(old: int, of: tuple[int, ...], split: float) -> Copies:
    counts, seen = Counter(of), Counter[int]()
    ratio, share = (1 - split) / split, []
    for entry in of:
        whole = sum(ratio**n for n in range(counts[entry]))
        share.append(ratio ** seen[entry] / whole)
        seen[entry] += 1
    return Copies(old, of, tuple(share))


def zero_sum(
    label: str, seed: int, values: torch.Tensor, copies: Copies, noise: float
) -> torch.Tensor:
    """Noise [pre, new, post] that adds up to 0 over the copies of each entry, float64.

    values: the old ones, [pre, old, post]; `noise` is a share of the size that each has divided
    among its copies. What has no copy gets none.
    """
    pre, _, post = values.shape
    rms = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / values.numel() ** 0.5
    size = noise * rms * copies.old / len(copies.of)
    found = torch.zeros(pre, len(copies.of), post, dtype=torch.float64)
    if size == 0:
        return found
    found += draw(label, seed, tuple(found.shape), size)
    of = torch.tensor(copies.of)
    counts = torch.bincount(of, minlength=copies.old).double()
    sums = torch.zeros(pre, copies.old, post, dtype=torch.float64).index_add_(1, of, found)
    return found.sub_((sums / counts[:, None]).index_select(1, of))
