"""Curves over the steps of a run, as SVG: axes, several series, what happened marked on them.

    Series (points) --thin()--> a line of means, a pale band from least to most --+
    Mark (a border, a fault ...)  --> a line from top to bottom, with its words --+--> figure()

Of many points each column of pixels shows mean, least and most: a spike of one step stays visible.
What is escaped is escaped by page.text. No script: words appear where the pointer rests (<title>).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.page import text

WIDTH, HEIGHT = 540, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 12, 20
COLUMNS = 300
"""Points of a line at most."""
COLOURS = 8
"""Colours of page.STYLE: s0 to s7; a ninth series takes the first again."""
EDGE = 0.005
"""Share of the values at each end that may lie outside, where there are many."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve."""

    name: str
    points: Sequence[Point]
    """(x, y), x rising; a y that is not finite breaks the line."""
    colour: int = 0
    dots: bool = False
    """Few points: each is shown."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at an x."""

    x: float
    words: str
    kind: str = "border"
    """border, fault, start: its colour; checkpoint: no more than a notch on the x axis."""


@dataclass
class Box:
    """Where data lie on paper."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    """y is a logarithm, base 10."""

    def at(self, x: float, y: float) -> str:
        """ "x,y" of the paper; what lies above or below stands at the edge."""
        share = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1.0)
        down = TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(share, -0.01), 1.01))
        return f"{self.across(x):.1f},{down:.1f}"

    def across(self, x: float) -> float:
        """Where an x stands."""
        share = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1.0)
        return LEFT + (WIDTH - LEFT - RIGHT) * share


def figure(
    caption: str,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    *,
    log: bool = False,
    unit: str = "",
    across: tuple[float, float] | None = None,
) -> str:
    """The curves in one pair of axes; nothing if there is no finite point.

    log: the y axis is logarithmic, points at 0 or below are left out.
    across: the x axis; None: from the first point to the last.
    """
    drawn = [(s, _measured(s.points, log)) for s in series]
    drawn = [(s, points) for s, points in drawn if any(math.isfinite(y) for _, y in points)]
    if not drawn:
        return ""
    box = _box([points for _, points in drawn], log, across)
    out = [f'<figure class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    out += _axes(box)
    out += [_mark(mark, box) for mark in marks if box.x[0] <= mark.x <= box.x[1]]
    for one, points in drawn:
        out += _curve(one, points, box)
    out.append(
        f"</svg><figcaption>{text(caption)}{_legend(drawn, log, unit)}</figcaption></figure>"
    )
    return "".join(out)


def _measured(points: Sequence[Point], log: bool) -> list[Point]:
    if not log:
        return list(points)
    return [(x, math.log10(y) if math.isfinite(y) and y > 0 else math.nan) for x, y in points]


def _box(curves: Sequence[Sequence[Point]], log: bool, across: tuple[float, float] | None) -> Box:
    xs = [x for points in curves for x, _ in points]
    ys = sorted(y for points in curves for _, y in points if math.isfinite(y))
    outside = int(EDGE * len(ys))
    low, high = ys[outside], ys[len(ys) - 1 - outside]
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    floor = 0.0 if low >= 0 and not log and low < 0.3 * high else low - room
    return Box(across or (min(xs), max(xs)), (floor, high + room), log)


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers between two."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / number))
    step *= next(m for m in (1, 2, 5, 10, 20) if (high - low) / (m * step) <= number)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Logarithms of round numbers between two logarithms."""
    digits = (1,) if high - low > 3 else (1, 3) if high - low > 1.2 else (1, 2, 3, 5, 7)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    found = [e + math.log10(d) for e in exponents for d in digits]
    inside = [y for y in found if low <= y <= high]
    every = max(1, -(-len(inside) // 6))
    return inside[::every] if len(inside) > 1 else ticks(low, high)


def number(value: float) -> str:
    """1.2M, 3,400, 0.25, 3e-05."""
    if not math.isfinite(value):
        return "—"
    size = abs(value)
    for least, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= least:
            return f"{value / least:.3g}{letter}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < size < 1e-3 else f"{value:.4g}"


def _axes(box: Box) -> list[str]:
    out, floor = [], HEIGHT - BOTTOM
    for y in _decades(*box.y) if box.log else ticks(*box.y):
        at = box.at(box.x[0], y).partition(",")[2]
        label = number(10**y if box.log else y)
        out.append(
            f'<line class="axis" x1="{LEFT}" y1="{at}" x2="{WIDTH - RIGHT}" y2="{at}"></line>'
            f'<text x="{LEFT - 5}" y="{float(at) + 3.5:.1f}" text-anchor="end">{label}</text>'
        )
    for x in ticks(*box.x, number=6):
        out.append(
            f'<text x="{box.across(x):.1f}" y="{floor + 14}" text-anchor="middle">'
            f"{number(x)}</text>"
        )
    out.append(f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH - RIGHT}" y2="{floor}">')
    out.append("</line>")
    return out


def _mark(mark: Mark, box: Box) -> str:
    x, floor = f"{box.across(mark.x):.1f}", HEIGHT - BOTTOM
    top = floor - 5 if mark.kind == "checkpoint" else TOP - 8
    return (
        f'<g class="mark {text(mark.kind)}"><title>{text(mark.words)}</title>'
        f'<line x1="{x}" y1="{top}" x2="{x}" y2="{floor}"></line></g>'
    )


def thin(points: Sequence[Point], most: int = COLUMNS) -> list[tuple[float, float, float, float]]:
    """(x, mean, least, most) of at most `most` runs of neighbours; one that has no finite y is
    NaN."""
    every = max(1, -(-len(points) // most))
    found = []
    for at in range(0, len(points), every):
        part = points[at : at + every]
        ys = [y for _, y in part if math.isfinite(y)]
        x = sum(x for x, _ in part) / len(part)
        if len(part) == 1 or not ys:
            found.append((x, *([ys[0]] * 3 if ys else [math.nan] * 3)))
        else:
            found.append((x, sum(ys) / len(ys), min(ys), max(ys)))
    return found  # type: ignore[return-value]


def _curve(one: Series, points: Sequence[Point], box: Box) -> list[str]:
    kind = f"s{one.colour % COLOURS}"
    rows, out = thin(points), []
    for part in _unbroken(rows):
        if any(least != most for _, _, least, most in part):
            above = [box.at(x, most) for x, _, _, most in part]
            below = [box.at(x, least) for x, _, least, _ in reversed(part)]
            out.append(
                f'<polygon class="band {kind}" points="{" ".join(above + below)}"></polygon>'
            )
        path = " ".join(box.at(x, mean) for x, mean, _, _ in part)
        out.append(f'<polyline class="line {kind}" points="{path}"></polyline>')
        if one.dots or len(part) == 1:
            places = [box.at(x, mean).split(",") for x, mean, _, _ in part]
            out += [f'<circle class="dot {kind}" cx="{x}" cy="{y}" r="2.2"></circle>'
                    for x, y in places]  # fmt: skip
    return out


def _unbroken(
    rows: Sequence[tuple[float, float, float, float]],
) -> list[list[tuple[float, float, float, float]]]:
    parts: list[list[tuple[float, float, float, float]]] = [[]]
    for row in rows:
        if math.isfinite(row[1]):
            parts[-1].append(row)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _legend(drawn: Sequence[tuple[Series, Sequence[Point]]], log: bool, unit: str) -> str:
    """Each curve's colour, name and last value."""
    out = []
    for one, points in drawn:
        last = next(y for _, y in reversed(points) if math.isfinite(y))
        told = f"{number(10**last if log else last)}{unit}"
        out.append(
            f'<span class="key"><i class="s{one.colour % COLOURS}"></i>{text(one.name)} '
            f"<b>{text(told)}</b></span>"
        )
    return f'<span class="keys">{"".join(out)}</span>'
