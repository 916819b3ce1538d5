"""Jobs for the warm worlds that go through train(), the one way through, and what they leave."""

import dataclasses
import hashlib
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from configs.load import from_dict
from configs.run import RunConfig
from pretrain import checkpoint
from pretrain.monitor import Terminal
from pretrain.state import State
from pretrain.train import train

MODEL = {
    "family": "cpm",
    "vocab": 320,
    "hidden": 32,
    "layers": 2,
    "heads": 2,
    "head_dim": 16,
    "ffn": 64,
    "positions": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def page(run: Path, corpus: Path, **changes: Any) -> dict[str, Any]:
    """A run's config as plain data; `changes` are dotted keys with __ for the dot."""
    data: dict[str, Any] = {
        "model": dict(MODEL),
        "data": {"train": [{"corpus": str(corpus)}], "seq_len": 32},
        "batch": {"samples": 8, "micro": 4},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 5, "decay_steps": 10},
        "precision": "fp32",
        "run": {"out": str(run), "steps": 30, "log_every_steps": 5, "validate_samples": 4},
    }
    for key, value in changes.items():
        at, *rest = key.split("__")
        section = data
        for part in rest:
            section, at = section.setdefault(at, {}), part
        section[at] = value
    return data


def go(config: dict[str, Any], file_limit: int | None = None) -> dict[str, Any]:
    """Train in this world; `file_limit` bytes is the largest file that may be written.

    The world's own log is a file too, so nothing is said under a limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_limit is None:
        return train(from_dict(RunConfig, config))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, hard))
    try:
        return train(from_dict(RunConfig, config), Terminal(enabled=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are steps."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["step"]]


def losses(run: Path) -> list[float]:
    """Loss of each step."""
    return [line["loss"] for line in metrics(run)]


def digests(checkpoint: str | Path) -> dict[str, str]:
    """Hash of each tensor file of a checkpoint."""
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def rewrite(path: Path, change: Callable[[State], State]) -> None:
    """Write a checkpoint again, changed, in its own place."""
    state = checkpoint.read(path)
    held = {key: entry.read().clone() for key, entry in state.entries.items()}
    entries = {
        key: dataclasses.replace(entry, read=lambda key=key: held[key])
        for key, entry in state.entries.items()
    }
    checkpoint.write_state(path, change(State(entries, state.record)), path / "tokenizer")


def write(path: Path, config: dict[str, Any]) -> Path:
    """The config as a YAML file."""
    path.write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
    return path
