"""Of documents that are nearly the same the first one stays: found by MinHash, joined by proof.

Long because the sketch, the stages and the builds are tried on the same edited copies.
"""

import functools
import itertools
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.corpus import CorpusConfig
from configs.dedup import Near
from configs.load import ConfigError, from_dict
from data_pipeline import build, hanzi, minhash, near
from data_pipeline.clean import normalise
from data_pipeline.shards import records, shard
from tests import dev_corpus
from tests.test_corpus_build import SAMPLE, contents, kept, page, start

NEAR = {"near": {}}
RULES = Near()
SIMPLE = {code: int(hanzi.forms()[code]) for code in range(0x2E80, 0xA000)}
HAN = [chr(code) for code in range(0x4E00, 0x5200)]


def letters(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    return "".join(filter(_is_letter, text)).translate(SIMPLE)


@functools.cache
def _is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"


def true_jaccard(one: str, two: str, n: int = 5) -> float:
    """The definition, over sets of strings."""
    a, b = ({t[k : k + n] for k in range(max(1, len(t) - n + 1))} for t in map(letters, (one, two)))
    return len(a & b) / len(a | b)


def edited(text: str, share: float, draw: random.Random) -> str:
    """`share` of the characters replaced (most often), removed, or followed by another."""
    chars = list(text)
    for at in draw.sample(range(len(chars)), round(share * len(chars))):
        new = draw.choice(HAN)
        chars[at] = draw.choice([new, new, "", chars[at] + new])
    return "".join(chars)


def texts_of_the_sample(least: int) -> list[str]:
    """Documents of the sample with at least so many characters, paragraphs put together."""
    texts = [
        normalise(json.loads(line)["text"]).text for line in SAMPLE.read_text("utf-8").splitlines()
    ]
    joined: list[str] = []
    for text in dict.fromkeys(texts):
        if joined and len(joined[-1]) < least:
            joined[-1] += "\n" + text
        else:
            joined.append(text)
    return [text for text in joined if len(text) >= least]


def find(folder: Path, shards: list[list[str]], rules: Near = RULES) -> list[tuple[int, int]]:
    """The pairs that the stages join, run block by block without a build."""
    sizes = [len(texts) for texts in shards]
    for rank, texts in enumerate(shards):
        with shard(folder / "cleaned" / f"{rank:05d}.jsonl.zst") as add:
            for text in texts:
                add({"text": text})

    def each(block: Any, tasks: int) -> Path:
        block.folder = folder / block.name
        for rank in range(tasks):
            list(block.run(rank=rank, world_size=tasks))
        return folder / block.name / "data"

    signed = each(near.Sign(folder / "cleaned", rules), len(shards))
    tables = sorted((signed / "bands").iterdir())
    found = each(near.FindCandidates(tables, sizes, [], rules.bands), 2 * rules.bands)
    members = sorted((found / "members").iterdir())
    gathered = each(near.GatherLetters(folder / "cleaned", sizes, members), len(shards))
    pairs = sorted((found / "pairs").iterdir())
    compared = each(near.Compare(pairs, gathered, sizes, rules), len(shards))
    joined = [np.load(path) for path in sorted((compared / "joined").iterdir())]
    return sorted(map(tuple, np.concatenate(joined, axis=1).T.tolist()))


# ---- the sketch


def test_hashes_of_n_grams_are_as_distinct_as_the_n_grams() -> None:
    draw = random.Random(3)
    for n in (1, 5, 13):
        text = "".join(draw.choices(HAN[:40], k=3000)) + "𠮷，1、a。" * 20
        solid = letters(text)
        grams = [solid[k : k + n] for k in range(len(solid) - n + 1)]
        hashes = minhash.gram_hashes(minhash.letters(text), n).tolist()
        assert len(hashes) == len(grams)
        assert len(set(zip(grams, hashes, strict=True))) == len(set(grams)) == len(set(hashes))


def test_what_stands_between_letters_changes_nothing() -> None:
    one, two = "天地玄黄，宇宙洪荒。日月盈昃", "天地玄黄 宇宙\n洪荒「日月」盈昃！"
    assert np.array_equal(minhash.signature(one, 5, 112), minhash.signature(two, 5, 112))
    assert not np.array_equal(minhash.signature(one, 5, 112), minhash.signature(one[1:], 5, 112))
    composed, apart = "caf\u00e9天地玄黄", "cafe\u0301天地玄黄"
    assert np.array_equal(minhash.letters(composed), minhash.letters(apart))
    assert minhash.signature("，。\n ", 5, 112) is None
    assert minhash.signature("天", 5, 112) is not None


def test_a_signature_is_the_lowest_of_each_function() -> None:
    """Against Python's own integers."""
    text = texts_of_the_sample(400)[3]
    hashes = minhash.gram_hashes(minhash.letters(text), 5).tolist()
    a, b = (column.tolist() for column in minhash.functions(112))
    slow = [min((f * h + s) % 2**64 for h in hashes) for f, s in zip(a, b, strict=True)]
    signed = minhash.signature(text, 5, 112)
    assert signed is not None
    assert signed.tolist() == slow


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_a_book_signed_in_pieces_has_the_same_signature(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        "天地，玄黄" * 3 + "宇宙洪荒",
        "一二三",
        "，" * 50 + "天" + "，" * 50 + "地",
        "。" * 30,
    ]
    whole = [minhash.signature(text, 5, 112) for text in texts]
    monkeypatch.setattr(minhash, "PIECE", piece)
    for text, expected in zip(texts, whole, strict=True):
        assert np.array_equal(minhash.signature(text, 5, 112), expected)  # type: ignore[arg-type]


def test_signatures_estimate_jaccard_within_their_standard_error() -> None:
    draw = random.Random(11)
    texts = texts_of_the_sample(300)[:250]
    errors, expected = [], []
    for text in texts:
        other = edited(text, draw.choice([0.005, 0.01, 0.03, 0.06]), draw)
        one, two = (minhash.signature(t, 5, 112) for t in (text, other))
        truth = true_jaccard(text, other)
        sets = (minhash.gram_set(minhash.letters(t), 5) for t in (text, other))
        assert minhash.jaccard(*sets) == truth
        assert one is not None and two is not None
        errors.append(minhash.estimate(one, two) - truth)
        expected.append(truth * (1 - truth) / 112)
    # 250 pairs: the mean lies within 4 of its own standard errors, the spread within a fifth.
    assert abs(np.mean(errors)) < 4 * (np.sum(expected) ** 0.5) / len(errors)
    assert 0.8 < np.mean(np.square(errors)) / np.mean(expected) < 1.2 * 1.2


# ---- the stages


def test_joined_pairs_equal_brute_force(tmp_path: Path) -> None:
    """With 60 bands of 2 no pair of 0.5 is missed: 1 - (1 - 0.25)^60 = 0.99999997."""
    draw = random.Random(2)
    texts = texts_of_the_sample(60)[:70]
    texts += [edited(draw.choice(texts), draw.choice([0.0, 0.05, 0.1, 0.2]), draw) for _ in texts]
    draw.shuffle(texts)
    rules = Near(bands=60, rows=2)
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(len(texts)), 2)
        if true_jaccard(texts[i], texts[j]) >= 0.5
    ]
    assert len(expected) > 30
    assert find(tmp_path / "a", [texts[:50], [], texts[50:]], rules) == expected
    stricter = [(i, j) for i, j in expected if true_jaccard(texts[i], texts[j]) >= 0.8]
    rules = Near(bands=60, rows=2, jaccard=0.8)
    assert find(tmp_path / "b", [texts], rules) == stricter != expected


