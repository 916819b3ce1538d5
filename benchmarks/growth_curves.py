"""What was saved: table and figure of the losses that benchmarks/growth_savings.py measured.

    python -m benchmarks.growth_curves OUT [--title TEXT]

    OUT/seed-N.json  ->  loss against FLOPs by arm  ->  table on the screen, OUT/figure.svg

The saving at equal loss is 1 - C(grown) / C(scratch at the grown model's loss), the scratch curve
of the same seed interpolated in log C; beyond its end it is extended on its last slope, marked *.
Beside it: loss less that of scratch at equal steps and at equal FLOPs, and the steps after the
growth, of those before the decay, until its training loss is no longer above that of scratch.
"""

import argparse
import itertools
import json
from fractions import Fraction
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

COLOURS = {
    "scratch": "#222222",
    "ours": "#c0392b",
    "paired": "#8e44ad",
    "stack": "#2471a3",
    "random": "#7d8b2f",
    "reset": "#e59866",
    "small": "#999999",
}
NAMES = {
    "scratch": "from scratch",
    "ours": "ours, silent layers",
    "paired": "ours, paired layers",
    "stack": "G_stack",
    "random": "random layers",
    "reset": "paired, moments at zero",
    "small": "small, not grown",
}
HEADS = [
    "arm",
    "budget",
    "FLOPs of scratch at equal steps",
    "loss, by seed",
    "saved at equal loss",
    "mean",
    "loss - scratch's, equal steps",
    "loss - scratch's, equal FLOPs",
    "mixing, steps",
]
Row = dict[str, Any]


def losses(out: Path) -> list[Row]:
    """Every loss of every seed that is there."""
    files = sorted(out.glob("seed-*.json"))
    return [row for file in files for row in json.loads(file.read_text())["losses"]]


def cpu_hours(out: Path) -> float:
    """Hours of one core, tuning included."""
    files = [*out.glob("seed-*.json"), *out.glob("tuning/*.json")]
    runs = [run for file in files for run in json.loads(file.read_text())["runs"]]
    return sum(float(run["cpu_s"]) for run in runs) / 3600


def between(points: list[tuple[float, float]], x: float) -> tuple[float, bool]:
    """(y of the lines through the points at x, whether a line had to be extended); x ascends."""
    pairs = list(itertools.pairwise(sorted(points)))
    inside = [pair for pair in pairs if pair[0][0] <= x <= pair[1][0]]
    (x0, y0), (x1, y1) = (inside or [pairs[0] if x < pairs[0][0][0] else pairs[-1]])[0]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0), not inside


def saving(curve: list[Row], row: Row) -> tuple[float, bool]:
    """(share of FLOPs saved at the row's loss, whether the curve had to be extended).

    The curve goes from the cheapest to the dearest; where it has the loss twice, the first time.
    """
    points = sorted((log(r["flops"]), r["loss"]) for r in curve)
    pairs, loss = list(itertools.pairwise(points)), row["loss"]
    inside = [pair for pair in pairs if pair[1][1] <= loss <= pair[0][1]]
    (c0, l0), (c1, l1) = (inside or [pairs[0] if loss > points[0][1] else pairs[-1]])[0]
    return 1 - row["flops"] / exp(c0 + (c1 - c0) * (loss - l0) / (l1 - l0)), not inside


