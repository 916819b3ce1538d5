"""Promise: what growth saves is read off the scratch curve as docs/growth.md says, and the script
that measures it runs from end to end, goes on where it was stopped and measures nothing twice.

The curve of the first tests is a straight line in log C, so that the interpolation is exact: 1e-12.
"""

import json
import subprocess
import sys
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.growth_curves import cpu_hours, figure, losses, saving, table

AT = 4.0, 0.2
"""Loss at one FLOP of the line, and how it falls with log C."""


def row(arm: str, seed: int, budget: float, cost: float, loss: float | None = None) -> Any:
    """A measurement; on the line of its seed if no loss is given."""
    on_line = AT[0] + 0.1 * seed - AT[1] * log(cost)
    return {
        "arm": arm, "seed": seed, "budget": budget, "flops": cost,
        "loss": on_line if loss is None else loss, "mixing_steps": 7, "constant_steps": 9,
    }  # fmt: skip


def curve(seed: int) -> list[Any]:
    return [row("scratch", seed, part, 100 * part) for part in (0.25, 0.5, 1.0)]


@pytest.mark.parametrize(("cost", "worth", "extended"), [(40, 80, False), (60, 120, True)])
def test_a_saving_is_the_share_of_flops_at_equal_loss(
    cost: float, worth: float, extended: bool
) -> None:
    """A grown model as good as `worth` FLOPs from scratch has saved 1 - cost / worth of them."""
    loss = AT[0] + 0.1 - AT[1] * log(worth)
    share, beyond = saving(curve(1), row("ours", 1, 1.0, cost, loss))
    assert share == pytest.approx(1 - cost / worth, rel=1e-12) and beyond == extended


def test_each_seed_is_read_off_its_own_curve(tmp_path: Path) -> None:
    """Seeds whose curves lie 0.1 apart: against the other's the saving would be off by half."""
    rows = [*curve(1), *curve(2)]
    for seed in (1, 2):
        rows.append(row("ours", seed, 1.0, 50, AT[0] + 0.1 * seed - AT[1] * log(100)))
    for seed in (1, 2):
        runs = [{"run": "scratch", "cpu_s": 1800.0, "steps": 5}]
        kept = {"losses": [r for r in rows if r["seed"] == seed], "runs": runs}
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(kept))
    assert losses(tmp_path) == rows[:3] + rows[6:7] + rows[3:6] + rows[7:]
    assert cpu_hours(tmp_path) == 1.0
    (line,) = [line for line in table(rows).splitlines() if line.startswith("| ours")]
    assert "| 50.0%, 50.0% | **50%** | +0.000, +0.000 |" in line and "| 7 of 9, 7 of 9 |" in line
    assert "| 0.50 |" in line and "*" not in line.replace("**", "")
    other, _ = saving(curve(1), rows[7])  # the control
    assert other == pytest.approx(1 - 50 / exp(log(100) - 0.1 / AT[1]))
    assert figure(rows, "title").count("<circle") == 3 + 1


def test_a_curve_that_goes_up_once_is_read_where_it_first_has_the_loss() -> None:
    costs = [(25, 4.0), (50, 3.6), (75, 3.61), (100, 3.5)]
    rows = [row("scratch", 1, cost / 100, cost, loss) for cost, loss in costs]
    share, extended = saving(rows, row("ours", 1, 1.0, 30, 3.605))
    at = exp(log(25) + (log(50) - log(25)) * (4.0 - 3.605) / 0.4)
    assert share == pytest.approx(1 - 30 / at) and not extended
    beyond = row("small", 1, 0.25, 9, 4.2)
    assert saving(rows, beyond)[1] and "*" in table([*rows, beyond]).splitlines()[-3]


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path: Path, tiny_corpus: Path) -> None:
    """A model of 16 numbers, every arm and control, stopped after its tuning and gone on with."""
    root = Path(__file__).parent.parent
    page = yaml.safe_load((root / "configs/runs/growth-savings.yaml").read_text("utf-8"))
    page["model"] |= {"vocab": 320, "hidden": 16, "head_dim": 4, "ffn": 32}
    page["batch"], page["schedule"]["warmup_steps"] = {"samples": 8, "micro": 8}, 4
    page["run"]["validate_samples"] = 20
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(page), "utf-8")

    def study(*seeds: str) -> str:
        words = "--steps 160 --tune 0.5 --lr 1e-3 4e-3 --controls reset small --seeds"
        where = ["--page", str(tmp_path / "page.yaml"), "--corpus", str(tiny_corpus)]
        line = ["-m", "benchmarks.growth_savings", str(tmp_path / "out"), *where, *words.split()]
        ran = subprocess.run(
            [sys.executable, *line, *seeds], cwd=root, capture_output=True, text=True, timeout=900
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout

    tuned = study()
    assert tuned.count("learning rate of") == 5 and not list(tmp_path.glob("out/seed-*"))
    study("1")
    files = sorted(tmp_path.glob("out/*/*.json")) + sorted(tmp_path.glob("out/seed-1.json"))
    before = {file: file.read_bytes() for file in files if file.parent.name != "grown"}
    said = study("1")
    assert "the edge of the grid" in said
    assert all(file.read_bytes() == kept for file, kept in before.items())
    rows = losses(tmp_path / "out")
    budgets = {arm: sorted(r["budget"] for r in rows if r["arm"] == arm) for arm in
               ("scratch", "ours", "paired", "stack", "random", "reset", "small")}  # fmt: skip
    assert budgets["scratch"] == [0.125, 0.25, 0.5, 0.75, 1.0]
    assert all(budgets[arm] == [0.25, 0.5, 1.0] for arm in ("ours", "paired", "stack", "random"))
    assert budgets["reset"] == budgets["small"] == [0.25]
    ours = ("ours, silent layers", "ours, paired layers", "paired, moments at zero")
    for name in ("from scratch", *ours, "G_stack", "random layers", "small, not grown"):
        assert f"| {name} |" in said
    # the same tensors, the same samples: only the moments differ, and so the losses
    at = {r["arm"]: r["loss"] for r in rows if r["budget"] == 0.25}
    assert at["paired"] != at["reset"] and at["paired"] == pytest.approx(at["reset"], abs=0.3)
    assert (tmp_path / "out/figure.svg").read_text("utf-8").startswith("<svg")
