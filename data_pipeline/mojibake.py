"""Text that was decoded with the wrong encoding, told by the characters that this makes.

    中文 in GB18030, read as Latin-1    ÖÐÎÄ           runs of letters with accents
    中文 in UTF-8, read as Windows-1252  ä¸­æ–‡         the same
    中文 in GB18030, read as Shift-JIS   ﾖﾐﾎﾄ          runs of half-width katakana
    U+FFFD in UTF-8, read as GBK        锟斤拷          by name; fresh memory: 烫烫烫, 屯屯屯
    的是 in UTF-8, read as GBK           鐨勬槸          rare Han, which decoded back are common

Good text has none of the runs (French has one accent at a time), but some of the rare Han: those
count only where half of a page's Han come back as Han when the mistake is undone.
"""

from functools import cache

import numpy as np

from data_pipeline.kernels import compiled

_ACCENT, _HIGH, _KATAKANA, _LEAD, _HAN = (1 << bit for bit in range(5))
SHORTEST_RUN = 4
SUSPECT = 0.05
"""Share of Han whose bytes in GBK could begin a Han's in UTF-8, from which on it is tried."""
TRIED = 4000  # characters
COME_BACK = 0.4
"""Han that come back for each Han; three bytes are one Han in UTF-8, one and a half in GBK."""


@cache
def _marks() -> np.ndarray:
    """What each code point may be a trace of, uint8 bits."""
    marks = np.zeros(0x110000, dtype=np.uint8)
    windows = bytes(n for n in range(0x80, 0xA0) if n not in (0x81, 0x8D, 0x8F, 0x90, 0x9D))
    marks[[ord(char) for char in windows.decode("cp1252")]] |= _HIGH
    marks[0xA1:0x100] |= _HIGH
    marks[0xC0:0x100] |= _ACCENT
    marks[[0xD7, 0xF7]] &= ~np.uint8(_ACCENT)  # × and ÷
    marks[0xFF61:0xFFA0] |= _KATAKANA
    marks[0x3400:0xA000] |= _HAN
    for lead in range(0xE4, 0xEA):
        for trail in (n for n in range(0x80, 0xC0) if n != 0x7F):
            marks[ord(bytes((lead, trail)).decode("gbk"))] |= _LEAD
    return marks


def characters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which code points (bool) a text without which has no traces but leads; which are those; which
    are counted as Han."""
    marks = _marks()
    spoilt = (marks & (_ACCENT | _KATAKANA)) != 0
    spoilt[[ord(char) for char in "锟烫屯"]] = True
    return spoilt, (marks & _LEAD) != 0, (marks & _HAN) != 0


def traces(text: str, codes: np.ndarray) -> int:
    """How many characters of a text (and its code points) a wrong decoding has made."""
    found, han, leads = _count(codes, _marks())
    if leads > SUSPECT * han and _comes_back(text[:TRIED]):
        return int(found + han)
    return int(found)


def _comes_back(text: str) -> bool:
    marks, before = _marks(), np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    restored = text.encode("gbk", "ignore").decode("utf-8", "ignore")
    after = np.frombuffer(restored.encode("utf-32-le"), dtype=np.uint32)
    han = np.count_nonzero(marks[before] & _HAN)
    return bool(np.count_nonzero(marks[after] & _HAN) > COME_BACK * han)


@compiled
def _count(codes, marks):  # type: ignore[no-untyped-def]
    """Characters in runs that good text does not have, Han, and Han that may begin another."""
    found, han, leads, run, accents, kana, same = 0, 0, 0, 0, 0, 0, 0
    last, before = np.uint32(0), np.uint32(0)
    for k in range(len(codes)):
        code = codes[k]
        mark = marks[code]
        han += (mark & _HAN) != 0
        leads += (mark & _LEAD) != 0
        if mark & _HIGH:
            run += 1
            accents += (mark & _ACCENT) != 0
        elif run:
            if run >= SHORTEST_RUN and accents >= 2 and 4 * accents >= run:
                found += run
            run, accents = 0, 0
        if mark & _KATAKANA:
            kana += 1
        elif kana:
            found += kana if kana >= SHORTEST_RUN else 0
            kana = 0
        if code == 0x62F7 and last == 0x65A4 and before == 0x951F:  # 锟斤拷
            found += 3
        if code == 0x70EB or code == 0x5C6F:  # 烫, 屯
            same = same + 1 if code == last else 1
            found += 3 if same == 3 else same > 3
        before, last = last, code
    if run >= SHORTEST_RUN and accents >= 2 and 4 * accents >= run:
        found += run
    found += kana if kana >= SHORTEST_RUN else 0
    return found, han, leads
