"""Stages whose tasks do what a test wants of them, and a driver for them in a process of its own.

python tests/stage_jobs.py EXECUTOR OUT WHAT [key=value ...]
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.corpus import Data
from configs.load import from_dict
from data_pipeline import blocks, executors, progress
from data_pipeline.shards import CorpusError

TASKS = 3
SMALL: dict[str, Any] = {"slurm": {"memory_gb_per_task": 0.9}}
"""What a task asks of a cluster of one small node."""


class Job(blocks.Block):
    """Task 1 does `what`: waits for OUT/open, dies, fails; then all write their number."""

    name = "job"

    def __init__(self, out: Path, what: str) -> None:
        super().__init__(what=what)
        self.out, self.what = out, what

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        if rank == 1:
            getattr(self, self.what)()
        path = self.folder / "data" / str(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(rank))
        self.counts["numbers"] += rank
        yield from ()

    def fine(self) -> None:
        """Nothing more."""

    def wait(self) -> None:
        """Until the test opens the gate."""
        while not (self.out / "open").exists():
            time.sleep(0.02)

    def die(self) -> None:
        """As if the kernel had killed it; not a second time."""
        with (self.out / "deaths").open("a") as file:
            file.write("x")
        if not (self.out / "immune").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def blame(self) -> None:
        """The user's mistake."""
        raise CorpusError("line 7 is not JSON; correct data.sources (不是 JSON)")

    def fill(self) -> None:
        """The disk's."""
        raise OSError(errno.ENOSPC, "No space left on device", "a/file")

    def bug(self) -> None:
        """Ours."""
        raise KeyError("forgotten")


def stage(executor: str, out: Path, what: str, **data: Any) -> blocks.Stage:
    """Run the stage on an executor, from where it stands."""
    source = {"kind": "jsonl", "name": "none", "path": "none"}
    given = {"out": str(out), "sources": [source], "workers": 2, "executor": executor}
    page = from_dict(Data, given | SMALL | data)
    watch = progress.Progress().watch("job", 0)
    executors.still_at_work(out, executor)
    with executors.crew(page) as crew:
        return blocks.run(out, "job", [Job(out, what)], TASKS, crew, [], watch)


if __name__ == "__main__":
    import stage_jobs  # not __main__: tasks elsewhere import it by its name

    try:
        stage_jobs.stage(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
    except ValueError as error:
        sys.exit(str(error))
