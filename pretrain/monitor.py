"""What a run shows: metrics.jsonl, events.jsonl, TensorBoard, one line; chatter goes to files.

    StepResult (tensors, no sync) --record()--> pending --flush() every log_every_steps-->
        RUN/metrics.jsonl    one JSON object a step (step 0: fresh weights, validated before any
                             training); lines past a checkpoint are cut on resume
        RUN/events.jsonl     starts, stages, checkpoints, faults, ends; only ever longer
        RUN/tensorboard/     the same as curves, and the generated samples as text
        terminal             step, loss, tokens/s, MFU with the peak it assumes, time left

Reading a loss from the device makes the host wait for it, so steps are handed over as tensors and
read together.
"""

import atexit
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from configs.model import ModelConfig
from pretrain import plan
from pretrain.lines import Lines, cut_metrics
from pretrain.parts import Parts
from pretrain.vitals import memory, worst

MARK = "\x1eBAJIE "
"""Opens a line for the user when `launch train` reads our output; all else goes to its log."""

SKIPPED_IN_ROW = 64
"""fp16 skips a step when its loss scale was too large and halves it; so many halvings are no search
any more."""


class NotFinite(ValueError):
    """A loss or a gradient is NaN or infinite."""

    def __init__(self, step: int, what: str, samples: int) -> None:
        super().__init__(
            f"step {step}: {what}; nothing of it reached the weights, the run ends here and its "
            "last checkpoint is good. Lower optimizer.lr, set faults.spike_z to pass over such "
            f"samples, or look at the data of this step (samples up to {samples}) "
            "(损失或梯度非有限值)"
        )
        self.step, self.what = step, what


@dataclass(frozen=True)
class Speed:
    """What turns tokens a second into model FLOPs utilisation."""

    peak_flops: float
    """Peak of all devices together, FLOP/s."""
    peak_note: str
    """Where the peak comes from, e.g. "H200 989 TFLOP/s"."""
    flops_per_token: float = 0.0
    """Forward and backward of the model in hand, attention counted in full: 6 N + 12 L H Q T."""


def speed(device: torch.device, devices: int, precision: str) -> Speed:
    """What the devices can do: the datasheet's peak; for a CPU or an unlisted card, measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    try:
        peak, note = plan.device_peak(name, precision)
    except plan.PlanError:
        peak = _measured_peak(device, precision)
        note = f"{peak / 1e12:,.3g} TFLOP/s ({name}, measured)"
    return Speed(peak * devices, f"{note} x {devices}")


def _measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the best matrix product in a second, in the precision of the run."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 768 if device.type == "cpu" else 8192
    matrix, best = torch.randn(size, size, device=device).to(dtype), math.inf
    deadline = time.perf_counter() + 1.0
    while (began := time.perf_counter()) < deadline:
        (matrix @ matrix)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


@dataclass
class Terminal:
    """Where a person looks: a stream."""

    stream: TextIO = field(default_factory=lambda: sys.stdout)
    errors: TextIO = field(default_factory=lambda: sys.stderr)
    enabled: bool = True
    marked: bool = False
    """Whether a launcher sorts our lines from chatter by MARK."""

    def say(self, text: str, passing: bool = False) -> None:
        """Show a line; a `passing` one is replaced by the next where the stream is a terminal."""
        if not self.enabled:
            return
        if self.marked:
            text = _marked(text, "\r" if passing else "")
        elif self.stream.isatty():
            text = f"\r\x1b[2K{text}" + ("" if passing else "\n")
        else:
            text += "\n"
        _write(self.stream, text)

    def complain(self, text: str) -> None:
        """Show what a person must act on, whichever rank says it."""
        _write(self.errors, _marked(text, "") if self.marked else f"{text}\n")


def _write(stream: TextIO, text: str) -> None:
    with suppress(OSError):  # a file on a full disk, a pipe without a reader: a run goes on
        stream.write(text)
        stream.flush()


def _marked(text: str, passing: str) -> str:
    return "".join(f"{MARK}{passing}{line}\n" for line in text.splitlines() or [""])


def terminal(run: Path, rank: int, marked: bool) -> Terminal:
    """Send everything that this process and its libraries print to RUN/logs, keep a way out.

    File descriptors are redirected, so that C++ libraries are caught too. Only rank 0 speaks.
    marked: `launch train` reads what we say.
    """
    logs = run / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    way_out, errors = (
        os.fdopen(os.dup(n), "w", encoding="utf-8", errors="replace") for n in (1, 2)
    )
    log = os.open(logs / f"rank-{rank:04d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    atexit.register(_let_go)
    return Terminal(way_out, errors, enabled=rank == 0, marked=marked)


def _let_go() -> None:
    """What the log's disk does not take must not become our exit code, Python's 120."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, None)


