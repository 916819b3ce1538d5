"""Documents whose id stood before in their source are kept, and counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.corpus import CorpusConfig
from configs.load import from_dict
from data_pipeline import build, repeated_ids
from data_pipeline.shards import records

WORDS = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


def built(folder: Path, sources: dict[str, list[dict[str, Any]]], **data: Any) -> dict[str, Any]:
    """The manifest of a build of documents, source by source."""
    for name, written in sources.items():
        lines = [json.dumps(record, ensure_ascii=False) for record in written]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    named = [{"kind": "jsonl", "name": n, "path": str(folder / f"{n}.jsonl")} for n in sources]
    page = {
        "data": {"out": str(folder / "c"), "sources": named, "workers": 1, **data},
        "split": {"valid_fraction": 0.2},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 290},
    }
    return build.build(from_dict(CorpusConfig, page))


def document(number: int, **more: Any) -> dict[str, Any]:
    return {**more, "text": f"第{number}篇：{WORDS}"}


def test_a_repeated_id_is_counted_and_its_document_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = [document(n, id=f"a{n % 20}") for n in range(30)]  # a0 to a9 twice
    mine += [document(50), document(51)]  # without an id: made here, of their places
    mine += [{"id": "a3", "text": "短"}]  # refused, and counted all the same
    others = [document(100 + n, id=f"a{n}") for n in range(20)]  # another source's are no copies
    manifest = built(tmp_path, {"mine": mine, "others": others})
    assert [s.get("repeated_ids") for s in manifest["sources"]] == [11, None]
    assert sum(split["documents"] for split in manifest["splits"].values()) == 52
    said = "source 'mine': 11 of 33 documents have an id that stood before in it"
    assert said in capsys.readouterr().err
    assert "documents whose id stood before" in (tmp_path / "c" / "report.html").read_text("utf-8")
    kept = [r for path in (tmp_path / "c/documents").glob("*.zst") for r in records(path)]
    texts = {r["text"] for r in kept if r["id"] == "a4" and r["source"] == "mine"}
    assert texts == {document(4)["text"], document(24)["text"]}


def test_they_are_found_across_tasks_and_buckets(tmp_path: Path) -> None:
    some = np.random.default_rng(0).integers(0, 300, (4, 200))
    paths = []
    for rank, numbers in enumerate(some.tolist()):
        ids = repeated_ids.Ids()
        for number in numbers:
            ids.add(number % 3, f"id{number}")
        paths.append(tmp_path / f"{rank}.npy")
        ids.save(paths[-1])
    every = some.reshape(-1)
    wanted = {n: sum(every % 3 == n) - len(np.unique(every[every % 3 == n])) for n in range(3)}
    for of in (1, 4):
        found = [repeated_ids.again(paths, bucket, of) for bucket in range(of)]
        assert sum(found, repeated_ids.Counter()) == wanted
    # A negative control: a source's ids alone, each once.
    assert not repeated_ids.again([], 0, 1)
