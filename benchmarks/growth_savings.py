"""What growth saves: loss against FLOPs, from scratch and grown late, the small cost counted.

    python -m benchmarks.growth_savings OUT --corpus DIR [--steps 900] [--at 0.5] [--seeds 2] ...

    seed:  scratch  |--------trunk (wsd, no decay)--------------------|
                           \\ 20 % decay     \\ 20 % decay      \\ 20 % decay   -> loss at 3 budgets
           small    |--trunk--| grow --------------------------------|
                                (each arm)   \\ 20 % decay      \\ 20 % decay   -> loss at 2 budgets

Every run goes through train(), every growth through `launch grow`; all arms see the same samples
in the same order under the same learning rate, the best of --lr for the large model from scratch at
the smallest budget. FLOPs as `plan` counts them (attention in full, the head included).

The saving at equal loss is 1 - C(grown) / C(scratch at the grown model's loss), the scratch curve
interpolated in log C; beyond its ends it is extended, and marked *. Results are kept in
OUT/results.json after each run: started again, it goes on; table and OUT/figure.svg at the end.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, gcd, log
from pathlib import Path
from typing import Any

import yaml

from configs.load import dump, from_dict, read_yaml, to_dict
from configs.model import ModelConfig, parameter_count
from configs.run import RunConfig, step_samples
from pretrain.costs import flops_per_token
from pretrain.plan import row_of

METHODS = {"ours": "exact", "stack": "stack", "random": "random"}
BUDGETS, DECAY = (0.5, 0.75, 1.0), 0.2
COLOURS = {"scratch": "#222222", "ours": "#c0392b", "stack": "#2471a3", "random": "#7d8b2f"}
NAMES = {"scratch": "from scratch", "ours": "ours", "stack": "G_stack", "random": "random layers"}


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    out: Path
    page: dict[str, Any]
    small: dict[str, Any]
    """The small model's sizes."""
    steps: int
    at: float
    """When it grows, as a share of the steps."""

    def config(self, name: str, seed: int, **changes: Any) -> RunConfig:
        """The page of one run; `changes` are whole sections or parts of them."""
        page = json.loads(json.dumps(self.page))
        page["run"] |= {"out": str(self.out / "runs" / f"{name}-{seed}"), "seed": seed}
        for section, values in changes.items():
            page[section] = page.get(section, {}) | values if section != "init" else values
        return from_dict(RunConfig, page)

    def borders(self) -> list[int]:
        """Where each budget's decay begins."""
        return [round(self.steps * budget * (1 - DECAY)) for budget in BUDGETS]


def train(config: RunConfig) -> Path:
    """A run to its end; returns its folder."""
    from pretrain.monitor import Terminal
    from pretrain.train import train as through

    through(config, Terminal(enabled=False))
    return Path(config.run.out)


def trunk(
    study: Study, name: str, seed: int, upto: int, borders: Iterable[int], **more: Any
) -> Path:
    """A run at a constant rate that keeps a checkpoint at each border."""
    every = gcd(upto, *borders)
    run = {"steps": upto, "save_every_steps": every, "keep_checkpoints": 999}
    return train(study.config(name, seed, run=run | {"validate_samples": 1}, **more))


def branch(study: Study, origin: Path, name: str, seed: int, budget: float, **more: Any) -> float:
    """The decay from a trunk's checkpoint to the budget's end; the validation loss there."""
    steps = round(study.steps * budget)
    start = round(steps * (1 - DECAY))
    found = sorted((origin / "checkpoints").glob(f"stage-*-step-{start:08d}"))
    changes = {
        "run": {"steps": steps},
        "schedule": {"decay_steps": steps - start},
        "init": {"from": str(found[-1]), "what": "all"},
    }
    folder = train(study.config(f"{name}-{budget:g}", seed, **changes, **more))
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    return float(next(line["valid_loss"] for line in reversed(lines) if "valid_loss" in line))


