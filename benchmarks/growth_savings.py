"""What growth saves: loss against FLOPs, from scratch and grown late, the small cost counted.

    python -m benchmarks.growth_savings OUT --corpus DIR [--steps 8000] [--at 0.7] ...

    seed:  scratch  |---------trunk (wsd, no decay)---------------------------|
                       \\ 20 % decay   \\ 20 % decay  ...                  \\ 20 % decay
           small    |--trunk---------------------------------| the control: goes on small
                        \\ grow (each arm)   \\ grow            \\ grow
                         -> to 1/4 of steps   -> to 1/2          -> to the end, 20 % decay each

Each budget is a run of its own length, grown at the share `--at` of it, so that the three say how
the saving goes with the budget. Every run goes through train(), every growth through `launch grow`;
all arms see the same samples in the same order. The learning rate is tuned for each arm alone, on
the same grid (--lr) with runs of `--tune` of the steps and a seed of their own (0); controls have
that of `paired`. FLOPs as `plan` counts them (attention in full, the head as often as it speaks).

What was measured is kept in OUT/tuning and OUT/seed-N.json after each run: started again, it goes
on, a run from its own checkpoint. Processes can measure side by side: seeds (`--seeds 1`, `--seeds
2`; `--seeds` alone tunes), and of one seed what is from scratch and what grows (`--budgets` alone,
`--curve` alone). OUT/study.json says what is measured; another study wants another folder. Table
and figure of all seeds that are there: benchmarks/growth_curves.py.
"""

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path
from typing import Any

import yaml

from benchmarks.growth_curves import report
from configs.load import dump, from_dict, read_yaml, to_dict
from configs.model import ModelConfig, parameter_count
from configs.run import RunConfig, step_samples
from pretrain.costs import flops_per_token
from pretrain.growth.moments import zeros
from pretrain.plan import row_of
from pretrain.state import State

PAIRED = ["--new-layers", "paired"]
WORDS = {
    "ours": [],
    "paired": PAIRED,
    "stack": ["--method", "stack"],
    "random": ["--method", "random"],
    "reset": PAIRED,
}
"""What `launch grow` is told beside the sizes, by arm."""
ARMS = ("ours", "paired", "stack", "random")
CONTROLS = ("reset", "small")
BUDGETS = (0.25, 0.5, 1.0)
CURVE = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the steps: where growth is measured, and where the curve from scratch is."""
DECAY = 0.2
WINDOW = 0.25
"""Losses of steps are compared as means over that part of the constant rate after a growth: over
fewer the noise of a batch decides."""
SAVED_EVERY = 400
"""Steps that a run to the end of a budget loses at most when its process is killed."""
FEWEST_STEPS = 10
"""Between two checkpoints of a trunk."""


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    out: Path
    page: dict[str, Any]
    small: dict[str, Any]
    """The small model's sizes."""
    steps: int
    """Of the largest budget."""
    at: float
    """When it grows, as a share of a budget's steps."""
    rates: dict[str, float] = field(default_factory=dict)
    """The learning rate of each arm."""

    def config(self, name: str, seed: int, **changes: Any) -> RunConfig:
        """The page of one run; `changes` are whole sections or parts of them."""
        page = json.loads(json.dumps(self.page))
        page["run"] |= {"out": str(self.out / "runs" / f"{name}-{seed}"), "seed": seed}
        for section, values in changes.items():
            page[section] = page.get(section, {}) | values if section != "init" else values
        return from_dict(RunConfig, page)

    def share(self, part: float) -> int:
        """That part of the steps."""
        return round(self.steps * part)


def train(config: RunConfig, results: "Results") -> Path:
    """A run to its end, its time kept; returns its folder."""
    from pretrain.monitor import Terminal
    from pretrain.train import train as through

    folder = Path(config.run.out)
    done = len(_losses(folder)) if (folder / "metrics.jsonl").exists() else 0
    began = time.process_time()
    through(config, Terminal(enabled=False))
    results.spent(folder.name, time.process_time() - began, len(_losses(folder)) - done)
    return folder


