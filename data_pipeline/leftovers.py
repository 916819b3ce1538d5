"""What a page's source left in its text: entities, tags, wiki markup.

    text --not between ` or ```--> &nbsp; &#20013;  -->  the characters
                                   <br> </p> <a ..> -->  a line break, nothing
                                   [[甲|乙]] '''甲''' <ref>..</ref> -->  乙 甲

Only where clean.strip_markup says so (recipe `web`): a textbook of HTML means its tags. Tags are
those of HTML by name, so that vector<int> and <user@host> stay; an entity needs its semicolon, so
that &copy=1 of an address stays. Done again, it changes nothing more.
"""

import html
import re
from collections import Counter

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]{1,300}`", re.DOTALL)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_BREAKING = "br|p|div|li|ul|ol|tr|td|th|table|tbody|thead|h[1-6]|hr|dl|dt|dd|section|article"
_INLINE = (
    "a|abbr|b|big|blockquote|body|button|center|cite|code|del|em|figcaption|figure|font|footer|form"
    "|head|header|html|i|iframe|img|input|ins|label|link|main|mark|meta|nav|o:p|option|pre|s|script"
    "|select|small|span|strike|strong|style|sub|sup|textarea|title|u|video|wbr"
)
_ATTRIBUTES = r"(?:[ \t\n][^<>]{0,1000})?[ \t]?/?>"
_BREAK = re.compile(rf"</?(?:{_BREAKING}){_ATTRIBUTES}", re.IGNORECASE)
_TAG = re.compile(rf"</?(?:{_INLINE}){_ATTRIBUTES}|<!--.{{0,1000}}?-->", re.IGNORECASE | re.DOTALL)
_HIDDEN = re.compile(
    r"<(script|style|ref)\b[^<>/]{0,300}>.{0,5000}?</\1\s*>", re.IGNORECASE | re.DOTALL
)
_REF = re.compile(r"<ref\b[^<>]{0,300}/>|</?ref\s*>", re.IGNORECASE)
_LINK = re.compile(
    r"(?<![A-Za-z0-9_\])])\[\[(?![ \t])"
    r"(?:(?P<file>File|Image|Category|文件|檔案|图像|圖像|分类|分類)[:：])?"
    r"(?:[^\[\]|\n]{1,200}\|)*(?P<said>[^\[\]|\n]{1,200})\]\]"
)
_HAN_LINK = re.compile(r"[\u3400-\u9fff]")
_QUOTES = re.compile(r"'{2,5}(?=[^'\n]{1,300}'{2,5})|(?<=[^'\n])'{2,5}")


def strip(text: str) -> tuple[str, "Counter[str]"]:
    """The text without what a page's source left in it, and how much of it there was."""
    found: Counter[str] = Counter()
    if not any(mark in text for mark in ("&", "<", "[[", "''")):
        return text, found
    if "`" not in text:
        return _strip(text, found), found
    parts, at = [], 0
    for code in _CODE.finditer(text):
        parts += [_strip(text[at : code.start()], found), code[0]]
        at = code.end()
    return "".join([*parts, _strip(text[at:], found)]), found


def _strip(text: str, found: "Counter[str]") -> str:
    while True:  # every round that goes on has made the text shorter
        before = text
        if "&" in text:
            text = _ENTITY.sub(lambda m: _character(m, found), text)
        if "<" in text:
            for pattern, instead in ((_HIDDEN, ""), (_REF, ""), (_BREAK, "\n"), (_TAG, "")):
                text, times = pattern.subn(instead, text)
                found["tags"] += times
        if "[[" in text:
            text = _LINK.sub(lambda m: _said(m, found), text)
        if "''" in text and _HAN_LINK.search(text):
            text, times = _QUOTES.subn("", text)
            found["wiki_markup"] += times
        if len(text) >= len(before):
            return text


def _character(match: "re.Match[str]", found: "Counter[str]") -> str:
    character = html.unescape(match[0])
    found["entities"] += character != match[0]
    return character


def _said(match: "re.Match[str]", found: "Counter[str]") -> str:
    """A wiki's link as its reader sees it; what has no Han in it may be an index in a program."""
    if match["file"] is None and not _HAN_LINK.search(match[0]):
        return match[0]
    found["wiki_markup"] += 1
    return "" if match["file"] else match["said"]
