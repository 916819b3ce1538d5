"""Sentences stored beside an index are slices of its tokens: what was picked in text is there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from configs.encoding import Tokenizing
from data_pipeline import pseudo_summary, tokenizer
from data_pipeline.encode import make_tokenizer
from data_pipeline.gaps import gap_units
from data_pipeline.index import IndexFault
from data_pipeline.pseudo_summary import pick
from data_pipeline.sidefile import GAPS, Gaps, GapUnit, GapWriter

SAMPLE = Path(pseudo_summary.__file__).parent / "sample" / "sample.jsonl"


class Characters:
    """Each character is a token; with `across`, so is 。” as one, as in a byte BPE."""

    def __init__(self, across: bool = False) -> None:
        self.across = across

    def encode_batch(self, texts: Sequence[str], /) -> list[np.ndarray]:
        """Code points."""
        joined = [text.replace("。”", "\x01") if self.across else text for text in texts]
        return [np.array([ord(char) for char in text], np.int32) for text in joined]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The shipped sample, in documents of some 1,500 characters; some too short for a unit."""
    with SAMPLE.open(encoding="utf-8") as file:
        whole = "\n".join(json.loads(line)["text"] for line in file)
    long = [whole[start : start + 1500].strip() for start in range(0, 120_000, 1500)]
    return [*long, "一句。", ""]


def checked(texts: list[str], words: object) -> int:
    """Every stored sentence equals its own encoding; returns how many texts have no borders."""
    encode = words.encode_batch  # type: ignore[attr-defined]
    ids = encode(texts)
    lost = 0
    for text, whole, stored in zip(texts, ids, gap_units(texts, ids, words), strict=True):  # type: ignore[arg-type]
        if stored is None:
            lost += 1
            continue
        for unit, found in zip(pick(text), stored, strict=True):
            assert np.flatnonzero(found.picked).tolist() == unit.picks
            slices = [whole[a:b] for a, b in zip(found.starts, found.stops, strict=True)]
            assert all(map(np.array_equal, slices, encode(unit.segments)))
            for picked, numbers in [
                (True, unit.picks),
                (False, [i for i in range(len(unit.segments)) if i not in unit.picks]),
            ]:
                kept = [unit.segments[i] for i in numbers]
                assert np.array_equal(found.tokens(whole, picked), np.concatenate(encode(kept)))
    return lost


def test_characters(texts: list[str]) -> None:
    assert checked(texts, Characters()) == 0


@pytest.mark.parametrize(("kind", "least"), [("cpm", 0.95), ("wordpiece", 1), ("byte_bpe", 0.5)])
def test_real_tokenizers(kind: str, least: float, texts: list[str], tmp_path: Path) -> None:
    """wordpiece ends a word at each border: all; so does cpm: all but ties. byte_bpe's pieces may
    lie across: most."""
    make_tokenizer(Tokenizing(kind, vocab_size=3000), texts, tmp_path / "t")  # type: ignore[arg-type]
    words = tokenizer.load(tmp_path / "t")
    assert checked(texts, words) <= (1 - least) * len(texts)


def test_a_token_across_a_border_is_noticed() -> None:
    """Negative control: were borders taken from the parts unseen, they would be one off."""
    text = "“" + "甲乙丙丁" * 8 + "。”" + "子丑寅卯" * 8 + "。" + "天地玄黄" * 8 + "。"
    plain, across = Characters(), Characters(across=True)
    assert len(pick(text)) == 1
    assert gap_units([text], plain.encode_batch([text]), plain)[0]
    assert gap_units([text], across.encode_batch([text]), across) == [None]


def random_units(draw: np.random.Generator) -> list[GapUnit]:
    units = []
    for _ in range(draw.integers(0, 4)):
        starts = np.cumsum(draw.integers(1, 50, draw.integers(2, 9)))
        units.append(GapUnit(starts, starts + 1, draw.random(len(starts)) < 0.3))
    return units


def same(a: list[GapUnit], b: list[GapUnit]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True)
    )


def test_written_read_and_merged(tmp_path: Path) -> None:
    """The file of a split is that of its shards: the same bytes however it was cut."""
    draw = np.random.default_rng(1)
    documents = [random_units(draw) for _ in range(200)]
    with GapWriter(tmp_path / "whole") as whole:
        for units in documents:
            whole.add_document(units)
    cuts = [0, 0, 1, 77, 200]
    for part, (start, stop) in enumerate(pairwise(cuts)):
        with GapWriter(tmp_path / f"part-{part}") as shard:
            for units in documents[start:stop]:
                shard.add_document(units)
    GAPS.merge([tmp_path / f"part-{part}" for part in range(4)], tmp_path / "merged")
    assert (tmp_path / "merged.gaps").read_bytes() == (tmp_path / "whole.gaps").read_bytes()
    assert GAPS.fingerprint(tmp_path / "merged") == GAPS.fingerprint(tmp_path / "whole")
    assert GAPS.fingerprint(tmp_path / "part-3") != GAPS.fingerprint(tmp_path / "whole")
    gaps = pickle.loads(pickle.dumps(Gaps(tmp_path / "merged")))
    assert (gaps.documents, gaps.units) == (200, sum(map(len, documents)))
    assert all(same(gaps.document(i), units) for i, units in enumerate(documents))
    assert not same(gaps.document(0), documents[1] + documents[2])
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    with GapWriter(tmp_path / "x") as writer:
        writer.add_document([])
    before = (tmp_path / "x.gaps").read_bytes()
    with pytest.raises(ZeroDivisionError), GapWriter(tmp_path / "x") as writer:
        writer.add_document(random_units(np.random.default_rng(2)))
        raise ZeroDivisionError
    assert (tmp_path / "x.gaps").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.gaps"]


def test_damage_is_a_sentence(tmp_path: Path) -> None:
    with GapWriter(tmp_path / "x") as writer:
        for _ in range(5):
            writer.add_document([GapUnit(np.array([0, 3]), np.array([2, 5]), np.array([1, 0]))])
    path = tmp_path / "x.gaps"
    good = path.read_bytes()
    with pytest.raises(IndexFault, match="no such file of sentences"):
        Gaps(tmp_path / "y")
    with pytest.raises(IndexFault, match="no file to merge"):
        GAPS.merge([], tmp_path / "z")
    gaps = Gaps(tmp_path / "x")
    with pytest.raises(IndexFault, match="document 5 was asked for, it has 5"):
        gaps.document(5)
    with pytest.raises(IndexFault, match="unit -1 was asked for, it has 5"):
        gaps.unit(-1)
    for bad, what in [
        (good[:-1], "cut or damaged"),
        (good[:20], "does not start with BAJIEGAP"),
        (b"x" + good[1:], "does not start with BAJIEGAP"),
        (good[:8] + b"\x02" + good[9:], "has version 2, 1 is read"),
        (good[:40] + b"\x02" + good[41:], "do not add up"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(IndexFault, match=what):
            Gaps(tmp_path / "x")
        assert GAPS.path(tmp_path / "x") == path
