"""Where the tasks of a corpus build run: processes of this machine, a Ray cluster, a Slurm cluster.

Nothing here changes a byte of a corpus; a build begun under one executor may be finished under
another. docs/corpus-at-scale.md says how.
"""

import re
from dataclasses import dataclass

SLURM_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}|infinite", re.IGNORECASE)


def slurm_seconds(limit: str) -> float:
    """Seconds of a time limit as SLURM_TIME allows it (sbatch(1), --time); inf for `infinite`."""
    if limit.lower() == "infinite":
        return float("inf")
    days, _, rest = limit.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(n * unit for n, unit in zip(numbers, units, strict=False))


@dataclass(frozen=True)
class Ray:
    """data.executor: ray."""

    address: str | None = None
    """null starts Ray on this machine for the build; else a running cluster: `auto` or HOST:PORT.
    Its nodes see data.out and the sources at the same paths."""
    cpus_per_task: float = 1.0
    """Cores that a task reserves."""
    memory_gb_per_task: float | None = None
    """Memory (10^9 bytes) that a task reserves; null reserves none."""
    retries: int = 1
    """How often a task is tried again whose process or node died. An error is not tried again."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if self.cpus_per_task <= 0:
            found.append(f"cpus_per_task: is {self.cpus_per_task}, must be more than 0")
        if self.memory_gb_per_task is not None and self.memory_gb_per_task <= 0:
            found.append(f"memory_gb_per_task: is {self.memory_gb_per_task}, must be more than 0")
        if self.retries < 0:
            found.append(f"retries: is {self.retries}, must be 0 or more")
        return found


@dataclass(frozen=True)
class Slurm:
    """data.executor: slurm."""

    partition: str | None = None
    """null is the cluster's default."""
    time: str = "24:00:00"
    """Limit of a job, as sbatch reads it: minutes, H:M:S, or D-H:M:S."""
    cpus_per_task: int = 1
    """Cores of a task."""
    memory_gb_per_task: float | None = 4.0
    """Memory (10^9 bytes) of a task; null asks for none."""
    tasks_per_job: int = 1
    """Tasks that one element of a job array does, one after another; more if the cluster's
    MaxArraySize wants it."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, `account=lab`, `exclude=n[01-04]`, `exclusive`."""
    setup: str = ""
    """Shell lines that a node runs first: `module load gcc`, `source ENV/bin/activate`."""
    python: str | None = None
    """The Python on the nodes; null is the one that runs the build, at the same path."""

    def problems(self) -> list[str]:
        """Numbers outside their range, options with dashes."""
        found = []
        for name in ("cpus_per_task", "tasks_per_job"):
            if getattr(self, name) < 1:
                found.append(f"{name}: is {getattr(self, name)}, must be at least 1")
        if self.memory_gb_per_task is not None and self.memory_gb_per_task <= 0:
            found.append(f"memory_gb_per_task: is {self.memory_gb_per_task}, must be more than 0")
        if not SLURM_TIME.fullmatch(self.time):
            found.append(
                f"time: is '{self.time}', must be minutes, H:M:S or D-H:M:S, in quotes (时限格式)"
            )
        for option in self.sbatch:
            name = option.partition("=")[0]
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                found.append(
                    f"sbatch: '{option}' must be the long name of an option of sbatch without its "
                    "dashes, as in account=lab (写长选项名，不带横线)"
                )
            elif name in ("array", "job-name", "output", "error", "wrap", "test-only"):
                found.append(f"sbatch: '{name}' is the build's own to choose (由程序决定)")
        return found
