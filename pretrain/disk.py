"""What a run leaves on the disk, before it is there: newest checkpoints, those that stay."""

from itertools import pairwise
from math import lcm
from typing import Any

from configs.model import ModelConfig, parameter_count
from configs.optimizers import moment_bytes
from configs.run import RunConfig, first_step


def taken(config: RunConfig, models: list[ModelConfig]) -> dict[str, Any]:
    """Bytes of the last model's checkpoint, how many are kept, and bytes of the whole run folder
    while one more is being written. `models`: that of each stage."""
    checkpoint = checkpoint_bytes(config, models[-1])
    stay = border_bytes(config, models) + kept_bytes(config, models)
    ordinary = config.run.keep_checkpoints + config.run.keep_best
    return {
        "checkpoint_bytes": checkpoint,
        "checkpoints_kept": ordinary + len(stay),
        "run_bytes": checkpoint * (ordinary + 1) + sum(stay),
    }


def checkpoint_bytes(config: RunConfig, model: ModelConfig) -> float:
    """What a checkpoint takes on disk: fp32 weights, and what the update rule remembers."""
    return 4 * parameter_count(model) + sum(moment_bytes(config.optimizer, model))


def border_bytes(config: RunConfig, models: list[ModelConfig]) -> list[float]:
    """Bytes of each checkpoint at a stage border, all of which stay: the end of every stage but the
    last, and the changed model that the next one begins with."""
    there = [model for border in pairwise(models) for model in dict.fromkeys(border)]
    return [checkpoint_bytes(config, model) for model in there]


def kept_bytes(config: RunConfig, models: list[ModelConfig]) -> list[float]:
    """Bytes of each checkpoint that stays for run.keep_every_steps, those at borders left out, and
    the newest, which run.keep_checkpoints counts."""
    if not (config.run.keep_every_steps and config.run.save_every_steps):
        return []
    every = lcm(config.run.keep_every_steps, config.run.save_every_steps)
    borders = [first_step(config, number) for number in range(len(models) + 1)]
    newest = config.run.keep_checkpoints * config.run.save_every_steps
    found = []
    for model, (start, end) in zip(models, pairwise(borders), strict=True):
        last = min(end - 1, borders[-1] - newest)
        found += [checkpoint_bytes(config, model)] * max(0, last // every - start // every)
    return found