def trunk(
    study: Study, results: "Results", name: str, borders: list[int], rate: float, **more: Any
) -> Path:
    """A run at a constant rate up to the last border, with a checkpoint at each."""
    folder = Path(study.config(name, results.seed).run.out)
    if all(any(folder.glob(f"checkpoints/*-step-{step:08d}")) for step in borders):
        return folder
    every = gcd(*borders)
    if every < FEWEST_STEPS:
        raise SystemExit(
            f"--steps: borders at {borders} share {every} steps; take a rounder number"
        )
    run = {"steps": max(borders), "save_every_steps": every, "keep_checkpoints": 999}
    changes = {"run": run | {"validate_samples": 1}, "optimizer": {"lr": rate}}
    return train(study.config(name, results.seed, **changes, **more), results)


def end(
    study: Study, results: "Results", origin: Path, name: str, steps: int, rate: float, **more: Any
) -> float:
    """From a checkpoint to the end of a budget of so many steps, decaying; the validation loss."""
    changes = {
        "run": {"steps": steps, "save_every_steps": SAVED_EVERY},
        "schedule": {"decay_steps": round(steps * DECAY)},
        "optimizer": {"lr": rate},
        "init": {"from": str(origin), "what": "all"},
    }
    folder = train(study.config(name, results.seed, **changes, **more), results)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    return float(next(line["valid_loss"] for line in reversed(lines) if "valid_loss" in line))


def checkpoint(run: Path, step: int) -> Path:
    """A trunk's checkpoint at a step."""
    return next(run.glob(f"checkpoints/*-step-{step:08d}"))


def flops(study: Study, steps: int, model: ModelConfig) -> float:
    """FLOPs of so many steps of a model."""
    config = study.config("any", 0)
    tokens = steps * step_samples(config) * config.data.seq_len
    return tokens * flops_per_token(model, row_of(config))[0]


def small_of(study: Study) -> ModelConfig:
    """The model that grows."""
    return study.config("any", 0, model=study.small).model


def large_of(study: Study) -> ModelConfig:
    """What it grows to."""
    return study.config("any", 0).model


def scratch(study: Study, results: "Results", budgets: Iterable[float]) -> None:
    """The large model from scratch, at every budget of the reference curve."""
    rate, ends = study.rates["scratch"], {part: study.share(part) for part in budgets}
    starts = {part: steps - round(steps * DECAY) for part, steps in ends.items()}
    for budget in results.missing("scratch", ends):
        origin = trunk(study, results, f"scratch-{rate:g}", list(starts.values()), rate)
        at, steps = checkpoint(origin, starts[budget]), ends[budget]
        loss = end(study, results, at, f"scratch-{rate:g}-{budget:g}", steps, rate)
        cost = flops(study, steps, large_of(study))
        results.add(arm="scratch", budget=budget, lr=rate, steps=steps, flops=cost, loss=loss)


def grown(study: Study, results: "Results", arms: list[str], budgets: list[float]) -> None:
    """The small model's trunk, then at each budget each way of growing it."""
    borders = [study.share(part * study.at) for part in budgets]
    for budget in budgets:
        at, steps = study.share(budget * study.at), study.share(budget)
        for arm in (arm for arm in arms if results.missing(arm, [budget])):
            rate = study.rates[arm]
            run = trunk(study, results, f"small-{rate:g}", borders, rate, model=study.small)
            small, cost = checkpoint(run, at), flops(study, at, small_of(study))
            if arm == "small":  # the control: it goes on as it is
                rest, larger, more = small_of(study), small, {"model": study.small}
            else:
                rest, larger, more = large_of(study), enlarge(study, results, small, arm), {}
            name = f"{arm}-{rate:g}-{budget:g}"
            loss = end(study, results, larger, name, steps, rate, **more)
            cost += flops(study, steps - at, rest)
            row = {"arm": arm, "budget": budget, "lr": rate, "steps": steps, "flops": cost}
            results.add(**row, loss=loss, **mixing(study, results, name, at, steps))