def test_candidates_are_all_pairs_of_a_bucket_and_a_line_through_a_huge_one() -> None:
    keys = np.repeat(np.array([5, 7, 9, 11], np.uint64), [1, 2, 17, 400])
    numbers = np.arange(len(keys), dtype=np.uint64) * np.uint64(3)
    found = set(map(tuple, near.pairs_of(keys, numbers).T.tolist()))
    for key in (5, 7, 9):
        pairs = set(itertools.combinations(numbers[keys == key].tolist(), 2))
        assert pairs <= found
    huge = numbers[keys == 11].tolist()
    within = {pair for pair in found if pair[0] >= huge[0]}
    assert set(itertools.pairwise(huge)) <= within
    assert {(huge[0], other) for other in huge[1:]} <= within
    assert len(within) < 2 * near.PARTNERS * len(huge)
    assert all(one < two for one, two in found)


def test_candidates_of_many_shards_take_their_sizes_one_by_one(tmp_path: Path) -> None:
    """A sum of those before, for each shard anew, is quadratic: minutes a task at 100,000."""

    class Sizes(list[int]):
        def __getitem__(self, key: Any) -> Any:
            assert not isinstance(key, slice)
            return super().__getitem__(key)

    paths, sizes = [], Sizes([3, 0, 2, 4])
    for shard_number, size in enumerate(sizes):
        table = np.empty((1, size), near.KEY)
        table["key"], table["row"] = 7, np.arange(size)
        paths.append(tmp_path / f"{shard_number}.npy")
        np.save(paths[-1], table)
    find = near.FindCandidates(paths, sizes, [], 1)
    find.folder = tmp_path
    list(find.run())
    assert np.load(tmp_path / "data" / "members" / "00000.npy").tolist() == list(range(9))


