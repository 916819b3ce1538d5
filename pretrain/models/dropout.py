"""Dropout that is cheap on a CPU.

    torch's generator --seed--> splitmix64(seed + counter) --16 bits an element--> 0 or 1 / (1 - p)

PyTorch draws Bernoulli numbers one after another from a Mersenne twister, which costs a training
step on a CPU more than the attention that they fall on. A hash of a counter has no such chain: the
compiler makes vectors of it. The seed comes from torch's generator, so that what restores
that generator (a resume, a recomputed layer) restores the mask. Source: Steele, Lea and Flood 2014
(splitmix64); Salmon et al. 2011 (random numbers by counting).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.compiled import compiled

_STEPS = 65536
_AT_ONCE = 512
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Dropout(nn.Module):
    """drop() while training."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """x with some of its elements zero and the rest scaled up, while training."""
        return drop(x, self.probability if self.training else 0.0)


def drop(x: Tensor, probability: float) -> Tensor:
    """Zero elements with a probability, scale the rest so that the mean stays.

    On a CPU from 16 random bits an element (so in steps of 1/65536); elsewhere PyTorch's own.
    """
    if probability == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    dropped = round(probability * _STEPS)
    if dropped == _STEPS:
        return x * 0.0
    seed = np.uint64(torch.randint(2**63 - 1, ()).item())
    bits = _BITS[x.element_size()]
    scale = torch.tensor(_STEPS / (_STEPS - dropped), dtype=x.dtype).view(bits).numpy()[()]
    keep = torch.empty(x.shape, dtype=x.dtype)
    _fill(keep.view(-1).view(bits).numpy(), seed, dropped, scale)
    return x * keep


@compiled
def _fill(out_N, seed, dropped, kept):  # type: ignore[no-untyped-def]
    """out_N[i]: `kept` or 0, the latter with a probability of dropped / 65536."""
    words_W = np.empty(_AT_ONCE, np.uint64)  # two plain loops over a few: both become vectors
    draws_X = words_W.view(np.uint16)
    zero, least = kept ^ kept, np.uint16(dropped)
    for first in range(0, len(out_N), 4 * _AT_ONCE):
        for word in range(_AT_ONCE):
            x = seed + np.uint64(first + word + 1) * np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            words_W[word] = x ^ (x >> np.uint64(31))
        part_X = out_N[first : first + 4 * _AT_ONCE]
        for i in range(len(part_X)):
            part_X[i] = kept if draws_X[i] >= least else zero
