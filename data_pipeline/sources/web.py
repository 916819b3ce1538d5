"""Documents from web pages: HTML files and crawls (WARC); the door to trafilatura and warcio.

    .warc(.gz)  --records--> response --warcio: chunks, gzip--> bytes --charset--> HTML
                         \\-> conversion (.wet): its text as it is                    |
    .html       --------------------------------------------> bytes --charset--> HTML
                                                                                     |
                                       navigation, comments, footers are left --trafilatura--> text

The extra `web` installs both. A page's charset is that of its mark, its HTTP header or its <meta>,
if its bytes agree; else it is guessed like that of any record. Where some of a crawl is missing,
reading goes on at the next record. A page without main text is a fault that is put aside.
"""

import codecs
import contextlib
import importlib.metadata
import io
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from configs.sources import Source
from data_pipeline.shards import CorpusError
from data_pipeline.sources import text, unpack
from data_pipeline.sources.decode import Decoder
from data_pipeline.sources.documents import (
    Document,
    Fault,
    Faults,
    Meter,
    Part,
    Unusable,
    excerpt,
    readable,
)
from data_pipeline.sources.places import opened
from data_pipeline.sources.unpack import Damage, Pieces

HEADER_BYTES = 1 << 16
META_BYTES = 4096
_CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_META = re.compile(r"<meta[^>]{0,200}charset[^>]{0,200}>", re.IGNORECASE)
_LENGTH = re.compile(rb"^content-length:\s*(\d+)", re.IGNORECASE | re.MULTILINE)
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SAME = {"gb2312": "gb18030", "gbk": "gb18030", "hz": "gb18030", "big5": "big5hkscs"}
"""What pages say and what they mean (encoding.spec.whatwg.org): the larger set."""


READERS = {
    "html": ("trafilatura", "lxml", "justext", "htmldate"),
    "warc": ("trafilatura", "lxml", "justext", "htmldate", "warcio"),
}
"""Kind of source -> the packages that decide what is read of a page."""


class Page(NamedTuple):
    """A page before it is read."""

    data: bytes
    charset: str
    """What its HTTP header says, or nothing."""
    url: str
    date: str


def guest(name: str, kind: str) -> ModuleType:
    """trafilatura or warcio. CorpusError if the extra is not installed."""
    try:
        if name == "trafilatura":
            import trafilatura

            return trafilatura
        import warcio

        return warcio
    except ImportError:
        raise CorpusError(
            f"a source of kind '{kind}' needs {name}, which is not installed; install the extra: "
            "./launch/setup.sh web (缺少网页读取组件)"
        ) from None


