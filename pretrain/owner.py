"""Whose a run folder is, where the file system has no locks (Lustre mounted without -o flock).

    RUN/.owner   host, machine, process and its birth; made by one job alone (O_EXCL), touched by
                 it every 10 s, removed at its end

A killed job's is taken over: at once on its own machine, where its process is gone; elsewhere after
a minute in which nobody touched it, by the clock of the one who waits. Slower than a lock, and no
help against a job that was frozen for longer than that.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

BEAT_S = 10.0
SILENT_S = 60.0
"""Untouched for so long, another machine's file is a dead job's."""
SETTLE_S = 1.0
"""After it is made it is read again: two may have taken the same dead job's away."""


def owned(run: Path, patience_s: float) -> "Owner | None":
    """A run folder for this process alone; None while another that is alive has it."""
    path, began = path_in(run), time.monotonic()
    seen, since, changes = None, began, -1
    while not _made(path):
        found, now = _found(path), time.monotonic()
        if found != seen:
            seen, since, changes = found, now, changes + 1
        lives = _lives(found[0])
        if lives is False or (lives is None and now - since > SILENT_S):
            path.unlink(missing_ok=True)
        elif (lives or changes > 0) and now - began > patience_s:
            return None
        else:
            time.sleep(0.1)
    return Owner(path)


class Owner:
    """Keeps the file of this process fresh, until it leaves."""

    def __init__(self, path: Path) -> None:
        self._path, self._ended = path, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def leaves(self) -> None:
        """The folder is free."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _found(self._path)[0] == _me():
                self._path.unlink()


def path_in(run: Path) -> Path:
    """Where a run folder's owner stands."""
    return run / ".owner"


def _made(path: Path) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as out:
            out.write(_me())
    except FileExistsError:
        return False
    time.sleep(SETTLE_S)
    return _found(path)[0] == _me()


def _found(path: Path) -> tuple[str, int]:
    """What stands in the file and when it was touched; opened, for a client's cache may lag."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return "", 0


def _me() -> str:
    return json.dumps([socket.gethostname(), *_machine(), os.getpid(), _born(os.getpid())])


def _machine() -> list[str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    return [boot, os.readlink("/proc/self/ns/pid")]  # containers count their own processes


def _born(process: int) -> str:
    """When a process began, by its machine; of one that is gone, nothing."""
    try:
        state, *about = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else about[18]


def _lives(text: str) -> bool | None:
    """Whether the process that wrote this is at work; None where it cannot be known."""
    try:
        _, *machine, process, born = json.loads(text)
    except ValueError:  # made just now, or its job was killed before it wrote
        return None
    return _born(process) == born if machine == _machine() else None  # numbers come again
