"""Nothing wrong with a checkpoint goes unseen; a write that fails costs nothing that was there."""

import builtins
import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.checkpoint import CheckpointError, reading
from pretrain.state import State
from tests.growing import trained
from tests.worlds import World

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two good checkpoints, never to be changed."""
    run = tmp_path_factory.mktemp("made")
    words = run / "words"
    words.mkdir()
    (words / "tokenizer.json").write_text('{"kind": "none"}')
    state = trained()
    for step in (5, 9):
        kept = State(state.entries, {**state.record, "step": step})
        checkpoint.write_state(
            run / "checkpoints" / checkpoint.checkpoint_name(0, step), kept, words
        )
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


# ---- damage --------------------------------------------------------------------------------------


def test_any_byte_that_differs_is_found(run: Path) -> None:
    """500 places over all files, the heads and ends of each among them, one byte each time."""
    folder = checkpoint.found_in(run)[0]
    draw = random.Random(5)
    tried = 0
    for path in files_of(folder):
        raw = path.read_bytes()
        places = {0, 1, 7, 8, 9, len(raw) // 2, len(raw) - 1}
        places |= {draw.randrange(len(raw)) for _ in range(120)}
        for at in sorted(place for place in places if place < len(raw)):
            wrong = bytearray(raw)
            wrong[at] ^= 1 << draw.randrange(8)
            path.write_bytes(wrong)
            complaints = checkpoint.damage(folder)
            assert complaints, f"{path.name}: byte {at} went unseen"
            assert any(str(path) in c for c in complaints) or path.name == "manifest.json"
            tried += 1
        path.write_bytes(raw)
    assert tried >= 500
    assert checkpoint.damage(folder) == []


def test_every_byte_of_the_manifest_counts(run: Path) -> None:
    folder = checkpoint.found_in(run)[0]
    path = folder / "manifest.json"
    raw = path.read_bytes()
    draw = random.Random(6)
    for at in range(len(raw)):
        wrong = bytearray(raw)
        wrong[at] ^= draw.randrange(1, 256)
        if bytes((raw[at], wrong[at])).isspace():
            continue  # one blank for another says the same
        path.write_bytes(wrong)
        assert checkpoint.damage(folder), f"byte {at} of the manifest went unseen"
        with pytest.raises(CheckpointError, match="manifest"):
            checkpoint.read(folder)


@pytest.mark.parametrize("how", ["removed", "cut", "emptied", "longer"])
def test_every_file_that_is_cut_or_gone_is_named(run: Path, how: str) -> None:
    folder = checkpoint.found_in(run)[0]
    for path in files_of(folder):
        raw = path.read_bytes()
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes({"cut": raw[:-3], "emptied": b"", "longer": raw + b"\0"}[how])
        assert path.name in "\n".join(checkpoint.damage(folder))
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint.resolve(folder if path.name != "manifest.json" else _alone(run, folder))
        path.write_bytes(raw)
    assert checkpoint.damage(folder) == []


def _alone(run: Path, folder: Path) -> Path:
    """A run in which only this checkpoint is left."""
    alone = run.parent / "alone"
    shutil.rmtree(alone, ignore_errors=True)
    shutil.copytree(folder, alone / "checkpoints" / folder.name)
    return alone


def test_the_newest_good_one_is_taken_and_the_damage_told(run: Path) -> None:
    new, old = checkpoint.found_in(run)
    path = new / "exp_avg_sq-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 8
    path.write_bytes(raw)
    good, wrong = checkpoint.newest(run)
    assert good == old and len(wrong) == 1
    assert str(path) in wrong[0] and "differs from its hash" in wrong[0]
    assert checkpoint.resolve(run) == old
    (old / "state.json").unlink()
    good, wrong = checkpoint.newest(run)
    assert good is None and len(wrong) == 2
    with pytest.raises(CheckpointError) as caught:
        checkpoint.resolve(run)
    assert "exp_avg_sq-00000" in str(caught.value) and "state.json" in str(caught.value)


def test_a_folder_that_is_no_checkpoint_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(CheckpointError, match="runs/tyop: there is no such folder"):
        checkpoint.resolve(tmp_path / "runs/tyop@ema")
    with pytest.raises(CheckpointError, match="has no manifest"):
        checkpoint.read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(CheckpointError, match="is not of the format"):
        checkpoint.resolve(tmp_path)


@pytest.mark.parametrize(
    ("number", "times"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.ESTALE, 99)]
)
def test_a_file_system_that_is_away_is_no_damage(
    run: Path, number: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look that fails costs nothing; a run does not begin again at an older checkpoint because
    the newest could not be read just now."""
    newest, calls, honest = checkpoint.newest(run)[0], [], reading.describe
    assert newest is not None

    def describe(path: Path, sync: bool = False) -> dict[str, Any]:
        calls.append(path)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return honest(path, sync)

    monkeypatch.setattr(reading, "describe", describe)
    monkeypatch.setattr(reading, "AGAIN_S", 0.0)
    if times == 1:
        assert checkpoint.newest(run) == (newest, [])
    else:
        with pytest.raises(checkpoint.StorageError, match="cannot be read: Stale file handle"):
            checkpoint.newest(run)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "weights-00000.safetensors"])
