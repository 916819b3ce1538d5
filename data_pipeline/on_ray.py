"""The tasks of a stage on a Ray cluster, or on a Ray started for the build: the door to ray.

    crew(config) --first stage with work--> ray.init -- one for the whole build --> ray.shutdown
    rank --ray task--> attempt() on some node --> None, or what went wrong

Nothing but a rank goes there and nothing but a mistake comes back: documents lie on the file system
that all nodes share. A task whose process or node dies is tried again `retries` times.
"""

import contextlib
import math
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.executor import RayPipelineExecutor

from configs import executing
from data_pipeline.executors import Crew, Executor, Surroundings, attempt, raise_again, where
from data_pipeline.shards import CorpusError

IN_FLIGHT = 1000
"""Tasks handed to a cluster at a time, if data.workers is 0; it runs what it has room for."""
STORE_BYTES = 80_000_000
"""The object store of a Ray of our own: the smallest there is, no document passes through it."""


@contextlib.contextmanager
def crew(config: executing.Ray, workers: int) -> Iterator[Crew]:
    """Ray for one build. CorpusError if it is not installed; joined when a task waits for it."""
    try:
        import ray
    except ModuleNotFoundError:
        raise CorpusError(
            "data.executor is ray, but the package ray is not installed; ./launch/setup.sh ray "
            "installs it, or set data.executor: local (未安装 ray)"
        ) from None
    joined = False

    def hands(blocks: Sequence[Any], tasks: int, folder: Path) -> RayPipelineExecutor:
        nonlocal joined
        executor = OnRay(list(blocks), tasks, folder, config, workers)
        if not ray.is_initialized() and executor.get_incomplete_ranks():
            _join(config, workers)
            joined = True
            _room_for_a_task(config)
        return executor

    try:
        yield hands
    finally:
        if joined:
            ray.shutdown()


def _join(config: executing.Ray, workers: int) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"address": config.address}
    if config.address is None:
        options = {
            "address": "local",
            "num_cpus": math.ceil((workers or len(os.sched_getaffinity(0))) * config.cpus_per_task),
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        host, colon, port = (config.address or "").rpartition(":")
        if colon and port.isdigit():  # ray itself would try for ten minutes
            socket.create_connection((host, int(port)), 10.0).close()
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        raise CorpusError(
            f"Ray at {config.address or 'this machine'} cannot be joined: "
            f"{_one_line(error)}; correct data.ray.address, or set data.executor: local "
            "(无法连接 Ray)"
        ) from None


def _room_for_a_task(config: executing.Ray) -> None:
    """CorpusError if no node of a Ray of our own could ever take a task; others may still grow."""
    import ray

    memory = int((config.memory_gb_per_task or 0) * 1e9)
    offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if config.address is None and all(offer.get("memory", 0) < memory for offer in offers):
        most = max(offer.get("memory", 0) for offer in offers) / 1e9
        raise CorpusError(
            f"data.ray.memory_gb_per_task is {memory / 1e9:g}, this machine offers {most:.1f} GB to"
            " Ray; lower it (内存超出本机)"
        )


class OnRay(Executor, RayPipelineExecutor):  # type: ignore[misc]
    """datatrove's Ray executor; a task that fails ends the stage with its sentence."""

    def __init__(
        self, blocks: list[Any], tasks: int, folder: Path, config: executing.Ray, workers: int
    ) -> None:
        super().__init__(blocks, tasks=tasks, workers=workers or IN_FLIGHT, logging_dir=str(folder))
        self.config = config

    def run(self) -> None:
        """Do the tasks that have no marker. CorpusError if a task cannot be done."""
        import ray

        self.say("handing out tasks")
        self.forget()
        surroundings = Surroundings.here()
        waiting, tries = deque(self.get_incomplete_ranks()), Counter[int]()
        remote = ray.remote(attempt).options(**self._needs(surroundings))
        everything = ray.put(self)
        running: dict[Any, int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    rank = waiting.popleft()
                    running[remote.remote(everything, rank, surroundings)] = rank
                done, _ = ray.wait(list(running), num_returns=1, timeout=1.0)
                for reference in done:
                    rank = running.pop(reference)
                    try:
                        failure = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        tries[rank] += 1
                        if tries[rank] > self.config.retries:
                            raise self._death(rank, tries[rank], error) from None
                        waiting.append(rank)
                    else:
                        if failure is not None:
                            raise_again(failure)
                begun = sum(where(self.folder, rank) is not None for rank in running.values())
                self.say(f"{begun} running, {len(waiting) + len(running) - begun} waiting")
        finally:
            with contextlib.suppress(Exception):
                for reference in running:
                    ray.cancel(reference, force=True)
                ray.wait(list(running), num_returns=max(1, len(running)), timeout=10.0)

    def _needs(self, surroundings: Surroundings) -> dict[str, Any]:
        """What a task asks of the cluster."""
        threads = {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")}
        needs: dict[str, Any] = {
            "num_cpus": self.config.cpus_per_task,
            "max_retries": 0,  # we count them, so that the last one is told by name
            "runtime_env": {"env_vars": {**threads, "PYTHONPATH": surroundings.python_path}},
        }
        if self.config.memory_gb_per_task is not None:
            needs["memory"] = int(self.config.memory_gb_per_task * 1e9)
        return needs

    def _death(self, rank: int, tries: int, error: Exception) -> CorpusError:
        place = where(self.folder, rank) or "a node that did not begin it"
        return CorpusError(
            f"task {rank} of {self.folder.name} died on {place}, try {tries} of "
            f"{self.config.retries + 1} ({type(error).__name__}: {_one_line(error)[:200]}); what "
            "is done is kept: give a task more with data.ray.memory_gb_per_task, or take fewer "
            "data.workers, and build again (Ray 任务的进程或节点死亡)"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
