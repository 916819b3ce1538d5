"""python -m launch train CONFIG --devices N [key=value ...]: start the job, watch it, end it well.

    this process --own session--> deepspeed --> its launch.py --> rank 0, rank 1 ...
         |   ^                                                        |
         |   +---- one pipe: marked lines -> terminal, all -> RUN/logs/launcher.log
         +-- SIGTERM, Ctrl-C, hang-up, or a file RUN/stop:
             SIGTERM to the RANKS, which save at the step border and end; those of a hostfile's
             machines, which are nobody's children here, look for RUN/stop themselves

DeepSpeed's launcher, told to stop, kills rank after rank with up to 30 s for each. So it is not
told: the ranks are, all at once. If somebody tells it nevertheless (a scheduler that signals every
process), it is ended, and the roll says how the ranks did. Whoever is left after the grace is
killed with everything that belongs to the job, also when a rank has failed and its peers wait for
it, or when the launcher itself has died. If this process is killed, a keeper (its fork, which waits
for nothing else) does the same in its place.
"""

import argparse
import contextlib
import io
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from configs.load import ConfigError, load
from configs.run import RunConfig, world_problems
from launch.machines import Machines, deepspeed_line
from launch.processes import family, parent, send
from pretrain.device import ON_CPU
from pretrain.folder import strangers
from pretrain.stopping import StopFile, forget_stop
from pretrain.watch import died, ends, failure, halted

ROOT = Path(__file__).resolve().parent.parent
MARK = "\x1eBAJIE "
"""What opens a line for the user; the same as pretrain/monitor.py's, which imports torch."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_S = 600.0
"""From a stop to the end of whoever has not saved: up to two steps and a checkpoint on a slow disk.
A step of a large model takes a minute; who is in a hurry says stop twice."""
FAILED_PEER_GRACE_S = 15.0
"""Once a rank has failed its peers wait in a collective for ever; this is for their last words."""
FAR_S = 10.0
"""For what is left on other machines to be ended by ssh."""
LOGGED_EVERY_S = 30.0
"""Of the lines that replace one another a terminal shows all, a file one in so many seconds."""
EXCEPTION = re.compile(r"(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Interrupt)\b.*)")
RETURN_CODE = re.compile(r"exits with return code = (-?\d+)")


def main(argv: list[str]) -> int:
    """The verb; the exit code is the job's own, 137 where it had to be killed."""
    parser = argparse.ArgumentParser("python -m launch train", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a page like configs/runs/cpm-small-1gpu.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. run.steps=100"
    )
    parser.add_argument("--devices", type=int, default=1, help="processes on this machine")
    parser.add_argument(
        "--hostfile", help="DeepSpeed's hostfile: --devices on each of its machines"
    )
    parser.add_argument(
        "--nodes", type=int, default=1, help="machines that start this, each its own"
    )
    parser.add_argument(
        "--node-rank", type=int, default=0, help="the number of this machine, from 0"
    )
    parser.add_argument("--master", metavar="HOST:PORT", help="of machine 0, reached by all")
    parser.add_argument("--gpu", action="store_true", help="GPUs; without it the CPU is used")
    parser.add_argument(
        "--stopped-code", type=int, default=0, help="exit code of a run that was told to stop"
    )
    parser.add_argument("--grace-s", type=float, default=GRACE_S, help="for saving, when stopped")
    parser.add_argument("--dry-run", action="store_true", help="print the line, start nothing")
    args = parser.parse_intermixed_args(argv)
    _show_what_it_can()
    config = load(args.config, RunConfig, args.overrides)
    machines = Machines.of(args.nodes, args.node_rank, args.master, args.hostfile)
    run = Path(config.run.out)
    if problems := [*world_problems(config, machines.processes(args.devices)), *strangers(run)]:
        raise ConfigError("\n".join(problems))
    gpu = args.gpu or os.environ.get("BAJIE_GPU") == "1"
    words = [args.config, *args.overrides]
    name = f"launcher-{args.node_rank}.log" if args.node_rank else "launcher.log"
    log = run / "logs" / name
    command = deepspeed_line(words, args.devices, gpu=gpu, machines=machines, logs=log.parent)
    _put(sys.stdout, "$ " + shlex.join(["deepspeed", *command[2:]]) + "\n")
    if args.dry_run:
        return 0
    machines.write(args.devices, log.parent, gpu)
    if args.node_rank == 0:
        forget_stop(run)
    # The launchers of several machines do not know of one another: whoever started them all does.
    restarts = 0 if machines.several else config.faults.restarts
    for left in range(restarts, -1, -1):
        with open(log, "ab", buffering=0) as stream:
            job = Job(
                [*command, "--launched"],
                environment(gpu),
                stream,
                ranks=None if args.hostfile else args.devices,
                hosts=machines.prefixes,
                far=tuple(machines.slots),
                grace_s=args.grace_s,
                folder=run,
            )
            code = job.run()
        if code and not job.complained:
            why = "; ".join(filter(None, [job.dead, job.last_error])) or "no rank said why"
            _put(
                sys.stderr, f"bajie: the job ended with code {code}: {why}; see {log} (任务失败)\n"
            )
        if not (left and code and job.may_restart):
            break
        command = deepspeed_line(words, args.devices, gpu=gpu, machines=machines, logs=log.parent)
        _put(
            sys.stdout,
            f"starting again, {left - 1} more times at most (faults.restarts, 自动重启)\n",
        )
    return args.stopped_code if job.stopped and not code else code