def small_of(study: Study) -> ModelConfig:
    """The model that grows."""
    return study.config("small", 0, model=study.small).model


def flops(study: Study, steps: int, model: ModelConfig) -> float:
    """FLOPs of so many steps of a model."""
    config = study.config("any", 0)
    tokens = steps * step_samples(config) * config.data.seq_len
    return tokens * flops_per_token(model, row_of(config))[0]


def scratch(study: Study, seed: int, results: "Results") -> None:
    """The reference curve: the large model from scratch at every budget."""
    if results.has("scratch", seed, BUDGETS):
        return
    model = study.config("any", 0).model
    origin = trunk(study, "scratch", seed, study.borders()[-1], study.borders())
    for budget in BUDGETS:
        loss = branch(study, origin, "scratch", seed, budget)
        cost = flops(study, round(study.steps * budget), model)
        results.add(arm="scratch", seed=seed, budget=budget, flops=cost, loss=loss)


def grown(study: Study, seed: int, arms: Iterable[str], results: "Results") -> None:
    """The small model's trunk, then each way of growing it, at the budgets after the growth."""
    from launch.cli import main as launch

    at, model = round(study.steps * study.at), study.config("any", 0).model
    budgets = [b for b, border in zip(BUDGETS, study.borders(), strict=True) if border > at]
    arms = [arm for arm in arms if not results.has(arm, seed, budgets)]
    if not arms:
        return
    origin = trunk(study, "small", seed, at, (), model=study.small)
    to = study.out / "large.yaml"
    to.write_text(dump({"model": to_dict(model)}), "utf-8")
    for arm in arms:
        out = study.out / f"grown-{arm}-{seed}"
        if not out.exists():
            words = ["grow", str(origin), "--to", str(to), "--out", str(out), "--seed", str(seed)]
            assert launch([*words, "--method", METHODS[arm]]) == 0
        borders = [b for b in study.borders() if b > at]
        init = {"from": str(out), "what": "all"}
        larger = trunk(study, arm, seed, borders[-1], [b - at for b in borders], init=init)
        for budget in budgets:
            steps = round(study.steps * budget)
            loss = branch(study, larger, arm, seed, budget)
            cost = flops(study, at, small_of(study)) + flops(study, steps - at, model)
            results.add(arm=arm, seed=seed, budget=budget, flops=cost, loss=loss)


class Results:
    """results.json: a line for each loss that was measured."""

    def __init__(self, path: Path) -> None:
        self.path, self.began = path, time.monotonic()
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def add(self, **row: Any) -> None:
        """Keep one (measured again, the newer), print it."""
        key = (row["arm"], row["seed"], row["budget"])
        self.rows = [r for r in self.rows if (r["arm"], r["seed"], r["budget"]) != key]
        self.rows.append(row | {"elapsed_s": round(time.monotonic() - self.began)})
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(json.dumps(self.rows[-1]), flush=True)

    def has(self, arm: str, seed: int, budgets: Iterable[float]) -> bool:
        """Whether all of an arm is there."""
        done = {r["budget"] for r in self.rows if (r["arm"], r["seed"]) == (arm, seed)}
        return set(budgets) <= done


