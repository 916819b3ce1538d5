"""A million documents without text do not stop a build, lose no good one, and cost little memory
and disk."""

import gzip
import json
import resource
from pathlib import Path

import pytest

from configs.corpus import CorpusConfig
from configs.load import from_dict
from data_pipeline import build
from data_pipeline.shards import records

WORDS = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
GOOD = [{"id": f"good{n}", "text": f"第{n}篇：{WORDS * 2}"} for n in range(200)]
EMPTY = {
    "empty": ('{"text": ""}', "too_short"),
    "blank": ('{"text": " \\n\\u3000 \\t"}', "too_short"),
    "missing": ("{}", "unreadable:no_text"),
}


def rejected(folder: Path) -> int:
    """How many rejected documents can be looked at."""
    return sum(1 for path in folder.rglob("*.zst") for _ in records(path))


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize(
    "number", [2_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_empty_documents_around_good_ones(kind: str, number: int, tmp_path: Path) -> None:
    line, reason = EMPTY[kind]
    path = tmp_path / "text.jsonl.gz"
    some = f"{line}\n".encode() * (number // len(GOOD))
    with gzip.open(path, "wb", 1) as file:
        for good in GOOD:
            file.write(json.dumps(good, ensure_ascii=False).encode() + b"\n" + some)
    page = {
        "data": {
            "out": str(tmp_path / "c"),
            "sources": [{"kind": "jsonl", "name": "s", "path": str(path)}],
            "workers": 1,
        },
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 300},
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = build.build(from_dict(CorpusConfig, page))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert manifest["read"]["documents"] == number + len(GOOD)
    assert {why: n["documents"] for why, n in manifest["rejects"].items()} == {reason: number}
    kept = [r for path in (tmp_path / "c/documents").glob("*.zst") for r in records(path)]
    assert sorted(r["id"] for r in kept) == sorted(good["id"] for good in GOOD)
    assert f"{number:,}" in (tmp_path / "c" / "report.html").read_text("utf-8")
    assert rejected(tmp_path / "c" / "rejects") == number
    # 6 bytes of disk for each that was put aside; what is loaded and learnt takes some 200 MB.
    on_disk = sum(f.stat().st_size for f in (tmp_path / "c" / "rejects").rglob("*") if f.is_file())
    assert on_disk < 6 * number + 10_000
    assert grown < 400_000, "kilobytes, whatever the number"
