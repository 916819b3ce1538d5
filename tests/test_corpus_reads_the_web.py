"""A page gives its paragraphs and nothing around them, in whatever encoding and container it comes;
where some of a crawl is missing, the pages around it are read."""

import gzip
import io
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from configs.corpus import Data
from configs.sources import Source
from data_pipeline import ingest
from data_pipeline.ingest import CorpusError, Document, Fault, Meter
from data_pipeline.sources import text

pytest.importorskip("trafilatura", reason="the extra `web` is not installed")
pytest.importorskip("warcio", reason="the extra `web` is not installed")

PARAGRAPHS = [
    "北京时间今天上午，国家图书馆公布了一批新近修复的古籍，其中包括三部宋代刻本和十二部明代抄本。",
    "馆方介绍，修复工作历时六年，由二十多位修复师共同完成；他们使用的纸张全部以传统方法手工制成。",
    "“每一页都要经过清洗、补缀、压平三道工序，”负责人说，“最难的是让新纸与旧纸的颜色一致。”",
    "这批古籍将于下月起在善本阅览室向公众开放，读者可以提前在网上预约，每天限额五十人。",
]
NAVIGATION = ["首页", "新闻", "登录", "注册", "关于我们", "上一篇：", "版权所有", "京ICP备"]
COMMENTS = ["沙发！楼主好人", "顶一个，期待开放"]


def html(charset: str, number: int = 0) -> str:
    links = "".join(f'<li><a href="/{n}">{word}</a></li>' for n, word in enumerate(NAVIGATION[:5]))
    body = "\n".join(f"<p>{paragraph}</p>" for paragraph in PARAGRAPHS)
    return f"""<!DOCTYPE html><html lang="zh-CN"><head>
<meta http-equiv="Content-Type" content="text/html; charset={charset}">
<title>古籍修复{number}</title></head><body>
<div id="header"><ul class="nav">{links}</ul></div>
<div class="article"><h1>国家图书馆公布古籍修复成果</h1><div class="content">{body}</div></div>
<div class="pager"><a href="/p">{NAVIGATION[5]}春节活动</a></div>
<div id="comments"><h3>网友评论</h3><ul><li>{COMMENTS[0]}</li><li>{COMMENTS[1]}</li></ul></div>
<div id="footer">{NAVIGATION[6]} 2024 {NAVIGATION[7]}00000000号</div>
<script>var a = "脚本";</script></body></html>"""


def read_all(source: Source, parts: int = 0) -> tuple[list[Document], list[Fault], Meter]:
    tasks, _ = ingest.plan(Data(out="", sources=(source,)))
    flat = [part for task in tasks for part in task]
    if parts:
        flat = [replace(flat[0], number=n, of=parts) for n in range(parts)]
    documents: list[Document] = []
    faults: list[Fault] = []
    meter = Meter()
    for part in flat:
        documents += list(ingest.read(source, part, meter, faults.append))
    return documents, faults, meter


def is_the_article(text: str) -> None:
    assert [line for line in text.split("\n") if line in PARAGRAPHS] == PARAGRAPHS
    for word in (*NAVIGATION, *COMMENTS, "脚本"):
        assert word not in text


