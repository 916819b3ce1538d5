"""Who does the tasks of a stage: processes of this machine, Ray (on_ray.py), Slurm (on_slurm.py).

    crew(data) --> (blocks, tasks, folder) -> executor.run()
                       for each rank without a marker, here or on another machine:
                       fresh blocks -> their work -> summary/RANK.json -> completions/RANK
                       what went wrong there: failures/RANK.json -> the same error here

An executor decides nothing about the bytes, so nothing of this module is in the key of a stage: a
stage begun by one executor is finished by another.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

from configs.corpus import Data
from data_pipeline.aside import aside
from data_pipeline.shards import CorpusError
from data_pipeline.sources import web

logger.remove()  # datatrove's own sink on stderr; each task logs to its stage's folder

Crew = Callable[[Sequence[Any], int, Path], PipelineExecutor]
"""Blocks, number of tasks, folder of the stage -> what does them when its run() is called."""

ROOT = Path(__file__).resolve().parents[1]
GUESTS = (
    *("datatrove", "jieba", "numba", "numpy", "orjson"),
    *("sentencepiece", "xxhash", "zstandard", "opencc", "pyarrow", "datasets"),
)
"""Packages that bytes may depend on: on another machine they must be of the same version."""


@contextlib.contextmanager
def crew(data: Data) -> Iterator[Crew]:
    """The executor that data.executor names, for one build."""
    if data.executor == "local":
        yield local(data.workers or len(os.sched_getaffinity(0)))
    elif data.executor == "ray":
        from data_pipeline import on_ray  # ray is an extra, and takes a second

        with on_ray.crew(data.ray, data.workers) as hands:
            yield hands
    else:
        from data_pipeline import on_slurm

        yield on_slurm.crew(data.slurm, data.workers)


def still_at_work(out: Path, executor: str) -> list[Path]:
    """Folders of stages on which the nodes of an earlier build go on. CorpusError if `executor`
    cannot join them."""
    if not any(out.glob("stages/*/slurm.json")):
        return []
    from data_pipeline import on_slurm

    return on_slurm.still_at_work(out, executor)


def local(workers: int) -> Crew:
    """So many processes of this machine."""
    return lambda blocks, tasks, folder: Local(
        list(blocks), tasks=tasks, workers=workers, logging_dir=str(folder)
    )


# ---- what every executor does for a task


class Executor(PipelineExecutor):  # type: ignore[misc]
    """A task's story, whoever tells it: quiet, with a summary, from fresh blocks."""

    @property
    def folder(self) -> Path:
        """The stage's."""
        return Path(self.logging_dir.path)

    def say(self, text: str) -> None:
        """For the line of progress: what the tasks of a cluster wait for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "queue").write_text(text)

    def forget(self) -> None:
        """What tasks elsewhere said of themselves, before they are tried again."""
        for said in ("failures", "where"):
            for path in (self.folder / said).glob("*"):
                path.unlink(missing_ok=True)

    def do(self, rank: int) -> None:
        """Do a task in this process."""
        executor = copy(self)
        executor.pipeline = [block.fresh() for block in self.pipeline]
        executor._run_for_rank(rank)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        log = self.folder / "logs" / f"chatter_{rank:05d}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        _reset_peak_rss()
        self._started = time.monotonic(), time.process_time()
        try:
            with log.open("w") as file, contextlib.redirect_stderr(file):
                # Not super(): Ray's keeps its logs in a folder of the node that tasks would share.
                return PipelineExecutor._run_for_rank(self, rank, local_rank, node_rank)
        finally:
            logger.remove()

    def _set_distributed_environment(self, node_rank: int) -> None:
        """For blocks that span nodes, which none of ours does; it would ask Slurm for each task."""

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
        with aside(self.folder / "summary" / f"{rank:05d}.json") as file:
            file.write(orjson.dumps(dict(counts) | measured, option=orjson.OPT_SORT_KEYS))
        super().mark_rank_as_completed(rank)


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


@contextlib.contextmanager
def told_to_stop() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that what runs elsewhere is called off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- processes of this machine


class Local(Executor, LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor with workers that may die."""

    def run(self) -> None:
        """Do the tasks that have no marker. CorpusError if a task cannot be done."""
        ranks = self.get_incomplete_ranks()
        workers = min(self.workers, len(ranks))
        if workers <= 1:
            for rank in ranks:
                self.do(rank)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["data_pipeline.intake"])
        pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(self,))
        try:
            futures = [pool.submit(_do, rank) for rank in ranks]
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


