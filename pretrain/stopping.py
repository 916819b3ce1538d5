"""A run told to stop: by a signal to any of its processes, or by the file RUN/stop.

    launch train --SIGTERM--> the ranks of its machine    (main() notes it)
    touch RUN/stop ---------> the first rank, wherever it runs, and every launcher
    any of them --one number, the largest of all--> all ranks save at one border and end

A launcher whose ranks stand on other machines (a hostfile) reaches them by the file alone.
"""

import contextlib
import fcntl
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.folder import LOCK

if TYPE_CHECKING:
    from pretrain.parallel import Mesh

LOOKED_EVERY_S = 1.0
"""Between two looks for the file."""


def at_work(run: Path) -> bool:
    """Whether a job holds the run folder's lock (pretrain/start.py): what lies there is its own."""
    with contextlib.suppress(OSError), open(run / LOCK, encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False  # nor where there is no such folder yet, or a file system without locks


def forget_stop(run: Path) -> None:
    """Take RUN/stop of another time away; not one that is meant for a job at work."""
    if not at_work(run):
        with contextlib.suppress(OSError):
            (run / "stop").unlink()


class StopFile:
    """RUN/stop.

    Args:
        run: the run folder.
        left_counts: whether one that lies there now asks too, or was left from another time.
    """

    def __init__(self, run: Path, *, left_counts: bool) -> None:
        self._path = run / "stop"
        self._left = None if left_counts else self._about()
        self._looked_s = -LOOKED_EVERY_S
        self._found = False

    def asked(self) -> bool:
        """Whether it lies there; looks once a second at most."""
        if not self._found and time.monotonic() >= self._looked_s + LOOKED_EVERY_S:
            self._looked_s = time.monotonic()
            self._found = self._about() not in (None, self._left)
        return self._found

    def _about(self) -> tuple[int, int] | None:
        try:
            about = self._path.stat()
        except OSError:  # none, or a file system that fails just now: it asks for nothing
            return None
        return about.st_ino, about.st_mtime_ns


class Stopping:
    """Asks all ranks at each step border whether one of them was told to stop; all hear the same.

    On a GPU the answer is that of the border before: this one's would wait for the device.
    """

    def __init__(self, mesh: "Mesh", interrupted: Callable[[], bool]) -> None:
        self._mesh, self._interrupted = mesh, interrupted
        self._late = mesh.device.type != "cpu"
        self._told: deque[tuple[Any, Any]] = deque()

    def asked(self, now: bool = False) -> bool:
        """Every rank calls this at every border; `now`: the device is waited for, for this one's
        answer."""
        here = self._interrupted()
        if self._mesh.world == 1:
            return here
        import torch
        import torch.distributed as dist

        flag = torch.full((1,), int(here), dtype=torch.int32, device=self._mesh.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        on_gpu = flag.is_cuda
        told = torch.empty(1, dtype=torch.int32, pin_memory=on_gpu)
        told.copy_(flag, non_blocking=on_gpu)
        ready = torch.cuda.Event() if on_gpu else None
        if ready is not None:
            ready.record()
        self._told.append((told, ready))
        found = False
        while len(self._told) > (1 if self._late and not now else 0):
            told, ready = self._told.popleft()
            if ready is not None:
                ready.synchronize()
            found = found or bool(told.item())
        return found