def test_clusters_equal_a_walk_through_the_pairs() -> None:
    draw = random.Random(4)
    drawn = [sorted(draw.sample(range(0, 900, 3), 2)) for _ in range(200)]
    pairs = near.sorted_pairs(np.array(drawn, np.uint64).T)
    jaccard = np.array([draw.random() for _ in pairs.T], np.float32)
    parts = [(pairs[:, k : k + 7], jaccard[k : k + 7]) for k in range(0, pairs.shape[1], 7)]
    label = {n: n for pair in drawn for n in pair}
    changed = True
    while changed:
        changed = False
        for one, two in drawn:
            low = min(label[one], label[two])
            changed |= label[one] != low or label[two] != low
            label[one] = label[two] = low
    goes, why, stays, sizes = near.clusters(lambda: parts)
    assert goes.tolist() == sorted(n for n in label if label[n] != n)
    assert stays.tolist() == sorted(set(label.values()))
    of = list(label.values())
    assert sizes.tolist() == [of.count(n) - 1 for n in stays.tolist()]
    assert why["kept"].tolist() == [label[n] for n in goes.tolist()]
    alike = dict(zip(map(tuple, pairs.T.tolist()), jaccard.tolist(), strict=True))
    for n, stay, other, said in zip(
        goes.tolist(), *(why[k].tolist() for k in why.dtype.names), strict=True
    ):
        mine = {a + b - n: j for (a, b), j in alike.items() if n in (a, b)}
        nearest = stay if stay in mine else max(mine, key=mine.__getitem__)
        assert (other, said) == (nearest, mine[nearest])
    nothing = (np.empty((2, 0), np.uint64), np.empty(0, np.float32))
    assert [len(part) for part in near.clusters(lambda: [nothing])] == [0, 0, 0, 0]


def recall(texts: list[str], share: float, folder: Path, seed: int) -> float:
    """Share of the texts whose edited copy is joined to them; every joined pair is checked."""
    draw = random.Random(seed)
    copies = [edited(text, share, draw) for text in texts]
    joined = find(folder, [texts, copies])
    both = texts + copies
    for one, two in joined:
        assert true_jaccard(both[one], both[two]) >= 0.5
    return sum((n, n + len(texts)) in set(joined) for n in range(len(texts))) / len(texts)


@pytest.mark.parametrize(("share", "least"), [(0.01, 0.99), (0.02, 0.95), (0.05, 0.25)])
def test_edited_copies_are_found(share: float, least: float, tmp_path: Path) -> None:
    texts = texts_of_the_sample(400)[:200]
    assert recall(texts, share, tmp_path, 1) >= least