def first_to_speak(run: Path) -> bool:
    """Whether this rank is the first of its launch to report a failure; the others stay silent."""
    parent = os.getppid()  # its number comes again, in containers always; its birth does not
    launch = f"{parent}-{psutil.Process(parent).create_time()}"
    try:
        os.close(os.open(run / "logs" / f".said-{launch}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        pass  # the disk may be what is to be reported: better twice than not at all
    return True


class Monitor:
    """The eyes of a run; only rank 0 writes, the others keep the same calls."""

    def __init__(
        self,
        run: Path,
        out: Terminal,
        *,
        writes: bool,
        total_steps: int,
        speed: Speed,
        may_skip: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.run, self.out, self.writes, self.may_skip = run, out, writes, may_skip
        self.total_steps, self.speed = total_steps, speed
        self.device = device or torch.device("cpu")
        self._sources: list[str] = []
        self._parts: Parts | None = None
        self._pending: list[tuple[dict[str, Any], Any]] = []
        self._notes: dict[int, dict[str, Any]] = {}
        self._clock, self._rate = time.monotonic(), 0.0
        self._skipped_in_row = 0
        self._board: Any = None
        self._metrics = Lines(run / "metrics.jsonl", out.say)
        self._events = Lines(run / "events.jsonl", out.say)

    def watch(self, config: ModelConfig, row: plan.Row, sources: Sequence[str] = ()) -> None:
        """Count FLOPs for the model of the stage that begins, and what its rows are made of.

        sources: the corpora of its mixture, whose losses are told apart.
        """
        full, _ = plan.flops_per_token(config, row)
        self.speed = replace(self.speed, flops_per_token=full)
        self._sources, self._parts = list(sources), Parts(config)

    def begin(self, step: int) -> None:
        """Start after `step` steps: cut what an interrupted run wrote past it."""
        if not self.writes:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        self._metrics.add()  # what waits is cut with the rest
        cut_metrics(self.run / "metrics.jsonl", step)
        self._shut_board()  # of a run that went back to an earlier step
        self._clock = time.monotonic()

    def _open_board(self, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, 1 s

        folder = str(self.run / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=first)  # type: ignore[no-untyped-call]

    def _shut_board(self) -> None:
        board, self._board = self._board, None
        if board is not None:
            with suppress(OSError):  # its thread's, of a disk that failed it
                board.close()

    def record(self, values: dict[str, Any], result: Any) -> None:
        """Keep a step's values and its StepResult (tensors) until the next flush()."""
        self._pending.append((values, result))

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Put on record, at once and for good, what is no number of a step."""
        if not self.writes:
            return
        self._events.add([{"event": kind, "step": step, "time": round(time.time(), 3), **values}])

    def note(self, step: int, **values: Any) -> None:
        """Add values (a validation, a sample) to the line of a step that is still pending."""
        self._notes.setdefault(step, {}).update(values)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent here (validation, saving) is not training time."""
        if self.device.type == "cuda":  # steps that were asked for and not yet made are
            torch.cuda.synchronize(self.device)
        began = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - began

    def flush(self) -> list[dict[str, Any]]:
        """Read the pending steps, write them, show the last; returns their lines.

        Raises NotFinite if one of them is sick: a loss that is none, or an update that was not made
        for its gradient, unless this may happen (fp16, whose scale was too large).
        """
        if not self._pending:
            return []
        rows = [(values, *self._numbers(result)) for values, result in self._pending]
        waits = [values.get("loader_wait_s", 0.0) for values, *_ in rows]
        *waits, peak, now = worst([*waits, *memory(self.device)], self.device)
        elapsed = max(time.monotonic() - self._clock, 1e-9)
        trained = sum(values["step_tokens"] for values, *_ in rows)
        self._rate = trained / elapsed
        mfu = self._rate * self.speed.flops_per_token / self.speed.peak_flops
        lines = [
            {"step": step, **self._notes.pop(step)} for step in sorted(self._notes) if step == 0
        ]
        for (values, loss, grad_norm, skipped, apart), wait in zip(rows, waits, strict=True):
            line = {
                "step": values["step"],
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": values["lr"],
                "tokens": values["tokens"],
                "samples": values["samples"],
                "tokens_per_s": round(self._rate, 1),
                "mfu": round(mfu, 4),
                "stage": values["stage"],
                "loader_wait_s": round(wait, 5),
                "time": round(time.time(), 1),
            }
            if skipped:
                line["skipped"] = True
            lines.append(line | apart | self._notes.pop(values["step"], {}))
        lines[-1] |= {"memory_gb": round(peak / 1e9, 4), "host_memory_gb": round(now / 1e9, 4)}
        self._pending.clear()
        if self.writes:
            self._events.add()  # what waits
            if self._metrics.add(lines):  # or each try would leave an empty file of curves
                self._curves(lines)
            self.out.say(self._progress(lines[-1], elapsed / len(rows)), passing=True)
        self._clock = time.monotonic()
        for line in lines:
            self._skipped_in_row = self._skipped_in_row + 1 if line.get("skipped") else 0
            if self._skipped_in_row >= SKIPPED_IN_ROW:
                what = (
                    f"the last {SKIPPED_IN_ROW} updates were skipped, no loss scale is small enough"
                )
                raise NotFinite(line["step"], what, line["samples"])
            lost = not math.isfinite(line.get("loss", 0.0))
            if lost or (line.get("skipped") and not self.may_skip):
                number = line["loss" if lost else "grad_norm"]
                what = f"the {'loss' if lost else 'norm of the gradient'} is {number}"
                raise NotFinite(line["step"], what, line["samples"])
        return lines

    def _numbers(self, result: Any) -> tuple[float, float, bool, dict[str, Any]]:
        """(mean loss, gradient norm, skipped, what is told apart) of a StepResult; the one place
        that waits for the device."""
        count = max(int(result.count), 1)
        norm = result.grad_norm
        norm = norm.item() if isinstance(norm, torch.Tensor) else norm
        skipped, apart = bool(result.skipped), {}
        if by_source := self.by_source(result.by_source):
            apart["loss_by_source"] = by_source
        if result.measured is not None and not skipped and self._parts is not None:
            grads, changes, weights = result.measured.tolist()
            apart["grad_norm_by_part"] = self._parts.norms(grads)
            apart["update_ratio_by_part"] = self._parts.ratios(changes, weights)
        return float(result.loss_sum) / count, float(norm or 0.0), skipped, apart

    def by_source(self, sums: torch.Tensor) -> dict[str, float]:
        """The mean loss of each corpus that a StepResult.by_source has positions of."""
        found: dict[str, tuple[float, float]] = {}
        if sums.numel():
            for name, loss, count in zip(self._sources, *sums.tolist(), strict=True):
                before = found.get(name, (0.0, 0.0))  # a folder may stand twice in a mixture
                found[name] = before[0] + loss, before[1] + count
        return {name: loss / count for name, (loss, count) in found.items() if count}

    def _progress(self, line: dict[str, Any], step_s: float) -> str:
        left = (self.total_steps - line["step"]) * step_s
        return (
            f"step {line['step']}/{self.total_steps}  loss {line['loss']:.4f}  "
            f"{line['tokens_per_s']:,.0f} tokens/s  {clock(left)} left  "
            f"MFU {100 * line['mfu']:.1f} % of {self.speed.peak_note}  lr {line['lr']:.2e}"
        )

    def _curves(self, lines: list[dict[str, Any]]) -> None:
        """What a failing disk takes of the curves stands in metrics.jsonl, if anywhere."""
        try:
            if self._board is None:
                self._open_board(lines[0]["step"])
            self._draw(lines)
        except OSError as error:
            if self._board is not None:
                folder = self.run / "tensorboard"
                self.out.say(f"{folder}: cannot be written: {error.strerror} (曲线暂时写不进去)")
            self._shut_board()

    def _draw(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            for name, value in line.items():
                if name == "sample":
                    self._board.add_text("sample", value, line["step"])
                elif isinstance(value, dict):
                    for key, number in value.items():
                        self._board.add_scalar(f"{name}/{key}", number, line["step"])
                elif name not in ("step", "time") and isinstance(value, int | float):
                    group = "valid" if name.startswith("valid_") else "train"
                    self._board.add_scalar(f"{group}/{name}", value, line["step"])
        self._board.flush()

    def close(self) -> None:
        """Write what is pending and close the files."""
        self.flush()
        self._metrics.add()
        self._shut_board()


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(int(max(seconds, 0)), 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"
