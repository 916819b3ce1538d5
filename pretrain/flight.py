"""The flight check: what would ground a run hours from now is said before step 1.

every rank: its versions, its code, its page, a sum over all ranks, a lock of a dead compiler
the first:  room for two checkpoints, and how fast the disk takes them
"""

import hashlib
import os
import platform
import shutil
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.load import ConfigError
from pretrain.checkpoint import first_rank, gather

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
PROBE_BYTES = 16 * 10**6
STALE_LOCK_S = 60.0
"""A compiler that is at work touches its lock's folder more often."""


def check(run: Path, checkpoint_bytes: int, page: str, device: torch.device) -> list[str]:
    """Check the job; every rank calls this, before the first step.

    Args:
        run: the run folder.
        checkpoint_bytes: of one checkpoint.
        page: the run's config as text; all ranks must have the same.
        device: of this rank.

    Returns sentences worth saying. Raises ConfigError for ranks that do not fit together, or no
    room for a checkpoint.
    """
    told = gather(_about(page))
    found = [
        f"rank {rank} on {other['host']} has {key} {other[key]}, rank 0 on {told[0]['host']} has "
        f"{told[0][key]}; all machines must have the same (各进程环境不一致)"
        for rank, other in enumerate(told)
        for key in other
        if key not in ("host", "lock") and other[key] != told[0][key]
    ]
    said = [
        f"{other['host']}: {other['lock']} is a lock that a dead compiler may have left; if the "
        "start hangs, remove it (编译锁残留)"
        for other in {o["host"]: o for o in told}.values()
        if other["lock"]
    ]
    first = _disk(run, checkpoint_bytes) if first_rank() else ([], [])
    wrong, sentences = gather(first)[0]
    if found + wrong:
        raise ConfigError("\n".join(found + wrong))
    _all_reduce(device)
    return said + sentences


def _about(page: str) -> dict[str, Any]:
    about = {"host": socket.gethostname(), "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = "none"
    about["the code"] = _code()
    about["the config"] = hashlib.blake2b(page.encode(), digest_size=6).hexdigest()
    return about | {"lock": stale_lock()}


def _code() -> str:
    """A hash of our own source, by names and contents."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.blake2b(digest_size=6)
    for folder in ("configs", "pretrain"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def stale_lock(now: float | None = None) -> str:
    """A lock in the folder of torch's compiled extensions that nobody has touched for a while."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(given) if given else Path.home() / ".cache" / "torch_extensions"
    for path in sorted(folder.glob("**/lock")):
        try:
            if (now or time.time()) - path.stat().st_mtime > STALE_LOCK_S:
                return str(path)
        except OSError:
            continue
    return ""


def _disk(run: Path, checkpoint_bytes: int) -> tuple[list[str], list[str]]:
    """(what forbids a start, what is worth saying) of the disk under the run folder."""
    free = shutil.disk_usage(run).free
    if free < checkpoint_bytes + PROBE_BYTES:
        wrong = (
            f"run.out: a checkpoint takes {checkpoint_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB "
            f"are free under {run}; make room or choose another run.out (磁盘空间不足)"
        )
        return [wrong], []
    said = []
    if free < 2 * checkpoint_bytes:
        said.append(
            f"{run}: {free / 1e6:,.1f} MB are free, a new checkpoint and the one before it take "
            f"{2 * checkpoint_bytes / 1e6:,.1f} MB (磁盘空间紧张)"
        )
    try:
        rate = _rate(run)
    except OSError as error:  # a save will say it, with the older checkpoints good
        return [], [*said, f"{run}: cannot be written at length: {error.strerror} (磁盘写入异常)"]
    if checkpoint_bytes / rate > 60:
        said.append(
            f"{run}: the disk takes {rate / 1e6:,.0f} MB/s, a checkpoint of "
            f"{checkpoint_bytes / 1e9:,.1f} GB takes {checkpoint_bytes / rate / 60:,.1f} minutes "
            "(磁盘写入较慢)"
        )
    return [], said


def _rate(run: Path) -> float:
    """Bytes a second that the disk under `run` takes and keeps."""
    path, block = run / ".probe", os.urandom(1 << 20)
    began = time.perf_counter()
    try:
        with open(path, "wb") as out:
            for _ in range(PROBE_BYTES // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return PROBE_BYTES / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def _all_reduce(device: torch.device) -> None:
    """One sum over all ranks: a network that is not there hangs or fails here, not at step 1."""
    if not dist.is_initialized():
        return
    value = torch.ones((), device=device)
    dist.all_reduce(value)
    if int(value) != dist.get_world_size():
        raise ConfigError(
            f"a sum of ones over {dist.get_world_size()} ranks gave {float(value)}; the network "
            "between the machines is broken (通信异常)"
        )