def test_any_file_that_is_away_is_no_damage(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that may not be read: it is not passed over in silence either."""
    away, honest = checkpoint.found_in(run)[0] / name, os.open

    def refusing(path: Any, *arguments: Any, **keywords: Any) -> int:
        if Path(path) == away:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return honest(path, *arguments, **keywords)

    def opened(path: Any, *arguments: Any, **keywords: Any) -> Any:
        return open_file(path, *arguments, **keywords, opener=refusing)

    open_file = builtins.open
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)  # pathlib's
    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(reading, "AGAIN_S", 0.0)
    for look in (lambda: checkpoint.newest(run), lambda: checkpoint.read(away.parent)):
        with pytest.raises(checkpoint.StorageError, match=f"{name}: cannot be read: Permission"):
            look()


def test_a_disk_that_gives_out_is_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a file fails, as on a shared disk whose server is gone: the older one is taken."""
    newest, older = checkpoint.found_in(run)
    honest = reading.describe

    def describe(path: Path) -> dict[str, Any]:
        if path.parent == newest and path.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error")  # of read(): it names no file
        return honest(path)

    monkeypatch.setattr(reading, "describe", describe)
    monkeypatch.setattr(reading, "AGAIN_S", 0.0)
    found, complaints = checkpoint.newest(run)
    assert found == older
    assert str(newest) in complaints[0] and "cannot be read: Input/output error" in complaints[0]


def test_ranks_share_the_hashing_of_what_a_run_begins_with(run: Path, world2: World) -> None:
    """Each file once in the job, and what one rank finds all say."""
    folder = checkpoint.found_in(run)[0]
    said = world2.run("tests.checkpoint_jobs:resolve", folder=str(folder))
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert [text for text, _ in said] == [str(folder)] * 2
    assert sum(hashed for _, hashed in said) == len(files) and all(hashed for _, hashed in said)
    path = folder / "weights-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    said = world2.run("tests.checkpoint_jobs:resolve", folder=str(folder))
    assert said[0][0] == said[1][0] and "its content differs from its hash" in said[0][0]


def test_a_manifest_cannot_point_outside(run: Path) -> None:
    folder = checkpoint.found_in(run)[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../words/tokenizer.json"] = {"bytes": 1, "xxh3_128": "0"}
    manifest["xxh3_128"] = checkpoint.own_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "outside" in checkpoint.damage(folder)[0]


def test_a_truncated_file_is_not_read_either(run: Path) -> None:
    folder = checkpoint.found_in(run)[0]
    path = folder / "weights-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="weights-00000"):
        checkpoint.read(folder)


# ---- writes that fail ----------------------------------------------------------------------------


def failing(name: str, number: int, calls: list[int]) -> Callable[..., Any]:
    """os.NAME that fails at its `number`th call as a full disk does."""
    original = getattr(os, name)

    def act(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **keywords)

    return act


@pytest.mark.parametrize("name", ["posix_fallocate", "pwrite", "fsync", "rename"])
@pytest.mark.parametrize("again", [False, True], ids=["new", "same-step"])
def test_a_write_that_fails_anywhere_leaves_the_older_ones(
    run: Path, name: str, again: bool
) -> None:
    """Each call of each system function fails once; what was good before is good afterwards."""
    state = trained()
    before = checkpoint.found_in(run)
    kept = {p: p.read_bytes() for folder in before for p in files_of(folder)}
    target = before[0] if again else before[0].parent / checkpoint.checkpoint_name(0, 12)
    failures = 0
    for number in range(1, 400):
        calls: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, failing(name, number, calls))
            try:
                checkpoint.write_state(target, state)
                assert len(calls) < number  # no such call any more
                break
            except CheckpointError as error:
                failures += 1
                assert "\n" not in str(error)
                assert "No space left" in str(error) and str(target) in str(error)
        for folder in before:
            assert checkpoint.damage(folder) == []
        good, wrong = checkpoint.newest(run)
        assert good in (before[0], target) and wrong == []
        if not again:
            assert all(path.read_bytes() == raw for path, raw in kept.items())
            shutil.rmtree(target, ignore_errors=True)  # only the folder's last fsync came too late
        hidden = [p.name for p in target.parent.iterdir() if p.name.startswith(".")]
        assert hidden == []
    assert failures >= (1 if name != "pwrite" else 100)
    assert checkpoint.newest(run) == (target, [])


def test_a_file_size_limit_is_one_sentence(run: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from pretrain import checkpoint
from tests.growing import trained
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoint.write_state(Path({str(run)!r}) / "checkpoints/stage-00-step-00000012", trained())
except checkpoint.CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "File too large" in done.stdout and "older checkpoints are untouched" in done.stdout
    good, wrong = checkpoint.newest(run)
    assert good is not None and good.name == "stage-00-step-00000009" and wrong == []
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_full_disk_is_seen_before_writing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(CheckpointError, match=r"takes [\d.]+ MB, 0\.0 MB are free"):
        checkpoint.write_state(run / "checkpoints/stage-00-step-00000012", trained())
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_one_ranks_failure_is_everybodys(run: Path, world2: World) -> None:
    folder = run / "checkpoints/stage-00-step-00000012"
    job = {"folder": str(folder), "seed": 3}
    one, other = world2.run("tests.checkpoint_jobs:save_cut", fail_on=1, **job)
    assert one == other and "No space left" in one[0]
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert world2.run("tests.checkpoint_jobs:save_cut", **job) == [[], []]
    assert checkpoint.newest(run) == (folder, [])
