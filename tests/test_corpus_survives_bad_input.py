"""Nothing that is damaged stops a build or loses a good document, and all of it is counted; what
must stop is one clear sentence."""

import gzip
import io
import json
import lzma
import random
from bz2 import compress as bzip2
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from configs.corpus import CorpusConfig, Data
from configs.load import from_dict
from configs.sources import Source
from data_pipeline import build, ingest
from data_pipeline.ingest import Document, Fault, Meter
from data_pipeline.shards import records
from data_pipeline.sources import text, unpack

WORDS = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"


def line(number: int, more: str = "") -> bytes:
    record = {"id": str(number), "text": f"第{number}篇：{WORDS * (number % 5 + 1)}{more}"}
    return json.dumps(record, ensure_ascii=False).encode()


LINES = [line(n) for n in range(3000)]
WHOLE = b"\n".join(LINES) + b"\n"


def read_all(
    source: Source, task_mb: int = 64, parts: int = 0
) -> tuple[list[Document], list[Fault], Counter[str]]:
    tasks, _ = ingest.plan(Data(out="", sources=(source,), task_mb=task_mb))
    flat = [part for task in tasks for part in task]
    if parts:
        flat = [replace(flat[0], number=n, of=parts) for n in range(parts)]
    documents: list[Document] = []
    faults: list[Fault] = []
    met: Counter[str] = Counter()
    for part in flat:
        meter = Meter()
        documents += list(ingest.read(source, part, meter, faults.append))
        met += meter.met
        assert meter.share == 1.0
    return documents, faults, met


def spoiled(folder: Path, name: str, data: bytes, **more: Any) -> Source:
    (folder / name).write_bytes(data)
    return Source("txt" if ".txt" in name else "jsonl", str(folder / name), "s", **more)


def numbers(documents: list[Document]) -> list[int]:
    return [int(document.id) for document in documents]


# ---- archives

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "bz2": bzip2,
    "xz": lzma.compress,
}
STREAMED = {**PACKERS, "zst": lambda data: streamed(data)}


def streamed(data: bytes) -> bytes:
    """zstd in blocks, as a writer that flushes leaves it: one block of a file cannot be cut."""
    packer = zstandard.ZstdCompressor().compressobj()
    packed = b""
    for start in range(0, len(data), 20_000):
        packed += packer.compress(data[start : start + 20_000])
        packed += packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return packed + packer.flush()


