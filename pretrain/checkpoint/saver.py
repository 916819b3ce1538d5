"""Saving behind the training: a copy in host memory now, written by a thread while steps go on.

    save(): wait for the last one -> copy this rank's pieces -> return
    thread: write, sum, hash, fsync, manifest, rename (writing.py) -> rotate
    wait(): the next save, a stage's border, the end; a write that failed is said here

The threads of the ranks talk through a group of their own. They are asked at the same places of the
loop on every rank, so a write that failed ends all of them alike, with one sentence; the previous
checkpoint is good, and is no more than one interval old.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.places import Piece
from pretrain.checkpoint.ranks import Ranks, own_group
from pretrain.checkpoint.writing import save

NICE = 10
"""The thread yields the processor to the training."""


class Saver:
    """Writes one checkpoint at a time; `rotate` gets its folder after each, on the first rank, and
    drops older ones."""

    def __init__(self, ranks: Ranks, rotate: Callable[[Path], None]) -> None:
        self._ranks, self._rotate = ranks, rotate
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._held: dict[tuple[str, int], torch.Tensor] = {}

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, rotate: Callable[[Path], None], waits: timedelta | None = None
    ) -> Iterator["Saver"]:
        """For the length of a run; every rank calls this. Leaving waits for the last write.

        The ranks wait for one another as long as `waits`; None: gloo's half an hour."""
        with own_group(waits) as ranks:
            saver = cls(ranks, rotate)
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
    ) -> Path:
        """Begin to write a checkpoint of the pieces as they are; arguments as writing.save()."""
        self.wait()
        copied = self._copied(pieces)
        arguments = (folder, shapes, copied, record, tokenizer, replay)
        self._thread = threading.Thread(target=self._write, args=arguments, name="saver")
        self._thread.start()
        return folder

    def wait(self) -> None:
        """Until the last one is a checkpoint. Raises its CheckpointError, the same on all ranks."""
        self._join()
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

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
        folder: Path,
        shapes: dict[str, tuple[tuple[int, ...], str]],
        pieces: list[Piece],
        record: dict[str, Any],
        tokenizer: Path | None,
        replay: dict[str, Any] | None,
    ) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            save(folder, shapes, pieces, record, tokenizer, replay=replay, ranks=self._ranks)
            if self._ranks.rank == 0:
                self._rotate(folder)
        except BaseException as error:  # it belongs to whoever waits
            self._error = error
