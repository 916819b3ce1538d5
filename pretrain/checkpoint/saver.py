"""Saving behind the training: a copy in host memory now, written by a thread while steps go on.

    save(): wait for the last one -> copy this rank's pieces -> return
    thread: write, sum, hash, fsync, manifest, rename (writing.py) -> written() -> rotate; a failure
            is told
    wait(): the next save, a stage's border, the end; what failed is written once more, from the
            copies, which are there still: a disk that was full or away may be back

The threads of the ranks talk through a group of their own. They are asked at the same places of the
loop on every rank, so a write that failed twice ends all of them alike, with one sentence; the
previous checkpoint is good.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.places import CheckpointError, Piece
from pretrain.checkpoint.ranks import Ranks, own_group
from pretrain.checkpoint.writing import save

NICE = 10
"""The thread yields the processor to the training."""
AGAIN_S = 5.0
"""Before a write that failed is tried once more."""

Rotate = Callable[[Path], None]
Failed = Callable[[Path, BaseException], None]
Written = Callable[[float], None]


class Saver:
    """Writes one checkpoint at a time; on the first rank `rotate` gets its folder after each, and
    drops older ones; `failed` gets the folder and the error of one that will be tried again."""

    def __init__(self, ranks: Ranks, rotate: Rotate, failed: Failed) -> None:
        self._ranks, self._rotate, self._failed = ranks, rotate, failed
        self._thread: threading.Thread | None = None
        self._arguments: tuple[Any, ...] = ()
        self._error: BaseException | None = None
        self._held: dict[tuple[str, int], torch.Tensor] = {}

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, rotate: Rotate, failed: Failed, waits: timedelta | None = None
    ) -> Iterator["Saver"]:
        """For the length of a run; every rank calls this. Leaving waits for the last write.

        The ranks wait for one another as long as `waits`; None: gloo's half an hour."""
        with own_group(waits) as ranks:
            saver = cls(ranks, rotate, failed)
            try:
                yield saver
            except BaseException:
                saver._join()  # what ended the run is more to the point than a write
                raise
            saver.wait()

    def save(
        self,
        folder: Path,
        shapes: dict[str, tuple[tuple[int, ...], str]],
        pieces: Iterable[Piece],
        record: dict[str, Any],
        tokenizer: Path | None = None,
        replay: dict[str, Any] | None = None,
        written: Written = lambda held_up_s: None,
    ) -> Path:
        """Begin to write a checkpoint of the pieces as they are; arguments as writing.save().

        Once it is there, `written` gets on the first rank the seconds that this call took."""
        began = time.monotonic()
        self.wait()
        copied = self._copied(pieces)
        done = partial(written, time.monotonic() - began)
        self._arguments = (folder, shapes, copied, record, tokenizer, replay, done)
        self._begin()
        return folder

    def wait(self) -> None:
        """Until the last one is a checkpoint. Raises its CheckpointError, the same on all ranks, if
        it fails again."""
        error = self._join()
        if isinstance(error, CheckpointError | OSError):
            time.sleep(AGAIN_S)
            self._begin(again=True)
            error = self._join()
        if error is not None:
            raise error

    def _begin(self, again: bool = False) -> None:
        arguments = (again, *self._arguments)
        self._thread = threading.Thread(target=self._write, args=arguments, name="saver")
        self._thread.start()

    def _join(self) -> BaseException | None:
        """Until nothing is being written; what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _copied(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces in memory of their own, kept from save to save: page faults cost more than
        copying."""
        copied: list[Piece] = []
        held, self._held = self._held, {}
        waits = False
        for number, (key, values, runs) in enumerate(pieces):
            values = values.detach()
            known = held.get((key, number))
            if known is None or known.shape != values.shape or known.dtype != values.dtype:
                known = torch.empty(
                    values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda"
                )
            known.copy_(values, non_blocking=True)
            waits = waits or values.device.type == "cuda"
            self._held[key, number] = known
            copied.append((key, known, runs))
        if waits:
            torch.cuda.synchronize()
        return copied

    def _write(
        self,
        again: bool,
        folder: Path,
        shapes: dict[str, tuple[tuple[int, ...], str]],
        pieces: list[Piece],
        record: dict[str, Any],
        tokenizer: Path | None,
        replay: dict[str, Any] | None,
        written: Callable[[], None],
    ) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            save(folder, shapes, pieces, record, tokenizer, replay=replay, ranks=self._ranks)
            if self._ranks.rank == 0:
                written()
                self._rotate(folder)
        except BaseException as error:  # it belongs to whoever waits
            self._error = error
            if self._ranks.rank == 0 and not again:
                self._failed(folder, error)
