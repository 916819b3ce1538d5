"""What stands in run.out before a run begins there, and whether it may.

    launch train, pretrain/train.py --strangers()--> refused before anything is made in the folder
    train() --held()----------------strangers()----> the same, for whoever calls it directly

The first thing that a run makes is RUN/logs, the next RUN/.lock, and it keeps both. So what stands
beside a lock is a run's own, also where it was killed before its first checkpoint.
"""

import contextlib
import os
from pathlib import Path

LOCK = ".lock"
"""Made before anything else but RUN/logs, never removed."""
BEFORE = frozenset({"logs", "stop", "profile", "lost+found"})
"""What may be there before the lock is, and what every new volume has."""
BESIDE = frozenset({".yaml", ".yml", ".log", ".out", ".err", ".txt", ".md", ".sh"})
"""Files that people lay beside a run, and no run writes: its page, its job file, its output."""
WRITTEN = frozenset({"config.yaml"})
"""Of such a name, but written by every run."""
OF_CORPORA = frozenset({"manifest.json", "stages"})
"""What a corpus has, whose build makes a lock of the same name."""


def strangers(run: Path) -> list[str]:
    """A sentence where a run would begin among files that no run wrote; else none.

    A folder with a checkpoint to go on from is a run's. One that cannot be listed cannot be written
    either: whoever writes first says so.
    """
    found: list[str] = []
    with contextlib.suppress(OSError):
        if run.is_dir() and not any((run / "checkpoints").glob("*stage-*")):
            names = sorted(path.name for path in run.iterdir())
            found = [name for name in names if _strange(run / name, begun=LOCK in names)]
    if not found:
        return []
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    sentence = (
        f"run.out: {run} holds '{found[0]}'{more}, which no run wrote and which one could "
        "overwrite; name an empty or a new folder (目录非空且不是运行目录，请换一个目录)"
    )
    return [sentence]


def _strange(path: Path, *, begun: bool) -> bool:
    """Whether this is neither of the run that has `begun` here, nor what may lie in its folder."""
    name = path.name
    if name in OF_CORPORA or begun:
        return name in OF_CORPORA
    if name.startswith(".") or name in BEFORE:
        return False
    if path.is_dir():
        return not os.access(path, os.R_OK) or any(path.iterdir())
    return path.suffix not in BESIDE or name in WRITTEN
