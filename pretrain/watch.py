"""The watch over a rank: who it is, whether it moves, and what is left to read when it does not.

    main() --enlist()--> RUN/logs/rank-0001.json  {rank, host, pid, step, state}
    loop   --beat()-->   a clock that a thread looks at; silent for stall_s:
              every rank: its stacks to RUN/logs/stack-0001.txt, what it does to rank-0001.json
              the first:  one sentence that names the ranks which no collective keeps waiting
              all:        exit code STALLED, from the thread, whatever the main thread hangs in
    launch train --died()--> the ranks that neither ended nor said why
                 --failure()--> the exit code, where DeepSpeed's launcher was ended before its own

Signals cannot do this: a rank that hangs inside a collective runs no Python handler. Nor can the
clock write: the disk may be what hangs. Others write for it, and it waits for them DISK_S at most.
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

STALLED = 69
"""Exit code of a rank that stalled, or waited for one that did (EX_UNAVAILABLE). Not the code of a
run that was told to stop: a job that always stalls would stand in the queue for ever."""
STOPPED = "stopped"
"""On the roll: this rank was told to stop, and saved before its run was at its end."""
WAITING = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/")
"""A main thread inside these waits for another rank."""
MOST_NAMED = 8
"""Ranks that a sentence names; of more it says how many."""
ANSWER_S = 3.0
"""How long the ranks wait for each other's accounts; a rank that gives none is frozen or dead."""
DISK_S = 10.0
"""How long a rank may take over its stacks, its account and the sentence: longer, and RUN/logs
hangs. Shorter than the launcher waits for the peers of a rank that has ended."""
TAIL_BYTES = 1 << 20
"""Of metrics.jsonl, in which its last whole line is looked for; a line with samples is long."""
HOME = str(Path(__file__).resolve().parent.parent)


def enlist(run: Path, rank: int) -> Path:
    """Put this process on the roll and its stacks, should it crash, on file; returns its entry."""
    logs = run / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    entry = logs / f"rank-{rank:04d}.json"
    host, now = socket.gethostname(), time.time()
    about = {"rank": rank, "host": host, "pid": os.getpid(), "step": 0, "born": now}
    told(entry, **about, state="running", begun=False, left=0.0, stalled_at=0.0)
    stacks = _stacks(entry)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR2, stacks, all_threads=True)  # the launcher, before it kills
    return entry


def told(entry: Path, **changes: Any) -> None:
    """Change an entry of the roll; never a reason to fail."""
    with contextlib.suppress(OSError):
        aside = entry.with_suffix(".writing")
        aside.write_text(json.dumps({**_entry(entry), **changes}, ensure_ascii=False), "utf-8")
        os.replace(aside, entry)


def died(run: Path, since: float) -> list[str]:
    """Which ranks born after `since` left without a word, as "rank 1 on HOST (last known step 12)".

    The step is the latest that anybody has told, if any: all finish a step together, and an entry
    may be ten seconds old. Of another machine's ranks it is not known whether they live: they are
    not named.
    """
    entries = [_entry(path) for path in sorted((run / "logs").glob("rank-*.json"))]
    steps = [e.get("step", 0) for e in entries if e.get("born", 0.0) >= since]
    step = max([*steps, _on_record(run / "metrics.jsonl", since)])
    known = f" (last known step {step})" if step else ""
    return [
        f"rank {e['rank']} on {e['host']}{known}"
        for e in entries
        if e.get("state") == "running" and e.get("born", 0.0) >= since and _gone(e)
    ]


def _on_record(metrics: Path, since: float) -> int:
    """The last step in metrics.jsonl, if something was written there after `since`; 0 if none."""
    with contextlib.suppress(OSError), open(metrics, "rb") as file:
        if os.fstat(file.fileno()).st_mtime < since:
            return 0  # of an earlier job, whose last steps may be made again
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        for line in reversed(file.read().split(b"\n")):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off
                return int(json.loads(line)["step"])
    return 0