def table(rows: list[Row]) -> str:
    """Markdown: each arm and budget, by seed."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    seeds = sorted({row["seed"] for row in rows})
    curves = {s: [r for r in rows if (r["arm"], r["seed"]) == ("scratch", s)] for s in seeds}
    for arm, budget in itertools.product(NAMES, sorted({row["budget"] for row in rows})):
        found = [r for r in rows if (r["arm"], r["budget"]) == (arm, budget)]
        if not found:
            continue
        share_said = f"{budget:g}"
        if len(share_said) > 5:  # 0.333333
            share_said = str(Fraction(budget).limit_denominator(48))
        cells = [NAMES[arm], share_said]
        share, saved = [], []
        steps, cost, mixing = [], [], []
        for row in found if arm != "scratch" else []:
            curve = curves[row["seed"]]
            if len(curve) < 2:
                continue
            saved.append(saving(curve, row))
            same = next((r for r in curve if r["budget"] == budget), None)
            if same is not None:
                share.append(row["flops"] / same["flops"])
                steps.append(f"{row['loss'] - same['loss']:+.3f}")
            points = [(log(r["flops"]), r["loss"]) for r in curve]
            at, beyond = between(points, log(row["flops"]))
            cost.append(f"{row['loss'] - at:+.3f}{'*' * beyond}")
            if "constant_steps" in row:
                after, of = row["mixing_steps"], row["constant_steps"]
                mixing.append(f"not in {of:,}" if after is None else f"{after:,} of {of:,}")
        cells += [f"{share[0]:.2f}" if share else "1" if arm == "scratch" else ""]
        cells += [", ".join(f"{row['loss']:.3f}" for row in found)]
        cells += [", ".join(f"{part:.1%}{'*' * extended}" for part, extended in saved)]
        cells += [f"**{mean(part for part, _ in saved):.0%}**" if saved else ""]
        cells += [", ".join(values) for values in (steps, cost, mixing)]
        lines.append("| " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join([*lines, "", f"{len(seeds)} seeds; * beyond the scratch curve, extended"])


def figure(rows: list[Row], title: str) -> str:
    """An SVG of loss against FLOPs: the mean over the seeds, bars from the least to the largest."""
    width, height, left, top, bottom = 640, 400, 64, 36, 48
    costs, losses = [log(r["flops"]) for r in rows], [r["loss"] for r in rows]
    x0, x1 = min(costs) - 0.08, max(costs) + 0.08
    y0, y1 = min(losses) - 0.02, max(losses) + 0.02

    def x(cost: float) -> float:
        return left + (log(cost) - x0) / (x1 - x0) * (width - left - 40)

    def y(loss: float) -> float:
        return top + (y1 - loss) / (y1 - y0) * (height - top - bottom)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif" font-size="12">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{title}</text>',
        f'<path d="M{left} {top}V{height - bottom}H{width - 40}" fill="none" stroke="#888"/>',
        (
            f'<text x="{(width + left) / 2}" y="{height - 8}" text-anchor="middle">'
            "training FLOPs, the small model's included (计算量)</text>"
        ),
        (
            f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">'
            "validation loss, nats a token (验证损失)</text>"
        ),
    ]
    for number in range(6):
        loss, cost = y0 + (y1 - y0) * number / 5, exp(x0 + (x1 - x0) * number / 5)
        parts += [
            f'<text x="{left - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>',
            (
                f'<text x="{x(cost):.1f}" y="{height - bottom + 16}" text-anchor="middle">'
                f"{cost:.1e}</text>"
            ),
        ]
    for number, (arm, colour) in enumerate(COLOURS.items()):
        points = []
        for budget in sorted({row["budget"] for row in rows}):
            found = [r for r in rows if r["arm"] == arm and r["budget"] == budget]
            if found:
                values = [r["loss"] for r in found]
                at, mean = x(found[0]["flops"]), y(sum(values) / len(values))
                points.append(f"{at:.1f} {mean:.1f}")
                parts += [
                    f'<circle cx="{at:.1f}" cy="{mean:.1f}" r="4" fill="{colour}"/>',
                    (
                        f'<path d="M{at:.1f} {y(max(values)):.1f}V{y(min(values)):.1f}" '
                        f'stroke="{colour}" stroke-width="2"/>'
                    ),
                ]
        if points:
            parts += [
                f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}"/>',
                (
                    f'<text x="{width - 150}" y="{top + 14 + 18 * number}" fill="{colour}">'
                    f"{NAMES[arm]}</text>"
                ),
            ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def report(out: Path, title: str) -> None:
    """The table of what is there on the screen, the figure into its file."""
    rows = losses(out)
    (out / "figure.svg").write_text(figure(rows, title), "utf-8")
    print(f"{title}\n\n{table(rows)}\n\n{cpu_hours(out):.2f} hours of one core in all")
    print(f"{out / 'figure.svg'}")


def main() -> None:
    """Table and figure of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path)
    parser.add_argument("--title", default="growth: loss against FLOPs")
    words = parser.parse_args()
    report(words.out, words.title)


if __name__ == "__main__":
    main()
