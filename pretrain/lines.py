"""Files of JSON lines: what a run puts on record, whatever its disk does meanwhile.

add() --> waiting --append--> RUN/metrics.jsonl, RUN/events.jsonl
             ^-- refused --+   and once more with the next lines
cut_metrics(): a resume drops what lies past its checkpoint
"""

import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT_LINES = 100_000
"""Lines that wait for a disk."""


class Lines:
    """A file of JSON lines. What its disk refuses is kept, the newest KEPT_LINES of it, and written
    when the disk is there again: no reason to end a training."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = path, say
        self._waiting: list[str] = []
        self._pen = threading.Lock()  # the thread that saves adds events of its own

    def add(self, lines: Iterable[dict[str, Any]] = ()) -> bool:
        """Append lines, behind those that wait; whether nothing waits any more."""
        with self._pen:
            return self._add(lines)

    def _add(self, lines: Iterable[dict[str, Any]]) -> bool:
        late = len(self._waiting)
        self._waiting += [json.dumps(plain(line), ensure_ascii=False) + "\n" for line in lines]
        if not self._waiting:
            return True
        try:
            self._append("".join(self._waiting).encode("utf-8"))
        except OSError as error:
            if not late:
                self._say(
                    f"{self.path}: cannot be written: {error.strerror}; the training goes on, its "
                    "lines are kept for later (日志暂时写不进去)"
                )
            self._waiting = self._waiting[-KEPT_LINES:]
            return False
        if late:
            self._say(f"{self.path}: is written again, with {late} lines that had waited (已恢复)")
        self._waiting.clear()
        return True

    def _append(self, data: bytes) -> None:
        with open(self.path, "a+b", buffering=0) as out:
            before, done = out.tell(), 0
            out.seek(max(before - 1, 0))
            if out.read(1) not in (b"\n", b""):  # of a process that was killed as it wrote
                data = b"\n" + data
            try:
                while done < len(data):
                    done += out.write(data[done:])
            except OSError:
                with suppress(OSError):
                    out.truncate(before)  # no half line
                raise


def plain(value: Any) -> Any:
    """With null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(inside) for key, inside in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl past `step`, and a last line that was cut by a crash.

    At step 0 nothing stays: the validation before any training is made again.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text("utf-8").split("\n"):  # a sample may hold U+2028
        try:
            if json.loads(text)["step"] <= step != 0:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_suffix(".writing")
    aside.write_text("".join(kept), "utf-8")
    os.replace(aside, path)