def _show_what_it_can() -> None:
    """A sample may hold what the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def environment(gpu: bool) -> dict[str, str]:
    """What the job inherits on this machine: our Python first, the CPU unless `gpu`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, "PATH": path}
    return env if gpu else {**env, **ON_CPU}


@dataclass
class Job:
    """A launcher and its ranks, from start to the last of them gone."""

    command: list[str]
    env: dict[str, str]
    log: IO[bytes]
    """Everything that launcher and ranks print."""
    ranks: int | None = None
    """How many must report a good end; None: not known (several machines)."""
    hosts: frozenset[str] = frozenset()
    """What pdsh puts in front of the lines of a machine, with a colon."""
    far: tuple[str, ...] = ()
    """The machines of a hostfile."""
    grace_s: float = GRACE_S
    """From the first signal to the kill."""
    folder: Path | None = None
    """The run folder, where the ranks are on a roll."""
    complained: bool = False
    """Whether a rank has said what is wrong."""
    last_error: str = ""
    """The last line that looks like an exception."""
    dead: str = ""
    """The ranks that died without a word."""
    mistaken: bool = False
    """Whether a rank ended with a sentence for the user (code 2), which no restart would mend."""
    _process: "subprocess.Popen[bytes] | None" = None
    _signals: list[int] = field(default_factory=list)
    _deadline: float | None = None
    _failed: bool = False
    _killed: bool = False
    _good_ends: int = 0
    _began: float = field(default_factory=time.time)
    _rest: bytes = b""
    _passing: bool = False
    _shown_s: float = field(default_factory=time.monotonic)
    _stop_file: StopFile | None = None

    def run(self) -> int:
        """Start, forward signals, show marked lines; returns the exit code of the job."""
        if self.folder is not None:
            self._stop_file = StopFile(self.folder, left_counts=False)
        # Who ignores a signal goes on ignoring it: nohup, a script's background job.
        heard = [n for n in STOPS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        self._process = subprocess.Popen(
            self.command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        keeper, leash = self._start_keeper()
        try:
            self._watch(self._process)
        except BaseException:
            self._let_save()
            raise
        finally:
            self._kill_all()  # whatever happened above, nothing of the job stays behind
            os.write(leash, b"done")
            os.close(leash)
            os.waitpid(keeper, 0)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._finish_line()
        return self._code(self._process.wait())

    @property
    def stopped(self) -> bool:
        """Whether somebody told us to stop, or ranks of ours by way of another machine."""
        told = self.folder is not None and halted(self.folder, self._began - 1)
        return bool(self._signals) or told

    @property
    def may_restart(self) -> bool:
        """Whether the end was nobody's will: no signal to us, no mistake in the settings."""
        return not self._signals and not self.mistaken

    def _start_keeper(self) -> tuple[int, int]:
        """Fork the keeper; returns its pid and the leash, a pipe that ends unsaid if we die."""
        held, leash = os.pipe()
        keeper = os.fork()
        if keeper:
            os.close(held)
            return keeper, leash
        try:
            os.setsid()  # what is sent to our group, Ctrl-C too, is ours alone
            os.close(leash)
            if not os.read(held, 4):
                self._let_save()
                self._kill_all()
        finally:
            os._exit(0)

    def _let_save(self) -> None:
        """Nobody watches any more: the ranks save, within the grace, and their pipe is kept
        empty."""
        assert self._process is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        deadline = time.monotonic() + self.grace_s
        self._tell()
        while self._family() and time.monotonic() < deadline:
            self._keep(self._process.stdout.read(1 << 16) or b"")
            time.sleep(0.1)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        told = 0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while process.poll() is None or (self._signals and self._outlived()):
                if selector.select(0.2):
                    self._read(process.stdout)
                if not self._signals and self._stop_file is not None and self._stop_file.asked():
                    self._signals.append(signal.SIGTERM)
                if len(self._signals) > told:
                    told = len(self._signals)
                    self._stop(again=told > 1)
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._killed = True
                    return
        self._kill_all()  # the launcher is gone; a rank that outlived it is an orphan
        self._read(process.stdout)
        self._line(self._rest.decode("utf-8", "replace"))

    def _outlived(self) -> bool:
        """Whether ranks live on after DeepSpeed's runner, which was told to stop as they were. Its
        launch.py, their parent, would kill them after 30 s: it is ended."""
        ranks = self._rank_processes()
        parents = {parent(rank) for rank in ranks}
        for process in self._family():
            if process.pid in parents:
                send(process, signal.SIGKILL)
        return bool(ranks)

    def _stop(self, again: bool) -> None:
        """A signal came: the ranks are told at once; a second one means now."""
        if again:
            self._deadline = 0.0
            return
        self._say(
            f"stopping: the ranks save and end, {self.grace_s:.0f} s at most; once more: at once "
            "(正在保存并停止，再按一次立即结束)"
        )
        self._deadline = time.monotonic() + self.grace_s
        self._tell()

    def _tell(self) -> None:
        """Tell the ranks to save and end."""
        if self.far and self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / "stop").touch()
            return
        for process in self._rank_processes():
            send(process, signal.SIGTERM)

    def _family(self) -> list[psutil.Process]:
        """Every process of the job."""
        assert self._process is not None
        return family(self._process.pid)

    def _rank_processes(self) -> list[psutil.Process]:
        """The ranks proper, not workers that they forked; the launcher if there are none yet."""
        ranks: dict[int, psutil.Process] = {}
        for process in self._family():
            try:
                if any(word.startswith("--local_rank") for word in process.cmdline()):
                    ranks[process.pid] = process
            except psutil.Error:
                continue
        proper = [p for p in ranks.values() if parent(p) not in ranks]
        if not proper and self._process is not None and self._process.poll() is None:
            proper = [psutil.Process(self._process.pid)]
        return proper

    def _kill_all(self) -> None:
        if self._killed and self._process is not None:
            # They hang: each leaves its stacks in RUN/logs before it goes.
            for process in self._rank_processes():
                if process.pid != self._process.pid:
                    send(process, signal.SIGUSR2)
            time.sleep(0.5)
            self._end_far()
        for _ in range(3):  # a process may fork while we look
            left = [process for process in self._family() if process.is_running()]
            for process in left:
                send(process, signal.SIGKILL)
            if not psutil.wait_procs(left, timeout=2)[1]:
                return

    def _end_far(self) -> None:
        """End what hangs on the machines of a hostfile, known by the job's port: DeepSpeed's own
        way would end every job there that it has started for this user."""
        if self.far and "--master_port" in self.command:
            port = self.command[self.command.index("--master_port") + 1]
            # [m]: or the shell that runs this line over there would be found too
            line = ["pdsh", "-S", "-w", ",".join(self.far), f"pkill -f '[m]aster_port={port}'"]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                quiet = subprocess.DEVNULL
                subprocess.run(line, env=self.env, stdout=quiet, stderr=quiet, timeout=FAR_S)

    def _code(self, code: int) -> int:
        if self._killed:
            return self._failure() if self._failed else 128 + signal.SIGKILL
        died = not 0 <= code < 128  # of a signal, whose negative number DeepSpeed passes on
        if self._signals and (died or code == 1) and self.folder is not None:
            # Who told us has told DeepSpeed too, whose end says nothing: the roll does. Ranks that
            # are not on it had not begun, and nothing is lost.
            begun, well = ends(self.folder, self._began - 1)
            return 0 if begun == well else 1
        if died:
            return 1
        if code == 0 and self.ranks is not None and self._good_ends < self.ranks:
            # deepspeed answers 0 when its own launch.py is killed: count the good ends instead.
            self.last_error = f"{self._good_ends} of {self.ranks} processes ended well"
            return 1
        return code

    def _failure(self) -> int:
        """The code of ranks that failed, where DeepSpeed's launcher waited for a frozen or a busy
        one until it was ended: it says a code only afterwards. The roll has it earlier."""
        told = failure(self.folder, self._began - 1) if self.folder else None
        self.mistaken = self.mistaken or told == 2
        return 2 if self.mistaken else told or 1

    def _dead(self) -> str:
        gone = died(self.folder, self._began - 1) if self.folder else []
        return f"{', '.join(gone)} died" if gone else ""

    # ---- what is printed ------------------------------------------------------------------

    def _read(self, stream: IO[bytes]) -> None:
        while chunk := stream.read(1 << 16):
            self._keep(chunk)
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                self._line(line.decode("utf-8", "replace"))

    def _keep(self, chunk: bytes) -> None:
        with contextlib.suppress(OSError):  # a disk that fails or is full: the job goes on
            self.log.write(chunk)
            self.log.flush()

    def _line(self, line: str) -> None:
        host, colon, rest = line.partition(": ")
        chatter, mark, text = (rest if colon and host in self.hosts else line).partition(MARK)
        if mark:
            self._show(text)
        if "exits successfully" in chatter:
            self._good_ends += 1
        elif "Killing subprocess" in chatter and self._deadline is None and not self._signals:
            self._failed = True
            self.dead = self._dead()
            self._deadline = time.monotonic() + FAILED_PEER_GRACE_S
        elif chatter.startswith("bajie: "):
            self._show(chatter)  # said before the run folder was known
        elif found := EXCEPTION.match(chatter):
            self.last_error = found[1][:300]
        elif found := RETURN_CODE.search(chatter):
            self.mistaken = self.mistaken or found[1] == "2"
            killed = "; it was killed: out of memory?" if found[1] == "-9" else ""
            self.last_error = self.last_error or f"a process ended with code {found[1]}{killed}"

    def _show(self, text: str) -> None:
        if text.startswith("bajie: "):
            self.complained = True
            self._finish_line()
            _put(sys.stderr, text + "\n")
        elif text.startswith("\r"):
            if sys.stdout.isatty():  # a line that the next one replaces
                width = shutil.get_terminal_size().columns - 1
                _put(sys.stdout, "\r\x1b[2K" + text[1 : width + 1])
                self._passing = True
            elif time.monotonic() > self._shown_s + LOGGED_EVERY_S:  # a file: some of them
                self._shown_s = time.monotonic()
                self._say(text[1:])
        else:
            self._say(text)

    def _say(self, text: str) -> None:
        _put(sys.stdout, ("\r\x1b[2K" if self._passing else "") + text + "\n")
        self._passing = False

    def _finish_line(self) -> None:
        if self._passing:
            _put(sys.stdout, "\n")
            self._passing = False


def _put(stream: IO[str], text: str) -> None:
    """Write to the terminal, if it is still there: the job goes on without, and the log has it."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:  # the reader has left (| head), the connection is lost, the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