@pytest.mark.parametrize(
    ("said", "encoding"),
    [
        ("utf-8", "utf-8"),
        ("gb2312", "gb18030"),
        ("gbk", "gb18030"),
        ("utf-8", "gb18030"),  # a page that says what it is not
        ("gb2312", "utf-8"),
        ("utf-16", "utf-16"),
    ],
)
def test_a_page_gives_its_paragraphs(said: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(html(said).encode(encoding))
    documents, faults, _ = read_all(Source("html", str(tmp_path), "s"))
    assert not faults
    (document,) = documents
    is_the_article(document.text)
    assert document.id == "s/a.html"
    assert document.fields["source"] == "s"
    assert "�" not in document.text


def test_a_page_without_text_and_a_page_of_no_encoding_are_faults(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<html><body><div></div></body></html>", "utf-8")
    (tmp_path / "b.html").write_bytes(html("utf-8").encode()[:-500] + b"\xff\xff\xfe" * 50)
    (tmp_path / "c.html").write_bytes(html("utf-8").encode())
    (tmp_path / "d.html").write_bytes(b"")
    documents, faults, _ = read_all(Source("html", str(tmp_path), "s"))
    assert [document.id for document in documents] == ["s/c.html"]
    assert [fault.kind for fault in faults] == ["no_main_text", "encoding"]


def crawl(
    gzipped: bool, pages: list[tuple[str, bytes, str]], more: Sequence[tuple[str, str]] = ()
) -> bytes:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    out = io.BytesIO()
    writer = WARCWriter(out, gzip=gzipped)
    writer.write_record(writer.create_warcinfo_record("a.warc", {"software": "test"}))
    for url, data, kind in pages:
        headers = StatusAndHeaders("200 OK", [("Content-Type", kind), *more], protocol="HTTP/1.1")
        record = writer.create_warc_record(
            url,
            "response",
            payload=io.BytesIO(data),
            http_headers=headers,
            warc_headers_dict={"WARC-Date": "2024-05-06T07:08:09Z"},
        )
        writer.write_record(record)
    return out.getvalue()


PAGES = [
    (f"http://example.org/{n}", html("gb2312", n).encode("gb18030" if n % 2 else "utf-8"), kind)
    for n, kind in enumerate(["text/html; charset=utf-8", "text/html"] * 5)
]


@pytest.mark.parametrize("gzipped", [False, True])
def test_a_crawl_gives_its_pages(gzipped: bool, tmp_path: Path) -> None:
    path = tmp_path / ("a.warc.gz" if gzipped else "a.warc")
    path.write_bytes(
        crawl(gzipped, [*PAGES, ("http://example.org/x.png", b"\x89PNG", "image/png")])
    )
    documents, faults, meter = read_all(Source("warc", str(path), "s"))
    assert not faults
    assert [document.fields["url"] for document in documents] == [page[0] for page in PAGES]
    for document in documents:
        is_the_article(document.text)
        assert document.fields["date"] == "2024-05-06T07:08:09Z"
    assert meter.met["other_records"] == 2
    cut, _, _ = read_all(Source("warc", str(path), "s"), parts=3)
    assert sorted(cut) == sorted(documents)


@pytest.mark.parametrize("gzipped", [False, True])
def test_pages_around_a_damage_are_read(gzipped: bool, tmp_path: Path) -> None:
    data = bytearray(crawl(gzipped, PAGES))
    starts = [n for n in range(len(data)) if data[n : n + 3] == b"\x1f\x8b\x08"]
    starts = starts if gzipped else [n for n in range(len(data)) if data[n : n + 7] == b"WARC/1."]
    assert len(starts) == len(PAGES) + 1
    middle = (starts[4] + starts[5]) // 2
    if gzipped:
        data[middle : middle + 200] = bytes(200)
    else:
        del data[middle : middle + 300]
    data = data[: len(data) - 100]
    path = tmp_path / ("a.warc.gz" if gzipped else "a.warc")
    path.write_bytes(data)
    documents, faults, _ = read_all(Source("warc", str(path), "s"))
    urls = [document.fields["url"] for document in documents]
    # a plain file does not say that bytes are gone: the record takes some of the next one
    assert {page[0] for page in PAGES} - set(urls) <= {
        f"http://example.org/{n}" for n in ((3, 9) if gzipped else (3, 4, 9))
    }
    assert len(urls) >= 7
    assert "truncated" in {fault.kind for fault in faults}
    assert len(faults) >= 2


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("packing", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_page_that_unpacks_without_end_is_one_fault(
    packing: str,
    pack: Callable[[bytes], bytes],
    chunked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 MB in 200 kB: no worker holds them. What is packed and short enough is read."""
    monkeypatch.setattr(text, "LONGEST_LINE_BYTES", 1 << 20)

    def packed(data: bytes) -> bytes:
        data = pack(data)
        return b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data) if chunked else data

    more = [("Content-Encoding", packing), *([("Transfer-Encoding", "chunked")] * chunked)]
    good, bomb = packed(html("utf-8").encode()), packed(bytes(200_000_000))
    pages = [(f"http://example.org/{n}", data, "text/html") for n, data in enumerate([bomb, good])]
    (tmp_path / "a.warc").write_bytes(crawl(False, pages, more))
    tracemalloc.start()
    (document,), (fault,), _ = read_all(Source("warc", str(tmp_path), "s"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    is_the_article(document.text)
    assert fault.kind == "long_line"
    assert "unpacks to more than 1,048,576 bytes, more than can be held" in fault.sentence
    assert peak < 100e6


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_of_a_page_without_end_is_one_fault(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "LONGEST_LINE_BYTES", 1 << 20)
    pack = gzip.compress if suffix else bytes
    (tmp_path / f"a.html{suffix}").write_bytes(pack(bytes(200_000_000)))
    (tmp_path / f"b.html{suffix}").write_bytes(pack(html("utf-8").encode()))
    tracemalloc.start()
    (document,), (fault,), _ = read_all(Source("html", str(tmp_path), "s"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    is_the_article(document.text)
    assert fault.kind == "long_line" and peak < 150e6
    assert "a.html" in fault.sentence and "more than 1,048,576 bytes" in fault.sentence


def test_text_of_a_crawl_is_taken_as_it_is(tmp_path: Path) -> None:
    words = "\n".join(PARAGRAPHS).encode()
    header = (
        "WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://example.org/\r\n"
        "WARC-Record-ID: <urn:uuid:0>\r\nWARC-Date: 2024-05-06T07:08:09Z\r\n"
        f"Content-Type: text/plain\r\nContent-Length: {len(words)}\r\n\r\n"
    )
    (tmp_path / "a.wet.gz").write_bytes(gzip.compress(header.encode() + words + b"\r\n\r\n"))
    (document,), faults, _ = read_all(Source("warc", str(tmp_path), "s"))
    assert document.text == "\n".join(PARAGRAPHS)
    assert not faults


def test_without_the_extra_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.html").write_text(html("utf-8"), "utf-8")
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(CorpusError, match=r"needs trafilatura, .*setup\.sh web"):
        read_all(Source("html", str(tmp_path), "s"))
