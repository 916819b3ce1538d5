"""The tasks of a stage as a job array of a Slurm cluster.

    driver                                         nodes
    stage folder <-- slurm.json (name, then id)
       |---sbatch---> job array ------------------> setup, Python, attempt(rank) ...
       |   squeue <-- who waits, who runs               completions/RANK or failures/RANK.json
       v
    every rank has its marker: the next stage      squeue knows it no more, no marker: it died

The driver runs where sbatch does and waits for each stage. Ctrl-C and SIGTERM cancel the array. A
driver that was killed leaves it running; the next one knows it by its name, which is made of the
stage's folder, and waits for it instead of submitting twice.
"""

import contextlib
import getpass
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
from datatrove.executor import SlurmPipelineExecutor

from configs import executing
from data_pipeline.aside import aside
from data_pipeline.executors import Crew, Executor, Surroundings, attempt, raise_again, where
from data_pipeline.shards import CorpusError

NOTE = "slurm.json"
IN_TASK = "BAJIE_SLURM_TASK"
"""Environment variable that tells a task from a driver that itself runs in a job."""
PATIENCE_S = 900.0
"""How long squeue may fail before the driver gives up (the array goes on)."""
LAG_S = 60.0
"""How long a file written on one node may take to be seen on another (NFS: acdirmax)."""
NEVER = {
    *("JobHeldAdmin", "JobHoldMaxRequeue", "launch failed requeued held", "BadConstraints"),
    *("PartitionTimeLimit", "PartitionNodeLimit", "DependencyNeverSatisfied"),
}
"""Reasons of squeue for which a job waits until somebody does something."""


def crew(config: executing.Slurm, workers: int) -> Crew:
    """Slurm's nodes; so many tasks at a time, 0 for as many as the queue lets."""
    return lambda blocks, tasks, folder: OnSlurm(list(blocks), tasks, folder, config, workers)


