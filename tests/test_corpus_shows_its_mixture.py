"""Before any work a corpus says what it will be made of."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import Data
from configs.sources import Source
from data_pipeline import mixture
from launch import corpus

LINE = json.dumps({"text": "床前明月光，疑是地上霜。" * 20}, ensure_ascii=False).encode() + b"\n"


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Source, ...]:
    (tmp_path / "laws").mkdir()
    for number in range(8):
        (tmp_path / "laws" / f"{number}.jsonl").write_bytes(LINE * 300)
    (tmp_path / "poems.jsonl.gz").write_bytes(gzip.compress(LINE * 12_000))
    (tmp_path / "notes.txt").write_text("一篇\n\n二篇\n\n三篇", "utf-8")
    return (
        Source("jsonl", str(tmp_path / "laws"), "laws"),
        Source("jsonl", str(tmp_path / "poems.jsonl.gz"), "poems"),
        Source("txt", str(tmp_path / "notes.txt"), "notes"),
    )


def test_files_bytes_documents_shares_and_parts(sources: tuple[Source, ...]) -> None:
    branches, tasks = mixture.survey(Data(out="", sources=sources, task_mb=1))
    laws, poems, notes = branches
    assert (laws.files, laws.documents, laws.parts) == (8, 2400, 8)
    assert laws.disk_bytes == laws.text_bytes == 2400 * len(LINE)
    assert poems.documents == pytest.approx(12_000, rel=0.2)  # the archive is looked at, not read
    assert poems.text_bytes == pytest.approx(12_000 * len(LINE), rel=0.2)
    assert notes.documents == 3
    assert sum(branch.share for branch in branches) == pytest.approx(1)
    assert sum(leaf.share for leaf in laws.below) == pytest.approx(laws.share)
    assert tasks >= 3


def test_it_is_drawn_as_a_tree(sources: tuple[Source, ...]) -> None:
    drawn = mixture.tree(*mixture.survey(Data(out="", sources=sources, task_mb=1))).split("\n")
    assert drawn[0].startswith("3 sources, 10 files, ")
    assert drawn[1].startswith("├─ laws (jsonl)")
    assert [line[:16].rstrip() for line in drawn[2:7]] == [
        *(f"│  ├─ {n}.jsonl" for n in range(4)),
        "│  └─ ... 4 more",
    ]
    assert drawn[7].startswith("├─ poems (jsonl)")
    assert "~" in drawn[7]
    assert drawn[8].startswith("└─ notes (txt)")
    assert drawn[9].endswith("tasks")


def page(tmp_path: Path, sources: tuple[Source, ...]) -> str:
    held: dict[str, Any] = {
        "data": {
            "out": str(tmp_path / "c"),
            "sources": [{"kind": s.kind, "path": s.path, "name": s.name} for s in sources],
        },
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 290},
    }
    (tmp_path / "page.yaml").write_text(json.dumps(held))
    return str(tmp_path / "page.yaml")


def test_plan_shows_it_and_does_nothing_else(
    sources: tuple[Source, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert corpus.main([page(tmp_path, sources), "--plan"]) == 0
    assert "├─ laws (jsonl)" in capsys.readouterr().out
    assert corpus.main([page(tmp_path, sources), "--plan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [source["name"] for source in told["sources"]] == ["laws", "poems", "notes"]
    assert len(told["sources"][0]["below"]) == 8
    assert not (tmp_path / "c").exists()


def test_of_one_file_there_is_nothing_to_show(sources: tuple[Source, ...]) -> None:
    assert mixture.is_trivial(mixture.survey(Data(out="", sources=sources[1:2]))[0])
    assert not mixture.is_trivial(mixture.survey(Data(out="", sources=sources))[0])
