"""Which checkpoints stay when a newer one has come."""

import json
import os
import shutil
from pathlib import Path

from pretrain.checkpoint.reading import found_in


def rotate(run: Path, keep: int, every: int = 0, best: int = 0) -> None:
    """Remove checkpoints that are too old; one rank calls it.

    What stays: the newest `keep`, those at stage borders, those at multiples of `every` steps, the
    `best` ones by validation loss; an ephemeral one only while nothing is newer.
    """
    ordinary, measured, gone = [], [], []
    for number, path in enumerate(found_in(run)):
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
    for path in gone:
        aside = path.parent / f".{path.name}.deleting"
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
