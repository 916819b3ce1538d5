"""Bytes to text: UTF-8, GB18030 (with GBK and GB2312), Big5; nothing is ever replaced.

    record --strict UTF-8--> text
           --strict GB18030, and it looks Chinese--> text
           --strict Big5, and it looks Chinese--> text
           --> Unusable

Text looks Chinese if 0.7 of its characters beyond ASCII are common: the first planes of GB 2312
(3,755) and of Big5 (5,401), and punctuation. Of 4,001 documents of poems, classics, laws, news and
their first 60 characters, 999 of 1,000 have at least 0.81; the same documents in the wrong encoding
(Big5 read as GB18030, UTF-8 read as GB18030) at most 0.67.

A file mostly has one encoding, and two characters of GB18030 may also be UTF-8 (小小 is СС): the
beginning of a file says what is tried first. Korean in EUC-KR lies where GB 2312 has its common
characters and is taken for Chinese; nobody should put it there.
"""

from functools import cache

from data_pipeline.sources.documents import Meter, Unusable

COMMON_SHARE = 0.7
GUESSED = ("utf-8", "gb18030", "big5")
_PUNCTUATION = (*range(0x3000, 0x3020), *range(0xFF00, 0xFFE6), *map(ord, "“”‘’…—·×～"))


class Decoder:
    """Decodes the records of one file."""

    def __init__(self, encoding: str, head: bytes, meter: Meter) -> None:
        """`encoding`: of the source; `head`: the first bytes of the file."""
        self.asked = encoding
        self.meter = meter
        first = guess(head) if encoding == "auto" else encoding
        self.order = (first, *(other for other in GUESSED if other != first))
        if encoding != "auto":
            self.order = (encoding,)

    @property
    def is_utf_8(self) -> bool:
        """Whether UTF-8 is what is tried first."""
        return self.order[0] == "utf-8"

    def decode(self, data: bytes) -> str:
        """The text of a record. Raises Unusable, with the first byte that is no UTF-8."""
        if data.isascii():
            return data.decode("ascii")
        for encoding in self.order:
            text = _strict(data, encoding)
            if text is None:
                continue
            if encoding == "utf-8":
                return text
            if self.asked != "auto" or looks_chinese(text):
                self.meter.met[encoding] += 1
                return text
        raise self._refused(data)

    def _refused(self, data: bytes) -> Unusable:
        encoding = "utf-8" if self.asked == "auto" else self.asked
        try:
            data.decode(encoding)
        except UnicodeDecodeError as error:
            name = {"utf-8": "UTF-8", "gb18030": "GB18030", "big5": "Big5"}[encoding]
            others = ", and no Chinese in GB18030 or Big5" if self.asked == "auto" else ""
            return Unusable(
                "encoding",
                f"is no valid {name} (the byte is 0x{data[error.start]:02x}){others}; convert it, "
                "or name its encoding in `encoding` of its source",
                error.start,
            )
        raise AssertionError("what could not be decoded can")


def guess(head: bytes) -> str:
    """The encoding of most lines of a file's beginning: utf-8 unless another one is plainly it."""
    votes = dict.fromkeys(GUESSED, 0)
    lines = head.split(b"\n")
    for line in lines[:-1] or lines:  # the last one may be cut
        if line.isascii():
            continue
        for encoding in GUESSED:
            text = _strict(line, encoding)
            if text is not None and (encoding == "utf-8" or looks_chinese(text)):
                votes[encoding] += len(line)
                break
    return max(GUESSED, key=lambda encoding: votes[encoding])


def looks_chinese(text: str) -> bool:
    """Whether the characters beyond ASCII are common in Chinese."""
    beyond = [character for character in text[:100_000] if character > "\x7f"]
    common = sum(map(_common().__contains__, beyond))
    return common >= COMMON_SHARE * len(beyond)


def _strict(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


@cache
def _common() -> frozenset[str]:
    planes = [
        ("gb2312", range(0xB0, 0xD8), range(0xA1, 0xFF)),
        ("big5", range(0xA4, 0xC7), (*range(0x40, 0x7F), *range(0xA1, 0xFF))),
    ]
    found = set(map(chr, _PUNCTUATION))
    for encoding, highs, lows in planes:
        for high in highs:
            found |= {_strict(bytes([high, low]), encoding) or "" for low in lows}
    return frozenset(found - {""})
