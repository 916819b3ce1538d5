"""Which checkpoints stay when a newer one has come."""

import json
import os
import shutil
from pathlib import Path

from pretrain.checkpoint.reading import found_in


def rotate(
    run: Path, keep: int, every: int = 0, best: int = 0, written: Path | None = None
) -> None:
    """Remove checkpoints that are too old; one rank calls it.

    What stays: the newest `keep`, those at stage borders, those at multiples of `every` steps, the
    `best` ones by validation loss; an ephemeral one only while nothing is newer. What is newer than
    the one just `written` was passed over at the start as damaged: it neither counts nor goes.
    Raises OSError, at the end, if one could not be removed.
    """
    ordinary, measured, gone = [], [], []
    found = found_in(run)
    if written in found:
        found = found[found.index(written) :]
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
