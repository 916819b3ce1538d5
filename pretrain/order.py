"""The order of samples: a pure function of the seed, with no state but one integer.

    n, the samples trained on so far                          (the only state of the data)
    |   skips: sorted ranges of the stream, passed over; they renumber, never shorten a batch
    v
    g, the place in the stream
    |   stages: [(first n, mixture), ...]; a dataset met again continues where it stood
    v
    s, the place in the stage's mixture
    |   block-stratified blend: 4096 consecutive places hold floor or ceil of 4096 x weight of each
    |   dataset; 4096 blocks hold exactly 2**24 x weight; inside a block a Feistel permutation
    v
    (dataset d, k): the k-th row that d is asked for
    |   epoch e, j = divmod(k, rows of d); Feistel permutation of [0, rows) keyed by (seed, d, e)
    v
    (dataset d, row): every epoch hands out every row once

World size, micro-batch, workers, the length of the training and restarts appear nowhere, so they
change nothing. No index file is built; nothing can go stale. The arithmetic is permutation.py's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.permutation import Ints, Keys, blend, deal, keyed, rows_of, shape_of

Range = tuple[int, int]

BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
"""Consecutive samples in which the mixture is exact to one sample a dataset."""
UNITS = BLOCK * BLOCK
"""Weights are whole numbers of 1 / UNITS; the smallest positive weight is one of them."""
_STRIDE = 2531
"""Odd and near BLOCK / golden ratio: turns that spread a dataset's spare samples evenly."""
_BLEND = 0x426C656E64
_BLOCK_SHAPE = shape_of(BLOCK)
_PATTERNS_KEPT = 4
_BLOCKS_LOOKED_THROUGH = 8


