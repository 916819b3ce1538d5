"""Warm worlds: groups of processes that live for a file of tests and do what they are told.

    test --run("tests.zero_jobs:train", zero=3)--> every worker imports the module, calls the
                                                   function, resets the product's global state
         <---- [result of rank 0, of rank 1, ...]  or an exception with the rank's own traceback

Starting a process and importing torch and DeepSpeed costs ten seconds and more: a server imports
them once, the workers are forked from it, and a job in a warm world costs what it computes. A job
is a function of an importable module that gets plain values and returns plain values. A hang is cut
by a timeout and takes the world with it; the next use starts a new one. Library chatter goes to a
log file, whose end is shown when a world falls silent.

Not for longer than a file: a group of gloo has a thread that wakes a hundred times a second, and no
job takes its groups along.

This module must not import torch: it is imported by the workers before their environment is set.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
START_S = 240.0
"""Starting a world: the first one imports torch and DeepSpeed, on a busy machine."""
JOB_S = 120.0
"""Longest a job may take unless the test says otherwise."""
GRACE_S = 5.0
"""When one rank has failed, the others may be waiting for it for ever: this long they get."""


class WorldError(RuntimeError):
    """A job did not end: a hang, or a worker that died."""


class World:
    """`size` processes with a gloo group among them; started at the first run()."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = Path(tempfile.mkdtemp(prefix=f"world{size}-"))
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(
        self, job: str | Callable[..., Any], /, timeout_s: float = JOB_S, **arguments: Any
    ) -> list[Any]:
        """Call the job with the same arguments on every rank; the results, in order of rank.

        `job` is "package.module:function" or the function itself. Raises what the lowest failing
        rank raised, its remote traceback added as a note; WorldError if a rank hangs or dies.
        """
        name = job if isinstance(job, str) else f"{job.__module__}:{job.__qualname__}"
        self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((name, arguments)))
        answers = self._collect(name, timeout_s)
        failed = [rank for rank, (ok, _) in enumerate(answers) if not ok]
        if not failed:
            return [value for _, value in answers]
        if len({type(answers[rank][1]) for rank in failed}) > 1 or len(failed) < self.size:
            self.stop()  # the ranks parted ways inside a collective: not to be trusted again
        error: BaseException = answers[failed[0]][1]
        raise error

    def stop(self) -> None:
        """Kill the processes; the next run() starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def log(self, rank: int, lines: int = 20) -> str:
        """The last lines that a rank has printed."""
        path = self.folder / f"rank{rank}.log"
        if not path.exists():
            return ""
        return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:])

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        for rank in range(self.size):
            ours, theirs = CONTEXT.Pipe()
            arguments = (theirs, rank, self.size, port, str(self.folder))
            process = CONTEXT.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for ok, value in self._collect("the start of the world", START_S):
            if not ok:
                self.stop()
                raise value

    def _collect(self, name: str, timeout_s: float) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = (
                        False,
                        WorldError(f"{name}: rank {rank} died\n{self.log(rank)}"),
                    )
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if not ready:
                break
        return self._complete(name, timeout_s, answers)

    def _complete(
        self, name: str, timeout_s: float, answers: dict[int, tuple[bool, Any]]
    ) -> list[tuple[bool, Any]]:
        missing = [rank for rank in range(self.size) if rank not in answers]
        if not missing:
            return [answers[rank] for rank in range(self.size)]
        logs = "\n".join(f"--- rank {rank}\n{self.log(rank)}" for rank in missing)
        self.stop()
        for ok, value in answers.values():
            if not ok:
                value.add_note(f"(rank {missing} did not answer any more)")
                raise value
        raise WorldError(f"{name}: rank {missing} gave no answer within {timeout_s:.0f} s\n{logs}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _work(pipe: Connection, rank: int, size: int, port: int, folder: str) -> None:
    """A worker's life: become a rank, then answer jobs until the pipe closes."""
    _become(rank, size, port, folder)
    try:
        import torch

        torch.set_num_threads(1)
        parallel = importlib.import_module("pretrain.parallel")
        engine = importlib.import_module("pretrain.engine")
        parallel.init_distributed()
        _answer(pipe, rank, True, None)
    except BaseException as error:
        _answer(pipe, rank, False, error)
        return
    with contextlib.suppress(EOFError, OSError):
        while True:
            name, arguments = pickle.loads(pipe.recv_bytes())
            try:
                module, _, function = name.partition(":")
                torch.manual_seed(0)
                ok, value = True, getattr(importlib.import_module(module), function)(**arguments)
            except BaseException as error:
                ok, value = False, error
            engine.reset()
            torch.set_num_threads(1)
            _answer(pipe, rank, ok, value)


def _become(rank: int, size: int, port: int, folder: str) -> None:
    with contextlib.suppress(OSError):  # die with the test run, whatever kills it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    log = os.open(Path(folder) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    root = str(Path(__file__).parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )


def _answer(pipe: Connection, rank: int, ok: bool, value: Any) -> None:
    if not ok:
        trace = "".join(traceback.format_exception(value))
        value.add_note(f"rank {rank} said:\n{trace}")
    try:
        message = pickle.dumps((ok, value))
        pickle.loads(message)
    except Exception as error:
        told = "".join(traceback.format_exception(value)) if not ok else repr(value)[:500]
        reason = WorldError(f"rank {rank}: the answer cannot be sent ({error})\n{told}")
        message = pickle.dumps((False, reason))
    pipe.send_bytes(message)
