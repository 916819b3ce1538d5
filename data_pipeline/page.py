"""A report as one HTML page that needs nothing else: no script, no font, no network.

    figures of report.py --> sections of tables, bars, curves (SVG), texts side by side --> a page

Whatever comes from a corpus is escaped here and nowhere else (`text`). Headings are in English and
Chinese. The page is light or dark as the reader's system is.
"""

import difflib
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LETTER = 6.2
"""Width of a character below a histogram, at most: svg text of 10 px."""
STYLE = """
:root{color-scheme:light dark;--ink:#1c2421;--soft:#5d6a64;--line:#d9dfdb;--ground:#fbfcfb;
--panel:#f1f5f2;--bamboo:#2f7d5b;--pale:#b9d8c8;--amber:#c77d1e;--mark:#ffe3a8}
@media(prefers-color-scheme:dark){:root{--ink:#e4ebe7;--soft:#9aa8a1;--line:#33403a;
--ground:#141a17;--panel:#1d2521;--bamboo:#5fb98e;--pale:#2c5a45;--amber:#e2a44d;--mark:#5a4413}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:2.5rem 1.5rem 5rem;background:var(--ground);
color:var(--ink);font:15px/1.6 system-ui,-apple-system,"Segoe UI","PingFang SC","Noto Sans CJK SC",
"Microsoft YaHei",sans-serif}
h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:3rem 0 .8rem;padding-top:1rem;
border-top:1px solid var(--line)}h2 span,h1 span,h3 span{color:var(--soft);font-weight:400}
h3{font-size:1rem;margin:1.6rem 0 .5rem}p{max-width:70ch}.soft,small{color:var(--soft)}
code{font:13px/1.5 ui-monospace,"SF Mono",Consolas,monospace;overflow-wrap:anywhere}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.4rem 0}
.card{background:var(--panel);border-radius:8px;padding:.7rem 1.1rem;min-width:9rem}
.card b{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{padding:.28rem .6rem;border-bottom:1px solid var(--line);text-align:right;
vertical-align:middle}th{color:var(--soft);font-weight:500}
th:first-child,td:first-child{text-align:left}td.bar{width:34%}
.track{background:var(--panel);border-radius:3px;height:.8rem;overflow:hidden}
.fill{background:var(--bamboo);height:100%;min-width:1px}.fill.lost{background:var(--amber)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:1rem}
figure{margin:0;background:var(--panel);border-radius:8px;padding:.7rem .9rem}
figcaption{font-size:.9rem}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:10px}svg .col{fill:var(--bamboo)}svg .out{fill:var(--amber)}
svg .axis{stroke:var(--line)}svg .limit{stroke:var(--amber);stroke-dasharray:3 2}
svg .curve{fill:none;stroke:var(--bamboo);stroke-width:1.6}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:1rem}
.band{fill:currentColor;opacity:.18}.line{fill:none;stroke:currentColor;stroke-width:1.6}
.dot{fill:currentColor}.s0{color:#2f7d5b}.s1{color:#3b6fb5}.s2{color:#c77d1e}.s3{color:#a2478f}
.s4{color:#b8473d}.s5{color:#2b94a0}.s6{color:#7a7f2a}.s7{color:#6d5fc0}
@media(prefers-color-scheme:dark){.s0{color:#5fb98e}.s1{color:#7aa8e6}.s2{color:#e2a44d}
.s3{color:#d285c2}.s4{color:#e58a80}.s5{color:#62c4cf}.s6{color:#bcc25f}.s7{color:#a99df0}}
.mark line{stroke:var(--soft);stroke-dasharray:4 3}.mark.fault line{stroke:#d0342c;
stroke-dasharray:none}.mark.start line{stroke:var(--amber);stroke-dasharray:2 3;stroke-width:1.8}
.mark.checkpoint line{stroke:var(--bamboo);stroke-dasharray:none}
.keys{display:flex;flex-wrap:wrap;gap:0 1rem;color:var(--soft);font-size:.82rem}
.key{overflow-wrap:anywhere}.key i{display:inline-block;width:.7em;height:.7em;border-radius:2px;
background:currentColor;margin-right:.35em}.key b{color:var(--ink);font-weight:500}
.list td{text-align:left;overflow-wrap:anywhere}.list td:first-child{white-space:nowrap}
.list th{text-align:left;white-space:nowrap}.plot text{font-size:11.5px}
pre{overflow-x:auto;font:12px/1.5 ui-monospace,Consolas,monospace}
details{margin:.5rem 0;border:1px solid var(--line);border-radius:8px;padding:.5rem .9rem}
summary{cursor:pointer}.texts{display:grid;gap:.8rem;margin:.7rem 0;
grid-template-columns:repeat(auto-fit,minmax(290px,1fr))}
.text{background:var(--panel);border-radius:6px;padding:.6rem .8rem;overflow-wrap:anywhere}
.text p{margin:.3rem 0 0;white-space:pre-wrap;max-width:none}.text small{overflow-wrap:anywhere}
mark{background:var(--mark);color:inherit;border-radius:2px}
.tokens span{border-radius:3px;padding:0 1px;margin-right:1px}
.tokens span:nth-child(odd){background:var(--pale)}.tokens span.unknown{background:var(--mark)}
"""


