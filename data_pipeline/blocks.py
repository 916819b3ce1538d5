"""Our blocks, and the stages of a build that they make: the door to datatrove.

    run(name, [block, ...], tasks) -> Stage       one folder OUT/stages/NAME-HASH:
                                                    completions/  datatrove's markers, empty files
        HASH = parameters of the blocks,            summary/      what each task counted
               text of the modules they use,        progress/     how far each task is
               HASH of the stages they read         logs/         what libraries had to say
                                                    data/         shards, tables, indexes

A task that was done is never done again; a folder whose HASH nobody asks for any more is never
read. Since a marker is an empty file, everything that could change a task's output is in the HASH.
Workers start by forkserver: a script that builds a corpus needs `if __name__ == "__main__":`.
"""

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import Stats

from configs.load import to_dict
from data_pipeline.executors import Crew, told_to_stop

__all__ = ["Document"]  # datatrove's own

Documents = Iterator[Document]
SPLITS = ("train", "valid")


# ---- stages


@dataclass(frozen=True)
class Stage:
    """A finished stage."""

    name: str
    folder: Path
    key: str
    """Hash of everything its bytes depend on."""
    tasks: int
    counts: "Counter[str]"
    """Totals over the tasks: documents, bytes, cpu_s ...; peak_rss_mb is the largest."""

    @property
    def data(self) -> Path:
        """Where its outputs lie."""
        return self.folder / "data"


class Block(PipelineStep):  # type: ignore[misc]
    """A datatrove step that knows what its output depends on, counts, and tells how far it is."""

    type = "bajie"
    modules: ClassVar[tuple[str, ...]] = ()
    """Modules of data_pipeline whose text decides the output (blocks itself always does)."""

    def __init__(self, **parameters: Any) -> None:
        super().__init__()
        self.parameters = parameters
        self.counts: Counter[str] = Counter()
        self.folder = Path()  # set by run()
        self._told = 0.0

    def fresh(self) -> "Block":
        """The same block with nothing counted: each task starts from one."""
        block = copy(self)
        block.counts, block.stats = Counter(), Stats(str(self))
        return block

    def tick(self, work: float, rank: int, final: bool = False) -> None:
        """Note in progress/ how much of its work (bytes, about) the task has done."""
        if final or time.monotonic() - self._told > 0.5:
            self._told = time.monotonic()
            path = self.folder / "progress" / f"{rank:05d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(int(work)))


def run(
    out: Path,
    name: str,
    blocks: Sequence[Block],
    tasks: int,
    crew: Crew,
    inputs: Sequence[Any],
    watch: Callable[[Path, int], contextlib.AbstractContextManager[None]],
) -> Stage:
    """Run a stage, or what is left of it; `inputs` are the keys of what it reads, `crew` (of
    executors.py) does the tasks."""
    key = stage_key(blocks, tasks, inputs)
    folder = out / "stages" / f"{name}-{key}"
    for block in blocks:
        block.folder = folder
    executor = crew(blocks, tasks, folder)
    left = len(executor.get_incomplete_ranks())
    with watch(folder, left), told_to_stop():
        if left:
            executor.run()
    return Stage(name, folder, key, tasks, _totals(folder, tasks))


def stage_key(blocks: Sequence[Block], tasks: int, inputs: Sequence[Any]) -> str:
    """Hexadecimal digits that change with parameters, code and inputs."""
    modules = sorted({"blocks", "shards", *(m for block in blocks for m in block.modules)})
    what = [[type(block).__name__, block.parameters] for block in blocks]
    return fingerprint_of([what, code_of(modules), tasks, list(inputs)])


def fingerprint_of(value: Any) -> str:
    """12 hexadecimal digits for plain data and configs."""
    text = orjson.dumps(value, default=_plain, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(text).hexdigest()[:12]


def code_of(modules: Sequence[str]) -> list[str]:
    """A hash of the text of each of data_pipeline's modules: the version of the code."""
    folder = Path(__file__).parent
    return [hashlib.sha256((folder / f"{m}.py").read_bytes()).hexdigest() for m in modules]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else to_dict(value)


def _totals(folder: Path, tasks: int) -> "Counter[str]":
    totals: Counter[str] = Counter()
    for rank in range(tasks):
        counts = orjson.loads((folder / "summary" / f"{rank:05d}.json").read_bytes())
        peak = max(totals["peak_rss_mb"], counts.pop("peak_rss_mb"))
        totals.update(counts)
        totals["peak_rss_mb"] = peak
    return totals