def documents_at_hand() -> list[str]:
    """2,000 documents of the development corpus, few of which have much in common."""
    drawn = dev_corpus.documents(3000, 4000, 8)
    texts = [normalise(text).text for group in drawn.values() for text in group]
    texts = [text for text in texts if len(letters(text)) >= 400]
    random.Random(9).shuffle(texts)
    chosen: list[str] = []
    taken: set[int] = set()
    for text in texts:
        signed = minhash.signature(text, 5, 112)
        assert signed is not None
        values = set(signed.tolist())
        if len(values & taken) < 30:
            chosen.append(text)
            taken |= values
        if len(chosen) == 2000:
            break
    return chosen


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("share", "least"), [(0.01, 0.99), (0.02, 0.95), (0.05, 0.25)])
def test_two_thousand_edited_copies_are_found(share: float, least: float, tmp_path: Path) -> None:
    texts = documents_at_hand()
    found = recall(texts, share, tmp_path, 2)
    print(f"\n{len(texts)} copies, {share:.0%} of characters edited: recall {found:.4f}")
    assert len(texts) == 2000
    assert found >= least


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_documents_of_two_sources_are_joined() -> None:
    """100,000 random pairs: no candidate among them is joined."""
    drawn = dev_corpus.documents(500, 3000, 7)
    groups = [
        [normalise(text).text for text in group if len(text) >= 100] for group in drawn.values()
    ]
    keys: dict[str, np.ndarray] = {}
    for text in itertools.chain.from_iterable(groups):
        signed = minhash.signature(text, RULES.ngram, RULES.bands * RULES.rows)
        if signed is not None:
            keys[text] = minhash.band_keys(signed, RULES.bands)
    draw = random.Random(5)
    candidates = joined = 0
    for _ in range(100_000):
        one, two = (draw.choice(group) for group in draw.sample(groups, 2))
        if one in keys and two in keys and (keys[one] == keys[two]).any():
            candidates += 1
            joined += true_jaccard(one, two) >= 0.5
    print(f"\n100,000 cross-source pairs: {candidates} candidates, {joined} joined")
    assert joined == 0


# ---- the build


def write_near_source(path: Path) -> Path:
    """Documents of the sample, some of them again with characters edited."""
    draw = random.Random(6)
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts_of_the_sample(300) * 4):
            copy = edited(text, 0.01, draw) if number % 3 == 0 else text
            other = f"第{number}篇" + "".join(draw.sample(text, len(text)))
            for name, words in (("copy", copy), ("other", other)):
                record = {"id": f"{name}-{number}", "text": words}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_near_source(tmp_path_factory.mktemp("source") / "text.jsonl")


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "corpus"
    build.build(page(out, source, dedup=NEAR))
    return out


