"""Our blocks on datatrove's executors: the door to datatrove.

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
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import orjson
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats, Stats

from configs.load import to_dict
from data_pipeline.shards import CorpusError, aside

logger.remove()  # datatrove's own sink on stderr; each task logs to its stage's folder

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


class Executor(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor with a quiet terminal, summaries, and workers that may die."""

    def run(self) -> None:
        """Do the tasks that have no marker. CorpusError if a task cannot be done."""
        ranks = self.get_incomplete_ranks()
        workers = min(self.workers, len(ranks))
        if workers <= 1:
            for rank in ranks:
                _task(rank, self)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_pipeline.intake"])
        pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(self,))
        try:
            futures = [pool.submit(_task, rank) for rank in ranks]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
            pool.shutdown()
        except BrokenProcessPool:
            raise CorpusError(
                "a worker process was killed from outside, most likely for want of memory; what is "
                "done is kept: build again with fewer data.workers. A script that builds a corpus "
                'needs `if __name__ == "__main__":` (工作进程被杀，多半是内存不足)'
            ) from None
        finally:
            for process in list((pool._processes or {}).values()):
                process.terminate()  # after an error the others need not finish
            pool.shutdown(cancel_futures=True)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        log = Path(self.logging_dir.path) / "logs" / f"chatter_{rank:05d}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        _reset_peak_rss()
        self._started = time.monotonic(), time.process_time()
        try:
            with log.open("w") as file, contextlib.redirect_stderr(file):
                return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            logger.remove()

    def mark_rank_as_completed(self, rank: int) -> None:
        """Write what the task counted, then datatrove's marker."""
        counts: Counter[str] = Counter()
        for block in self.pipeline:
            counts.update(block.counts)
        wall, cpu = self._started
        measured = {
            "elapsed_s": time.monotonic() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_rss_mb": _peak_rss_mb(),
        }
        with aside(Path(self.logging_dir.path) / "summary" / f"{rank:05d}.json") as file:
            file.write(orjson.dumps(dict(counts) | measured, option=orjson.OPT_SORT_KEYS))
        super().mark_rank_as_completed(rank)


def run(
    out: Path,
    name: str,
    blocks: Sequence[Block],
    tasks: int,
    workers: int,
    inputs: Sequence[Any],
    watch: Callable[[Path, int], contextlib.AbstractContextManager[None]],
) -> Stage:
    """Run a stage, or what is left of it; `inputs` are the keys of what it reads."""
    key = stage_key(blocks, tasks, inputs)
    folder = out / "stages" / f"{name}-{key}"
    for block in blocks:
        block.folder = folder
    executor = Executor(list(blocks), tasks=tasks, workers=workers, logging_dir=str(folder))
    with watch(folder, len(executor.get_incomplete_ranks())):
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


_executor: Executor | None = None  # a worker's, given to it once


def _begin_worker(executor: Executor) -> None:
    global _executor
    _executor = executor
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker dies with the build: one that lived on would write under the next one's feet."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _task(rank: int, executor: Executor | None = None) -> None:
    executor = copy(executor or _executor)
    assert executor is not None
    executor.pipeline = [block.fresh() for block in executor.pipeline]
    executor._run_for_rank(rank)


def _reset_peak_rss() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_mb() -> float:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