class OnSlurm(Executor, SlurmPipelineExecutor):  # type: ignore[misc]
    """datatrove's Slurm executor with a driver that waits, finds its array again, and says why."""

    tasks_per_job: int

    def __init__(
        self, blocks: list[Any], tasks: int, folder: Path, config: executing.Slurm, workers: int
    ) -> None:
        super().__init__(
            blocks,
            tasks=tasks,
            time=config.time,
            partition=config.partition or "",
            cpus_per_task=config.cpus_per_task,
            workers=workers or -1,
            job_name=name_of(folder),
            qos="",
            max_array_size=-1,
            tasks_per_job=config.tasks_per_job,
            logging_dir=str(folder.resolve()),
            with_srun=False,
        )
        self.config = config
        self.surroundings = Surroundings.here()

    def run(self) -> None:
        """Do the tasks that have no marker: on a node its own, in the driver all, by the array."""
        if IN_TASK in os.environ:
            ranks = orjson.loads((self.folder / "ranks_to_run.json").read_bytes())
            first = int(os.environ["SLURM_ARRAY_TASK_ID"]) * self.tasks_per_job
            failed = [self._on_node(rank) for rank in ranks[first : first + self.tasks_per_job]]
            sys.exit(any(failed))
        noted = Array.of(self.folder)
        array = noted or Array(self.folder, self.job_name, self.tasks_per_job)
        try:
            if noted is None or not array.queue():
                self._submit(array)
            self._wait(array)
        except (CorpusError, RuntimeError, OSError, KeyboardInterrupt, SystemExit) as error:
            if not isinstance(error, Unreachable):
                array.cancel()
            raise
        (self.folder / NOTE).unlink(missing_ok=True)

    def _on_node(self, rank: int) -> bool:
        if (failure := attempt(self, rank, self.surroundings)) is not None:
            with aside(self.folder / "failures" / f"{rank:05d}.json") as file:
                file.write(orjson.dumps(failure))
        return failure is not None

    # ---- submitting

    def _submit(self, array: "Array") -> None:
        cancel_others(self.folder)
        self.forget()
        most = _largest_array()
        self.tasks_per_job = max(self.tasks_per_job, -(-len(self.get_incomplete_ranks()) // most))
        array.tasks_per_job = self.tasks_per_job
        array.write_note()
        try:
            self.launch_job()
        except FileNotFoundError:
            (self.folder / NOTE).unlink()
            raise CorpusError(
                "data.executor is slurm, but there is no sbatch on this machine; start the build "
                "on a login node of the cluster, or set data.executor: local (找不到 sbatch)"
            ) from None
        except subprocess.CalledProcessError:
            script = str(self.folder / "launch_script.slurm")
            reason = _ask("sbatch", "--test-only", script)[1] or "it said no more"
            raise CorpusError(
                f"sbatch refused the job of {self.folder.name}: {reason[:300]}; correct data.slurm "
                "(Slurm 拒绝了作业)"
            ) from None
        array.job = str(self.job_id)
        array.write_note()

    def launch_merge_stats(self) -> None:
        """Nothing: a stage's summaries say more, and a job for it would wait in the queue."""

    def save_executor_as_json(self, indent: int = 4) -> None:
        """Nothing: what a stage was made from is in its key."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """sbatch's options: datatrove's, without what the page leaves to the cluster."""
        chosen = super().get_sbatch_args(max_array)
        chosen.pop("mem-per-cpu")
        for name in ("output", "error"):
            chosen[name] = f'"{chosen[name]}"'  # a path of the page, which may hold blanks
        if not chosen["partition"]:
            chosen.pop("partition")
        if self.config.memory_gb_per_task is not None:
            chosen["mem"] = f"{max(1, round(self.config.memory_gb_per_task * 1e9 / 2**20))}M"
        for option in self.config.sbatch:
            name, _, value = option.partition("=")
            chosen[name] = value
        return chosen

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """The script of a task: the page's own lines, the driver's surroundings, Python."""
        told = [
            f"#SBATCH --{k}={v}" if v != "" else f"#SBATCH --{k}" for k, v in sbatch_args.items()
        ]
        path = shlex.quote(self.surroundings.python_path)
        python = shlex.quote(self.config.python or sys.executable)
        pickled = shlex.quote(str(self.folder / "executor.pik"))
        lines = [
            "#!/bin/bash",
            *told,
            self.config.setup,
            f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}} {IN_TASK}=1",
            f"exec {python} -m datatrove.tools.launch_pickled_pipeline {pickled}",
        ]
        return "\n".join(lines) + "\n"

    # ---- waiting

    def _wait(self, array: "Array") -> None:
        """Until every rank has its marker. CorpusError names a task that failed or died."""
        started, missed = time.monotonic(), dict[int, float]()
        ranks = orjson.loads((self.folder / "ranks_to_run.json").read_bytes())
        element = {rank: place // array.tasks_per_job for place, rank in enumerate(ranks)}
        while left := self.get_incomplete_ranks():
            now, queue = time.monotonic(), array.queue()
            self._raise_failures()
            self.say(_in_words(queue))
            for reason in {job["reason"] for job in queue.values()} & NEVER:
                raise CorpusError(
                    f"Slurm will not start the tasks of {self.folder.name} ({reason}); correct "
                    f"data.slurm or ask its keepers, squeue --name={array.name} (作业被挂起)"
                )
            gone = [] if None in queue else [r for r in left if element.get(r) not in queue]
            missed = {rank: missed.get(rank, now) for rank in gone}
            for rank in [rank for rank, since in missed.items() if now - since > 3.0][:1]:
                told = array.ended(element.get(rank, -1))
                # A task that ended well has its marker, but this machine may not see it yet.
                failed = told.get("JobState", "COMPLETED") != "COMPLETED"
                if failed or now - missed[rank] > LAG_S:
                    self._raise_failures()
                    if not self.is_rank_completed(rank):
                        raise self._death(array, rank, element.get(rank, -1), told)
            time.sleep(min(15.0, max(1.0, (now - started) / 20)))

    def _raise_failures(self) -> None:
        for path in sorted((self.folder / "failures").glob("*.json")):
            raise_again(orjson.loads(path.read_bytes()))

    def _death(self, array: "Array", rank: int, element: int, told: dict[str, str]) -> CorpusError:
        state = told.get("JobState", "gone from squeue")
        code = f", exit code {told['ExitCode']}" if "ExitCode" in told else ""
        place = where(self.folder, rank)
        if place is None:
            place = f"node {told.get('NodeList') or 'unknown'}, before it began"
        log = Path(self.slurm_logs_folder) / f"{array.id()}_{element}.out"
        words = _last_words(log)
        return CorpusError(
            f"task {rank} of {self.folder.name}, Slurm job {array.id()}_{element}, died on {place}"
            f": {state}{code}{words}; what is done is kept: give tasks more "
            "(data.slurm.memory_gb_per_task, data.slurm.time) or leave a bad node out "
            "(data.slurm.sbatch: [exclude=NODE]), and build again (Slurm 任务中途死亡)"
        )


class Array:
    """A job array in the queue; it may have been submitted by a driver that is dead."""

    def __init__(self, folder: Path, name: str, tasks_per_job: int, job: str | None = None) -> None:
        self.folder, self.name, self.tasks_per_job, self.job = folder, name, tasks_per_job, job
        self._silent_since: float | None = None

    @classmethod
    def of(cls, folder: Path) -> "Array | None":
        """The one that the folder's note tells of."""
        try:
            told = orjson.loads((folder / NOTE).read_bytes())
            return cls(folder, told["name"], told["tasks_per_job"], told["job"])
        except (OSError, ValueError, KeyError):
            return None

    def write_note(self) -> None:
        """Before it is submitted, so that it can be found, and after, with its number."""
        told = {"name": self.name, "tasks_per_job": self.tasks_per_job, "job": self.job}
        with aside(self.folder / NOTE) as file:
            file.write(orjson.dumps(told))

    def id(self) -> str:
        """The number of the array."""
        return self.job or "?"

    def queue(self) -> dict[int | None, dict[str, str]]:
        """Elements that wait or run, by number (None: not yet told apart). Waits while Slurm's
        controller does not answer; Unreachable after PATIENCE_S."""
        since = time.monotonic()
        user = getpass.getuser()
        while True:
            code, said = _ask(
                *("squeue", "--noheader", "--array", f"--user={user}", f"--name={self.name}"),
                "--format=%F|%K|%T|%r",
            )
            if code == 0:
                break
            if code == 127:
                raise Unreachable(
                    f"{self.folder} is the work of a Slurm job ({self.name}), and there is no "
                    "squeue on this machine to ask whether it goes on; build on a login node, or "
                    f"cancel the job and remove {self.folder / NOTE} (本机没有 squeue)"
                )
            if time.monotonic() - since > PATIENCE_S:
                raise Unreachable(
                    f"squeue has not answered for {PATIENCE_S / 60:.0f} minutes ({said[:200]}); "
                    "the jobs go on: build again when it does, and they are found (Slurm 无响应)"
                )
            time.sleep(5.0)
        found: dict[int | None, dict[str, str]] = {}
        for line in said.splitlines():
            job, element, state, reason = line.split("|", 3)
            self.job = job
            found[int(element) if element.isdigit() else None] = {"state": state, "reason": reason}
        return found

    def ended(self, element: int) -> dict[str, str]:
        """What Slurm remembers of an element that is over: JobState, ExitCode, NodeList."""
        code, said = _ask("scontrol", "--oneliner", "show", "job", f"{self.id()}_{element}")
        if code == 0 and "JobState=" in said:
            return dict(re.findall(r"\b(JobState|ExitCode|NodeList)=(\S+)", said.splitlines()[0]))
        code, said = _ask(
            *("sacct", "--noheader", "--parsable2", "--allocations"),
            *("--jobs", f"{self.id()}_{element}", "--format=State,ExitCode,NodeList"),
        )
        parts = said.splitlines()[0].split("|") if code == 0 and "|" in said else []
        return dict(zip(("JobState", "ExitCode", "NodeList"), parts, strict=False))

    def cancel(self) -> None:
        """Call it off, and wait a while until nothing of it writes any more."""
        with contextlib.suppress(Unreachable):  # then the note stays: it goes on
            until = time.monotonic() + 60.0
            while self.queue() and time.monotonic() < until:
                _ask("scancel", self.id())
                time.sleep(1.0)
            (self.folder / NOTE).unlink(missing_ok=True)


class Unreachable(CorpusError):
    """Slurm does not answer; what it was given to do may go on."""


def name_of(folder: Path) -> str:
    """The name of a stage's array, the same for every driver: bajie-STAGE-HASH of the folder."""
    stage = folder.name.rpartition("-")[0] or folder.name
    return f"bajie-{stage}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"


def still_at_work(out: Path, executor: str) -> list[Path]:
    """Folders of stages whose array goes on, to be left alone. CorpusError if `executor` is not
    slurm: another crew would write into them as well."""
    folders = []
    for note in sorted(out.glob(f"stages/*/{NOTE}")):
        array = Array.of(note.parent)
        if array is None or not array.queue():
            note.unlink(missing_ok=True)
        elif executor == "slurm":
            folders.append(note.parent)
        else:
            raise CorpusError(
                f"Slurm job {array.id()} of an earlier build still works on {note.parent}; wait "
                f"for it, scancel {array.id()}, or set data.executor: slurm to join it "
                "(此前提交的 Slurm 作业仍在运行)"
            )
    return folders


def cancel_others(folder: Path) -> None:
    """Call off arrays of this corpus whose stage is no longer asked for: the page has changed."""
    for note in folder.parent.glob(f"*/{NOTE}"):
        if note.parent != folder and (array := Array.of(note.parent)) is not None:
            array.cancel()


def _largest_array() -> int:
    """How many elements the cluster's job arrays may have."""
    code, said = _ask("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE) if code == 0 else None
    return max(1, int(found[1]) - 1) if found else 1000


def _in_words(queue: dict[int | None, dict[str, str]]) -> str:
    states = Counter(job["state"].lower() for job in queue.values())
    reasons = {job["reason"] for job in queue.values() if job["state"] == "PENDING"}
    why = f" ({', '.join(sorted(reasons - {'None', ''})[:2])})" if reasons - {"None", ""} else ""
    return ", ".join(f"{n} {state}" for state, n in sorted(states.items(), reverse=True)) + why


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
    except OSError:
        return f", without a word in {log}"
    return f', its last words: "{lines[-1].strip()[:200]}"' if lines else f", nothing in {log}"


def _ask(*command: str) -> tuple[int, str]:
    """Exit code and what was said, an error in one line; 127 if there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        return 127, f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]} did not answer for two minutes"
    said = done.stdout if done.returncode == 0 else done.stderr or done.stdout
    return done.returncode, said.strip() if done.returncode == 0 else " ".join(said.split())
