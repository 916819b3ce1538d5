"""Row groups and MNBVC's paragraphs give the documents that lie in them, each once."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import Data
from configs.sources import Source
from data_pipeline import ingest, unreadable
from data_pipeline.ingest import CorpusError, Document, Fault, Meter

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"id": str(n), "text": f"第{n}篇：" + "字" * (n % 50), "n": n} for n in range(5000)]


def read_all(source: Source, parts: int = 0) -> tuple[list[Document], list[Fault], Meter]:
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))
    flat = [part for task in tasks for part in task]
    if parts:
        flat = [replace(flat[0], number=n, of=parts) for n in range(parts)]
    faults: list[Fault] = []
    meter = Meter()
    return [d for p in flat for d in ingest.read(source, p, meter, faults.append)], faults, meter


def written(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Source:
    path = folder / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    return Source("parquet", str(path), "s")


def test_row_groups_are_parts(tmp_path: Path) -> None:
    source = written(tmp_path)
    documents, faults, _ = read_all(source)
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert documents[1] == Document("1", ROWS[1]["text"], {"n": 1, "source": "s"}, own_id=True)
    assert not faults
    for parts in (3, 8, 20):  # more parts than groups: some are empty
        assert read_all(source, parts)[0] == documents
    assert len(ingest.plan(Data(out="", sources=(source,), task_mb=1))[0]) >= 1


def test_a_row_without_text_lies_between_good_ones(tmp_path: Path) -> None:
    source = written(tmp_path, [*ROWS[:10], {**ROWS[10], "text": None}, *ROWS[11:20]])
    documents, faults, _ = read_all(source)
    assert len(documents) == 19
    assert "a.parquet, row 10: the row has no text" in faults[0].sentence


def spoil_group_3(path: Path) -> None:
    data = bytearray(path.read_bytes())
    about = parquet.read_metadata(path).row_group(3).column(1)
    start = about.dictionary_page_offset or about.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)


def test_a_damaged_row_group_costs_no_other(tmp_path: Path) -> None:
    source = written(tmp_path)
    spoil_group_3(Path(str(source.path)))
    documents, faults, _ = read_all(source)
    assert [fault.kind for fault in faults] == ["damaged"]
    assert "row group 3 from its row 2100 on, 700 rows, is damaged" in faults[0].sentence
    assert faults[0].records == 700
    kept = [int(document.id) for document in documents]
    assert set(range(5000)) - set(kept) == set(range(2100, 2800))


@pytest.mark.parametrize("kind", ["parquet", "parquet of a dictionary", "datasets"])
def test_a_text_that_is_no_utf_8_costs_no_other_row(kind: str, tmp_path: Path) -> None:
    """Of 2,500 rows, three batches, two cannot be used, in whatever column the bytes stand."""
    texts = [f"第{n}篇".encode() for n in range(2500)]
    notes = [b"note"] * 2500
    texts[1200], notes[2400] = b"\xb5\xda\xff", b"\xff"
    columns = {
        name: pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
        for name, values in (("text", texts), ("note", notes))
    }
    if kind == "parquet of a dictionary":
        columns = {name: column.dictionary_encode() for name, column in columns.items()}
    path, kind = tmp_path / "a", kind.split()[0]
    if kind == "datasets":
        datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(columns))).save_to_disk(path)
    else:
        parquet.write_table(pyarrow.table(columns), path)
    documents, faults, _ = read_all(Source(kind, str(path), "s"))
    good = [text.decode() for n, text in enumerate(texts) if n not in (1200, 2400)]
    assert [document.text for document in documents] == good
    assert [(fault.kind, fault.place) for fault in faults] == [
        ("encoding", "row 1200"),
        ("encoding", "row 2400"),
    ]
    said = "row 1200: the row has in its column 'text' what is no UTF-8 (the byte is 0xb5)"
    assert said in faults[0].sentence and r"b'\xb5\xda\xff'" in faults[0].excerpt


def test_rows_that_a_damage_takes_are_counted_one_by_one(tmp_path: Path) -> None:
    source = written(tmp_path)
    spoil_group_3(Path(str(source.path)))
    counts: Counter[str] = Counter()
    aside: list[Any] = []
    faults = unreadable.faults_of(
        replace(source, bad_lines="reject"), counts, lambda *of: aside.append(of)
    )
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))
    documents = list(ingest.read(source, tasks[0][0], Meter(), faults))
    assert len(documents) + counts["read_documents"] == 5000
    assert counts["rejected/unreadable:damaged"] == 700
    assert len(aside) == 1


def test_a_truncated_file_is_one_fault(tmp_path: Path) -> None:
    source = written(tmp_path)
    path = Path(str(source.path))
    path.write_bytes(path.read_bytes()[:-500])
    documents, faults, _ = read_all(source)
    assert not documents
    assert [fault.kind for fault in faults] == ["damaged"]


@pytest.mark.parametrize("place", ["__init__", "iter_batches"])
def test_a_file_system_that_fails_is_no_damage(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is read when it is back; to put rows aside as damaged would lose them for good."""
    source = written(tmp_path)
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(parquet.ParquetFile, place, failing)
    with pytest.raises(CorpusError, match="could not be read to its end: Stale file handle"):
        list(ingest.read(source, tasks[0][0], Meter(), [].append))


def test_a_file_system_that_fails_changes_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files")

    source = written(tmp_path)
    monkeypatch.setattr(parquet, "read_metadata", failing)
    with pytest.raises(CorpusError, match=r"a\.parquet cannot be read: Too many open files"):
        ingest.plan(Data(out="", sources=(source,)))


def test_a_column_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    source = replace(written(tmp_path), text_field="content")
    with pytest.raises(CorpusError, match="has no column 'content', it has id, text, n; set its"):
        read_all(source)


def paragraph(number: int, words: str, repeated: bool = False, across: bool = False) -> Any:
    return {
        "行号": number,
        "是否重复": repeated,
        "是否跨文件重复": across,
        "md5": "0",
        "内容": words,
        "扩展字段": "{}",
    }


FILES = [
    {
        "文件名": "一.txt",
        "是否待查文件": False,
        "是否重复文件": False,
        "段落": [
            paragraph(1, "第一段。"),
            paragraph(2, "第一段。", repeated=True),
            paragraph(3, "别处也有。", across=True),
            paragraph(5, "最后一段。"),
        ],
        "时间": "20240801",
    },
    {"文件名": "二.txt", "是否重复文件": True, "段落": [paragraph(1, "副本。")]},
    {"text": json.dumps([paragraph(1, "又一篇。")], ensure_ascii=False), "meta": "{}"},
]


def test_paragraphs_are_joined_and_repeated_ones_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(f, ensure_ascii=False) for f in FILES), "utf-8")
    documents, faults, meter = read_all(Source("mnbvc", str(path), "s"))
    assert [document.text for document in documents] == ["第一段。\n最后一段。", "又一篇。"]
    assert documents[0].fields == {"source": "s", "file": "一.txt", "date": "20240801"}
    assert meter.met == {"repeated_paragraphs": 2, "repeated_files": 1}
    assert not faults
    every, _, _ = read_all(Source("mnbvc", str(path), "s", keep_repeated=True))
    assert [document.text.count("\n") for document in every] == [3, 0, 0]


def test_a_line_that_is_none_of_mnbvcs_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"段落": "x"}\n{"段落": [{"行号": 1}]}\n{"文件名": "a"}\n', "utf-8")
    documents, faults, _ = read_all(Source("mnbvc", str(path), "s"))
    assert not documents
    assert [fault.kind for fault in faults] == ["no_text"] * 3
