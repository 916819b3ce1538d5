"""Promise: the order of samples is a pure function of the seed, an epoch hands out every row once,
and the mixture is exact; checked against a slow reference written here in plain Python integers."""

import numpy as np
import pytest

from pretrain.order import (
    BLOCK,
    UNITS,
    Dataset,
    Mixture,
    Order,
    dataset_key,
    skip_samples,
    stream_places,
    weight_units,
)
from pretrain.permutation import keyed, permute

U64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


# ---------------------------------------------------------------- the slow reference


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & U64
    return x ^ (x >> 31)


def slow_key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = slow_mix(((key + GOLDEN) & U64) ^ slow_mix((part + GOLDEN) & U64))
    return key


def slow_permute(x: int, size: int, key: int) -> int:
    bits = (size - 1).bit_length()
    if not bits:
        return 0
    low_bits = bits // 2
    while True:
        high, low = x >> low_bits, x & ((1 << low_bits) - 1)
        k = key
        for r in range(8):
            k = (k + GOLDEN) & U64
            word = (((high if r % 2 else low) ^ k) * 0xBF58476D1CE4E5B9) & U64
            word = ((word ^ (word >> 32)) * 0x94D049BB133111EB) & U64
            if r % 2:
                low ^= (word >> 32) & ((1 << low_bits) - 1)
            else:
                high ^= (word >> 32) & ((1 << (bits - low_bits)) - 1)
        x = high << low_bits | low
        if x < size:
            return x


def slow_stream(seed: int, datasets: list[tuple[int, float]], samples: int) -> list[tuple]:
    """The first samples of a mixture, place by place, by counting; keys are the dataset numbers."""
    units = [int(u) for u in weight_units([w for _, w in datasets])]
    asked = [0] * len(datasets)
    stream: list[tuple[int, int]] = []
    block = 0
    while len(stream) < samples:
        dealt = []
        teeth = range((block * 2531) % BLOCK, BLOCK * (len(datasets) + 1), BLOCK)
        end = 0
        for d, unit in enumerate(units):
            begin, end = end, end + unit % BLOCK
            dealt += [d] * (unit // BLOCK + sum(begin <= tooth < end for tooth in teeth))
        assert len(dealt) == BLOCK
        for place in range(BLOCK):
            d = dealt[slow_permute(place, BLOCK, slow_key(seed, 0x426C656E64, block))]
            epoch, j = divmod(asked[d], datasets[d][0])
            stream.append((d, slow_permute(j, datasets[d][0], slow_key(seed, d, epoch))))
            asked[d] += 1
        block += 1
    return stream[:samples]


MIX = [(1000, 0.62), (333, 0.37), (17, 0.0097), (5, 0.0003)]


def test_the_fast_order_equals_the_slow_one():
    samples = 3 * BLOCK + 100
    dataset, row = Mixture(7, MIX).locate(np.arange(samples))
    expected = slow_stream(7, MIX, samples)
    assert list(zip(dataset.tolist(), row.tolist(), strict=True)) == expected


def test_a_wrong_key_is_seen_by_the_reference():
    samples = 200
    dataset, row = Mixture(8, MIX).locate(np.arange(samples))  # negative control: another seed
    got = list(zip(dataset.tolist(), row.tolist(), strict=True))
    assert got != slow_stream(7, MIX, samples)


# ---------------------------------------------------------------- permutations


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4096, 99_991])
def test_every_epoch_is_a_bijection(size: int):
    for key in range(3):
        image = permute(np.arange(size), size, keyed(key, size))
        assert np.array_equal(np.sort(image), np.arange(size))


def test_images_are_spread_evenly():
    # 4000 keys, 6 rows: each image of row 0 is expected 667 times, standard deviation 24; 5 sigma.
    first = permute(np.zeros(4000, np.int64), 6, keyed(np.arange(4000, dtype=np.uint64)))
    counts = np.bincount(first, minlength=6)
    assert abs(counts - 4000 / 6).max() < 5 * 24
    # Neighbours do not stay neighbours, and one epoch says nothing about the next.
    rows = 10_000
    _, row = Mixture(3, [(rows, 1.0)]).locate(np.arange(2 * rows))
    a, b = row[:rows], row[rows:]
    assert (np.abs(np.diff(a)) == 1).mean() < 0.002
    assert (a == b).mean() < 0.002
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05  # 5 standard errors of 10,000 pairs
    assert abs(np.corrcoef(a, np.arange(rows))[0, 1]) < 0.05


