"""What belongs to a person, behind placeholders: telephone, identity and card numbers, addresses.

    text --digits in a row, an @?--> patterns --checksum, date, label, address?--> [电话] [邮箱] ...
         `--nothing of the kind-----> as it is

Han are word characters to Python's patterns, so a `\\b` next to one never matches: "邮箱a@b.cn"
would leak. Borders are therefore written out for ASCII alone. What looks like a person's number is
checked like one: identity numbers by province, date and ISO 7064 mod 11-2, cards by issuer and
Luhn; numbers of orders, books and versions, and addresses that belong to no one, stay.
"""

import re
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import cache

import numpy as np

from configs.cleaning import PRIVATE_KINDS
from data_pipeline.kernels import compiled

PLACEHOLDERS = {
    "email": "[邮箱]",
    "id": "[身份证号]",
    "card": "[银行卡号]",
    "qq": "[QQ号]",
    "wechat": "[微信号]",
    "phone": "[电话]",
    "ip": "[IP地址]",
}
"""In the order in which they are looked for: the longer number first."""
assert set(PLACEHOLDERS) == set(PRIVATE_KINDS)

_PROVINCES = {
    *range(11, 16),
    *range(21, 24),
    *range(31, 38),
    *range(41, 47),
    *range(50, 55),
    *range(61, 66),
    *(71, 81, 82, 83),
}
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_OTHER_NUMBER = re.compile(
    r"(?:单号|编号|货号|批号|序号|型号|款号|流水号|条码|版号|期号|ISBN|ISSN|DOI|No\.?|SN|ID)"
    r"[是为:：#\s]*$",
    re.IGNORECASE,
)
"""Labels of numbers that are no person's, just before them."""
_VERSION = re.compile(
    r"(?:版本号?|固件|内核|version|ver|release|[vV])[是为:：.\s]*$", re.IGNORECASE
)
_CARD_LABEL = re.compile(r"(?:卡|账|帐|card|account)[^\n]{0,12}$", re.IGNORECASE)
_IP_LABEL = re.compile(r"(?:ip|主机|服务器|地址)[^\n]{0,8}$", re.IGNORECASE)
_FILES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "py", "so", "service"}
_NOBODYS = re.compile(r"(?:.*\.)?(?:example\.(?:com|org|net|cn)|.*\.(?:test|invalid|local))$")
_OPEN_SERVERS = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "114.114.114.114", "223.5.5.5", "9.9.9.9"}


def mask(
    text: str, kinds: tuple[str, ...] = PRIVATE_KINDS, codes: np.ndarray | None = None
) -> tuple[str, "Counter[str]"]:
    """The text with what is private replaced, and how much of each kind; doing it again changes
    nothing. `codes`: its code points, if they are at hand."""
    found: Counter[str] = Counter()
    if not kinds:
        return text, found
    there = _gates(text, codes)
    for kind in PLACEHOLDERS:
        if there[kind] and kind in kinds:
            text, times = _replace(text, kind)
            if times:
                found[kind] = times
    return text, found


def _replace(text: str, kind: str) -> tuple[str, int]:
    holds = _CHECKS.get(kind, bool)
    times = 0

    def put(match: "re.Match[str]") -> str:
        nonlocal times
        if not holds(match):
            return match[0]
        times += 1
        start = match.start("it") - match.start()
        stop = match.end("it") - match.start()
        return match[0][:start] + PLACEHOLDERS[kind] + match[0][stop:]

    return _pattern(kind).sub(put, text), times


ADDRESSES = "@＠微薇VvWw"
"""Characters of which an e-mail address or the label of a WeChat name has one."""
FEWEST_DIGITS = 4
"""All other kinds have more."""


def _gates(text: str, codes: np.ndarray | None) -> dict[str, bool]:
    """Which kinds there may be: patterns are slow, most texts hold none of what they begin with."""
    if codes is None:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    most, dotted, at, qq, wechat = _signs(codes)
    return {
        "email": at,
        "id": most >= 17,
        "card": most >= 16,
        "phone": most >= 11,
        "ip": dotted,
        "qq": most >= 5 and qq,
        "wechat": wechat,
    }


