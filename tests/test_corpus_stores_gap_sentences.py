"""A corpus may hold the gap sentences of its documents: picked once, the same for any workers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import build, tokenizer
from data_pipeline.index import Index
from data_pipeline.pseudo_summary import pick
from data_pipeline.sidefile import GAPS, Gaps
from tests.test_corpus_build import contents, kept, kill_and_finish, page, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "text.jsonl", copies=5, every=3)


WORDS: dict[str, Any] = {
    "tokenizer": {"kind": "cpm", "vocab_size": 3000},
    "encode": {"pseudo_summary": True},
}


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "corpus"
    build.build(page(out, source, **WORDS))
    return out


@pytest.mark.parametrize("split", ["train", "valid"])
def test_what_is_stored_is_what_was_picked(split: str, built: Path) -> None:
    """Every document kept, its units and picks, and the tokens of each sentence."""
    encoder = tokenizer.load(built / "tokenizer")
    index, gaps = Index(built / split), Gaps(built / split)
    documents = kept(built, split)
    assert gaps.documents == index.documents == len(documents) > 30
    without = 0
    for number, record in enumerate(documents):
        units, stored = pick(record["text"]), gaps.document(number)
        without += bool(units) and not stored
        for unit, found in zip(units, stored, strict=bool(stored)):
            assert np.flatnonzero(found.picked).tolist() == unit.picks
            ids = index.document(number)
            slices = [ids[a:b] for a, b in zip(found.starts, found.stops, strict=True)]
            assert all(map(np.array_equal, slices, encoder.encode_batch(unit.segments)))
    said = json.loads((built / "manifest.json").read_bytes())["splits"][split]["gaps"]
    assert said["no_borders"] == without <= 0.05 * len(documents)
    assert said["units"] == gaps.units > 0 and said["sentences"] == gaps.sentences
    picked = sum(int(gaps.unit(unit).picked.sum()) for unit in range(gaps.units))
    assert said["gap_sentences"] == picked
    assert said["fingerprint"] == GAPS.fingerprint(built / split)


def test_the_bytes_do_not_depend_on_workers(source: Path, built: Path, tmp_path: Path) -> None:
    config = page(tmp_path / "corpus", source, data={"workers": 1}, **WORDS)
    build.build(config)
    assert contents(tmp_path / "corpus") == contents(built)


def test_the_switch_changes_nothing_else(source: Path, built: Path, tmp_path: Path) -> None:
    """Off: the same tokens, another fingerprint, no file; on again in the same folder: as before;
    a file that went is made again."""
    out = tmp_path / "corpus"
    off = page(out, source, tokenizer=WORDS["tokenizer"])
    manifest = build.build(off)
    without, whole = contents(out), contents(built)
    assert {name for name in whole if name not in without} == {"train.gaps", "valid.gaps"}
    differing = {name for name in without if without[name] != whole[name]}
    assert differing <= {"manifest.json", "report.html"}
    assert all("gaps" not in split for split in manifest["splits"].values())
    on = page(out, source, **WORDS)
    assert build.build(on, replacing=True)["fingerprint"] != manifest["fingerprint"]
    assert contents(out) == whole
    (out / "train.gaps").unlink()
    build.build(on)
    assert contents(out) == whole
    build.build(off, replacing=True)
    assert contents(out) == without


@pytest.mark.slow
@pytest.mark.parametrize("seed", [20, 21])
def test_a_killed_build_stores_the_same(
    seed: int, source: Path, built: Path, tmp_path: Path
) -> None:
    """Marks and gap sentences after five blows are those of an unbroken build."""
    kill_and_finish(5, seed, source, built, tmp_path, **WORDS)
    assert (tmp_path / "corpus" / "train.marks").stat().st_size > 1000
