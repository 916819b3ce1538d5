"""A document is the same whatever file it came in and however the file was cut into parts."""

import gzip
import importlib.metadata
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from configs.corpus import Data
from configs.sources import Source
from data_pipeline import ingest
from data_pipeline.blocks import stage_key
from data_pipeline.ingest import Document, Meter
from data_pipeline.intake import Read
from data_pipeline.sources import text

ROOT = Path(__file__).parents[1]
ROWS = [
    {
        "id": str(n),
        "text": f"第{n}篇：" + "床前明月光，" * (n * 37 % 101),
        "kind": n % 3,
        "list": [1],
    }
    for n in range(4000)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def pack(data: bytes, packing: str) -> bytes:
    half = len(data) // 2
    return {
        "": lambda: data,
        ".gz": lambda: gzip.compress(data),
        ".zst": lambda: zstandard.compress(data),
        "two members.gz": lambda: (
            gzip.compress(data[:half]) + gzip.compress(data[half:]) + b"\0" * 9
        ),
        "of pzstd.zst": lambda: b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard.compress(data),
        "two frames.zst": lambda: zstandard.compress(data[:half]) + zstandard.compress(data[half:]),
        "window of 31 bits.zst": lambda: wide_window(data),
    }[packing]()


def wide_window(data: bytes) -> bytes:
    """A frame that does not say how long it is, so that its window is not made smaller."""
    params = zstandard.ZstdCompressionParameters(
        window_log=31, hash_log=12, chain_log=12, write_content_size=False
    )
    packer = zstandard.ZstdCompressor(compression_params=params).compressobj()
    packed = packer.compress(data) + packer.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << 31
    return packed


def read_all(source: Source, task_mb: int = 64, parts: int = 0) -> list[Document]:
    tasks, _ = ingest.plan(Data(out="", sources=(source,), task_mb=task_mb))
    flat = [part for task in tasks for part in task]
    if parts:
        flat = [replace(flat[0], number=n, of=parts) for n in range(parts)]
    documents = []
    for part in flat:
        meter = Meter()
        documents += list(ingest.read(source, part, meter))
        assert meter.share == 1.0
    return documents


@pytest.mark.parametrize(
    "packing",
    [
        "",
        ".gz",
        ".zst",
        "two members.gz",
        "two frames.zst",
        "window of 31 bits.zst",
        "of pzstd.zst",
    ],
)
def test_jsonl_packed_in_any_way(packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(pack(LINES, packing))
    source = Source("jsonl", str(path), "s")
    documents = read_all(source)
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    assert [d.id for d in documents] == [row["id"] for row in ROWS]
    assert documents[1].fields == {"kind": 1, "source": "s"}
    for parts in (2, 3, 7):
        cut = read_all(source, parts=parts)
        assert sorted(int(d.id) for d in cut) == list(range(len(ROWS)))
        if not packing:  # a plain file's parts are in its order
            assert cut == documents


def test_parts_of_an_archive_do_not_depend_on_the_unpacker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of zlib or zstd gives its output in other pieces."""
    monkeypatch.setattr(text, "BLOCK_BYTES", 5000)
    parts = {}
    for frame in (1000, 7777, len(LINES)):
        path = tmp_path / "a.jsonl.zst"
        starts = range(0, len(LINES), frame)
        path.write_bytes(b"".join(zstandard.compress(LINES[n : n + frame]) for n in starts))
        parts[frame] = read_all(Source("jsonl", str(path), "s"), parts=3)
    assert parts[1000] == parts[7777] == parts[len(LINES)]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 17, 64])
def test_parts_of_a_plain_file_meet_at_line_borders(parts: int, tmp_path: Path) -> None:
    """Few long lines, so that most parts hold none or begin within one."""
    path = tmp_path / "a.jsonl"
    lengths = [3, 4000, 10, 1, 900, 900, 0, 2]
    path.write_text("\n".join(json.dumps({"text": "x" * n}) for n in lengths))
    texts = [len(d.text) for d in read_all(Source("jsonl", str(path), "s"), parts=parts)]
    assert texts == lengths


def test_lines_that_hold_nothing_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [d.text for d in read_all(Source("jsonl", str(path), "s"))] == ["a", "b"]
    path.write_bytes(b"")
    assert read_all(Source("jsonl", str(path), "s")) == []


def test_a_document_without_id_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "source": "poems"}\n{"text": "b", "id": 7}\n')
    first, second = read_all(Source("jsonl", str(path), "s"))
    assert (first.id, first.fields) == ("s/a.jsonl:0", {"source": "poems"})
    assert second.id == "7"


def test_duplicate_ids_are_two_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n')
    assert len(read_all(Source("jsonl", str(path), "s"))) == 2


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_plain_text_between_blank_lines_or_whole(packing: str, tmp_path: Path) -> None:
    text = "\ufeff第一篇\n第二行\n\n\n \t\n第二篇\r\n\r\n第三篇"
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(pack(text.encode(), packing))
    between = read_all(Source("txt", str(path), "s"))
    assert [d.text.strip() for d in between] == ["第一篇\n第二行", "第二篇", "第三篇"]
    assert between[0].id == "s/a.txt" + packing + ":0"
    whole = read_all(Source("txt", str(path), "s", documents="file"))
    assert [d.text for d in whole] == [text.removeprefix("\ufeff")]


def test_plain_text_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 64)
    texts = [f"{n}" + "字\n" * (n * 7 % 50) + "末" for n in range(300)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(texts), "utf-8")
    assert [d.text.rstrip("\n") for d in read_all(Source("txt", str(path), "s"))] == texts


def test_a_path_is_a_file_a_folder_a_pattern_or_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.jsonl", "b/c/3.jsonl.gz", "1.jsonl", "b/no.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": name}).encode()
        path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    monkeypatch.setenv("BAJIE_TEST_TEXT", str(tmp_path))

    def found(*paths: str) -> list[str]:
        return [d.text for d in read_all(Source("jsonl", paths, "s"))]

    assert found(str(tmp_path)) == ["1.jsonl", "b/2.jsonl", "b/c/3.jsonl.gz"]
    assert found(f"{tmp_path}/**/*.jsonl*") == ["1.jsonl", "b/2.jsonl", "b/c/3.jsonl.gz"]
    assert found("$BAJIE_TEST_TEXT/b/*.jsonl", "$BAJIE_TEST_TEXT") == [
        "b/2.jsonl",
        "1.jsonl",
        "b/c/3.jsonl.gz",
    ]
    monkeypatch.chdir(tmp_path)
    assert found("data_pipeline/sample/sample.jsonl") == found(
        str(ROOT / "data_pipeline/sample/sample.jsonl")
    )


def test_small_files_share_a_task_and_large_ones_are_cut(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.jsonl").write_bytes(LINES[:200_000])
    (tmp_path / "large.jsonl").write_bytes(LINES * 4)
    tasks, identity = ingest.plan(
        Data(out="", sources=(Source("jsonl", str(tmp_path), "s"),), task_mb=1)
    )
    assert [len(task) for task in tasks[:2]] == [5, 5]
    assert len(tasks) == 2 + -(-len(LINES) * 4 // 1_000_000)
    assert len(identity) == 11


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved") / "dataset"
    rows = datasets.Dataset.from_list([{**row, "score": None} for row in ROWS])
    datasets.DatasetDict({"train": rows}).save_to_disk(str(folder))
    return folder


def test_a_saved_dataset(saved: Path) -> None:
    source = Source("datasets", str(saved), "s")
    documents = read_all(source)
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    assert documents[1] == Document("1", ROWS[1]["text"], {"kind": 1, "source": "s"}, own_id=True)
    assert read_all(source, parts=3) == documents


def test_a_dataset_brings_no_torch(saved: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from configs.sources import Source; "
        "from data_pipeline import ingest; from configs.corpus import Data; "
        f"source = Source('datasets', {str(saved)!r}, 's'); "
        "tasks, _ = ingest.plan(Data(out='', sources=(source,))); "
        "assert len(list(ingest.read(source, tasks[0][0], ingest.Meter()))) == 4000; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what cannot be read is one sentence


def spoiled(tmp_path: Path, name: str, data: bytes, **more: Any) -> Source:
    path = tmp_path / name
    path.write_bytes(data)
    return Source("txt" if ".txt" in name else "jsonl", str(path), "s", **more)


GOOD = b'{"text": "a"}\n' * 3
SENTENCES = [
    ("truncated zst", "a.jsonl.zst", pack(LINES, ".zst")[:-1000], "a.jsonl.zst is truncated"),
    ("truncated gz", "a.jsonl.gz", pack(LINES, ".gz")[:-1000], "a.jsonl.gz is truncated"),
    (
        "damaged zst",
        "a.jsonl.zst",
        pack(LINES, ".zst")[:2000] + bytes(200) + pack(LINES, ".zst")[2200:],
        "a.jsonl.zst is damaged",
    ),
    (
        "damaged gz",
        "a.jsonl.gz",
        pack(LINES, ".gz")[:2000] + bytes(200) + pack(LINES, ".gz")[2200:],
        "a.jsonl.gz is damaged",
    ),
    (
        "invalid UTF-8",
        "a.jsonl",
        GOOD + '{"text": "明月'.encode() + b'\xff"}\n',
        "a.jsonl, line 4, byte 58: the line is no valid UTF-8 (the byte is 0xff)",
    ),
    (
        "no known encoding",
        "a.txt",
        "café au lait".encode("latin-1"),
        "a.txt, line 1, byte 3: the line is no valid UTF-8",
    ),
    (
        "invalid UTF-8 in a later document",
        "a.txt",
        b"one\n\ntwo\nthree\xc3\n\nfour",
        "a.txt, line 4, byte 14: the line is no valid UTF-8",
    ),
    ("no text", "a.jsonl", GOOD + b'{"content": "b"}\n', "line 4, byte 42: the line has no text"),
    ("null text", "a.jsonl", GOOD + b'{"text": null}\n', "field 'text' is null or not text"),
    ("broken JSON", "a.jsonl", GOOD + b'{"text": "b"\n' + GOOD, "line 4, byte 42: the line is no"),
    ("no object", "a.jsonl", b'["text"]\n', "line 1, byte 0: the line is no JSON object"),
]


@pytest.mark.parametrize(
    ("name", "data", "sentence"), [row[1:] for row in SENTENCES], ids=[row[0] for row in SENTENCES]
)
def test_a_spoiled_file_is_one_sentence(
    name: str, data: bytes, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ingest.CorpusError) as error:
        read_all(spoiled(tmp_path, name, data))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_the_field_to_name_is_named(tmp_path: Path) -> None:
    source = spoiled(tmp_path, "a.jsonl", b'{"content": "b", "url": "c"}\n')
    with pytest.raises(ingest.CorpusError, match=r"'content', 'url'.*text_field of source 's'"):
        read_all(source)
    assert read_all(replace(source, text_field="content"))[0].text == "b"


def test_a_bad_line_in_a_later_part_is_found_at_its_own_line(tmp_path: Path) -> None:
    lines = LINES.split(b"\n")
    lines[3500] = b"{"
    for name, data in (
        ("a.jsonl", b"\n".join(lines)),
        ("a.jsonl.gz", gzip.compress(b"\n".join(lines))),
    ):
        place = len(b"\n".join(lines[:3500])) + 1
        with pytest.raises(ingest.CorpusError, match=rf"line 3501, byte {place}: the line is no"):
            read_all(spoiled(tmp_path, name, data), parts=5)


def test_a_link_to_nowhere_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(ingest.CorpusError, match=r"b\.jsonl cannot be read"):
        read_all(Source("jsonl", str(tmp_path), "s"))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (Source("jsonl", "/nowhere/*.jsonl", "s"), "source 's': no file at '/nowhere/*.jsonl'"),
        (Source("datasets", "/nowhere/saved", "s"), "source 's': the dataset '/nowhere/saved'"),
    ],
)
def test_a_missing_source_is_one_sentence(source: Source, sentence: str) -> None:
    with pytest.raises(ingest.CorpusError) as error:
        ingest.plan(Data(out="", sources=(source,)))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dataset_without_the_split_or_the_column_is_one_sentence(saved: Path) -> None:
    with pytest.raises(ingest.CorpusError, match=r"has no split 'test', it has train"):
        read_all(Source("datasets", str(saved), "s", split="test"))
    with pytest.raises(
        ingest.CorpusError, match=r"no column 'content', it has id, text.*text_field"
    ):
        read_all(Source("datasets", str(saved), "s", text_field="content"))


@pytest.mark.parametrize(("kind", "guest"), [("html", "trafilatura"), ("warc", "warcio")])
def test_another_reader_of_pages_reads_them_again(
    kind: Any, guest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else: lines are read by our own code."""

    def key(kind: Any, version: str) -> str:
        monkeypatch.setattr(
            importlib.metadata, "version", lambda of: version if of == guest else ""
        )
        return stage_key([Read((Source(kind, "p", "s"),), [])], 1, [])

    assert key(kind, "1.0") == key(kind, "1.0") != key(kind, "2.0")
    assert key("jsonl", "1.0") == key("jsonl", "2.0")
    monkeypatch.undo()
    assert "versions" not in Read((Source("jsonl", "p", "s"),), []).parameters
