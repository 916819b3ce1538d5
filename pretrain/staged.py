"""What a run that grows costs beside the large model from scratch, and when to grow. No torch.

    stages --FLOPs of each--> the staged run | the last model on the same tokens | its ratio
    first model, last model --FLOPs of growing at 30 ... 80 % of the steps--> table, suggestion

What it costs is counted; when to grow is a rule of thumb out of what was published: at most 70 % of
the run under a schedule with a constant stretch (wsd), half of it under a cosine, which leaves what
is new too little rate (zero/one-layer expansion, arXiv 2511.04981; SPARKLING grew its width at
half); and before the decay there must be room for what is new to settle. What was measured here
(docs/growth.md) says that the share matters less than what the small model can still learn: one
layer that grew to four was not worth its steps beyond some ten tokens a parameter, and what it was
worth was lost again in a long run behind the growth. So the table says how many tokens both models
will have read, and for a run beyond WORTH of the large one's no step.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.grown import GROWS, idle, rescales
from configs.model import ModelConfig, parameter_count
from configs.optimizers import Schedule
from configs.run import RunConfig, first_step, stage_model, stages, total_steps

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LATEST = {"wsd": 0.7, "constant": 0.7}
"""The largest share of a run that the small model should take; half under any other schedule."""
SETTLING = 0.1
"""Share of the run between a growth and the beginning of the decay."""
WORTH = 2.4
"""Tokens a parameter of the large model up to which growth saved something in every study; in the
larger one it cost more at 7 (docs/growth.md)."""


def beside_scratch(
    each: list[dict[str, Any]],
    models: list[ModelConfig],
    schedule: Schedule,
    small: list[float],
    large: list[float],
) -> dict[str, Any] | None:
    """The comparison as plain data, or None for a run that does not grow.

    Args:
        each: the stages as pretrain.plan counts them (steps, tokens, flops, days).
        models: the model of each stage.
        schedule: of the last stage.
        small, large: FLOPs that each stage would take with the first, the last stage's model.
    """
    grows = [n for n, (a, b) in enumerate(pairwise(models), 1) if _sizes(a) != _sizes(b)]
    if not grows:
        return None
    total, flops = sum(large), sum(stage["flops"] for stage in each)
    days = sum(s["days"] * f / s["flops"] for s, f in zip(each, large, strict=True))
    counts = [stage["steps"] for stage in each]
    steps = sum(counts)
    decaying = schedule.decay_steps / steps if schedule.name == "wsd" else 0.0
    latest = min(LATEST.get(schedule.name, 0.5), 1 - decaying - SETTLING)
    grid = []
    for share in SHARES:
        early, whole = (spent(counts, of, share * steps) for of in (small, large))
        cost = early + total - whole
        grid.append({"share": share, "flops": cost, "advised": share <= latest})
    advised = [row["share"] for row in grid if row["advised"]]
    tokens = [stage["tokens"] for stage in each]
    last = max(advised, default=None)
    read = spent(counts, tokens, (last or 0.0) * steps)
    whole_run = sum(tokens) / parameter_count(models[-1])
    return {
        "scratch": {"flops": total, "days": days},
        "staged": {"flops": flops, "days": sum(stage["days"] for stage in each)},
        "share": flops / total,
        "first_model_costs": small[0] / large[0],
        "grows_at": [sum(counts[:stage]) / steps for stage in grows],
        "scratch_steps_for_the_same": round(affordable(counts, large, flops)),
        "when": grid,
        "latest": last,
        "latest_step": round(steps * last) if last else None,
        "suggestion": last if whole_run <= WORTH else None,
        "tokens_per_parameter": read / parameter_count(models[0]) if last else None,
        "tokens_per_parameter_at_the_end": whole_run,
    }


def _sizes(model: ModelConfig) -> list[int]:
    return [getattr(model, size) for size in GROWS]


def idle_options(config: RunConfig, number: int) -> list[str]:
    """The options of a stage's `grow:` that will change nothing, a sentence each with its key: what
    the run says at the border, before the stages up to there are paid for.

    What the checkpoint that a run begins with has divided is not known here.
    """
    if number == 0:
        return []
    models = [stage_model(config, at) for at in range(number + 1)]
    grown = zip(models, models[1:], stages(config)[1:], strict=False)
    divided = config.init is not None or any(rescales(a, b, by.grow) for a, b, by in grown)
    left = total_steps(config) - first_step(config, number)
    told = idle(models[-2], models[-1], stages(config)[number].grow, divided, left)
    return [f"stages.{number}.grow.{sentence}" for sentence in told]


def left(config: RunConfig, each: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What is still to be paid of a run that goes on from a checkpoint (init.what: all); None of
    one that begins anew. Without the checkpoint's step where it cannot be read here."""
    if config.init is None or config.init.what != "all":
        return None
    begun = Path(config.init.from_)
    found = [begun, *sorted(begun.glob("checkpoints/stage-*"), reverse=True)]
    try:
        folder = next(path for path in found if (path / "state.json").exists())
        done = int(json.loads((folder / "state.json").read_text("utf-8"))["step"])
    except (StopIteration, OSError, ValueError, KeyError, TypeError):
        return {"from": str(begun), "step": None}
    counts = [stage["steps"] for stage in each]
    gone = {key: spent(counts, [stage[key] for stage in each], done) for key in ("flops", "days")}
    return {
        "from": str(folder),
        "step": done,
        "steps": max(0, sum(counts) - done),
        **{key: sum(stage[key] for stage in each) - gone[key] for key in gone},
    }