@pytest.mark.parametrize("packing", ["gz", "zst", "xz"])
def test_a_truncated_archive_keeps_what_was_before_its_end(packing: str, tmp_path: Path) -> None:
    packed = STREAMED[packing](WHOLE)
    source = spoiled(tmp_path, f"a.jsonl.{packing}", packed[: len(packed) * 2 // 3])
    documents, faults, _ = read_all(source)
    kept = numbers(documents)
    assert kept == list(range(len(kept)))
    assert len(kept) > 1000
    assert [document.text for document in documents] == [
        json.loads(data)["text"] for data in LINES[: len(kept)]
    ]
    assert faults[0].kind == "truncated"
    assert [fault.kind for fault in faults[1:]] in ([], ["broken_json"], ["encoding"])  # its line
    assert f"a.jsonl.{packing} is truncated" in faults[0].sentence
    for parts in (2, 3):  # found once, whoever meets it
        cut, again, _ = read_all(source, parts=parts)
        assert sorted(numbers(cut)) == kept
        assert Counter(map(str, again)) == Counter(map(str, faults))


@pytest.mark.parametrize("kind", ["jsonl", "txt", "html"])
@pytest.mark.parametrize("packing", PACKERS)
def test_an_empty_archive_is_a_truncated_one(packing: str, kind: str, tmp_path: Path) -> None:
    """What a download leaves that brought nothing; an empty plain file is an empty file."""
    source = replace(spoiled(tmp_path, f"a.{kind}.{packing}", b""), kind=kind)
    documents, faults, _ = read_all(source)
    assert [fault.kind for fault in faults] == ["truncated"]
    assert f"a.{kind}.{packing} is truncated: it is empty" in faults[0].sentence
    assert not documents
    assert read_all(spoiled(tmp_path, "a.jsonl", b""))[:2] == ([], [])


@pytest.mark.parametrize("packing", PACKERS)
def test_frames_around_a_damaged_one_are_read(packing: str, tmp_path: Path) -> None:
    frames = [PACKERS[packing](b"\n".join(LINES[n : n + 500]) + b"\n") for n in (0, 500, 1000)]
    middle = bytearray(frames[1])
    middle[len(middle) // 2 : len(middle) // 2 + 100] = bytes(100)
    source = spoiled(tmp_path, f"a.jsonl.{packing}", frames[0] + bytes(middle) + frames[2])
    documents, faults, _ = read_all(source)
    kept = set(numbers(documents))
    assert kept >= {*range(500), *range(1000, 1500)}
    assert "damaged" in {fault.kind for fault in faults}
    good = {n: json.loads(LINES[n])["text"] for n in kept}
    if packing != "xz":  # which finds out by the checksum behind the frame
        assert all(document.text == good[int(document.id)] for document in documents)


def test_the_documents_before_a_damage_are_kept_to_the_last_one(tmp_path: Path) -> None:
    """Of a chunk in which gzip meets the damage the unpacker itself gives nothing."""
    packed = bytearray(gzip.compress(WHOLE, 1))
    place = len(packed) // 2
    packed[place : place + 50] = b"\xff" * 50
    documents, faults, _ = read_all(spoiled(tmp_path, "a.jsonl.gz", bytes(packed)))
    decoder, before = unpack.PACKINGS[0].decoder(), b""
    before = decoder.decompress(bytes(packed[:place]))
    assert len(documents) >= before.count(b"\n")
    assert faults[0].kind == "damaged"


def test_a_document_that_a_damage_cuts_is_no_document(tmp_path: Path) -> None:
    """Plain text does not say where a document must end."""
    poems = "\n\n".join(f"第{n}首\n{WORDS}" for n in range(2000)).encode()
    packed = gzip.compress(poems)
    source = spoiled(tmp_path, "a.txt.gz", packed[: len(packed) // 2])
    documents, faults, _ = read_all(source)
    assert [document.text.strip() for document in documents] == [
        f"第{n}首\n{WORDS}" for n in range(len(documents))
    ]
    assert [fault.kind for fault in faults] == ["truncated", "fragment"]


# ---- lines


def test_broken_lines_lie_between_good_ones(tmp_path: Path) -> None:
    bad = {
        "broken_json": b'{"id": "x", "text": "a"',
        "encoding": b'{"id": "x", "text": "\xff\xfe"}',
        "no_text": b'{"id": "x", "content": "a"}',
        "nul_bytes": bytes(5000),
    }
    data = b"\n".join([*LINES[:10], *bad.values(), *LINES[10:20]])
    documents, faults, _ = read_all(spoiled(tmp_path, "a.jsonl", data))
    assert numbers(documents) == list(range(20))
    assert [fault.kind for fault in faults] == list(bad)
    assert [fault.place.split(",")[0] for fault in faults] == [f"line {n}" for n in range(11, 15)]
    assert faults[1].excerpt == '{"id": "x", "text": "\\xff\\xfe"}'


def test_nul_bytes_within_a_text_are_left_to_cleaning(tmp_path: Path) -> None:
    data = b'{"id": "1", "text": "a\0b\tc"}\n\0\0{"id": "2", "text": "d"}\0\n'
    documents, faults, met = read_all(spoiled(tmp_path, "a.jsonl", data))
    assert [document.text for document in documents] == ["a\0b\tc", "d"]
    assert not faults
    assert met["control_characters"] == 2


def test_halves_of_characters_are_no_text(tmp_path: Path) -> None:
    """They could not be written again."""
    data = rb'{"text": "\ud800"}' + b"\n" + rb'{"text": "' + b"\0" + rb'\ud800"}'
    documents, faults, _ = read_all(spoiled(tmp_path, "a.jsonl", data))
    assert not documents
    assert [fault.kind for fault in faults] == ["broken_json"] * 2


def test_a_hundred_megabytes_on_one_line(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(LINES[0] + b'\n{"id": "1", "text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + LINES[2] + b"\n")
    documents, faults, _ = read_all(Source("jsonl", str(tmp_path / "a.jsonl"), "s"))
    assert numbers(documents) == [0, 1, 2]
    assert len(documents[1].text) == 100_000_000
    assert not faults


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_line_that_cannot_be_held_is_passed_over(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LONGEST_LINE_BYTES", 3_000_000)
    long = line(9, random.Random(0).randbytes(4_500_000).hex())
    data = b"\n".join([*LINES[:5], long, *LINES[10:12], long, long, LINES[12]])
    packed = gzip.compress(data) if packing else data
    source = spoiled(tmp_path, f"a.jsonl{packing}", packed)
    for parts in (1, 3):
        documents, faults, _ = read_all(source, parts=parts)
        assert sorted(numbers(documents)) == [0, 1, 2, 3, 4, 10, 11, 12]
        assert {fault.kind for fault in faults} == {"long_line"}
        places = {fault.place.split(",")[0] for fault in faults}
        assert places == {"line 6", "line 9", "line 10"}
        assert len(faults) == 3


def test_an_empty_file_beside_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(LINES[0])
    (tmp_path / "c.jsonl.gz").write_bytes(b"")
    documents, faults, _ = read_all(Source("jsonl", str(tmp_path), "s"))
    assert numbers(documents) == [0]
    assert [(fault.kind, Path(fault.path).name) for fault in faults] == [
        ("truncated", "c.jsonl.gz")  # a plain file may be empty, an archive cannot
    ]


def test_a_million_empty_documents(tmp_path: Path) -> None:
    data = b'{"text": ""}\n' * 1_000_000 + LINES[7]
    source = spoiled(tmp_path, "a.jsonl", data)
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))
    empty, last = 0, ""
    for document in ingest.read(source, tasks[0][0], Meter()):
        empty += not document.text
        last = document.id
    assert (empty, last) == (1_000_000, "7")


def test_ten_thousand_fuzzed_documents_lose_no_good_one(tmp_path: Path) -> None:
    """Bytes changed, doubled, removed at random, between good lines that must all be there."""
    chance = random.Random(0)
    data, good = [], []
    for number in range(10_000):
        fuzzed = bytearray(LINES[number % len(LINES)].replace(b'"id": "', b'"id": "fuzz'))
        for _ in range(chance.randrange(1, 9)):
            place = chance.randrange(len(fuzzed))
            change = chance.randrange(3)
            if change == 0:
                fuzzed[place] = chance.randrange(256)
            elif change == 1:
                del fuzzed[place : place + chance.randrange(9)]
            else:
                fuzzed[place:place] = chance.randbytes(chance.randrange(9))
            fuzzed = fuzzed or bytearray(b"x")
        data.append(bytes(fuzzed))
        if number % 10 == 0:
            good.append(number)
            data.append(line(number).replace(b'"id": "', b'"id": "good'))
    source = spoiled(tmp_path, "a.jsonl", b"\n".join(data))
    documents, faults, _ = read_all(source, parts=4)
    kept = [d for d in documents if d.id.startswith("good")]
    assert [d.id for d in kept] == [f"good{n}" for n in good]
    assert [d.text for d in kept] == [json.loads(line(n))["text"] for n in good]
    lines = sum(1 for one in b"\n".join(data).split(b"\n") if one.strip())
    assert len(documents) + len(faults) == lines  # each line is one or the other
    assert len(faults) > 5000
    for document in documents:
        document.text.encode()  # whatever passed is text


# ---- a whole build


def page(folder: Path, data: bytes, **more: Any) -> CorpusConfig:
    path = folder / "text.jsonl"
    path.write_bytes(data)
    source = {"kind": "jsonl", "name": "s", "path": str(path)}
    return from_dict(
        CorpusConfig,
        {
            "data": {"out": str(folder / "c"), "sources": [source], "workers": 1, **more},
            "clean": {"min_characters": 5},
            "dedup": {"exact": False},
            "split": {"valid_fraction": 0.2},
            "tokenizer": {"kind": "byte_bpe", "vocab_size": 290},
        },
    )


BAD_LINES = [b'{"text": "a"', b'{"text": "\xff"}', b'{"txt": "a"}', b'{"text": "\xfe"}']


def test_a_build_counts_and_shows_what_it_could_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = page(tmp_path, b"\n".join([*LINES[:50], *BAD_LINES, *LINES[50:100]]))
    manifest = build.build(config)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 100
    rejected = {reason: lost["documents"] for reason, lost in manifest["rejects"].items()}
    assert rejected == {
        "unreadable:broken_json": 1,
        "unreadable:encoding": 2,
        "unreadable:no_text": 1,
    }
    assert manifest["read"]["documents"] == 104
    shown = list(records(tmp_path / "c/rejects/unreadable:encoding/00000.jsonl.zst"))
    assert [record["text"] for record in shown] == [r'{"text": "\xff"}', r'{"text": "\xfe"}']
    assert shown[0]["why"].startswith("text.jsonl, line 52, byte")
    assert str(tmp_path) not in json.dumps(shown)
    said = capsys.readouterr().err
    assert "source 's': 4 of 104 records could not be read (2 encoding, 1 broken_json" in said
    assert manifest["sources"][0]["unreadable"] == {"encoding": 2, "broken_json": 1, "no_text": 1}


def test_rejects_without_a_character_are_counted_too(tmp_path: Path) -> None:
    """Empty documents, and an archive that ends where a line does."""
    config = page(tmp_path, b"\n".join([*LINES[:50], *[b'{"text": ""}'] * 30]))
    packed = streamed(b"\n".join(LINES[50:100]))
    (tmp_path / "b.jsonl.zst").write_bytes(packed[:-3])
    paths = (str(tmp_path / "text.jsonl"), str(tmp_path / "b.jsonl.zst"))
    sources = (replace(config.data.sources[0], path=paths),)
    manifest = build.build(replace(config, data=replace(config.data, sources=sources)))
    assert manifest["rejects"]["too_short"] == {"documents": 30, "characters": 0}
    assert manifest["rejects"]["unreadable:truncated"] == {"documents": 1, "characters": 0}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 100


def test_a_build_that_is_told_to_stop_stops(tmp_path: Path) -> None:
    data = b"\n".join([*LINES[:50], *BAD_LINES])
    with pytest.raises(ValueError, match=r"text\.jsonl, line 51, byte \d+: the line is no valid"):
        build.build(page(tmp_path, data, bad_lines="stop"))
    config = page(tmp_path, data)
    (source,) = config.data.sources
    data = replace(config.data, sources=(replace(source, bad_lines="stop"),))
    with pytest.raises(ValueError, match="line 51"):
        build.build(replace(config, data=data))


def test_a_field_that_no_record_has_is_a_mistake_and_no_damage(tmp_path: Path) -> None:
    few = b'{"content": "a"}\n' * 10
    with pytest.raises(ValueError) as error:
        build.build(page(tmp_path, few))
    assert "source 's': nothing of it could be read, 10 no_text; the first: text.jsonl, line 1" in (
        str(error.value)
    )
    with pytest.raises(ValueError) as error:
        build.build(page(tmp_path, few * 100_000))  # said long before its end
    assert "line 1, byte 0: the line has no text" in str(error.value)
    assert "nor can one of the 999 records after it be used" in str(error.value)


def test_a_thousand_bad_records_are_no_mistake_if_one_is_good(tmp_path: Path) -> None:
    data = LINES[0] + b"\n" + b'{"content": "a"}\n' * 2000 + b"\n".join(LINES[1:50])
    manifest = build.build(page(tmp_path, data))
    assert manifest["rejects"]["unreadable:no_text"]["documents"] == 2000


def test_a_source_that_vanishes_is_one_sentence_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(2):
        lines = LINES[number * 1000 : number * 1000 + 1000]
        (folder / f"{number}.jsonl").write_bytes(b"\n".join(lines))
    config = page(tmp_path, b"")
    sources = (replace(config.data.sources[0], path=str(folder)),)
    config = replace(config, data=replace(config.data, sources=sources))
    read = ingest.read

    def taken_away(source: Source, part: Any, *rest: Any) -> Any:
        if part.path.endswith("1.jsonl"):
            (folder / "1.jsonl").rename(tmp_path / "away")
        return read(source, part, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(ingest, "read", taken_away)
        with pytest.raises(ValueError) as error:
            build.build(config)
    assert "1.jsonl cannot be read: No such file" in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "away").rename(folder / "1.jsonl")
    assert build.build(config)["read"]["documents"] == 2000


def test_a_disk_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = spoiled(tmp_path, "a.jsonl", WHOLE)
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))

    class Failing(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(text, "opened", lambda path: Failing(path))
    with pytest.raises(ingest.CorpusError, match=r"a\.jsonl could not be read to its end: Input"):
        list(ingest.read(source, tasks[0][0], Meter(), [].append))