def equal_loss(curve: list[tuple[float, float]], loss: float) -> tuple[float, bool]:
    """(FLOPs at which the curve of (FLOPs, loss) has `loss`, whether it had to be extended)."""
    points = sorted((log(c), at) for c, at in curve)
    pairs = list(itertools.pairwise(points))
    inside = [pair for pair in pairs if pair[1][1] <= loss <= pair[0][1]]
    (c0, l0), (c1, l1) = (inside or [pairs[0] if loss > points[0][1] else pairs[-1]])[0]
    return exp(c0 + (c1 - c0) * (loss - l0) / (l1 - l0)), not inside


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: each arm and budget, by seed."""
    lines = [
        (
            "| arm | budget | FLOPs of scratch at equal steps | loss, by seed | saved at equal "
            "loss | loss less scratch's at equal steps |"
        ),
        "|---|---|---|---|---|---|",
    ]
    seeds = sorted({row["seed"] for row in rows})
    plain = {(r["seed"], r["budget"]): r for r in rows if r["arm"] == "scratch"}
    for arm in NAMES:
        for budget in BUDGETS:
            found = [r for r in rows if r["arm"] == arm and r["budget"] == budget]
            if not found:
                continue
            share, saved, gap = "1", [], []
            for row in found if arm != "scratch" else []:
                curve = [(r["flops"], r["loss"]) for (s, _), r in plain.items() if s == row["seed"]]
                if len(curve) < 2:
                    continue
                cost, extended = equal_loss(curve, row["loss"])
                saved.append(f"{1 - row['flops'] / cost:.1%}{'*' * extended}")
                same = plain[row["seed"], budget]
                gap.append(f"{row['loss'] - same['loss']:+.3f}")
                share = f"{row['flops'] / same['flops']:.2f}"
            losses = ", ".join(f"{r['loss']:.3f}" for r in found)
            cells = [NAMES[arm], f"{budget:g}", share, losses, ", ".join(saved), ", ".join(gap)]
            lines.append("| " + " | ".join(cell or "-" for cell in cells) + " |")
    return "\n".join([*lines, "", f"{len(seeds)} seeds; * beyond the scratch curve, extended"])


def figure(rows: list[dict[str, Any]], title: str) -> str:
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
        for budget in BUDGETS:
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


def best_rate(study: Study, rates: list[float]) -> float:
    """The learning rate under which the large model from scratch does best, at the least budget."""
    if len(rates) == 1:
        return rates[0]
    found = {}
    for rate in rates:
        steps, start = study.steps * BUDGETS[0], study.borders()[0]
        changes = {
            "run": {"steps": round(steps)},
            "schedule": {"decay_steps": round(steps) - start},
            "optimizer": {"lr": rate},
        }
        folder = train(study.config(f"rate-{rate:g}", 1, **changes))
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        found[rate] = next(
            v for text in reversed(lines) if (v := json.loads(text).get("valid_loss"))
        )
        print(f"lr {rate:g}: {found[rate]:.4f}", flush=True)
    return min(found, key=lambda rate: found[rate])


def main() -> None:
    """Run what is missing, print the table, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", required=True, help="see benchmarks/growth_data.py")
    parser.add_argument(
        "--page", default="configs/runs/growth-savings.yaml", help="the large model"
    )
    parser.add_argument("--small", nargs="*", default=["layers=1"], help="the small one's sizes")
    parser.add_argument("--steps", type=int, default=900, help="of the largest budget")
    parser.add_argument("--at", type=float, default=0.5, help="when to grow, a share of the steps")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--lr", type=float, nargs="*", default=[3e-3])
    words = parser.parse_args()
    page = read_yaml(words.page)
    page["data"]["train"] = [{"corpus": words.corpus}]
    small = {key: yaml.safe_load(value) for key, value in (s.split("=") for s in words.small)}
    study = Study(words.out, page, small, words.steps, words.at)
    words.out.mkdir(parents=True, exist_ok=True)
    page["optimizer"]["lr"] = best_rate(study, words.lr)
    results = Results(words.out / "results.json")
    for seed in range(1, words.seeds + 1):
        scratch(study, seed, results)
        grown(study, seed, words.arms, results)
    large, less = study.config("any", 0).model, small_of(study)
    title = f"{parameter_count(less):,} -> {parameter_count(large):,} parameters, grown at "
    title += f"step {round(words.steps * words.at)} of {words.steps}, {words.seeds} seeds"
    (words.out / "figure.svg").write_text(figure(results.rows, title), "utf-8")
    print(f"{title}\n\n{table(results.rows)}\n\n{words.out / 'figure.svg'}")


if __name__ == "__main__":
    main()