def spent(counts: list[int], each: list[float], steps: float) -> float:
    """What the first `steps` steps take of stages of so many steps and FLOPs (or tokens) each; a
    stage is even."""
    found = 0.0
    for count, whole in zip(counts, each, strict=True):
        found += whole * min(count, max(0.0, steps)) / count
        steps -= count
    return found


def affordable(counts: list[int], flops: list[float], budget: float) -> float:
    """Steps that `budget` FLOPs buy; beyond the last stage at its price of a step."""
    steps = 0.0
    for count, whole in zip(counts[:-1], flops[:-1], strict=True):
        if budget < whole:
            return steps + count * budget / whole
        steps, budget = steps + count, budget - whole
    return steps + counts[-1] * budget / flops[-1]


def rows(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Title and table for people."""
    lines = [["", "FLOP", "of scratch", "days"]]
    for name, key in (("the large model from scratch", "scratch"), ("this run", "staged")):
        part = found[key]
        share = part["flops"] / found["scratch"]["flops"]
        lines.append([name, f"{part['flops']:.2e}", f"{share:.1%}", f"{part['days']:.3g}"])
    for row in found["when"]:
        share = row["flops"] / found["scratch"]["flops"]
        mark = " *" if row["share"] == found["suggestion"] else ""
        days = found["scratch"]["days"] * share
        name = f"grown once, at {row['share']:.0%} of the steps{mark}"
        lines.append([name, f"{row['flops']:.2e}", f"{share:.1%}", f"{days:.3g}"])
    if found["latest"] is None:
        lines.append(["when to grow: the decay begins too early for any; shorten it (衰减过早)"])
    else:
        step, advised = f"step {found['latest_step']:,}", found["suggestion"] is not None
        when = (
            f"about {step} (*), a rule of thumb" if advised else f"no step advised, {step} at most"
        )
        lines.append([f"when to grow: {when} (生长时机)"])
        read = f"by then the small model has read {found['tokens_per_parameter']:.3g} tokens a"
        lines.append([f"{read} parameter (小模型每参数所读词元)"])
    if (whole_run := found["tokens_per_parameter_at_the_end"]) > WORTH:
        beyond = f"beyond {WORTH:g}, growing can cost more than scratch at equal loss"
        lines.append([f"{whole_run:.3g} tokens a parameter of the large model: {beyond}"])
        advice = "(docs/growth.md), early too, unless the small model is there already"
        lines.append([f"{advice} (每参数词元过多，生长可能更费)"])
    at = ", ".join(f"{share:.0%}" for share in found["grows_at"])
    same = f"this run, grown at {at}, costs as much as "
    lines.append(
        [same + f"{found['scratch_steps_for_the_same']:,} steps from scratch (同等计算量)"]
    )
    return "growth beside the large model from scratch (生长与从头训练)", lines