def document(title: str, sections: Iterable[str]) -> str:
    """The page: HTML in UTF-8, with everything that it needs."""
    return (
        f'<!DOCTYPE html>\n<html lang="zh-CN">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """A value as text of the page: nothing in it is markup."""
    return html.escape(str(value), quote=True)


def heading(english: str, chinese: str, level: int = 2) -> str:
    """A heading in both languages."""
    return f"<h{level}>{text(english)} <span>{text(chinese)}</span></h{level}>"


def paragraph(words: str) -> str:
    """A remark."""
    return f'<p class="soft">{text(words)}</p>'


def number(value: float) -> str:
    """1,234 or 0.123."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def cards(values: Mapping[str, float | str]) -> str:
    """Some figures in large."""
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{text(v) if isinstance(v, str) else number(v)}</b>'
            f"<small>{text(name)}</small></div>"
            for name, v in values.items()
        )
        + "</div>"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], lost: Sequence[bool] = ()) -> str:
    """Rows of a name and numbers, and a bar of the last number's share of the largest; `lost` says
    which bars are of what was lost."""
    if not rows:
        return ""
    largest = max(float(row[-1] or 0) for row in rows) or 1.0
    out = ["<table><thead><tr>"]
    out += [f"<th>{text(column)}</th>" for column in (*columns, "")]
    out.append("</tr></thead><tbody>")
    for place, row in enumerate(rows):
        kind = " lost" if place < len(lost) and lost[place] else ""
        cells = [text(row[0]), *("" if cell is None else number(cell) for cell in row[1:])]
        width = 100 * float(row[-1] or 0) / largest
        out.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells))
        out.append(
            f'<td class="bar"><div class="track"><div class="fill{kind}" '
            f'style="width:{width:.2f}%"></div></div></td></tr>'
        )
    out.append("</tbody></table>")
    return "".join(out)


def listing(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows of words; nothing where there is no row."""
    body = "".join(
        "<tr>" + "".join(f"<td>{text('' if cell is None else cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    return f'<table class="list"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>' * (
        bool(body)
    )


def plain(words: str) -> str:
    """Text as it stands, line by line."""
    return f"<pre>{text(words)}</pre>"


def columns(
    caption: str,
    labels: Sequence[str],
    values: Sequence[float],
    outside: Sequence[bool] = (),
    limits: Sequence[float] = (),
) -> str:
    """Columns of a histogram; `outside` ones are coloured as lost, `limits` are places (in columns)
    where a threshold stands."""
    if not values or not max(values):
        return ""
    width, height, left = 360, 110, 4
    step = (width - 2 * left) / len(values)
    out = [f'<figure><svg viewBox="0 0 {width} {height + 18}" role="img">']
    for place, value in enumerate(values):
        tall = height * 0.94 * value / max(values)
        kind = "out" if place < len(outside) and outside[place] else "col"
        out.append(
            f'<rect class="{kind}" x="{left + place * step + 0.5:.2f}" y="{height - tall:.2f}" '
            f'width="{max(step - 1, 0.5):.2f}" height="{tall:.2f}">'
            f"<title>{text(labels[place])}: {number(value)}</title></rect>"
        )
    for limit in limits:
        x = left + limit * step
        out.append(f'<line class="limit" x1="{x:.2f}" y1="0" x2="{x:.2f}" y2="{height}"></line>')
    out.append(f'<line class="axis" x1="0" y1="{height}" x2="{width}" y2="{height}"></line>')
    every = max(1, -(-len(values) // 8))
    for place in range(0, len(values), every):
        x = left + place * step
        if x + LETTER * len(labels[place]) <= width:  # cut, it would be another number
            out.append(f'<text x="{x:.1f}" y="{height + 13}">{text(labels[place])}</text>')
    out.append(f"</svg><figcaption>{text(caption)}</figcaption></figure>")
    return "".join(out)


def curve(caption: str, values: Sequence[float], ends: tuple[str, str]) -> str:
    """A line from left to right through values in [0, 1]."""
    width, height = 360, 110
    points = " ".join(
        f"{width * place / max(len(values) - 1, 1):.1f},{height * (1 - 0.94 * value):.1f}"
        for place, value in enumerate(values)
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height + 18}" role="img">'
        f'<polyline class="curve" points="{points}"></polyline>'
        f'<line class="axis" x1="0" y1="{height}" x2="{width}" y2="{height}"></line>'
        f'<text x="2" y="{height + 13}">{text(ends[0])}</text>'
        f'<text x="{width - 2}" y="{height + 13}" text-anchor="end">{text(ends[1])}</text>'
        f"</svg><figcaption>{text(caption)}</figcaption></figure>"
    )


def charts(figures: Iterable[str], wide: bool = False) -> str:
    """Figures beside each other; two abreast where they are wide."""
    inside = "".join(figures)
    return f'<div class="{"plots" if wide else "charts"}">{inside}</div>' if inside else ""


def excerpt(caption: str, words: str, longest: int = 400) -> str:
    """A document's beginning."""
    more = " …" if len(words) > longest else ""
    return (
        f'<div class="text"><small>{text(caption)}</small>'
        f"<p>{text(words[:longest])}{more}</p></div>"
    )


def side_by_side(texts: Iterable[str]) -> str:
    """Excerpts beside each other."""
    return f'<div class="texts">{"".join(texts)}</div>'


def folded(summary: str, inside: str, opened: bool = False) -> str:
    """What is shown on a click."""
    mark = " open" if opened else ""
    return f"<details{mark}><summary>{text(summary)}</summary>{inside}</details>"


def difference(one: tuple[str, str], other: tuple[str, str], longest: int = 400) -> str:
    """Two (caption, text) beside each other, what differs marked."""
    a, b = one[1][:longest], other[1][:longest]
    parts: tuple[list[str], list[str]] = ([], [])
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for part, words in zip(parts, (a[a0:a1], b[b0:b1]), strict=True):
            part.append(text(words) if kind == "equal" or not words else _marked(words))
    return side_by_side(
        f'<div class="text"><small>{text(caption)}</small><p>{"".join(part)}</p></div>'
        for (caption, _), part in zip((one, other), parts, strict=True)
    )


def _marked(words: str) -> str:
    return f"<mark>{text(words)}</mark>"


def tokens(caption: str, pieces: Sequence[str], unknown: Sequence[bool]) -> str:
    """A text's tokens, each in a box."""
    boxes = "".join(
        f"<span{' class=unknown' if lost else ''}>{text(piece)}</span>"
        for piece, lost in zip(pieces, unknown, strict=True)
    )
    return f'<div class="text"><small>{text(caption)}</small><p class="tokens">{boxes}</p></div>'