def test_near_duplicates_are_aside_and_counted(built: Path, source: Path, tmp_path: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    aside = [
        row for path in (built / "rejects" / "near_duplicate").iterdir() for row in records(path)
    ]
    stay = kept(built, "train") + kept(built, "valid")
    assert len(aside) == manifest["rejects"]["near_duplicate"]["documents"] > 100
    assert sum(row["near_duplicates"] for row in stay) == len(aside)
    assert manifest["near"]["near_clusters"] == sum(row["near_duplicates"] > 0 for row in stay)
    assert manifest["read"]["documents"] == len(stay) + sum(
        said["documents"] for said in manifest["rejects"].values()
    )
    plain = build.build(page(tmp_path / "c", source))
    assert "near_duplicate" not in plain["rejects"]
    assert "near_duplicates" not in kept(tmp_path / "c", "train")[0]


def test_the_first_of_a_cluster_stays(built: Path) -> None:
    place = {"copy": 0, "other": 1}

    def order(row: dict[str, Any]) -> tuple[int, int]:
        name, number = row["id"].rpartition("/")[2].rpartition(":")[2].split("-")
        return int(number), place[name]

    stay = sorted((row for split in ("train", "valid") for row in kept(built, split)), key=order)
    stand_for = [row for row in stay if row["near_duplicates"]]
    aside = [
        row for path in (built / "rejects" / "near_duplicate").iterdir() for row in records(path)
    ]
    for row in aside[::25]:
        alike = [r for r in stand_for if true_jaccard(r["text"], row["text"]) >= 0.5]
        assert alike
        assert min(map(order, alike)) < order(row)


def test_a_reject_names_the_document_that_stays_and_how_alike_it_is(built: Path) -> None:
    stay = {row["id"]: row for split in ("train", "valid") for row in kept(built, split)}
    gone = {
        reason: [r for path in (built / "rejects" / reason).iterdir() for r in records(path)]
        for reason in ("duplicate", "near_duplicate")
    }
    by_id = stay | {row["id"]: row for rows in gone.values() for row in rows}
    assert all(row["kept"] in stay for row in gone["near_duplicate"])
    for row in gone["near_duplicate"][::20]:
        other = by_id[row.get("alike", row["kept"])]
        assert round(true_jaccard(row["text"], other["text"]), 4) == row["jaccard"] >= 0.5
    for row in gone["duplicate"]:
        assert letters(row["text"]) == letters(by_id[row["kept"]]["text"])
        assert "jaccard" not in row
    assert all("kept" not in row for row in stay.values())
    assert gone["duplicate"] and gone["near_duplicate"]


def test_near_duplicates_do_not_depend_on_workers(
    built: Path, source: Path, tmp_path: Path
) -> None:
    build.build(page(tmp_path / "c", source, dedup=NEAR, data={"workers": 1}))
    assert len(list(built.glob("documents/train-*"))) > 1
    assert contents(tmp_path / "c") == contents(built)


@pytest.mark.slow
def test_a_build_killed_among_near_duplicates_makes_the_same_bytes(
    built: Path, source: Path, tmp_path: Path
) -> None:
    import os
    import signal
    import time

    config, out = page(tmp_path / "c", source, dedup=NEAR), tmp_path / "c"
    for name in ("signatures", "candidates", "letters", "compare"):
        process = start(config, tmp_path)
        while process.poll() is None and not list(out.glob(f"stages/{name}-*")):
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (out / "manifest.json").exists()
    build.build(config)
    assert contents(out) == contents(built)


def test_another_threshold_compares_again_and_signs_no_more(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"clean", "duplicates", "signatures", "candidates", "letters", "compare", "clusters"}
    stages |= {"divide", "tokenizer", "encode"}

    def done_again(**sections: Any) -> set[str]:
        build.build(page(tmp_path / "c", source, **{"data": {"workers": 1}, **sections}), True)
        lines = capsys.readouterr().err.splitlines()
        before = {line.split()[0] for line in lines if line.endswith("done before")}
        return stages - before

    assert done_again(dedup=NEAR) == stages
    after = {"compare", "clusters", "divide", "tokenizer", "encode"}
    strict = {"near": {"jaccard": 0.9}}
    assert done_again(dedup=strict) == after
    seed = {"valid_fraction": 0.1, "seed": 1}
    apart = {"duplicates", "divide", "tokenizer", "encode"}
    assert done_again(dedup=strict, split=seed) == apart


def test_valid_documents_is_a_number_without_near_duplicates(source: Path, tmp_path: Path) -> None:
    config = page(tmp_path / "c", source, dedup=NEAR, split={"valid_documents": 9})
    assert build.build(config)["splits"]["valid"]["documents"] == 9


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"jaccard": 0.0}, r"jaccard: is 0\.0, must lie in \(0, 1\]"),
        ({"bands": 0}, r"bands: is 0, must lie in \[1, 500\]"),
    ],
)
def test_mistakes_in_near_are_sentences(rules: dict[str, Any], said: str) -> None:
    make: Callable[[], CorpusConfig] = lambda: page(Path("c"), Path("t"), dedup={"near": rules})  # noqa: E731
    with pytest.raises(ConfigError, match=said):
        make()


def test_near_is_off_unless_asked_for() -> None:
    data = {
        "data": {"out": "c", "sources": [{"kind": "jsonl", "name": "s", "path": "t"}]},
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "cpm", "vocab_size": 300},
    }
    assert from_dict(CorpusConfig, data).dedup.near is None
    assert from_dict(CorpusConfig, data | {"dedup": {"near": {}}}).dedup.near == Near()