def test_a_huge_dataset_needs_no_index():
    rows = 3 * 10**11
    _, row = Mixture(1, [(rows, 1.0)]).locate(np.arange(10**11, 10**11 + 20_000))
    assert len(np.unique(row)) == 20_000
    assert row.min() >= 0
    assert row.max() < rows


# ---------------------------------------------------------------- the blend


def test_each_block_holds_its_share_and_rows_come_once_an_epoch():
    blocks = 40
    mixture = Mixture(11, MIX)
    dataset, row = mixture.locate(np.arange(blocks * BLOCK))
    exact = mixture.units / BLOCK
    for block in dataset.reshape(blocks, BLOCK):
        counts = np.bincount(block, minlength=len(MIX))
        assert (np.abs(counts - exact) < 1).all()
    for d, (rows, _) in enumerate(MIX):
        mine = row[dataset == d]
        for epoch in range(len(mine) // rows):
            assert np.array_equal(np.sort(mine[epoch * rows : (epoch + 1) * rows]), np.arange(rows))
        tail = mine[len(mine) // rows * rows :]
        assert len(np.unique(tail)) == len(tail)


def test_small_weights_get_their_share_over_blocks():
    weights = [1.0, 1e-4, 3e-5, 1e-6, 1e-12]
    mixture = Mixture(5, [(10**6, w) for w in weights])
    units = mixture.units
    assert units.sum() == UNITS
    assert units[-1] == 1  # too small for a unit, still not starved
    assert abs(units[:4] / UNITS - np.asarray(weights[:4]) / sum(weights)).max() < 2 / UNITS
    # After BLOCK blocks every dataset has exactly its units; on the way never 3 samples off.
    assert np.array_equal(mixture.consumed(UNITS), units)
    assert np.array_equal(mixture.consumed(5 * UNITS), 5 * units)
    for blocks in (1, 2, 3, 10, 100, 1000, 3000, 4095):
        due = units / BLOCK * blocks
        assert np.abs(mixture.consumed(blocks * BLOCK) - due).max() < 3
        assert mixture.consumed(blocks * BLOCK).sum() == blocks * BLOCK


def test_two_hundred_datasets_and_two():
    weights = np.random.default_rng(0).random(200) ** 4
    units = weight_units(weights)
    assert units.sum() == UNITS
    assert np.abs(units - weights / weights.sum() * UNITS).max() < 2
    assert weight_units([1, 1, 1]).sum() == UNITS
    assert weight_units([1, 0, 3]).tolist() == [UNITS // 4, 0, UNITS // 4 * 3]
    assert weight_units([1.0] + [1e-30] * 50).tolist() == [UNITS - 50] + [1] * 50


def test_wrong_mixtures_are_sentences():
    for weights in ([], [0.0, 0.0], [1.0, -0.5], [float("nan")]):
        with pytest.raises(ValueError, match="weights are"):
            weight_units(weights)
    with pytest.raises(ValueError, match="dataset 1 has 0 rows"):
        Mixture(1, [(5, 1.0), (0, 1.0)])
    with pytest.raises(ValueError, match="named once"):
        Mixture(1, [Dataset(5, 1.0, 9), Dataset(6, 1.0, 9)])
    with pytest.raises(ValueError, match="the first must be 0"):
        Order(1, [(5, [Dataset(5, 1.0, 9)])])
    with pytest.raises(ValueError, match="not a range of samples"):
        stream_places([0], [(5, 3)])


# ---------------------------------------------------------------- independence of everything else


def test_any_way_of_asking_gives_the_same_rows():
    whole = Mixture(2, MIX).locate(np.arange(9000))
    rng = np.random.default_rng(0)
    for world, micro in ((1, 7), (3, 64), (8, 5)):
        asked = Mixture(2, MIX)
        dataset, row = np.empty(9000, np.int32), np.empty(9000, np.int64)
        calls = [
            np.arange(start, min(start + micro, 9000))
            for rank in range(world)
            for start in range(rank * micro, 9000, micro * world)
        ]
        for at in rng.permutation(len(calls)):  # any order: no state is kept between calls
            dataset[calls[at]], row[calls[at]] = asked.locate(calls[at])
        assert np.array_equal(dataset, whole[0])
        assert np.array_equal(row, whole[1])


def test_consumed_counts_what_locate_handed_out():
    mixture = Mixture(2, MIX)
    dataset, _ = mixture.locate(np.arange(3 * BLOCK))
    for n in (0, 1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 9999, 3 * BLOCK):
        counted = np.bincount(dataset[:n], minlength=len(MIX))
        assert np.array_equal(mixture.consumed(n), counted)


# ---------------------------------------------------------------- stages and skips


def two_datasets(*shares: float) -> list[Dataset]:
    rows = (5003, 2999)
    return [
        Dataset(n, w, dataset_key(f"set {i}"))
        for i, (n, w) in enumerate(zip(rows, shares, strict=True))
    ]


def test_a_later_stage_continues_without_repeats():
    border = 3001  # in the middle of a block
    new = Dataset(700, 0.5, dataset_key("new"))
    stages = [(0, two_datasets(0.8, 0.2)), (border, [new, *two_datasets(0.3, 0.7)])]
    order = Order(4, stages)
    stage, dataset, row = order.locate(np.arange(6000))
    assert np.array_equal(stage, (np.arange(6000) >= border).astype(np.int32))
    for old, now, rows in ((0, 1, 5003), (1, 2, 2999)):
        seen = np.concatenate(
            [row[:border][dataset[:border] == old], row[border:][dataset[border:] == now]]
        )
        assert len(seen) < rows
        assert len(np.unique(seen)) == len(seen)
    at, counts = order.consumed(6000)
    assert at == 1
    assert counts[0] == (dataset[border:] == 0).sum()
    assert order.consumed(border)[0] == 1
    # The stages of the past do not move when a stage is appended.
    alone = Order(4, stages[:1]).locate(np.arange(border))
    assert np.array_equal(alone[1], dataset[:border])
    assert np.array_equal(alone[2], row[:border])
    # Negative control: a second stage that forgets where the first stood repeats rows.
    forgot = Mixture(4, list(stages[1][1])).locate(np.arange(6000 - border))
    again = np.concatenate([row[:border][dataset[:border] == 0], forgot[1][forgot[0] == 1]])
    assert len(np.unique(again)) < len(again)


def test_another_number_of_rows_is_another_dataset():
    # A longer sequence cuts the same tokens into other rows: nothing to continue.
    longer = [Dataset(2500, 1.0, dataset_key("set 0"))]
    order = Order(4, [(0, two_datasets(1, 1)), (100, longer)])
    assert order.mixtures[1].datasets[0].start == 0


def test_skips_renumber_and_never_shorten():
    places = stream_places(np.arange(20), [(5, 8), (0, 2), (7, 9), (15, 15)])
    expected = [g for g in range(40) if not (g < 2 or 5 <= g < 9)][:20]
    assert places.tolist() == expected


def test_a_skipped_range_is_never_seen_also_at_a_border():
    stages = [(0, two_datasets(0.5, 0.5)), (1000, two_datasets(0.9, 0.1))]
    plain = Order(4, stages)
    _, dataset, row = plain.locate(np.arange(3000))
    # Samples 1000..1099, right behind the border, were bad: pass over them.
    skips = skip_samples((), 1000, 100)
    order = Order(4, stages, skips)
    stage, dataset_2, row_2 = order.locate(np.arange(2900))
    kept = np.r_[0:1000, 1100:3000]
    assert np.array_equal(dataset_2, dataset[kept])
    assert np.array_equal(row_2, row[kept])
    assert (stage[1000:] == 1).all()
    # A second spike, numbered as the run numbers its samples now.
    skips = skip_samples(skips, 950, 100)  # crosses the first range
    assert skips == ((950, 1150),)
    third = Order(4, stages, skips)
    assert len(third.locate(np.arange(990, 1010))[2]) == 20  # batches are as long as ever
    # Stage 0 still has its 1000 samples, the last 50 of them from behind the skipped range.
    seen = third.locate(np.arange(1000))
    assert np.array_equal(seen[2][:950], row[:950])
    bad = set(zip(dataset[950:1000].tolist(), row[950:1000].tolist(), strict=True))
    assert not bad & set(zip(seen[1].tolist(), seen[2].tolist(), strict=True))
