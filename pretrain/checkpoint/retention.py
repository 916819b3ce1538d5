"""Which checkpoints stay when a newer one has come."""

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.places import NAME
from pretrain.checkpoint.reading import found_in


def passed_over(run: Path, record: Mapping[str, Any]) -> set[Path]:
    """The checkpoints newer than that of `record`, from which a run goes on: they are damaged."""
    at = record["stage"], record["step"]
    return {p for p in found_in(run) if (m := NAME.match(p.name)) and (int(m[1]), int(m[2])) > at}


def rotate(run: Path, keep: int, every: int = 0, best: int = 0, but: Collection[Path] = ()) -> None:
    """Remove checkpoints that are too old; one rank calls it.

    What stays: the newest `keep`, those at stage borders, those at multiples of `every` steps, the
    `best` ones by validation loss; an ephemeral one only while nothing is newer. What is in
    `but` neither counts nor goes. Raises OSError, at the end, if one could not be removed.
    """
    ordinary, measured, gone = [], [], []
    found = [path for path in found_in(run) if path not in but]
    for number, path in enumerate(found):
        try:
            record = json.loads((path / "state.json").read_text("utf-8"))
        except (OSError, ValueError):
            record = {}
        if record.get("ephemeral"):
            gone += [path] if number else []
        elif not record.get("border"):
            ordinary.append((path, record))
            measured += [(record["valid_loss"], path)] if "valid_loss" in record else []
    good = [path for _, path in sorted(measured)[:best]]
    gone += [
        path
        for path, record in ordinary[keep:]
        if path not in good and not (every and record.get("step", 1) % every == 0)
    ]
    failed = None
    for path in gone:
        aside = path.parent / f".{path.name}.deleting"
        shutil.rmtree(aside, ignore_errors=True)  # what another time could not remove
        try:
            os.rename(path, aside)
        except OSError as error:
            failed = error
        shutil.rmtree(aside, ignore_errors=True)
    if failed is not None:
        raise failed
