"""Documents with named fields: where each field lies in the text, the label, lists of synonyms."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig, Data
from configs.load import ConfigError, from_dict
from configs.sources import Source
from data_pipeline import ingest
from data_pipeline.ingest import Document, Meter

PAIRS = [
    ("床前明月光", "疑是地上霜", "1"),
    ("谁知道她是网络美女吗？", "爱情这杯酒谁喝都会醉是什么歌", "0"),
]
WANTED = [
    Document(
        f"s/a{n}",
        f"{a}\n{b}",
        {
            "source": "s",
            "label": label,
            "spans": [["a", 0, len(a)], ["b", len(a) + 1, len(a) + 1 + len(b)]],
        },
    )
    for n, (a, b, label) in enumerate(PAIRS)
]


def read_all(source: Source, task_mb: int = 64) -> list[Document]:
    tasks, _ = ingest.plan(Data(out="", sources=(source,), task_mb=task_mb))
    return [d for task in tasks for part in task for d in ingest.read(source, part, Meter())]


def without_ids(documents: list[Document]) -> list[tuple[str, dict[str, Any]]]:
    return [(document.text, document.fields) for document in documents]


def rows(folder: Path, kind: str) -> dict[str, Any]:
    """The pairs in a file of a kind, and what a source has to say of it."""
    path = folder / f"pairs.{kind}"
    records = [{"left": a, "right": b, "same": label} for a, b, label in PAIRS]
    by_name = {"fields": ("a=left", "b=right"), "label_field": "same"}
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    elif kind == "tsv":
        path.write_text("\n".join("\t".join(pair) for pair in PAIRS) + "\n", "utf-8")
        by_name = {"fields": ("a=1", "b=2"), "label_field": "3"}
    elif kind == "csv":
        lines = ["left,right,same", *(f'"{a}",{b},{label}' for a, b, label in PAIRS)]
        path.write_text("\r\n".join(lines), "utf-8")
        return {"kind": "tsv", "path": str(path), "separator": ",", **by_name}
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(records)
        parquet.write_table(table, path)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    return {"kind": kind, "path": str(path), **by_name}


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv", "parquet", "datasets"])
def test_fields_are_spans_of_the_text_whatever_they_came_in(kind: str, tmp_path: Path) -> None:
    documents = read_all(Source(name="s", **rows(tmp_path, kind)))
    assert without_ids(documents) == without_ids(WANTED)
    for document in documents:
        texts = [document.text[start:stop] for _, start, stop in document.fields["spans"]]
        assert "\n".join(texts) == document.text


def test_a_list_is_several_spans_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"same": ["高兴", "快乐", "欢喜"], "n": 3}), "utf-8")
    (document,) = read_all(Source("jsonl", str(path), "s", fields=("synonym=same",)))
    assert document.text == "高兴\n快乐\n欢喜"
    assert document.fields == {
        "n": 3,
        "source": "s",
        "spans": [["synonym", 0, 2], ["synonym", 3, 5], ["synonym", 6, 8]],
    }


def test_without_fields_there_are_no_spans(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "spans": [["x", 0, 1]]}', "utf-8")
    assert read_all(Source("jsonl", str(path), "s"))[0].fields == {"source": "s"}


def test_a_label_needs_no_fields_and_may_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "mine", "class": 0}', "utf-8")
    (document,) = read_all(Source("jsonl", str(path), "s", label_field="class"))
    assert document.fields == {"source": "s", "label": 0, "label_of_source": "mine"}


def test_a_table_without_names_has_a_text_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("春晓\t春眠不觉晓\n", "utf-8")
    (document,) = read_all(Source("tsv", str(path), "s", text_field="2"))
    assert document == Document("s/a.tsv:0", "春眠不觉晓", {"1": "春晓", "source": "s"})


def test_parts_of_a_table_leave_its_names_out_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\ttext\n" + "".join(f"{n}\t第{n}行\n" for n in range(200_000)), "utf-8")
    documents = read_all(Source("tsv", str(path), "s"), task_mb=1)
    assert [d.id for d in documents] == [str(n) for n in range(200_000)]


BAD = [
    ('{"a": "x"}', {"fields": ("a", "b")}, "its field 'b' is missing (there are 'a')"),
    ('{"a": ["x", 1]}', {"fields": ("a",)}, "its field 'a' is null or not text"),
    ('{"text": "x"}', {"label_field": "c"}, "has no label: its field 'c' is missing"),
    ('{"text": "x", "c": []}', {"label_field": "c"}, "has no label: its field 'c'"),
]


@pytest.mark.parametrize(("line", "more", "sentence"), BAD)
def test_a_field_that_is_not_there_is_one_sentence(
    line: str, more: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(ingest.CorpusError) as error:
        read_all(Source("jsonl", str(tmp_path / "a.jsonl"), "s", **more))
    assert sentence in str(error.value)
    assert "line 1, byte 0" in str(error.value)


def test_a_row_of_another_width_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\tn\na\t1\nb\n")
    with pytest.raises(ingest.CorpusError, match=r"line 3, byte 11: the line has 1 columns"):
        read_all(Source("tsv", str(tmp_path / "a.tsv"), "s"))


PAGES = [
    ({"fields": ["a", "x=a", "a=b"]}, "fields: the name 'a' stands 2 times"),
    ({"fields": ["a="]}, "fields: an entry is empty"),
    ({"kind": "txt", "fields": ["a"]}, "fields: is set, but kind is 'txt'"),
    ({"kind": "txt", "label_field": "a"}, "label_field: is set, but kind is 'txt'"),
    ({"kind": "tsv", "separator": "||"}, "separator: is '||', must be one character"),
    ({"kind": "index"}, "tokenizer: is None and kind is 'index'"),
    ({"tokenizer": "t"}, "tokenizer: is 't' and kind is 'jsonl'"),
]


@pytest.mark.parametrize(("change", "sentence"), PAGES, ids=[row[1][:30] for row in PAGES])
def test_a_source_whose_fields_cannot_be(change: dict[str, Any], sentence: str) -> None:
    source = {"kind": "jsonl", "name": "s", "path": "p", **change}
    page = {
        "data": {"out": "c", "sources": [source]},
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 290},
    }
    with pytest.raises(ConfigError) as error:
        from_dict(CorpusConfig, page)
    assert f"data.sources.0.{sentence}" in str(error.value)


def test_real_pairs_and_real_triples(tmp_path: Path) -> None:
    """Shaped as LCQMC (two questions, a label; no header) and CSL (a first line of no use)."""
    lcqmc = tmp_path / "dev.txt"
    lcqmc.write_text("开初婚未育证明怎么弄？\t初婚未育情况证明怎么开？\t1\n", "utf-8")
    (pair,) = read_all(Source("tsv", str(lcqmc), "s", fields=("a=1", "b=2"), label_field="3"))
    assert pair.fields["label"] == "1"
    csl = tmp_path / "title.tsv"
    csl.write_text("to title\t采用修正的参数\t一种设计方法\n", "utf-8")
    (paper,) = read_all(Source("tsv", str(csl), "s", fields=("source=2", "target=3")))
    assert [name for name, *_ in paper.fields["spans"]] == ["source", "target"]
    assert paper.fields["1"] == "to title"
