"""A changed state on disk under its name only if what was written is proven.

    state --write--> .NAME.growing --read back--> prove() --> proof.json in it --holds--> NAME

Where the proof fails, or is broken off, there is no NAME that a run could train on.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

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
) -> dict[str, Any]:
    """Write `state` as the checkpoint `folder`, which must not exist; every rank calls this.

    The first rank proves what was written. Returns its proof, on every rank; where it does not
    hold, the state stands at aside_of(folder). Raises CheckpointError if one cannot be written.
    """
    aside = aside_of(folder)

    def proven() -> dict[str, Any]:
        if not checkpoint.first_rank():
            return {}
        proof = prove(checkpoint.read(aside))
        write_proof(aside, proof)
        if holds(proof):
            os.rename(aside, folder)
        return proof

    with checkpoint.own_group(PATIENCE) as ranks:
        checkpoint.write_state(aside, state, tokenizer)
        proof: dict[str, Any] = ranks.together(proven, aside)[0]
    return proof