def dataset_key(name: str) -> int:
    """A dataset's own 64-bit number, out of its name or fingerprint: the same in every stage."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Dataset:
    """One dataset of a mixture."""

    rows: int
    """Rows of an epoch."""
    weight: float
    """Share of the samples, relative to the other weights of the mixture."""
    key: int
    """What its permutations are keyed by: `dataset_key(fingerprint)`."""
    start: int = 0
    """Rows of it that were handed out before this mixture began."""


def weight_units(weights: Sequence[float]) -> Ints:
    """Weights as whole numbers that sum to UNITS: largest remainder, one at least if positive."""
    given = np.asarray(weights, np.float64)
    if not (np.isfinite(given).all() and (given >= 0).all() and given.sum() > 0):
        raise ValueError(
            f"data: the weights are {list(weights)}; they must be finite, none below 0 and one "
            "above 0; set `weight` of each dataset (权重必须为非负数, 且至少一个大于零)"
        )
    exact = given / given.sum() * UNITS
    units: Ints = np.floor(exact).astype(np.int64)
    units[(given > 0) & (units == 0)] = 1
    over = np.argsort(units - exact, kind="stable")  # the most underpaid first
    spare = UNITS - int(units.sum())
    if spare > 0:
        paid = over[given[over] > 0]
        units += spare // len(paid)
        units[paid[: spare % len(paid)]] += 1
        units[given == 0] = 0
    elif spare < 0:  # many weights were lifted to one unit: the largest pays
        units[np.argmax(units)] += spare
    return units


class Mixture:
    """Datasets blended by weight: place in the mixture -> (dataset, row), a pure function.

    `datasets` are `Dataset`s, or (rows, weight) pairs keyed by their number.
    """

    def __init__(self, seed: int, datasets: Sequence[Dataset | tuple[int, float]]) -> None:
        self.seed = seed
        self.datasets = tuple(
            d if isinstance(d, Dataset) else Dataset(int(d[0]), float(d[1]), key)
            for key, d in enumerate(datasets)
        )
        self.units = weight_units([d.weight for d in self.datasets])
        for number, dataset in enumerate(self.datasets):
            if dataset.rows < 1 and self.units[number]:
                raise ValueError(
                    f"data: dataset {number} has {dataset.rows} rows and a weight of "
                    f"{dataset.weight}; it must have at least 1 row or no weight "
                    "(数据集为空, 不能参与混合)"
                )
        if len({d.key for d in self.datasets}) < len(self.datasets):
            raise ValueError(
                f"data: {len(self.datasets)} datasets share "
                f"{len({d.key for d in self.datasets})} keys; the same dataset must be named once, "
                "raise its `weight` instead (同一数据集不能重复出现)"
            )
        self._floor, self._extra = _apportion(self.units)
        self._patterns: dict[int, tuple[NDArray[np.int32], Ints]] = {}
        self._rows_D = np.asarray([max(d.rows, 1) for d in self.datasets], np.int64)
        self._start_D = np.asarray([d.start for d in self.datasets], np.int64)
        leads = [keyed(seed, d.key) for d in self.datasets]
        self._lead_D: Keys = np.concatenate(leads)
        self._shape_D4 = np.stack([shape_of(int(rows)) for rows in self._rows_D])

    def locate(self, places: ArrayLike) -> tuple[NDArray[np.int32], Ints]:
        """Places in the mixture, any shape flattened -> (dataset int32, row int64), elementwise."""
        s = np.ascontiguousarray(np.asarray(places, np.int64).reshape(-1))
        number, k = self._blend(s)
        rows = np.empty_like(k)
        rows_of(number, k, self._rows_D, self._start_D, self._lead_D, self._shape_D4, rows)
        return number, rows

    def consumed(self, places: int) -> Ints:
        """Rows of each dataset handed out by the first `places` places, its `start` included."""
        block, inside = divmod(places, BLOCK)
        counts = self._before(np.asarray([block]))[0]
        if inside:
            pattern, _ = self._pattern(block)
            counts = counts + np.bincount(pattern[:inside], minlength=len(self.datasets))
        return counts + np.asarray([d.start for d in self.datasets], np.int64)

    def _blend(self, s: Ints) -> tuple[NDArray[np.int32], Ints]:
        """Places -> (dataset, how many rows of it were asked for before this one)."""
        if len(self.datasets) == 1:
            return np.zeros(len(s), np.int32), s.copy()
        number, k = np.empty(len(s), np.int32), np.empty(len(s), np.int64)
        if not len(s):
            return number, k
        first, last = int(s.min()) >> BLOCK_BITS, int(s.max()) >> BLOCK_BITS
        if last - first < _BLOCKS_LOOKED_THROUGH:
            for block in range(first, last + 1):
                blend(s, block, *self._pattern(block), number, k)
            return number, k
        by_block = np.argsort(s, kind="stable")  # places far apart: each block sees its own only
        s = s[by_block]
        blocks, starts = np.unique(s >> BLOCK_BITS, return_index=True)
        number_by, k_by = np.empty_like(number), np.empty_like(k)
        for block, start, stop in zip(blocks, starts, [*starts[1:], len(s)], strict=True):
            mine = slice(start, stop)
            blend(s[mine], int(block), *self._pattern(int(block)), number_by[mine], k_by[mine])
        number[by_block], k[by_block] = number_by, k_by
        return number, k

    def _pattern(self, block: int) -> tuple[NDArray[np.int32], Ints]:
        """Datasets [BLOCK] of a block's places, and the k [BLOCK] of each.

        The k of a dataset rise along the block, so that the rows handed out up to any place are a
        prefix of its order: a stage may end anywhere.
        """
        if found := self._patterns.get(block):
            return found
        before, after = self._before(np.asarray([block, block + 1]))
        pattern, order = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int64)
        key = keyed(self.seed, _BLEND, block)[0]
        deal(after - before, before, _BLOCK_SHAPE, key, pattern, order)
        # Replaced, never changed in place: another thread may be reading.
        kept = list(self._patterns.items())[-(_PATTERNS_KEPT - 1) :]
        self._patterns = {**dict(kept), block: (pattern, order)}
        return pattern, order

    def _before(self, blocks: Ints) -> Ints:
        """Samples of each dataset [blocks, datasets] in all blocks before the given ones."""
        period, inside = np.divmod(blocks, BLOCK)
        due = period[:, None] * self.units + inside[:, None] * self._floor
        return due.astype(np.int64) + self._extra[inside]


def _apportion(units: Ints) -> tuple[Ints, Ints]:
    """Samples of each dataset in every block [D], and its spare ones before each block [BLOCK, D].

    A dataset's units / BLOCK samples a block are a whole part and a fraction paid by turns: lay
    the fractions end to end on a line; in each block one comb of teeth one apart lies on the line,
    moved by a turn, and the dataset under a tooth has one sample more. Whole samples a block, the
    exact sum in every block, and after BLOCK turns every dataset exactly its units.
    """
    floor: Ints = units // BLOCK
    fraction = units % BLOCK
    ends = np.cumsum(fraction)
    turn = np.arange(BLOCK, dtype=np.int64)[:, None] * _STRIDE % BLOCK
    # Teeth at turn, turn + BLOCK, ... below `ends`, counted at both ends of a dataset's stretch.
    below = (np.concatenate([[0], ends])[None, :] - turn + BLOCK - 1) // BLOCK
    extra = np.diff(below, axis=1)
    return floor, np.concatenate([np.zeros((1, len(units)), np.int64), extra.cumsum(0)[:-1]])


def normalised(skips: Sequence[Range]) -> tuple[Range, ...]:
    """Skipped ranges [start, stop) of the stream: sorted, merged, empty ones dropped."""
    merged: list[Range] = []
    for start, stop in sorted((int(a), int(b)) for a, b in skips):
        if start < 0 or stop < start:
            raise ValueError(
                f"skips: [{start}, {stop}] is not a range of samples; it must be "
                "0 <= first <= end (跳过的样本区间不合法)"
            )
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif stop > start:
            merged.append((start, stop))
    return tuple(merged)


def stream_places(samples: ArrayLike, skips: Sequence[Range]) -> Ints:
    """Sample numbers n of a run -> places g of the stream, the skipped ranges passed over."""
    n = np.asarray(samples, np.int64)
    ranges = np.asarray(normalised(skips), np.int64).reshape(-1, 2)
    lengths = ranges[:, 1] - ranges[:, 0]
    passed = np.concatenate([[0], np.cumsum(lengths)])
    return n + passed[np.searchsorted(ranges[:, 0] - passed[:-1], n, side="right")]


def skip_samples(skips: Sequence[Range], first: int, count: int) -> tuple[Range, ...]:
    """Ranges with samples [first, first + count) of a run, as numbered now, skipped as well."""
    if count < 1:
        return normalised(skips)
    ends = stream_places([first, first + count - 1], skips)
    return normalised([*skips, (int(ends[0]), int(ends[1]) + 1)])


class Order:
    """The order of a whole run: sample number -> (stage, dataset of the stage, row).

    `stages` are (first sample, datasets) in rising order, the first at 0. A dataset that an earlier
    stage had with the same key and rows continues where it stood (skipped rows count as used).
    """

    def __init__(
        self,
        seed: int,
        stages: Sequence[tuple[int, Sequence[Dataset]]],
        skips: Sequence[Range] = (),
    ) -> None:
        self.seed, self.skips = seed, normalised(skips)
        self.first = np.asarray([first for first, _ in stages], np.int64)
        if not len(stages) or self.first[0] != 0 or (np.diff(self.first) < 0).any():
            raise ValueError(
                f"stages: they begin at samples {self.first.tolist()}; the first must be 0 and "
                "each at least the one before (阶段的起始样本必须从零开始并递增)"
            )
        # A stage begins right behind the last sample of the one before: a range skipped at the very
        # border is skipped in the new stage, not handed out after all.
        last = stream_places(np.maximum(self.first - 1, 0), self.skips)
        self.begins = np.where(self.first > 0, last + 1, 0)
        self.mixtures: list[Mixture] = []
        stood: dict[tuple[int, int], int] = {}
        for i, (_, datasets) in enumerate(stages):
            if i:
                before = self.mixtures[-1]
                reached = before.consumed(int(self.begins[i] - self.begins[i - 1]))
                stood |= {
                    (d.key, d.rows): int(k) for d, k in zip(before.datasets, reached, strict=True)
                }
            self.mixtures.append(
                Mixture(
                    seed,
                    [
                        Dataset(d.rows, d.weight, d.key, stood.get((d.key, d.rows), d.start))
                        for d in datasets
                    ],
                )
            )

    def locate(self, samples: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32], Ints]:
        """Sample numbers -> (stage, dataset of that stage, row), elementwise."""
        n = np.asarray(samples, np.int64).reshape(-1)
        g = stream_places(n, self.skips)
        stage = (np.searchsorted(self.first, n, side="right") - 1).astype(np.int32)
        dataset, row = np.empty(len(n), np.int32), np.empty(len(n), np.int64)
        for i in np.unique(stage):
            mine = np.flatnonzero(stage == i)
            dataset[mine], row[mine] = self.mixtures[i].locate(g[mine] - self.begins[i])
        return stage, dataset, row

    def consumed(self, samples: int) -> tuple[int, Ints]:
        """After `samples` samples: (stage that the next one belongs to, rows of its datasets)."""
        stage = int(np.searchsorted(self.first, samples, side="right")) - 1
        at = int(stream_places(samples - 1, self.skips)) + 1 if samples else 0
        begin = int(self.begins[stage])
        return stage, self.mixtures[stage].consumed(max(at - begin, 0))