@compiled
def _signs(codes):  # type: ignore[no-untyped-def]
    """The most digits in a row, single blanks, dots and hyphens between them left out; whether
    three dots stand in one of the rows; whether there is an @, a label of QQ, one of WeChat."""
    most, digits, dots, dotted, gap = 0, 0, 0, False, False
    at, qq, wechat = False, False, False
    for k in range(len(codes)):
        code = codes[k]
        last = codes[k - 1] if k else np.uint32(0)
        if code == 0x4FE1:  # 信 after 微, 薇, V, v
            wechat |= last == 0x5FAE or last == 0x8587 or last | 32 == 118
        elif code == 0x6263:  # 扣扣
            qq |= last == code
        elif code == 0x40 or code == 0xFF20:
            at = True
        elif code >= 128:
            pass
        elif code | 32 == 113:  # QQ
            qq |= last | 32 == 113
        elif code | 32 == 120:  # vx, VX, Vx
            wechat |= last == 86 or (last == 118 and code == 120)
        elif code == 110 or code == 116:  # ei(x|X)in, e(c|C)hat: the last letter, then back
            wechat |= k >= 4 and _ends_a_label(codes[k - 4 : k + 1])
        if 48 <= code <= 57:
            digits += 1
            gap = False
            most = max(most, digits)
            dotted |= dots >= 3
        elif digits:
            if gap or not (code == 45 or code == 46 or code == 32):
                digits, dots = 0, 0
            dots += code == 46
            gap = True
    return most, dotted, at, qq, wechat


@compiled
def _ends_a_label(five):  # type: ignore[no-untyped-def]
    """Whether five characters are eixin, eiXin, echat or eChat."""
    a, b, c, d, e = five[0], five[1], five[2], five[3], five[4]
    weixin = b == 105 and c | 32 == 120 and d == 105 and e == 110
    return a == 101 and (weixin or (b | 32 == 99 and c == 104 and d == 97 and e == 116))


_BLANKS = r"[ \t]{0,2}"
_PATTERNS = {
    "email": (
        r"(?<![A-Za-z0-9._%+-])(?P<it>[A-Za-z0-9._%+-]{1,64}[@＠](?P<domain>"
        r"(?:[A-Za-z0-9-]{1,63}\.){1,8}(?P<top>[A-Za-z]{2,24})))(?![A-Za-z0-9@＠]|:[A-Za-z0-9~/$])"
    ),
    "id": (
        r"(?<![0-9A-Za-z.])(?P<it>[1-9][0-9]{5}(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])"
        r"(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx])(?![0-9A-Za-z])"
    ),
    "card": (
        r"(?<![0-9A-Za-z.])(?P<it>[2-69][0-9]{3}(?:(?P<gap>[ -])[0-9]{4}(?:(?P=gap)[0-9]{4}){2}"
        r"(?:(?P=gap)[0-9]{1,3})?|[0-9]{12,15}))(?![0-9A-Za-z]|[.-][0-9])"
    ),
    "qq": (
        r"(?<![A-Za-z])(?:[Qq]{2}|扣扣)(?:交流|咨询|客服|联系)?群?(?:号码?)?"
        rf"{_BLANKS}(?:[:：是为]{_BLANKS})?"
        r"(?P<it>[1-9][0-9]{4,10})(?![0-9A-Za-z万亿元人个年版])"
    ),
    "wechat": (
        r"(?<![A-Za-z])(?:微信|薇信|[vV]信|[wW]e[iI]xin|[wW]e[cC]hat|[vV][xX])(?:"
        rf"{_BLANKS}[:：]{_BLANKS}|(?:号码?|账号|帐号|[iI][dD]){_BLANKS}[:：是为]?{_BLANKS})"
        r"(?P<it>[A-Za-z][A-Za-z0-9_-]{5,19}|1[3-9][0-9]{9})(?![A-Za-z0-9_@/-]|\.[A-Za-z])"
    ),
    "phone": (
        r"(?<![0-9A-Za-z_=$])(?<![0-9]\.)(?P<it>(?:(?:\+|00)?86[- ]?)?"
        r"1[3-9][0-9](?:[0-9]{8}|(?P<gap>[- ])[0-9]{4}(?P=gap)[0-9]{4}))"
        r"(?![0-9A-Za-z_$]|[.-][0-9])"
    ),
    "ip": (
        r"(?<![0-9A-Za-z.])(?P<it>(?:(?:25[0-5]|2[0-4][0-9]|1?[0-9]{1,2})\.){3}"
        r"(?:25[0-5]|2[0-4][0-9]|1?[0-9]{1,2}))(?![0-9A-Za-z]|\.[0-9])"
    ),
}


