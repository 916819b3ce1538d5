"""A disk that is full is one sentence, wherever it strikes; the next build goes on from there."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_corpus_build import contents, page, write_source

from data_pipeline import build
from data_pipeline.shards import CorpusError

FULL = r"^reading or writing failed: .*; make room or change data\.out, .* what is done is kept"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "text.jsonl", copies=2)


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "corpus"
    build.build(page(out, source, data={"workers": 1}))
    return out


def test_a_disk_that_is_full_at_any_moment(
    source: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file does not reach the disk: the third, of the next build the sixth ..."""
    synced, strikes_at, config = [0], [0], page(tmp_path / "corpus", source, data={"workers": 1})
    fsync: Callable[[Any], None] = os.fsync

    def full(handle: Any) -> None:
        synced[0] += 1
        if synced[0] == strikes_at[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    while True:
        synced[0] = 0
        strikes_at[0] += 3
        try:
            build.build(config)
        except CorpusError as error:
            assert re.search(FULL, str(error)) and "No space left on device" in str(error)
        else:
            break
    assert strikes_at[0] > 12
    assert contents(tmp_path / "corpus") == contents(built)
    assert not list((tmp_path / "corpus").rglob("*.partial"))


@pytest.mark.parametrize(
    ("stage", "suffix"),
    [("clean", ".jsonl.zst"), ("divide", ".jsonl.zst"), ("encode", ".bin"), ("encode", ".idx")],
)
def test_a_file_damaged_after_its_stage_names_the_folder_to_remove(
    stage: str, suffix: str, source: Path, built: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The stage is marked as done while its folder stands: without it, it is done again."""
    out, after = tmp_path / "data" / "corpus", {"clean": "divide", "divide": "tokenizer"}
    run, config = build.run, page(out, source, data={"workers": 1})

    def killed(*of: Any) -> Any:
        if of[1] == after.get(stage, "tally"):
            raise KeyboardInterrupt
        return run(*of)

    monkeypatch.setattr(build, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        build.build(config)
    monkeypatch.undo()
    path = min(out.glob(f"stages/{stage}-*/data/**/*00000{suffix}"))
    path.write_bytes(path.read_bytes()[:-4])
    folder = next(out.glob(f"stages/{stage}-*"))
    with pytest.raises(CorpusError) as told:
        build.build(config)
    assert str(told.value).startswith(str(path))
    assert str(told.value).endswith(f"; the folder to remove first is {folder} (先删除此目录)")
    shutil.rmtree(folder)
    build.build(config)
    assert contents(out) == contents(built)


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk of so many bytes at `folder`; what it gives makes it larger."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here (it takes root)")
    try:
        yield (
            lambda size: (
                subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
                and None
            )
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_is_really_full(
    workers: int, source: Path, built: Path, tmp_path: Path
) -> None:
    """From no room at all to nearly enough: it always ends in the sentence, and in the corpus."""
    whole = int(subprocess.check_output(["du", "-s", "-B1", str(built)]).split()[0])
    failed = 0
    with disk(tmp_path / "disk", 1 << 16) as enlarge:
        config = page(tmp_path / "disk" / "corpus", source, data={"workers": workers})
        for size in range(1 << 16, whole, max(whole // 8, 1 << 14)):
            enlarge(size)
            try:
                build.build(config)
            except CorpusError as error:
                assert re.search(FULL, str(error)) and "No space left on device" in str(error)
                failed += 1
        enlarge(4 * whole)
        build.build(config)
        assert contents(tmp_path / "disk" / "corpus") == contents(built)
        assert not list((tmp_path / "disk").rglob("*.partial"))
    assert failed > 3
