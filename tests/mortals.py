"""Ranks that may die: groups of processes that are forked ready, run one job and are gone.

    fork server (imports once) --fork--> rank 0, rank 1: gloo among them --> job() --> exit

A warm world (tests/worlds.py) is for jobs that end; here ranks are killed, frozen and end
themselves. A start costs well under a second.
"""

import importlib
import os
import pickle
import traceback
from pathlib import Path
from typing import Any

from tests.worlds import CONTEXT, _become, _free_port


class Mortals:
    """`size` processes that do one job; kill them as you like."""

    def __init__(self, size: int, folder: Path, job: str, **arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, port = folder, _free_port()
        self.processes = [
            CONTEXT.Process(target=_live, args=(rank, size, port, str(folder), job, arguments))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def codes(self, timeout_s: float = 60.0) -> list[int | None]:
        """Exit codes once all have ended; whoever has not by then is killed, its code is None."""
        for process in self.processes:
            process.join(timeout_s)
        late = [process for process in self.processes if process.exitcode is None]
        self.kill()
        return [None if p in late else p.exitcode for p in self.processes]

    def kill(self) -> None:
        """SIGKILL to all that are left."""
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
        for process in self.processes:
            process.join(10)

    def answer(self, rank: int) -> Any:
        """What the rank's job returned, or the sentence that it raised; None if it said nothing."""
        path = self.folder / f"answer{rank}"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def log(self, rank: int) -> str:
        """What the rank has printed."""
        return (self.folder / f"rank{rank}.log").read_text("utf-8", "replace")


def _live(rank: int, size: int, port: int, folder: str, job: str, arguments: Any) -> None:
    _become(rank, size, port, folder)
    code = 0
    try:
        import torch

        torch.set_num_threads(1)
        importlib.import_module("pretrain.parallel").init_distributed()
        module, _, function = job.partition(":")
        answer = getattr(importlib.import_module(module), function)(**arguments)
    except BaseException as error:
        traceback.print_exc()
        answer, code = f"{type(error).__name__}: {error}", 1
    (Path(folder) / f"answer{rank}").write_bytes(pickle.dumps(answer))
    os._exit(code)  # a peer that died must not hold up the end
