"""A file, or a part of one, as blocks of whole lines, with the place of each for the sentences.

    bytes, bytes ... --> (offset, line, data), a MiB or more, ending at a line's end

A block ends at the first end of a line after a MiB, however the unpacker cuts its output: the
parts of an archive, and so the order of documents, are the same under any version of it. At a
damage a block ends where it stands, and says that it is cut.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from configs.sources import Source
from data_pipeline.sources import unpack
from data_pipeline.sources.documents import (
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

BLOCK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 1 << 27
"""A line, or a document of plain text, that is longer is a fault: a worker has to hold it."""
HEAD_BYTES = 1 << 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Block(NamedTuple):
    """Whole lines."""

    number: int
    offset: int
    """Bytes before it, in the unpacked file."""
    line: int
    """Lines before it, of a file that is read from its beginning (packed, UTF-16); else 0."""
    data: bytes
    cut: bool
    """Whether some bytes are missing behind it."""


class Text:
    """What a reader of lines reads."""

    def __init__(self, source: Source, part: Part, meter: Meter, faults: Faults) -> None:
        self.source, self.part, self.meter = source, part, meter
        self.path = Path(part.path)
        self.shown = readable(part.path)
        self.faults = faults
        self._packing = unpack.packing_of(self.path)
        self._whole = part.packed or unpack.is_whole(self.path)
        self._start = 0
        self._counted = (0, 0)  # a place of a plain file, and the lines before it

    def head(self) -> bytes:
        """The first bytes of the file, from which its encoding is guessed."""
        with opened(self.path) as file:
            stream = unpack.pieces(file, self._packing, Meter())
            held = b""
            for piece in stream:
                if isinstance(piece, Damage) or len(held := held + piece) >= HEAD_BYTES:
                    break
        return held[:HEAD_BYTES]

    def blocks(self) -> Iterator[Block]:
        """The blocks; of a packed file all of them, whatever the part. Damage is a fault of the
        part that the block before it belongs to."""
        number = line = 0
        offset = -1
        with opened(self.path) as file:
            for data, damage, left_out in self._cut(self._pieces(file)):
                offset = self._start if offset < 0 else offset
                if damage and self.mine(number):
                    self._damaged(damage, offset, line)
                if data or damage:
                    yield Block(number, offset, line, data, damage is not None)
                number += 1
                if self._whole:  # of a plain file they are counted when a sentence asks for them
                    line += data.count(b"\n")
                offset += len(data) + left_out

    def mine(self, number: int) -> bool:
        """Whether a block, or a record, belongs to the part: all of a plain one's do."""
        return not self.part.packed or number % self.part.of == self.part.number

    def fault(self, kind: str, what: str, offset: int, line: int, data: bytes) -> None:
        """Hand on that a line cannot be used; `line` is Block.line and what was added to it."""
        line = (line if self._whole else self._lines_before(offset)) + 1
        place = f"line {line}, byte {offset}"
        sentence = f"{self.shown}, {place}: the line {what} (此行无法使用)"
        self.faults(Fault(kind, self.shown, place, sentence, excerpt(data)))

    def unusable(self, bad: Unusable, offset: int, line: int, data: bytes) -> None:
        """The same for what was raised; `line` is that of the first byte of `data`."""
        line += data.count(b"\n", 0, bad.at)
        self.fault(bad.kind, bad.what, offset + bad.at, line, data)

    def _pieces(self, file: BinaryIO) -> Pieces:
        if self._whole:
            return unpack.pieces(file, self._packing, self.meter)
        size = self.path.stat().st_size
        part = self.part
        ends = (line_start(file, size * n // part.of) for n in (part.number, part.number + 1))
        self._start, stop = ends
        return unpack.plain_range(file, self.meter, self._start, stop)

    def _cut(self, stream: Pieces) -> Iterator[tuple[bytes, Damage | None, int]]:
        """(whole lines, what is missing behind them, bytes left out there)."""
        held: list[bytes] = []
        size = left_out = 0
        too_long = Damage("long_line", f"has more than {LONGEST_LINE_BYTES >> 20} MiB")
        for piece in stream:
            if isinstance(piece, Damage):
                if left_out:
                    yield b"", too_long, left_out
                yield b"".join(held), piece, 0
                held, size, left_out = [], 0, 0
                continue
            if left_out:
                if (end := piece.find(b"\n")) < 0:
                    left_out += len(piece)
                    continue
                yield b"", too_long, left_out + end
                left_out, piece = 0, piece[end:]
            held.append(piece)
            size += len(piece)
            if size < BLOCK_BYTES or (b"\n" not in piece and size <= LONGEST_LINE_BYTES):
                continue
            data = b"".join(held)
            held.clear()
            cut = yield from _whole_blocks(data)
            held.append(data[cut:])
            size = len(held[0])
            if size > LONGEST_LINE_BYTES:
                whole = data.rfind(b"\n") + 1
                if whole > cut:
                    yield data[cut:whole], None, 0
                held, size, left_out = [], 0, len(data) - whole
        if left_out:
            yield b"", too_long, left_out
        data = b"".join(held)
        cut = yield from _whole_blocks(data)
        if cut < len(data):
            yield data[cut:], None, 0

    def _damaged(self, damage: Damage, offset: int, line: int) -> None:
        if damage.kind == "long_line":
            what = f"{damage.what}; split the document or leave the file out"
            self.fault(damage.kind, what, offset, line, b"")
            return
        sentence = f"{self.shown} {damage.what}; fetch it again (压缩文件损坏或不完整)"
        self.faults(Fault(damage.kind, self.shown, f"byte {offset}", sentence, ""))

    def _lines_before(self, offset: int) -> int:
        """Lines before a place of a plain file; the places of a part rise, so that no byte is
        counted twice."""
        at, lines = self._counted if self._counted[0] <= offset else (0, 0)
        with opened(self.path) as file:
            file.seek(at)
            while at < offset and (data := file.read(min(BLOCK_BYTES, offset - at))):
                lines += data.count(b"\n")
                at += len(data)
        self._counted = (at, lines)
        return lines


def _whole_blocks(data: bytes) -> Generator[tuple[bytes, None, int], None, int]:
    """Blocks from the beginning of some bytes; returns where the rest begins."""
    cut = 0
    while end := data.find(b"\n", cut + BLOCK_BYTES - 1) + 1:
        yield data[cut:end], None, 0
        cut = end
    return cut


def line_start(file: BinaryIO, position: int) -> int:
    """The first border of lines at or after a position."""
    if position == 0:
        return 0
    file.seek(position - 1)
    while piece := file.readline(BLOCK_BYTES):
        if piece.endswith(b"\n"):
            break
    return file.tell()