_worker: Executor | None = None  # a worker's executor, given to it once


def _begin_worker(executor: Executor) -> None:
    global _worker
    _worker = executor
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker dies with the build: one that lived on would write under the next one's feet."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(rank: int) -> None:
    assert _worker is not None
    _worker.do(rank)


# ---- other machines


@dataclass(frozen=True)
class Surroundings:
    """What a task on another machine must find there: the same folder, code and packages."""

    cwd: str
    python_path: str
    """Where our packages, and those of the script that builds, are imported from."""
    versions: dict[str, str]

    @classmethod
    def here(cls) -> "Surroundings":
        """Of this process."""
        ours = [str(ROOT), *(path for path in sys.path if path and not _of_python(path))]
        return cls(os.getcwd(), os.pathsep.join(dict.fromkeys(ours)), _versions())

    def enter(self, folder: Path) -> None:
        """Make this process work as if it were the driver. CorpusError says what is different."""
        node = platform.node()
        with contextlib.suppress(OSError):
            os.chdir(self.cwd)
        if os.getcwd() != self.cwd or not folder.is_dir():
            missing = folder if os.getcwd() == self.cwd else self.cwd
            raise CorpusError(
                f"node {node} does not see {missing}; data.out, the sources and the working "
                "directory must lie on a file system that all nodes share (节点看不到共享目录)"
            )
        for name, version in _versions().items():
            if version != self.versions.get(name, version):
                raise CorpusError(
                    f"node {node} has {name} {version}, the build was started with "
                    f"{self.versions[name]}; give all nodes the same environment "
                    "(data.slurm.setup, data.slurm.python or Ray's own): the bytes of a corpus may "
                    "depend on it (节点环境不一致)"
                )


def _of_python(path: str) -> bool:
    return any(Path(path).is_relative_to(p) for p in (sys.prefix, sys.base_prefix))


@functools.cache
def _versions() -> dict[str, str]:
    text = hashlib.sha256()
    for room in ("configs", "data_pipeline"):
        for path in sorted((ROOT / room).rglob("*.py")):
            text.update(path.read_bytes())
    return {
        "Python": ".".join(map(str, sys.version_info[:2])),
        "the code of bajie": text.hexdigest()[:12],
        **{name: importlib.metadata.version(name) for name in GUESTS},
        **web.versions(web.READERS),  # a machine without the extra says so where a page is read
    }


def attempt(executor: Executor, rank: int, surroundings: Surroundings) -> dict[str, Any] | None:
    """Do a task far from the driver; what went wrong, as plain data for `raise_again`."""
    try:
        surroundings.enter(executor.folder)
        where = executor.folder / "where" / f"{rank:05d}"
        where.parent.mkdir(exist_ok=True)
        where.write_text(f"node {platform.node()}, process {os.getpid()}")
        executor.do(rank)
    except Exception as error:
        said = {"text": str(error), "node": platform.node()}
        if isinstance(error, OSError):
            name = None if error.filename is None else str(error.filename)
            return said | {"os": [error.errno, error.strerror or str(error), name]}
        if isinstance(error, ValueError) and type(error).__module__.startswith("data_pipeline"):
            return said | {"sentence": str(error)}
        return said | {"traceback": traceback.format_exc()}
    return None


def raise_again(failure: dict[str, Any]) -> None:
    """Raise here what was raised on another machine."""
    if "sentence" in failure:
        raise CorpusError(failure["sentence"])
    if "os" in failure:
        raise OSError(*failure["os"])
    raise RuntimeError(f"on node {failure['node']}:\n{failure['traceback']}")


def where(folder: Path, rank: int) -> str | None:
    """The node and process that last began a task."""
    try:
        return (folder / "where" / f"{rank:05d}").read_text()
    except OSError:
        return None
