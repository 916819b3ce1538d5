"""What a run has on record: its folder read as it lies there, of a run that is on its way as well.

    RUN/metrics.jsonl   numbers of each step          RUN/config.yaml   the page
    RUN/events.jsonl    starts, stages, faults ...    RUN/logs/rank-*   who is at work, or how it
    RUN/faults/         samples of sick steps                           ended
    RUN/checkpoints/    which ones are there          RUN/profiles/     tables of operations

Nothing is asked of torch and nothing is written. A line that is only half there is passed over; a
run from before there were events has those that its other files tell of.
"""

import contextlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.load import ConfigError, load
from configs.run import RunConfig
from pretrain.watch import STOPPED

MOST_LINES = 20_000
"""Steps that are drawn of a run; a million of them are gigabytes as objects."""
TOLD_WHOLE = ("valid_loss", "sample", "skipped", "grad_norm_by_part")
"""Of lines with one of these none is left out."""
CHECKPOINT = re.compile(r"stage-(\d+)-step-(\d+)$")


class NoRun(ValueError):
    """A folder that is no run's."""


@dataclass(frozen=True)
class Record:
    """A run, as far as its files tell."""

    folder: Path
    name: str
    """What it is called beside others."""
    lines: list[dict[str, Any]]
    """Of metrics.jsonl, by step; step 0 is the validation before any training."""
    events: list[dict[str, Any]]
    """In the order in which they happened."""
    page: str
    """config.yaml."""
    config: RunConfig | None
    """None where this version cannot read it."""
    status: str
    """Where it stands, in words."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """RUN/faults: step, what, samples."""
    profiles: list[tuple[str, str]] = field(default_factory=list)
    """(which steps, the first rank's table)."""

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines that are steps."""
        return [line for line in self.lines if line["step"] > 0]

    def happened(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of some kinds."""
        return [event for event in self.events if event["event"] in kinds]

    def series(self, key: str, at: str = "step") -> list[tuple[float, float]]:
        """(step or tokens, value) of each line that has it; NaN where it was not finite."""
        return [(x, math.nan if v is None else float(v)) for x, v in self._pairs(key, at)]

    def series_by(self, key: str, at: str = "step") -> dict[str, list[tuple[float, float]]]:
        """The same of what is told apart, by name in the order of appearance."""
        found: dict[str, list[tuple[float, float]]] = {}
        for x, values in self._pairs(key, at):
            for name, v in (values or {}).items():
                found.setdefault(name, []).append((x, math.nan if v is None else float(v)))
        return found

    def _pairs(self, key: str, at: str) -> Iterator[tuple[float, Any]]:
        for line in self.lines:
            if key in line:
                yield float(line.get(at, 0)), line[key]

    def place(self, step: int, at: str = "step") -> float:
        """Where a step stands on the axis `at`."""
        if at == "step":
            return float(step)
        done = [float(line[at]) for line in self.steps if line["step"] <= step and at in line]
        return done[-1] if done else 0.0


def read(folder: Path, name: str = "") -> Record:
    """The record of a run folder. Raises NoRun for a folder that is none."""
    if not (folder / "metrics.jsonl").exists() and not (folder / "config.yaml").exists():
        raise NoRun(
            f"{folder}: has neither metrics.jsonl nor config.yaml, it is no run; give the folder "
            "of run.out (不是运行目录)"
        )
    lines = _thinned(_json_lines(folder / "metrics.jsonl"))
    events = _events(folder, lines)
    return Record(
        folder,
        name or folder.resolve().name,
        lines,
        events,
        _text(folder / "config.yaml"),
        _config(folder / "config.yaml"),
        _status(folder, events),
        _faults(folder),
        _profiles(folder),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for text in file:  # bytes: a sample may hold U+2028
                with contextlib.suppress(ValueError):
                    line = json.loads(text.decode("utf-8", "replace"))
                    if isinstance(line, dict):
                        yield line
    except OSError:
        return


def _thinned(lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines by step; of a long run's plain ones the lowest and the highest loss of every few,
    so that a spike stays, and the last."""
    rare: list[dict[str, Any]] = []
    plain: list[dict[str, Any]] = []
    group: list[dict[str, Any]] = []
    size = 1
    for line in lines:
        if not isinstance(line.get("step"), int):
            continue
        if any(line.get(key) for key in TOLD_WHOLE):
            rare.append(line)
            continue
        group.append(line)
        if len(group) >= size:
            plain, group = plain + _ends(group) if size > 1 else [*plain, line], []
        if len(plain) > MOST_LINES:
            size = max(2 * size, 4)
            plain = [end for at in range(0, len(plain), 4) for end in _ends(plain[at : at + 4])]
    tail = _ends(group)
    if group and all(line is not group[-1] for line in tail):
        tail.append(group[-1])
    return sorted(rare + plain + tail, key=lambda line: line["step"])


def _ends(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the lowest and the highest loss; what is no number is the highest."""

    def loss(line: dict[str, Any]) -> float:
        value = line.get("loss")
        return float(value) if isinstance(value, int | float) else math.inf

    low, high = min(group, key=loss, default=None), max(group, key=loss, default=None)
    return [line for line in (low, high if high is not low else None) if line is not None]


def _config(path: Path) -> RunConfig | None:
    try:
        return load(path, RunConfig)
    except ConfigError:  # of another version of the house, or half written
        return None


def _events(folder: Path, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those on file; of an older run those that can be told from the rest."""
    found = [
        event
        for event in _json_lines(folder / "events.jsonl")
        if isinstance(event.get("step"), int) and isinstance(event.get("event"), str)
    ]
    if not found:
        found = [
            {"event": "stage", "step": a["step"], "stage": b["stage"]}
            for a, b in pairwise(lines)
            if a.get("stage", b.get("stage")) != b.get("stage")
        ]
        found += [{"event": "fault", "step": f["step"], "what": f["what"]} for f in _faults(folder)]
    known = {event["step"] for event in found if event["event"] == "checkpoint"}
    for path in sorted((folder / "checkpoints").glob("stage-*-step-*")):
        match = CHECKPOINT.search(path.name)
        if match and int(match[2]) not in known:
            found.append({"event": "checkpoint", "step": int(match[2]), "name": path.name})
    return found


def _faults(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted((folder / "faults").glob("step-*.json")):
        try:
            fault = json.loads(_text(path))
            found.append({"step": int(fault["step"]), "what": str(fault["what"]), **fault})
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _profiles(folder: Path) -> list[tuple[str, str]]:
    tables = sorted((folder / "profiles").glob("steps-*/rank-0000.txt"))
    return [(path.parent.name, _text(path)) for path in tables]


def _status(folder: Path, events: list[dict[str, Any]]) -> str:
    """How the last start ended, or that it has not."""
    of_last: list[dict[str, Any]] = []
    for event in events:
        of_last = [] if event["event"] == "start" else [*of_last, event]
    ends = [event for event in of_last if event["event"] == "end"]
    if ends:
        why = str(ends[-1].get("why"))
        return "finished (完成)" if why == "finished" else f"stopped: {why} (已停止)"
    try:
        entry = json.loads(_text(folder / "logs" / "rank-0000.json"))
        state, host, pid = str(entry["state"]), str(entry["host"]), int(entry["pid"])
    except (ValueError, KeyError, TypeError):
        return "has no end on record (未记录结束)"
    if state in ("ended", STOPPED):
        return f"{state} (已结束)"
    if state != "running":
        return f"ended with: {state} (出错结束)"
    if host != socket.gethostname():
        return f"was at work on {host} when last heard of (在另一台机器上运行)"
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass  # somebody else's, and there
    except OSError:
        return "was killed, or died without a word (被终止)"
    return "is at work (运行中)"
