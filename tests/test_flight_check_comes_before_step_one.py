"""What would ground a run hours from now is said before its first step, in a sentence."""

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import ConfigError
from pretrain import flight

CPU = torch.device("cpu")


def test_a_sound_job_has_nothing_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert flight.check(tmp_path, 10**6, "page", CPU) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["Python", "torch", "deepspeed", "the code", "the config"])
def test_machines_that_differ_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    def two(value: Any) -> list[Any]:
        return (
            [value, value | {"host": "other", key: "9.9"}] if isinstance(value, dict) else [value]
        )

    monkeypatch.setattr(flight, "gather", two)
    with pytest.raises(ConfigError, match=f"rank 1 on other has {key} 9.9, rank 0 on"):
        flight.check(tmp_path, 10**6, "page", CPU)


def test_a_disk_without_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**6))
    with pytest.raises(ConfigError, match=r"a checkpoint takes 5\.0 MB, 1\.0 MB are free"):
        flight.check(tmp_path, 5 * 10**6, "page", CPU)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 6 * 10**7))
    [said] = flight.check(tmp_path, 4 * 10**7, "page", CPU)
    assert "a new checkpoint and the one before it take 80.0 MB" in said


def test_a_slow_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "_rate", lambda run: 1e3)
    [said] = flight.check(tmp_path, 10**6, "page", CPU)
    assert "takes 16.7 minutes" in said


def test_a_stale_lock_is_named_and_a_fresh_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    lock = tmp_path / "ext" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert flight.check(tmp_path, 10**6, "page", CPU) == []
    os.utime(lock, (time.time() - 600,) * 2)
    [said] = flight.check(tmp_path, 10**6, "page", CPU)
    assert str(lock) in said and "remove it" in said
