"""Text in GB18030, Big5 and UTF-16 is read as what it is, and nothing is ever replaced."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from configs.corpus import Data
from configs.sources import Source
from data_pipeline import ingest
from data_pipeline.ingest import Document, Fault, Meter
from data_pipeline.sources.decode import looks_chinese

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data_pipeline" / "sample" / "sample.jsonl"
ROWS = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()[:400]]
TEXTS = [" ".join(row["text"].split()) for row in ROWS]
TRADITIONAL = [
    "國破山河在，城春草木深。感時花濺淚，恨別鳥驚心。",
    "獨在異鄉為異客，每逢佳節倍思親。",
]


def read_all(source: Source) -> tuple[list[Document], list[Fault], Counter[str]]:
    tasks, _ = ingest.plan(Data(out="", sources=(source,), task_mb=1))
    faults: list[Fault] = []
    documents: list[Document] = []
    met: Counter[str] = Counter()
    for part in (part for task in tasks for part in task):
        meter = Meter()
        documents += list(ingest.read(source, part, meter, faults.append))
        met += meter.met
    return documents, faults, met


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-be"])
def test_a_file_in_any_encoding(encoding: str, kind: str, packing: str, tmp_path: Path) -> None:
    data = (lines(TEXTS) if kind == "jsonl" else "\n\n".join(TEXTS)).encode(encoding)
    data = b"\xfe\xff" + data if encoding == "utf-16-be" else data
    path = tmp_path / f"a.{kind}{packing}"
    path.write_bytes(gzip.compress(data) if packing else data)
    documents, faults, met = read_all(Source(kind, str(path), "s"))  # type: ignore[arg-type]
    assert [document.text.strip() for document in documents] == TEXTS
    assert not faults
    assert bool(met["gb18030"]) is (encoding == "gb18030")


def test_traditional_text_in_big5_and_in_gbk(tmp_path: Path) -> None:
    for encoding in ("big5", "gbk"):
        (tmp_path / "a.txt").write_bytes("\n\n".join(TRADITIONAL).encode(encoding))
        documents, faults, met = read_all(Source("txt", str(tmp_path / "a.txt"), "s"))
        assert [document.text.strip() for document in documents] == TRADITIONAL
        assert met == {"big5" if encoding == "big5" else "gb18030": 2}
        assert not faults


def test_lines_of_several_encodings_in_one_file(tmp_path: Path) -> None:
    encodings = ["utf-8", "gb18030"] * 200
    data = b"".join(
        lines([text]).encode(encoding) for text, encoding in zip(TEXTS, encodings, strict=True)
    )
    (tmp_path / "a.jsonl").write_bytes(data)
    documents, faults, _ = read_all(Source("jsonl", str(tmp_path / "a.jsonl"), "s"))
    assert [document.text for document in documents] == TEXTS
    assert not faults


def test_two_characters_that_might_be_utf_8(tmp_path: Path) -> None:
    """小小 in GB18030 is valid UTF-8; the rest of the file says what it is."""
    data = "\n\n".join([TEXTS[0], "小小", TEXTS[1]]).encode("gb18030")
    assert "小小".encode("gb18030").decode("utf-8") == "СС"
    (tmp_path / "a.txt").write_bytes(data)
    documents, _, _ = read_all(Source("txt", str(tmp_path / "a.txt"), "s"))
    assert documents[1].text.strip() == "小小"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "shift_jis"])
def test_what_is_no_chinese_is_a_fault_and_no_mojibake(encoding: str, tmp_path: Path) -> None:
    text = {
        "latin-1": "Où êtes-vous allé, élève? Ça été très dur à l'hôpital.",
        "cp1251": "Съешь же ещё этих мягких французских булок, да выпей чаю",
        "shift_jis": "ｱｲｳｴｵ カタカナとひらがなのぶんしょうです",
    }[encoding]
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    documents, faults, _ = read_all(Source("txt", str(tmp_path / "a.txt"), "s"))
    assert not documents
    assert [fault.kind for fault in faults] == ["encoding"]


def test_an_encoding_that_is_named_is_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("“寿”".encode("gb18030"))
    source = Source("txt", str(tmp_path / "a.txt"), "s", encoding="utf-8")
    _, faults, _ = read_all(source)
    assert "is no valid UTF-8 (the byte is 0xa1); convert it" in faults[0].sentence
    named = Source("txt", str(tmp_path / "a.txt"), "s", encoding="gb18030")
    assert read_all(named)[0][0].text == "“寿”"


def test_real_text_looks_chinese_and_its_mojibake_does_not() -> None:
    assert all(looks_chinese(text[:60]) for text in TEXTS)
    wrong = 0
    for text in TEXTS:
        for encoding, other in (("utf-8", "gb18030"), ("big5", "gb18030"), ("utf-8", "big5")):
            try:
                mojibake = text[:60].encode(encoding).decode(other)
            except UnicodeError:
                continue
            if not mojibake.isascii():
                wrong += looks_chinese(mojibake)
    assert wrong == 0
