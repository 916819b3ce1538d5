"""A changed state on disk under its name only if what was written is proven.

    state --write--> .NAME.growing --read back--> prove() --> proof.json in it --holds--> NAME

Where the proof fails, or is broken off, there is no NAME that a run could train on.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain import checkpoint
from pretrain.proof import write_proof
from pretrain.state import State

PATIENCE = timedelta(days=1)
"""So long do ranks wait for the first one's proof of a changed model (2.6 B: 24 minutes)."""


def aside_of(folder: Path) -> Path:
    """Where a state stands that is not proven, or not yet."""
    return folder.with_name(f".{folder.name}.growing")


def written(
    folder: Path,
    state: State,
    tokenizer: Path | None,
    prove: Callable[[State], dict[str, Any]],
    holds: Callable[[dict[str, Any]], bool],
    alive: Callable[[], None] = lambda: None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Write `state` as the checkpoint `folder`, which must not exist; every rank calls this.

    The first rank proves what was written. Returns its proof, on every rank; where it does not
    hold, the state stands at aside_of(folder). Raises CheckpointError if one cannot be written.
    `alive` is called for each tensor that a rank reads; `waiting` is around the others' wait.
    """
    aside = aside_of(folder)

    def proven() -> dict[str, Any]:
        try:
            proof = prove(heard(checkpoint.read(aside), alive))
            write_proof(aside, proof)
            if holds(proof):
                os.rename(aside, folder)
        except OSError as error:
            raise checkpoint.CheckpointError(
                f"{error.filename or aside}: {error.strerror}; the changed model is not proven, "
                "the checkpoint before it is whole (证明中断)"
            ) from error
        return proof

    first = checkpoint.first_rank()
    with checkpoint.own_group(PATIENCE) as ranks:
        checkpoint.write_state(aside, heard(state, alive), tokenizer)
        with nullcontext() if first else waiting():
            proof: dict[str, Any] = ranks.together(proven if first else dict, aside)[0]
    return proof


def heard(state: State, alive: Callable[[], None]) -> State:
    """The same state, whose reader is heard of at each tensor, also by way of what it grew to."""

    def telling(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def reading() -> Tensor:
            alive()
            return read()

        return reading

    told = {key: replace(entry, read=telling(entry.read)) for key, entry in state.entries.items()}
    return State(told, state.record, state.verify)
