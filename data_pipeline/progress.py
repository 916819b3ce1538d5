"""Where a build stands: one line that moves on a terminal, one line a stage anywhere else.

    clean       [############........]  61 %   24.1 MB/s   0:05 left
    clean       208.1 MB   24.3 MB/s   0:09
    clean       [############........]  61 % ...      every half minute, in a file
    ...   0:05 left   3 running, 9 pending (Priority)    on a cluster

The numbers come from the small files that the tasks of a stage write into its progress/ folder, so
they are the same whether a task runs in this process, in another one or on another machine.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

BAR = 20
FILE_EVERY_S = 30.0


class Progress:
    """Writes to a stream, by default stderr."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.moves = self.stream.isatty()

    def line(self, text: str) -> None:
        """A line that stays."""
        print(text, file=self.stream, flush=True)

    def watch(self, name: str, work: float) -> Callable[[Path, int], AbstractContextManager[None]]:
        """What blocks.run() wraps a stage in: called with its folder and the tasks left to do."""

        @contextmanager
        def watching(folder: Path, left: int) -> Iterator[None]:
            if left == 0:
                self.line(f"{name:<11} done before")
                yield
                return
            before, started = _done(folder), time.monotonic()
            over = threading.Event()
            thread = threading.Thread(
                target=self._move, args=(name, folder, work, before, over), daemon=True
            )
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()
                if self.moves:
                    self.stream.write("\r\x1b[K")
            elapsed = time.monotonic() - started
            done = (_done(folder) - before) / 1e6
            rate = f"{done:9.1f} MB {done / max(elapsed, 1e-9):7.1f} MB/s" if done else " " * 25
            self.line(f"{name:<11}{rate}   {_clock(elapsed)}")

        return watching

    def _move(
        self, name: str, folder: Path, work: float, before: float, over: threading.Event
    ) -> None:
        started, looking_s = time.monotonic(), 0.0
        # Ten thousand tasks on a network disk are not looked at twice a second.
        while not over.wait(max(0.5 if self.moves else FILE_EVERY_S, 20 * looking_s)):
            looked = time.monotonic()
            done, elapsed = _done(folder), time.monotonic() - started
            looking_s = time.monotonic() - looked
            rate = (done - before) / elapsed
            share = min(done / work, 1.0) if work else 0.0
            bar = ("#" * round(share * BAR)).ljust(BAR, ".")
            left = f"{_clock((work - done) / rate)} left" if rate and work > done else ""
            text = f"{name:<11} [{bar}] {share:4.0%} {rate / 1e6:7.1f} MB/s   {left}"
            text = text if work else f"{name:<11} {_clock(elapsed)}"
            text += _queue(folder)
            self.stream.write(f"\r\x1b[K{text}" if self.moves else f"{text}\n")
            self.stream.flush()


def _done(folder: Path) -> float:
    total = 0.0
    for path in (folder / "progress").glob("[0-9]*"):
        try:
            total += float(path.read_text() or 0)
        except (OSError, ValueError):  # being written at this moment
            continue
    return total


def _queue(folder: Path) -> str:
    """What a cluster has to say: how many tasks run, how many wait and what for."""
    try:
        return f"   {(folder / 'queue').read_text()}"
    except OSError:
        return ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
