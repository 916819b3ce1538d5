"""Documents from lines: JSON, columns between tabs, MNBVC's paragraphs; and from plain text.

    blocks of whole lines --decode--> record --document()--> Document
                              |
                              +--> a fault with its line and byte; the next line is read

MNBVC (github.com/esbatmop/MNBVC) writes a text file as one line: {文件名, 是否待查文件,
是否重复文件, 段落: [{行号, 是否重复, 是否跨文件重复, md5, 内容, 扩展字段}]}; in its Hub edition the
paragraphs stand, as a JSON text, in `text`.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from configs.sources import Source
from data_pipeline.sources import text
from data_pipeline.sources.decode import Decoder
from data_pipeline.sources.documents import (
    SIMPLE,
    Document,
    Faults,
    Meter,
    Part,
    Unusable,
    document,
)
from data_pipeline.sources.text import BYTE_ORDER_MARK, Text

Parse = Callable[[bytes, str], Document | None]
_CONTROL = re.compile(r"[\x00-\x1f]")
BLANK_LINE = re.compile(rb"^[ \t\r\f\v]*\n", re.MULTILINE)


def read(source: Source, part: Part, meter: Meter, faults: Faults) -> Iterator[Document]:
    """The documents of a part of a file of lines."""
    file = Text(source, part, meter, faults)
    decoder = Decoder(source.encoding, file.head(), meter)
    parse, after = _parser(source, file, decoder), _lines_of_header(source)
    for block in file.blocks():
        if not file.mine(block.number):
            continue
        offset = block.offset
        for line, data in enumerate(block.data.split(b"\n"), block.line):
            data = data.removeprefix(BYTE_ORDER_MARK) if offset == 0 else data
            if data and not data.isspace() and (line >= after or block.offset != 0):
                try:
                    if (found := parse(data, f"{part.name}:{offset}")) is not None:
                        yield found
                except Unusable as bad:
                    file.unusable(bad, offset, line, data)
            offset += len(data) + 1


def _lines_of_header(source: Source) -> int:
    return int(source.kind == "tsv" and not _by_number(source))


def _parser(source: Source, file: Text, decoder: Decoder) -> Parse:
    """bytes of a line, its place -> a document, or None for what is left out without a word."""
    if source.kind == "tsv":
        return _columns(source, file, decoder)
    if source.kind == "mnbvc":
        return lambda data, place: _paragraphs(source, _object(data, decoder), place, decoder.meter)
    return lambda data, place: document(source, _object(data, decoder), place)


# ---- JSON


def _object(data: bytes, decoder: Decoder) -> dict[str, Any]:
    try:
        record = orjson.loads(data if decoder.is_utf_8 else decoder.decode(data))
    except orjson.JSONDecodeError as error:
        record = _mended(data, decoder, error.msg)
    if not isinstance(record, dict):
        raise Unusable("broken_json", "is no JSON object, must be {...}")
    return record


def _mended(data: bytes, decoder: Decoder, reason: str) -> Any:
    """The record of a line that is no JSON in UTF-8: in its own encoding, or with bare control
    characters in its texts (NUL, tab), which cleaning removes and counts."""
    bare = data.strip(b"\0")
    if not bare:
        raise Unusable("nul_bytes", f"holds nothing but {len(data):,} NUL bytes")
    words = decoder.decode(bare)
    try:
        record = orjson.loads(words)
        decoder.meter.met["control_characters"] += len(bare) < len(data)
        return record
    except orjson.JSONDecodeError as error:
        reason = error.msg
    if _CONTROL.search(words):
        try:
            record = json.loads(words, strict=False)
            orjson.dumps(record)  # refuses halves of characters, which are no text
            decoder.meter.met["control_characters"] += 1
            return record
        except (ValueError, TypeError, RecursionError):
            pass
    raise Unusable("broken_json", f"is no valid JSON ({reason})")


def _paragraphs(
    source: Source, record: dict[str, Any], place: str, meter: Meter
) -> Document | None:
    """One of MNBVC's files; None if it is marked as a copy of another one."""
    if record.get("是否重复文件") is True and not source.keep_repeated:
        meter.met["repeated_files"] += 1
        return None
    paragraphs = record.get("段落", record.get(source.text_field))
    if isinstance(paragraphs, str):
        try:
            paragraphs = orjson.loads(paragraphs)
        except orjson.JSONDecodeError:
            paragraphs = None
    if not isinstance(paragraphs, list):
        raise Unusable(
            "no_text", "has no text: 段落 (or the text field) is missing or no list of paragraphs"
        )
    kept = []
    for paragraph in paragraphs:
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("内容"), str):
            raise Unusable("no_text", "has no text: a paragraph has no 内容")
        repeated = paragraph.get("是否重复") is True or paragraph.get("是否跨文件重复") is True
        if source.keep_repeated or not repeated:
            kept.append(paragraph["内容"])
        else:
            meter.met["repeated_paragraphs"] += 1
    name = record.get("文件名")
    fields = {"source": source.name}
    if isinstance(name, str):
        fields["file"] = name
    if isinstance(record.get("时间"), SIMPLE):
        fields["date"] = str(record["时间"])
    return Document(f"{source.name}/{place}", "\n".join(kept), fields)


