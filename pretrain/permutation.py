"""Keyed permutations of [0, size) and keys out of numbers, compiled: the arithmetic of order.py.

    key      a chain of splitmix64 finalisers over the parts, 64 bits
    permute  an unbalanced Feistel network of 8 rounds on ceil(log2(size)) bits; images outside
             [0, size) walk on along their cycle until they fall inside (Black and Rogaway 2002),
             fewer than two steps on average

Legend: N places asked for, D datasets, B places of a block.
"""

import numpy as np
from numpy.typing import NDArray

from pretrain.compiled import compiled

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)
_ROUND_PAIRS = 4


def mix(x: Keys) -> Keys:
    """Scramble 64-bit words (the finaliser of splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def keyed(*parts: int | Keys) -> Keys:
    """One 64-bit key out of several whole numbers or arrays of them, elementwise."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        word = part & 0xFFFFFFFFFFFFFFFF if isinstance(part, int) else part
        key = mix((key + _GOLDEN) ^ mix(np.atleast_1d(np.asarray(word, np.uint64)) + _GOLDEN))
    return key


def permute(x: Ints, size: int, key: Keys) -> Ints:
    """Image of x under a keyed permutation of [0, size); x and key of one shape (or broadcast)."""
    x = np.asarray(x, np.int64)
    out = np.empty(x.shape, np.int64)
    keys = np.ascontiguousarray(np.broadcast_to(key, x.shape))
    _permute_all(x.reshape(-1), shape_of(size), keys.reshape(-1), out.reshape(-1))
    return out


def shape_of(size: int) -> Keys:
    """What the network needs of a size: [size, low bits, mask of the low half, of the high]."""
    bits = (size - 1).bit_length()
    low = bits // 2
    return np.asarray([size, low, (1 << low) - 1, (1 << (bits - low)) - 1], np.uint64)


@compiled
def _mixed(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@compiled
def _image(x, shape_4, key):  # type: ignore[no-untyped-def]
    size, low, low_mask, high_mask = shape_4[0], shape_4[1], shape_4[2], shape_4[3]
    while True:
        high_x, low_x = x >> low, x & low_mask
        k = key
        for _ in range(_ROUND_PAIRS):
            k += _GOLDEN
            word = (low_x ^ k) * _M1
            word = (word ^ (word >> _S32)) * _M2
            high_x ^= (word >> _S32) & high_mask
            k += _GOLDEN
            word = (high_x ^ k) * _M1
            word = (word ^ (word >> _S32)) * _M2
            low_x ^= (word >> _S32) & low_mask
        x = (high_x << low) | low_x
        if x < size:
            return x


@compiled
def _permute_all(x_N, shape_4, key_N, out_N):  # type: ignore[no-untyped-def]
    for n in range(len(x_N)):
        out_N[n] = np.int64(_image(np.uint64(x_N[n]), shape_4, key_N[n]))


@compiled
def deal(counts_D, before_D, shape_4, key, pattern_B, order_B):  # type: ignore[no-untyped-def]
    """Shuffle counts_D[d] places for each dataset d over a block: pattern_B the dataset of each
    place, order_B how many of that dataset's came before it, rising from before_D."""
    dealt_B = np.empty_like(pattern_B)
    at = 0
    for d in range(len(counts_D)):
        dealt_B[at : at + counts_D[d]] = d
        at += counts_D[d]
    seen_D = before_D.copy()
    for place in range(len(pattern_B)):
        d = dealt_B[np.int64(_image(np.uint64(place), shape_4, key))]
        pattern_B[place] = d
        order_B[place] = seen_D[d]
        seen_D[d] += 1


@compiled
def blend(place_N, block, pattern_B, order_B, number_N, order_N):  # type: ignore[no-untyped-def]
    """Dataset and order of the places that lie in a block; the others are left as they are."""
    size = len(pattern_B)
    for n in range(len(place_N)):
        inside = place_N[n] - block * size
        if 0 <= inside < size:
            number_N[n] = pattern_B[inside]
            order_N[n] = order_B[inside]


@compiled
def rows_of(number_N, order_N, rows_D, start_D, lead_D, shape_D4, row_N):  # type: ignore[no-untyped-def]
    """The row that each dataset hands out as its order_N-th: permuted anew in every epoch, keyed
    by lead_D (the key of seed and dataset) and the epoch."""
    for n in range(len(number_N)):
        d = number_N[n]
        k = order_N[n] + start_D[d]
        epoch = k // rows_D[d]
        key = _mixed((lead_D[d] + _GOLDEN) ^ _mixed(np.uint64(epoch) + _GOLDEN))
        j = np.uint64(k - epoch * rows_D[d])
        row_N[n] = np.int64(_image(j, shape_D4[d], key))
