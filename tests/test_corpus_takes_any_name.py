"""Files and fields may be called anything: names in GB18030, one name in many folders, fields
called as the pipeline calls its own."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig, Data
from configs.load import from_dict
from configs.sources import Source
from data_pipeline import build, ingest
from data_pipeline.ingest import Meter
from data_pipeline.shards import records
from data_pipeline.sources.documents import TAKEN

WORDS = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


def text_of(number: int) -> str:
    return f"第{number}篇写的是{chr(0x4E00 + 7 * number)}{chr(0x5000 + 11 * number)}：{WORDS}"


def page(folder: Path, sources: list[dict[str, Any]], **data: Any) -> CorpusConfig:
    return from_dict(
        CorpusConfig,
        {
            "data": {"out": str(folder / "out"), "sources": sources, "workers": 1, **data},
            "clean": {"min_characters": 5},
            "split": {"valid_documents": 2},
            "tokenizer": {"kind": "byte_bpe", "vocab_size": 420},
        },
    )


def ids(source: Source) -> list[str]:
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))
    parts = [part for task in tasks for part in task]
    return [document.id for part in parts for document in ingest.read(source, part, Meter())]


def kept(out: Path) -> list[dict[str, Any]]:
    return [r for path in sorted(out.glob("documents/*")) for r in records(path)]


def test_names_of_files_in_gb18030(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    try:
        for number in range(20):
            name = f"{number:02d}-文件.txt".encode("gb18030")
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(text_of(number))
        Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.txt")).write_bytes(b"\xff\xff\xff")
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    sources = [{"kind": "txt", "name": "书", "path": str(folder), "documents": "file"}]
    manifest = build.build(page(tmp_path, sources))
    assert manifest["read"]["documents"] == 21
    assert sorted(r["id"] for r in kept(tmp_path / "out"))[3] == "书/03-文件.txt:0"
    (path,) = tmp_path.glob("out/rejects/unreadable:*/*")
    (lost,) = records(path)
    assert lost["id"].startswith("书/bad\\xff.txt, line 1")


def test_one_name_in_many_folders_gives_ids_that_can_be_found_again(tmp_path: Path) -> None:
    for date in ("2023-06", "2023-07"):
        (tmp_path / "a" / "crawl" / date).mkdir(parents=True)
        (tmp_path / "a" / "crawl" / date / "part.txt").write_text(WORDS)
    want = ["s/2023-06/part.txt:0", "s/2023-07/part.txt:0"]
    for path in ("crawl", "crawl/*/*.txt", "crawl/**/part.txt"):
        assert ids(Source("txt", str(tmp_path / "a" / path), "s")) == want
    one = str(tmp_path / "a" / "crawl" / "2023-06" / "part.txt")
    assert ids(Source("txt", one, "s")) == ["s/part.txt:0"]
    (tmp_path / "a").rename(tmp_path / "b")  # where it lies does not matter
    assert ids(Source("txt", str(tmp_path / "b" / "crawl"), "s")) == want


def test_the_name_of_one_source_begins_with_anothers(tmp_path: Path) -> None:
    """What could not be read of code/python is none of code's."""
    good = "".join(json.dumps({"text": text_of(n)}) + "\n" for n in range(20))
    (tmp_path / "a.jsonl").write_text(good + "{\n")
    (tmp_path / "b.jsonl").write_bytes(good.encode() + b"{\n{\n" + b"{}\n")
    sources = [
        {"kind": "jsonl", "name": name, "path": str(tmp_path / f"{file}.jsonl")}
        for name, file in (("code", "a"), ("code/python", "b"))
    ]
    manifest = build.build(page(tmp_path, sources))
    one, other = manifest["sources"]
    assert one["unreadable"] == {"broken_json": 1}
    assert other["unreadable"] == {"broken_json": 2, "no_text": 1}


def test_fields_that_are_called_as_ours(tmp_path: Path) -> None:
    """A crawl whose records have `spans` and `label` beside pairs with fields and classes."""
    pages = tmp_path / "pages.jsonl"
    with pages.open("w") as file:
        for number in range(20):
            theirs = dict.fromkeys(TAKEN, f"theirs {number}")
            file.write(json.dumps({"id": number, **theirs, "content": text_of(number)}) + "\n")
    pairs = tmp_path / "pairs.jsonl"
    with pairs.open("w") as file:
        for number in range(20, 40):
            a, b = text_of(number), text_of(number + 100)
            file.write(json.dumps({"id": number, "a": a, "b": b, "class": number % 2}) + "\n")
    sources: list[dict[str, Any]] = [
        {"kind": "jsonl", "name": "pages", "path": str(pages), "text_field": "content"},
        {"kind": "jsonl", "name": "pairs", "path": str(pairs), "fields": ["a", "b"]},
    ]
    sources[1]["label_field"] = "class"
    manifest = build.build(page(tmp_path, sources))
    read = manifest["splits"]
    assert sum(split["fields"]["labelled"] for split in read.values()) == 20
    found = {record["id"]: record for record in kept(tmp_path / "out")}
    assert len(found) == 40
    for key in TAKEN:
        assert found["7"][f"{key}_of_source"] == "theirs 7"
    assert found["7"]["text"] == text_of(7) and "spans" not in found["7"]
    assert found["27"]["label"] == 1 and len(found["27"]["spans"]) == 2