def enlarge(study: Study, results: "Results", small: Path, arm: str) -> Path:
    """The small model's checkpoint, grown by an arm's method."""
    from pretrain import checkpoint as files

    rate = study.rates[arm]
    out = study.out / "grown" / f"{arm}-{rate:g}-{small.name}-{results.seed}"
    if (out / "proof.json").exists():
        return out
    out.parent.mkdir(exist_ok=True)
    for left in out.parent.glob(f"{out.name}*/"):  # of a run that was killed meanwhile
        shutil.rmtree(left)
    to = Path(f"{out}.yaml")
    to.write_text(dump({"model": to_dict(large_of(study))}), "utf-8")
    target = out.with_name(out.name + "-carried") if arm == "reset" else out
    # in a process of its own: its allocator gives every page back, which would slow the training
    words = [sys.executable, "-m", "launch", "grow", str(small), "--to", str(to)]
    words += ["--out", str(target), "--seed", str(results.seed), *WORDS[arm]]
    subprocess.run(words, check=True)
    if arm == "reset":  # every moment at zero, every tensor at its first update
        state = files.read(target)
        moments = {k: zeros(e.shape) for k, e in state.entries.items() if k.startswith("optim/")}
        born = dict.fromkeys(state.record["born"], state.record["updates"])
        record = {**state.record, "born": born}
        files.write_state(out, State({**state.entries, **moments}, record))
        shutil.copy(target / "proof.json", out)
    return out


def mixing(study: Study, results: "Results", name: str, at: int, steps: int) -> dict[str, Any]:
    """Steps after the growth until the loss is no longer above that of scratch at the same steps,
    of those at a constant rate; None where it stays above. Nothing while scratch is not so far, or
    where a run was measured on another machine."""
    rate = study.rates["scratch"]
    beside = study.out / "runs" / f"scratch-{rate:g}-{results.seed}"
    grew = study.out / "runs" / f"{name}-{results.seed}"
    if not all((run / "metrics.jsonl").exists() for run in (grew, beside)):
        return {}
    ours, plain = _losses(grew), _losses(beside)
    upto = steps - round(steps * DECAY)
    if upto not in plain:
        return {}
    gaps = [ours[step] - plain[step] for step in range(at + 1, upto + 1) if step in plain]
    window = max(1, round(WINDOW * (upto - at)))
    sums = (sum(gaps[n : n + window]) for n in range(len(gaps) - window + 1))
    found = next((number for number, total in enumerate(sums) if total <= 0), None)
    return {"mixing_steps": found, "constant_steps": upto - at}


def mixed(study: Study, results: "Results") -> None:
    """The mixing of what grew before the run from scratch had come so far."""
    for row in results.kept["losses"]:
        if row["arm"] == "scratch" or "mixing_steps" in row:
            continue
        at = study.share(row["budget"] * study.at)
        name = f"{row['arm']}-{row['lr']:g}-{row['budget']:g}"
        if found := mixing(study, results, name, at, row["steps"]):
            results.add(**{**row, **found})


