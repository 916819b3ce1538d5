"""torch's profiler over steps N to M of a run, when the page or a person asks.

    monitor.profile_steps: [N, M]  \\          step N begins --torch.profiler--> step M is done
    echo N M > RUN/profile -look()-/                              |
                 RUN/profiles/steps-N-M/rank-0000.json.gz    a Chrome trace of each rank, for
                                                             ui.perfetto.dev or chrome://tracing
                                        rank-0000.txt        the operations that took most time

Nothing is imported, and nothing runs, in a run that is not asked. A step bears its number in the
trace ("step 100"), so that forward, backward and update can be told from the loader's wait between.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.vitals import worst

ROWS = 12
"""Operations in the table."""


class Profiler:
    """Records some steps of one rank.

    Args:
        run: the run folder.
        rank: of this process; the first one reads RUN/profile and speaks.
        device: where this rank computes.
        say: shows a line to the user.
        steps: (first, last) of what is to be recorded, counted from 1; or None.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
        steps: tuple[int, int] | None = None,
    ) -> None:
        self.run, self.rank, self.device, self.say = run, rank, device, say
        self._asked = steps
        self._running: Any = None
        self._first = self._done = 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`: begin before it, write after it, where it is the first or last.

        A run that has gone back to an earlier step has had its profile: of the steps so far.
        """
        if self._running is not None and number <= self._done:
            self.close()
        if self._asked is None or not self._asked[0] <= number <= self._asked[1]:
            yield
            return
        if self._running is None:
            self._begin(number)
        with torch.profiler.record_function(f"step {number}"):
            yield
        self._done = number
        if number == self._asked[1]:
            self.close()

    def look(self, done: int) -> None:
        """Ask whether RUN/profile wants steps after `done`; every rank calls this."""
        first, last = worst(self._wanted(done) if self.rank == 0 else (0.0, 0.0), self.device)
        if last and self._running is None:
            self._asked = int(first), int(last)

    def _wanted(self, done: int) -> tuple[float, float]:
        path = self.run / "profile"
        try:
            text = path.read_text("utf-8", "replace")[:200]
            path.unlink()
        except OSError:
            return 0.0, 0.0
        try:
            first, last = (int(word) for word in text.split())
            if not 0 < first <= last:
                raise ValueError
        except ValueError:
            self.say(
                f"RUN/profile: says '{text.strip()}', must be two numbers, the first and the last "
                "step to record, e.g. 100 103 (剖析请求无效)"
            )
            return 0.0, 0.0
        late = max(0, done + 1 - first)  # steps that are gone come as so many of those to come
        return float(first + late), float(last + late)

    def _begin(self, number: int) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._first = number
        self._running = torch.profiler.profile(activities=kinds)
        self._running.start()

    def close(self) -> None:
        """Write what was recorded, also of a run that ends before the last step asked for."""
        if self._running is None:
            return
        running, self._running, self._asked = self._running, None, None
        running.stop()
        folder = self.run / "profiles" / f"steps-{self._first:08d}-{self._done:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self.rank:04d}"
        running.export_chrome_trace(str(folder / f"{name}.json.gz"))
        found = table(running.key_averages(), self.device.type)
        (folder / f"{name}.txt").write_text(found + "\n", "utf-8")
        if self.rank == 0:
            steps = f"steps {self._first} to {self._done}"
            self.say(f"profile of {steps} of each rank: {folder} (剖析结果)\n{found}")


def table(averages: Any, device: str) -> str:
    """The operations with most time of their own: milliseconds, share, calls."""
    kind = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    times = [(float(getattr(e, kind)), int(e.count), str(e.key)) for e in averages]
    times = [row for row in times if not row[2].startswith("step ")]
    total = sum(row[0] for row in times) or 1.0
    lines = [f"{'ms':>12}{'share':>8}{'calls':>9}  operation (算子, {device})"]
    for spent, calls, name in sorted(times, reverse=True)[:ROWS]:
        lines.append(f"{spent / 1e3:>12,.2f}{spent / total:>8.1%}{calls:>9,}  {name[:60]}")
    return "\n".join(lines)