def halted(run: Path, since: float) -> bool:
    """Whether the job born after `since` was told to stop: its ranks know, wherever they were told,
    and saved before the run was at its end."""
    entries = [_entry(path) for path in (run / "logs").glob("rank-*.json")]
    return any(e.get("state") == STOPPED and e.get("born", 0.0) >= since for e in entries)


def ends(run: Path, since: float) -> tuple[int, int]:
    """How many ranks born after `since` had begun, the run folder theirs, and how many of them
    saved and ended."""
    entries = [_entry(path) for path in (run / "logs").glob("rank-*.json")]
    states = [e.get("state") for e in entries if e.get("begun") and e["born"] >= since]
    return len(states), sum(state in (STOPPED, "ended") for state in states)


def failure(run: Path, since: float) -> int | None:
    """The exit code of a job, by what its ranks have said of their ends after `since`: 2 where one
    found a mistake, STALLED where one stalled, else that of the first that ended badly, if any."""
    entries = [_entry(path) for path in (run / "logs").glob("rank-*.json")]
    left = sorted((e["left"], e["code"]) for e in entries if e.get("left", 0.0) >= since)
    codes = [code for _, code in left]
    if 2 not in codes and any(e.get("stalled_at", 0.0) >= since for e in entries):
        return STALLED
    return 2 if 2 in codes else next(iter(codes), None)