def _losses(run: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8"))
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


class Results:
    """A file of what one seed measured: a line for each loss and for each run's time. Several
    processes may write to it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed = path, seed
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def kept(self) -> dict[str, list[dict[str, Any]]]:
        """What stands in the file."""
        if not self.path.exists():
            return {"losses": [], "runs": []}
        return dict(json.loads(self.path.read_text()))

    def add(self, **row: Any) -> None:
        """Keep a loss in place of the one of this arm and budget, print it."""
        line = {"seed": self.seed, **row}
        same = (line["arm"], line["budget"])
        with self._held() as kept:
            others = [r for r in kept["losses"] if (r["arm"], r["budget"]) != same]
            kept["losses"] = [*others, line]
        print(json.dumps(line), flush=True)

    def spent(self, run: str, cpu_s: float, steps: int) -> None:
        """Keep what a run took; one that was finished already took no steps."""
        if steps:
            with self._held() as kept:
                kept["runs"].append({"run": run, "cpu_s": round(cpu_s, 1), "steps": steps})

    def missing(self, arm: str, budgets: Iterable[float]) -> list[float]:
        """Those budgets of an arm that are not measured yet."""
        done = {row["budget"] for row in self.kept["losses"] if row["arm"] == arm}
        return [budget for budget in budgets if budget not in done]

    @contextmanager
    def _held(self) -> Iterator[dict[str, list[dict[str, Any]]]]:
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = self.kept
            yield kept
            aside = self.path.with_suffix(".writing")
            aside.write_text(json.dumps(kept, indent=1) + "\n")
            os.replace(aside, self.path)


def the_same(study: Study, tune: float) -> None:
    """End with a sentence if the folder holds another study."""
    about = {"page": study.page, "small": study.small, "steps": study.steps, "at": study.at}
    about |= {"tuning_steps": study.share(tune), "arms": WORDS}
    path = study.out / "study.json"
    kept = json.loads(path.read_text("utf-8")) if path.exists() else about
    if other := [key for key in about if about[key] != kept.get(key)]:
        raise SystemExit(f"{path}: was measured with another {', '.join(other)}; name another OUT")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")


def tuned(study: Study, rates: list[float], arms: list[str], share: float) -> dict[str, float]:
    """The best learning rate of each arm, all tried on the same grid at a short budget."""
    if len(rates) == 1:
        return dict.fromkeys(["scratch", *arms, *CONTROLS], rates[0])
    tried: dict[float, dict[str, float]] = {}
    for rate in rates:
        results = Results(study.out / "tuning" / f"{rate:g}.json", 0)
        short = replace(study, steps=study.share(share), rates=dict.fromkeys(WORDS, rate))
        short.rates["scratch"] = rate
        scratch(short, results, [1.0])
        grown(short, results, arms, [1.0])
        tried[rate] = {row["arm"]: row["loss"] for row in results.kept["losses"]}
    best = {arm: min(rates, key=lambda rate: tried[rate][arm]) for arm in ["scratch", *arms]}
    for arm, rate in best.items():
        losses = ", ".join(f"{rate:g}: {tried[rate][arm]:.4f}" for rate in rates)
        edge = ", the edge of the grid" if rate in (min(rates), max(rates)) else ""
        print(f"learning rate of {arm}: {rate:g} ({losses}){edge}", flush=True)
    return best | {control: best["paired"] for control in CONTROLS if "paired" in best}


def main() -> None:
    """Run what is missing; table and figure of what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", required=True, help="see benchmarks/growth_data.py")
    parser.add_argument(
        "--page", default="configs/runs/growth-savings.yaml", help="the large model"
    )
    parser.add_argument("--small", nargs="*", default=["layers=1"], help="the small one's sizes")
    parser.add_argument("--steps", type=int, default=8000, help="of the largest budget")
    parser.add_argument("--at", type=float, default=0.7, help="when to grow, a share of the steps")
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS))
    parser.add_argument("--curve", type=float, nargs="*", default=list(CURVE))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument(
        "--controls",
        nargs="*",
        default=[],
        choices=CONTROLS,
        help="paired with moments at zero; the small model trained on (at --control-budgets)",
    )
    parser.add_argument("--control-budgets", type=float, nargs="*", default=[0.25])
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--tune", type=float, default=0.1, help="a share of the steps")
    words = parser.parse_args()
    if 0 in words.seeds or (words.controls and "paired" not in words.arms):
        parser.error("seed 0 is that of the tuning; --controls stand beside --arms paired")
    page = read_yaml(words.page)
    page["data"]["train"] = [{"corpus": words.corpus}]
    small = {key: yaml.safe_load(value) for key, value in (s.split("=") for s in words.small)}
    study = Study(words.out, page, small, words.steps, words.at)
    the_same(study, words.tune)
    rates = tuned(study, words.lr, words.arms, words.tune)
    study = replace(study, rates=rates)
    for seed in words.seeds:
        results = Results(words.out / f"seed-{seed}.json", seed)
        scratch(study, results, words.curve)
        grown(study, results, words.arms, words.budgets)
        grown(study, results, words.controls, words.control_budgets)
        mixed(study, results)
    large, less = parameter_count(large_of(study)), parameter_count(small_of(study))
    if words.seeds:
        report(words.out, f"{less:,} -> {large:,} parameters, grown at {words.at:.0%} of the steps")


if __name__ == "__main__":
    main()