def versions(kinds: Collection[str]) -> dict[str, str]:
    """Of the packages that read sources of these kinds, as far as they are installed."""
    found: dict[str, str] = {}
    for name in sorted({name for kind in kinds for name in READERS.get(kind, ())}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# ---- a page


def words_of(page: Page, decoder: Decoder, kind: str) -> tuple[str, dict[str, Any]]:
    """The main text of a page, a paragraph a line, and its title, date and address. Raises
    Unusable."""
    html = _html(page, decoder)
    found = guest("trafilatura", kind).bare_extraction(
        html, url=page.url or None, include_comments=False, include_tables=True, with_metadata=True
    )
    if found is None or not (found.text or "").strip():
        raise Unusable("no_main_text", "has no main text: it is a list of links, or empty")
    about = {"title": found.title, "date": page.date or found.date, "url": page.url or found.url}
    return found.text, {key: str(value) for key, value in about.items() if value}


def _html(page: Page, decoder: Decoder) -> str:
    charset = next((name for mark, name in _MARKS.items() if page.data.startswith(mark)), "")
    said = _CHARSET.search(page.data[:META_BYTES])
    for name in (charset, page.charset, said[1].decode("ascii", "ignore") if said else ""):
        name = _SAME.get(name.lower(), name.lower())
        try:
            html = page.data.decode(name) if name else None
        except (LookupError, UnicodeError):
            continue
        if html is not None:
            if codecs.lookup(name).name not in ("utf-8", "utf-8-sig"):
                decoder.meter.met[name.replace("big5hkscs", "big5")] += 1
            return _META.sub("", html, count=3)
    return _META.sub("", decoder.decode(page.data), count=3)


def read_html(source: Source, part: Part, meter: Meter, faults: Faults) -> Iterator[Document]:
    """The document of a file."""
    path, shown = Path(part.path), readable(part.path)
    packing = unpack.packing_of(path)
    held, most = bytearray(), text.LONGEST_LINE_BYTES
    with opened(path) as file:
        plain: Pieces = iter(lambda: file.read(1 << 20), b"")
        for piece in unpack.pieces(file, packing, meter) if packing else plain:
            if isinstance(piece, Damage):
                sentence = f"{shown} {piece.what}; fetch it again (压缩文件损坏或不完整)"
                faults(Fault(piece.kind, shown, "its end", sentence, ""))
                return
            held += piece
            if len(held) > most:
                what = f"the page has more than {most:,} bytes, more than can be held"
                sentence = f"{shown}: {what} (此页无法使用)"
                faults(Fault("long_line", shown, "byte 0", sentence, excerpt(bytes(held[:4000]))))
                return
    data = bytes(held)
    if not data.strip():
        return
    try:
        decoder = Decoder(source.encoding, data[: text.HEAD_BYTES], meter)
        words, about = words_of(Page(data, "", "", ""), decoder, source.kind)
    except Unusable as bad:
        sentence = f"{shown}, byte {bad.at}: the page {bad.what} (此页无法使用)"
        faults(Fault(bad.kind, shown, f"byte {bad.at}", sentence, excerpt(data)))
        return
    yield Document(f"{source.name}/{part.name}", words, {**about, "source": source.name})


# ---- a crawl


class Record(NamedTuple):
    """A record of a WARC file: its bytes with their header, or what is wrong with it."""

    offset: int
    data: bytes
    bad: Unusable | None


def read_warc(source: Source, part: Part, meter: Meter, faults: Faults) -> Iterator[Document]:
    """The documents of every n-th record."""
    guest("warcio", source.kind)
    path, shown = Path(part.path), readable(part.path)
    decoder = Decoder(source.encoding, b"", meter)

    def fault(kind: str, what: str, offset: int, data: bytes) -> None:
        sentence = f"{shown}, byte {offset}: the record {what} (此页无法使用)"
        faults(Fault(kind, shown, f"byte {offset}", sentence, excerpt(data)))

    with opened(path) as file:
        pieces = unpack.pieces(file, unpack.packing_of(path), meter)
        for number, record in enumerate(records(pieces)):
            if number % part.of != part.number:
                continue
            try:
                if record.bad is not None:
                    raise record.bad
                name = f"{source.name}/{part.name}:{record.offset}"
                found = _document(source, record, name, decoder)
                if found is not None:
                    yield found
            except Unusable as bad:
                fault(bad.kind, bad.what, record.offset, record.data)


def records(pieces: Pieces) -> Iterator[Record]:
    """The records of a crawl; where bytes are missing, one that says so, then the next whole."""
    buffer = _Buffer(pieces)
    while True:
        if not buffer.fill(12):
            if buffer.damage is None:
                return
            yield Record(buffer.offset, b"", buffer.lost())
            continue
        if not buffer.starts(b"WARC/"):
            offset, skipped = buffer.offset, buffer.skip_to(b"WARC/1.")
            if skipped.strip():
                yield Record(offset, skipped, Unusable("damaged", "begins nowhere: bytes are lost"))
            continue
        offset = buffer.offset
        head = buffer.until(b"\r\n\r\n", HEADER_BYTES)
        length = _LENGTH.search(head)
        if length is None:
            yield Record(offset, head, Unusable("damaged", "has no length in its header"))
            continue
        size = int(length[1])
        if size > text.LONGEST_LINE_BYTES:
            buffer.drop(size)
            what = f"has {size:,} bytes, more than can be held"
            yield Record(offset, head, Unusable("long_line", what))
            continue
        data = buffer.take(size)
        if len(data) < size:
            yield Record(offset, head + data, buffer.lost())
            continue
        yield Record(offset, head + data, None)
        buffer.skip_blank()


def _document(source: Source, record: Record, name: str, decoder: Decoder) -> Document | None:
    """The document of a response or of a conversion; None, counted, for any other record."""
    from warcio.archiveiterator import ArchiveIterator  # its price is paid for crawls alone
    from warcio.exceptions import ArchiveLoadFailed

    try:
        parsed = next(iter(ArchiveIterator(io.BytesIO(record.data))))
        data = _unpacked(parsed)
    except (ArchiveLoadFailed, StopIteration, ValueError, EOFError) as error:
        raise Unusable("damaged", f"cannot be unpacked ({error})") from None
    headers = parsed.rec_headers
    about = {
        "url": headers.get_header("WARC-Target-URI") or "",
        "date": headers.get_header("WARC-Date") or "",
    }
    if parsed.rec_type == "conversion":
        kept = {key: value for key, value in about.items() if value}
        return Document(name, decoder.decode(data), {**kept, "source": source.name})
    http = parsed.http_headers
    kind = (http.get_header("Content-Type") or "text/html") if http else ""
    if parsed.rec_type != "response" or http.get_statuscode() != "200" or "html" not in kind:
        decoder.meter.met["other_records"] += 1
        return None
    charset = _CHARSET.search(kind.encode("latin-1", "ignore"))
    page = Page(data, charset[1].decode() if charset else "", **about)
    words, fields = words_of(page, decoder, source.kind)
    return Document(name, words, {**fields, "source": source.name})


def _unpacked(parsed: Any) -> bytes:
    """What a record holds without its chunks and its packing. Raises Unusable for a page that
    becomes longer than can be held."""
    from warcio.bufferedreaders import BufferedReader, ChunkedDataReader

    stream = parsed.content_stream()
    if isinstance(stream, ChunkedDataReader) and (packing := stream.decomp_type):
        stream.set_decomp(None)  # it would unpack a chunk, of any size, at once
        stream = BufferedReader(stream, decomp_type=packing)
    data: bytes = stream.read(text.LONGEST_LINE_BYTES + 1)
    if len(data) > text.LONGEST_LINE_BYTES:
        what = f"unpacks to more than {text.LONGEST_LINE_BYTES:,} bytes, more than can be held"
        raise Unusable("long_line", what)
    return data


class _Buffer:
    """Bytes of pieces, by length or by what ends them; stops at a damage until it is cleared."""

    def __init__(self, pieces: Pieces) -> None:
        self.pieces = pieces
        self.held = bytearray()
        self.offset = 0
        self.damage: Damage | None = None

    def fill(self, length: int) -> bool:
        """Hold so many bytes, if there are as many; whether there are any. At a damage what is
        behind it is not looked at."""
        while len(self.held) < length and self.damage is None:
            piece = next(self.pieces, None)
            if piece is None:
                break
            if isinstance(piece, Damage):
                self.damage = piece
            else:
                self.held += piece
        return bool(self.held)

    def lost(self) -> Unusable:
        """Why a record is not whole; what is behind the damage may be read from now on."""
        damage = self.damage or Damage("truncated", "ends before the length that it gives")
        self.damage = None
        return Unusable(damage.kind, damage.what)

    def starts(self, what: bytes) -> bool:
        """Whether these bytes come next."""
        self.fill(len(what))
        return self.held.startswith(what)

    def take(self, length: int) -> bytes:
        """The next bytes, fewer at the end or at a damage."""
        self.fill(length)
        data = bytes(self.held[:length])
        del self.held[:length]
        self.offset += len(data)
        return data

    def drop(self, length: int) -> None:
        """Pass over bytes without holding them."""
        while length > 0 and (data := self.take(min(length, 1 << 20))):
            length -= len(data)

    def until(self, end: bytes, most: int) -> bytes:
        """The bytes up to and with an end, or `most` of them."""
        while (at := self.held.find(end)) < 0 and len(self.held) < most:
            size = len(self.held)
            self.fill(min(size + 4096, most))
            if len(self.held) == size:
                break
        return self.take(at + len(end) if at >= 0 else len(self.held))

    def skip_to(self, what: bytes) -> bytes:
        """Pass over everything before some bytes; the beginning of what was passed over."""
        passed = b""
        while True:
            self.fill(1 << 16)
            at = self.held.find(what)
            keep = 0 if at < 0 and self.damage else len(what)
            data = self.take(at if at >= 0 else max(len(self.held) - keep, 0))
            passed = passed or data[:2000]
            if at >= 0 or not data:
                break
        if at < 0:
            passed = passed or self.take(len(self.held))
        return passed

    def skip_blank(self) -> None:
        """Pass over the empty lines between two records."""
        while self.fill(2) and self.held[:1] in (b"\r", b"\n"):
            self.take(1)