@cache
def _pattern(kind: str) -> "re.Pattern[str]":
    return re.compile(_PATTERNS[kind])


def _before(match: "re.Match[str]", characters: int = 24) -> str:
    return match.string[max(0, match.start("it") - characters) : match.start("it")]


def _in_link(match: "re.Match[str]") -> bool:
    """Whether it is part of an address of a page."""
    before = _before(match, 300)
    at = before.rfind("://")
    return at >= 0 and re.search(r"[^!-~]", before[at:]) is None


def _mail(match: "re.Match[str]") -> bool:
    domain = match["domain"].lower()
    return match["top"].lower() not in _FILES and not _NOBODYS.match(domain)


def _identity(match: "re.Match[str]") -> bool:
    number = match["it"].upper()
    try:
        date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(d) * w for d, w in zip(number[:17], _WEIGHTS, strict=True))
    return int(number[:2]) in _PROVINCES and "10X98765432"[total % 11] == number[17]


def _card(match: "re.Match[str]") -> bool:
    digits = match["it"].replace(" ", "").replace("-", "")
    if not 16 <= len(digits) <= 19 or not _luhn(digits) or _OTHER_NUMBER.search(_before(match)):
        return False
    if digits.startswith(("62", "9558", "6013", "6035")):  # UnionPay and what it grew from
        return not _in_link(match)
    # Visa, Mastercard, JCB: one number in ten passes Luhn, so it must look like a card or say so.
    foreign = len(digits) == 16 and re.match(r"4|5[1-5]|2[2-7]|35", digits) is not None
    return foreign and (match["gap"] is not None or _CARD_LABEL.search(_before(match)) is not None)


def _luhn(digits: str) -> bool:
    """The checksum of cards (ISO/IEC 7812-1)."""
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _telephone(match: "re.Match[str]") -> bool:
    return not _OTHER_NUMBER.search(_before(match)) and not _in_link(match)


def _address(match: "re.Match[str]") -> bool:
    """Neither a version, nor an address of no one's: private nets, examples, open servers."""
    octets = [int(part) for part in match["it"].split(".")]
    a, b, c, _ = octets
    if a in (0, 10, 127) or a >= 224 or match["it"] in _OPEN_SERVERS:
        return False
    if (a, b) in ((192, 168), (169, 254)) or (a == 172 and 16 <= b < 32):
        return False
    if a == 100 and 64 <= b < 128:  # shared by the customers of one network, RFC 6598
        return False
    if (a, b, c) in ((192, 0, 2), (198, 51, 100), (203, 0, 113)):  # for documents, RFC 5737
        return False
    before = _before(match)
    if _VERSION.search(before):
        return False
    # Numbers of versions and sections are small.
    return max(octets) >= 30 or _IP_LABEL.search(before) is not None


_CHECKS: "dict[str, Callable[[re.Match[str]], bool]]" = {
    "email": _mail,
    "id": _identity,
    "card": _card,
    "phone": _telephone,
    "ip": _address,
}
