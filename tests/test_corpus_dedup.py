"""Of equal documents the first one stays: the same answer as comparing all pairs."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import dedup, names
from data_pipeline.clean import digest, normalise
from data_pipeline.shards import open_table, save_table

HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张"


def shards(draw: random.Random, sizes: list[int]) -> list[list[str]]:
    """Short texts that often agree, in letters at least."""
    marks = ["，", "。", " ", "\n", "！", "「", "…"]
    return [
        [
            "".join(
                char + draw.choice(["", *marks])
                for char in draw.choices(HAN[:4], k=draw.randrange(1, 6))
            )
            for _ in range(size)
        ]
        for size in sizes
    ]


def tables(folder: Path, texts: list[list[str]]) -> list[Path]:
    paths = [folder / f"{number:05d}.npy" for number in range(len(texts))]
    for path, shard in zip(paths, texts, strict=True):
        save_table(path, [digest(normalise(text)) for text in shard])
    return paths


@pytest.mark.parametrize("of", [1, 2, 8])
def test_duplicates_equal_brute_force(of: int, tmp_path: Path) -> None:
    texts = shards(random.Random(of), [500, 0, 1, 700, 300])
    paths = tables(tmp_path, texts)
    seen: dict[str, int] = {}
    expected, stays = [], []
    for number, text in enumerate(text for shard in texts for text in shard):
        letters = "".join(filter(str.isalnum, text))
        if letters in seen:
            expected.append(number)
            stays.append(seen[letters])
        seen.setdefault(letters, number)
    found = [dedup.search(paths, bucket, of, seed=0, lowest=5) for bucket in range(of)]
    pairs = [zip(f.duplicates.tolist(), f.kept.tolist(), strict=True) for f in found]
    assert sorted(itertools.chain(*pairs)) == list(zip(expected, stays, strict=True))
    assert sum(f.distinct for f in found) == len(seen)

    for number, f in enumerate(found):
        dedup.save(tmp_path / f"duplicates-{number}.npy", f.duplicates)
    again = sorted(tmp_path.glob("duplicates-*"))
    first, marks = 0, []
    for shard in texts:
        marks += dedup.rows_within(again, first, len(shard)).tolist()
        first += len(shard)
    assert np.flatnonzero(marks).tolist() == expected


def test_ids_are_found_by_number(tmp_path: Path) -> None:
    shards = [["甲/1", "b"], [], ["c", "", "丁" * 50]]
    for rank, ids in enumerate(shards):
        names.keep(tmp_path, rank, ids)
    sizes = [len(ids) for ids in shards]
    assert names.named(tmp_path, sizes, np.array([4, 0, 2, 0])) == {0: "甲/1", 2: "c", 4: "丁" * 50}
    assert names.named(tmp_path, sizes, np.array([1, 3])) == {1: "b", 3: ""}
    assert names.named(tmp_path, sizes, np.array([], dtype=np.int64)) == {}


def test_texts_without_letters_are_compared_by_their_signs() -> None:
    def same(one: str, other: str) -> bool:
        return digest(normalise(one)) == digest(normalise(other))

    assert not same("！！！", "。。。")
    assert same("！！！", "！！！")
    assert same("天，地", "天 地。")


def test_lots_are_even_and_follow_the_seed(tmp_path: Path) -> None:
    (path,) = tables(tmp_path, [[f"{HAN}{n}" for n in range(20_000)]])
    table = open_table(path)
    lots = dedup.shard_lots(table, seed=0)
    share = dedup.below(lots, int(0.1 * 2**64)).mean()
    assert abs(share - 0.1) < 0.01  # five deviations of a binomial of 20,000
    assert not np.array_equal(lots, dedup.shard_lots(table, seed=1))
    assert dedup.below(lots, 2**64).all()
    assert not dedup.below(lots, 0).any()
    one = digest(normalise(f"{HAN}7，"))
    (single,) = tables(tmp_path / "one", [[f"，{HAN}7"]])
    assert dedup.shard_lots(open_table(single), 0)[0] == lots[7], one


def test_the_lowest_lots_are_found_whatever_the_buckets(tmp_path: Path) -> None:
    texts = shards(random.Random(1), [900, 900])
    paths = tables(tmp_path, texts)
    distinct = {int(lot) for path in paths for lot in dedup.shard_lots(open_table(path), seed=3)}
    for of in (1, 4):
        drawn = [dedup.search(paths, bucket, of, seed=3, lowest=10).lots for bucket in range(of)]
        assert np.sort(np.concatenate(drawn))[:10].tolist() == sorted(distinct)[:10]


def test_buckets_grow_with_the_corpus() -> None:
    assert [dedup.buckets(n) for n in (0, 1, 4_000_000, 5_000_000, 100_000_000)] == [1, 1, 1, 2, 32]
    assert 10**9 / dedup.buckets(10**9) <= dedup.DOCUMENTS_PER_BUCKET * 1.05