# ---- columns


def _by_number(source: Source) -> bool:
    named = [column for _, column in source.columns] or [source.text_field]
    return all(name.isdigit() for name in named)


def _columns(source: Source, file: Text, decoder: Decoder) -> Parse:
    """Columns by the names of the first line, or by their numbers."""

    def cells(data: bytes) -> list[str]:
        line = decoder.decode(data).removesuffix("\r")
        if source.separator == "\t":
            return line.split("\t")
        try:
            return next(csv.reader([line], delimiter=source.separator, strict=True))
        except csv.Error as error:
            raise Unusable("broken_row", f"is no row of a table ({error})") from None

    header = None if _by_number(source) else _header(file, cells)

    def parse(data: bytes, place: str) -> Document:
        row = cells(data)
        names = header or [str(number) for number in range(1, len(row) + 1)]
        if len(row) != len(names):
            raise Unusable(
                "broken_row", f"has {len(row)} columns, the first line of the file {len(names)}"
            )
        return document(source, dict(zip(names, row, strict=True)), place)

    return parse


def _header(file: Text, cells: Callable[[bytes], list[str]]) -> list[str]:
    first = file.head().removeprefix(BYTE_ORDER_MARK).split(b"\n")[0]
    try:
        return cells(first)
    except Unusable:
        return []  # then no line has the fields that are asked for, and each says so


# ---- plain text


def read_text(source: Source, part: Part, meter: Meter, faults: Faults) -> Iterator[Document]:
    """Text between blank lines, or the whole file; at a damage, the documents on either side of it
    are faults, since they are not whole."""
    file = Text(source, part, meter, faults)
    decoder = Decoder(source.encoding, file.head(), meter)
    held: list[bytes] = []
    size = 0
    start, line = 0, 0  # where the document in hand begins
    torn = False

    def whole() -> Iterator[Document]:
        data = b"".join(held)
        held.clear()
        data = data.removeprefix(BYTE_ORDER_MARK) if start == 0 else data
        if not data or data.isspace():
            return
        if torn:
            file.fault(
                "fragment",
                "begins a document that is cut by damage, or longer than can be held",
                start,
                line,
                data,
            )
            return
        try:
            words = decoder.decode(data)
        except Unusable as bad:
            file.unusable(bad, start, line, data)
            return
        yield Document(f"{source.name}/{part.name}:{start}", words, {"source": source.name})

    for block in file.blocks():
        last = 0
        for blank in BLANK_LINE.finditer(block.data) if source.documents == "blank_line" else ():
            held.append(block.data[last : blank.start()])
            yield from whole()
            torn, size = False, 0
            last = blank.end()
            start = block.offset + last
            line = block.line + block.data.count(b"\n", 0, last)
        held.append(block.data[last:])
        size += len(held[-1])
        if block.cut or size > text.LONGEST_LINE_BYTES:
            torn = True
            yield from whole()
            size = 0
            start, line = block.offset + len(block.data), block.line + block.data.count(b"\n")
    yield from whole()