def _gone(entry: dict[str, Any]) -> bool:
    if entry["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(entry["pid"]), 0)
    except OSError:
        return True
    return False


def _entry(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def _stacks(entry: Path) -> IO[str]:
    return open(entry.with_name(f"stack-{entry.stem[5:]}.txt"), "a", encoding="utf-8")


class Watch:
    """Looks at one rank's clock.

    Args:
        run: the run folder.
        rank, ranks: which one of how many.
        stall_s: silence that means a stall; 0 looks at nothing.
        complain: says a sentence to the user.
        end: what ends the process; never returns in a real job.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        ranks: int,
        stall_s: float,
        complain: Callable[[str], None],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.run, self.rank, self.ranks, self.stall_s = run, rank, ranks, stall_s
        self._complain, self._end = complain, end
        self._entry = run / "logs" / f"rank-{rank:04d}.json"
        self._main, self._done = threading.get_ident(), threading.Event()
        self._step, self._heard = 0, time.monotonic()
        self._pen = threading.Lock()  # of who writes our entry

    @contextlib.contextmanager
    def __call__(self) -> Iterator["Watch"]:
        """Watch while the block runs."""
        thread = threading.Thread(target=self._look, name="watch", daemon=True)
        if self.stall_s:
            thread.start()
        try:
            yield self
        finally:
            self._done.set()
            if self.stall_s:
                thread.join()
                self._pen.acquire(timeout=DISK_S)  # for good: how the run ended is the last word

    def beat(self, step: int) -> None:
        """This rank moves; `step` steps are done."""
        self._step, self._heard = step, time.monotonic()

    def alive(self) -> None:
        """This rank moves, in what is no step."""
        self._heard = time.monotonic()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Look away while this rank waits for another, which may take hours: a large model's proof.

        The roll says so ("patient"): such a silence is no one's fault. A rank that dies meanwhile
        still ends the others, who wait for it in a collective.
        """
        self._heard = math.inf
        try:
            yield
        finally:
            self._heard = time.monotonic()

    def _look(self) -> None:
        """The clock, which touches no disk."""
        pause, said, told_at = min(1.0, self.stall_s / 10), False, time.monotonic()
        while not self._done.wait(pause):
            patient = self._heard == math.inf
            due = time.monotonic() - told_at > 10.0 or patient != said
            if due and not self._pen.locked():
                told_at, said = time.monotonic(), patient
                _apart(self._tell)
            if time.monotonic() - self._heard > self.stall_s:
                self._stalled()
                return

    def _tell(self) -> None:
        with self._pen:
            told(self._entry, step=self._step, patient=self._heard == math.inf)

    def _stalled(self) -> None:
        """Have everything left on disk and the sentence said; end, whatever becomes of that."""
        waits, where = _doing(sys._current_frames().get(self._main))
        account = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "step": self._step,
            "state": "waits" if waits else "stuck",
            "where": where,
            "stalled_at": time.time(),
        }
        leaving = _apart(lambda: self._leave(account))
        leaving.join(DISK_S)
        if leaving.is_alive():
            _apart(lambda: self._complain(self._hung(account))).join(1.0)
        self._end(STALLED)

    def _leave(self, account: dict[str, Any]) -> None:
        """Leave everything on disk, name who is to blame."""
        with self._pen:
            with contextlib.suppress(OSError), _stacks(self._entry) as out:
                out.write(f"--- rank {self.rank} on {account['host']}: no step finished for ")
                out.write(f"{self.stall_s:.0f} s after step {account['step']}\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
            told(self._entry, **account)
        accounts = self._accounts(account)
        if self.rank == min(accounts):
            self._complain(self._sentence(accounts))
        else:
            time.sleep(ANSWER_S / 6)  # the one who speaks must not be ended by our end

    def _hung(self, account: dict[str, Any]) -> str:
        """Each such rank says it for itself: what the others do stands on the same disk."""
        does = {"waits": "waits for other ranks", "stuck": "is stuck"}[account["state"]]
        return (
            f"bajie: no step was finished for {self.stall_s:.0f} s (faults.stall_s), and "
            f"{self._entry.parent} cannot be written: its file system hangs; rank {self.rank} on "
            f"{account['host']} {does} in {account['where']} after step {account['step']} "
            "(进程停滞，文件系统无响应)"
        )

    def _accounts(self, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """What the ranks say of themselves within ANSWER_S."""
        found = {self.rank: own}  # a full disk does not have it
        oldest = own["stalled_at"] - self.stall_s - 2 * ANSWER_S
        deadline = time.monotonic() + min(ANSWER_S, self.stall_s)
        while len(found) < self.ranks and time.monotonic() < deadline:
            for path in self._entry.parent.glob("rank-*.json"):
                entry = _entry(path)
                if entry.get("stalled_at", 0.0) > oldest:
                    found[int(entry["rank"])] = entry
            time.sleep(0.05)
        return found

    def _sentence(self, accounts: dict[int, dict[str, Any]]) -> str:
        roll = [_entry(self._entry.with_name(f"rank-{n:04d}.json")) for n in range(self.ranks)]
        silent = [n for n in range(self.ranks) if n not in accounts and not roll[n].get("patient")]
        stuck = [e for e in accounts.values() if e["state"] == "stuck"]
        slow = min(e["step"] for e in accounts.values())
        if len(stuck) == len(accounts):
            # Nobody is in a collective: on GPUs that call returns at once, and ranks wait where
            # they next read a value. Those that lag behind are the ones that are waited for.
            stuck = [e for e in stuck if e["step"] == slow and not silent]
        named = []
        for rank in silent:
            host = roll[rank].get("host", "its host")
            named.append(f"rank {rank} on {host} answers no more (frozen or dead)")
        named += [f"rank {e['rank']} on {e['host']} is stuck in {e['where']}" for e in stuck]
        if (more := len(named) - MOST_NAMED) > 0:
            named = [*named[:MOST_NAMED], f"and {more} more"]
        blame = "; ".join(named) or f"all ranks wait for each other after step {slow}"
        return (
            f"bajie: no step was finished for {self.stall_s:.0f} s (faults.stall_s): {blame}; the "
            f"stacks of the ranks are in {self._entry.parent}/stack-*.txt (进程停滞)"
        )


def _apart(job: Callable[[], object]) -> threading.Thread:
    """Start what may hang, or fail, in a thread that nobody has to wait for."""
    thread = threading.Thread(target=job, name="watch's clerk", daemon=True)
    thread.start()
    return thread


def _doing(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and the innermost line of ours that it is in."""
    waits, ours = False, ""
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or any(part in name for part in WAITING)
        if not ours and name.startswith(HOME) and "site-packages" not in name:
            ours = f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}()"
        frame = frame.f_back
    return waits, ours or "a library"
