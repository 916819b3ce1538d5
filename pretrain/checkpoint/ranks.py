"""Steps that all ranks take together: if it fails on one, it failed on all, with one sentence."""

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint.places import CheckpointError, StorageError, whole_name

FOR_A_PERSON = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What fails again until somebody makes room, or gives rights."""


@dataclass(frozen=True)
class Ranks:
    """The processes of the job, as a group of their own or all that there are."""

    group: Any = None

    @property
    def rank(self) -> int:
        """Which one this is."""
        return dist.get_rank() if _started() else 0

    @property
    def world(self) -> int:
        """How many there are."""
        return dist.get_world_size() if _started() else 1

    def gather(self, value: Any) -> list[Any]:
        """What every rank hands in, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, act: Callable[[], Any], aside: Path) -> list[Any]:
        """Do a step on every rank; if it fails on one, all clean up and raise its sentence."""
        error, value, bug, failed = None, None, None, False
        try:
            value = act()
        except CheckpointError as wrong:
            error = str(wrong)
        except OSError as wrong:
            failed = wrong.errno not in FOR_A_PERSON
            error = (
                f"{whole_name(aside)}: cannot be written: {wrong.strerror}; the older checkpoints "
                "are untouched (检查点写入失败，旧检查点完好)"
            )
        except Exception as wrong:  # ours; the other ranks must not wait for this one for ever
            error, bug = f"rank {self.rank}: {type(wrong).__name__}: {wrong}", wrong
        outcomes = self.gather((error, value, failed))
        errors = [(e, storage) for e, _, storage in outcomes if e]
        if errors:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise (StorageError if errors[0][1] else CheckpointError)(errors[0][0]) from bug
        return [v for _, v, _ in outcomes]


EVERYONE = Ranks()
"""All ranks, by the group that the training uses: never beside it, in a thread."""


@contextlib.contextmanager
def own_group(patience: timedelta | None = None) -> Iterator[Ranks]:
    """All ranks by a group of their own over gloo, for a thread, or for what one rank does while
    the others wait for longer than a step's timeout; every rank calls this."""
    if not _started() or dist.get_world_size() == 1:
        yield EVERYONE
        return
    group = dist.new_group(backend="gloo", timeout=patience)
    try:
        yield Ranks(group)
    finally:
        dist.destroy_process_group(group)


def first_rank() -> bool:
    """Whether this process is the one that acts for all."""
    return EVERYONE.rank == 0


def gather(value: Any) -> list[Any]:
    """What every rank hands in, on every rank."""
    return EVERYONE.gather(value)


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()
