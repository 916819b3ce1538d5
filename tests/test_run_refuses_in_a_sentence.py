"""What a user gets wrong about a run ends in one sentence that names the key, and loses nothing."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint, evaluate, owner, start
from pretrain.state import State
from tests.run_jobs import go, page, rewrite
from tests.worlds import World

GO = "tests.run_jobs:go"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world1: World) -> Path:
    """A run of ten steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    world1.run(GO, config=page(run, tiny_corpus, run__steps=10, schedule__decay_steps=0))
    return run


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__hidden": 48}, "model.hidden: is 48, the checkpoint"),
        ({"run__seed": 5}, "run.seed: is 5, the run was started with 1"),
        ({"data__seq_len": 16}, "restore data.seq_len"),
        ({"model__vocab": 300}, "model.vocab: is 300, the tokenizer of"),
        ({"run__steps": 5, "schedule": {}}, "the run ends at step 5, the checkpoint .* at step 10"),
        ({"run__prompt": "长" * 300}, "run.prompt: is .* tokens long, must be 1 to 32"),
        (
            {"run__steps": None, "stages": [{"steps": 20}, {"steps": 5, "model": {"hidden": 16}}]},
            "hidden would shrink from 32 to 16",
        ),
    ],
)
def test_another_run_in_the_same_folder(
    trained: Path, tiny_corpus: Path, world1: World, changes: dict[str, Any], sentence: str
) -> None:
    kept = sorted(p.name for p in (trained / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=sentence):
        world1.run(GO, config=page(trained, tiny_corpus, **{"run__steps": 20, **changes}))
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == kept


def test_two_jobs_in_one_folder(trained: Path) -> None:
    refused = pytest.raises(ValueError, match="another job is at work in")
    with start.held(trained), refused, start.held(trained, patience_s=0.0):
        pass
    with start.held(trained, patience_s=0.0):
        pass


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system as Lustre mounted without -o flock."""

    def refuse(lock: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(owner, "SETTLE_S", 0.0)


def test_two_jobs_in_one_folder_without_locks(tmp_path: Path, no_locks: None) -> None:
    """The second is refused and takes nothing away from the first."""
    half = tmp_path / "checkpoints" / ".stage-00-step-00000040.writing"
    refused = pytest.raises(checkpoint.StorageError, match="another job is at work in")
    with start.held(tmp_path):
        half.mkdir(parents=True)
        with refused, start.held(tmp_path, patience_s=0.0):
            pass
        assert owner.path_in(tmp_path).exists() and half.exists()
    assert not owner.path_in(tmp_path).exists()
    with start.held(tmp_path, patience_s=0.0):
        assert half.exists(), "written to a moment ago"
    os.utime(half, (0, 0))
    with start.held(tmp_path, patience_s=0.0):
        assert not half.exists()


@pytest.mark.parametrize("where", ["here", "another machine", "cut off"])
def test_a_killed_job_frees_its_folder_without_locks(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Here its process is gone; elsewhere its file is touched no more, or it was never written."""
    code = "import sys; from pathlib import Path; from pretrain import owner; "
    code += "owner._made(Path(sys.argv[1]) / '.owner')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    left = owner.path_in(tmp_path)
    about = json.loads(left.read_text())
    if where == "another machine":
        left.write_text(json.dumps(["node9", "its boot", *about[2:]]))
    elif where == "cut off":
        left.write_text("")
    monkeypatch.setattr(owner, "SILENT_S", 60.0 if where == "here" else 0.3)
    began = time.monotonic()
    with start.held(tmp_path, patience_s=0.0):
        assert json.loads(left.read_text())[3] == os.getpid()
    assert (time.monotonic() - began >= 0.3) == (where != "here")


@pytest.mark.parametrize("locks", [False, True])
def test_another_machines_job_is_at_work_while_its_file_is_touched(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """Also where the second job's machine has locks, and the first one's has none."""
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    monkeypatch.setattr(owner, "SILENT_S", 2.0)
    refused = pytest.raises(checkpoint.StorageError, match="another job is at work in")
    with start.held(tmp_path):
        monkeypatch.setattr(owner, "_machine", lambda: ["another boot", "pid:[1]"])
        if locks:
            monkeypatch.setattr(fcntl, "flock", lambda lock, how: None)
        with refused, start.held(tmp_path, patience_s=0.2):
            pass
        monkeypatch.undo()
    assert not owner.path_in(tmp_path).exists()


def test_a_run_says_that_its_folder_has_no_locks(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    config = page(tmp_path, tiny_corpus, run__steps=2, schedule={})
    said = world2.run("tests.fault_jobs:go_without_locks", config=config)[0]
    assert sum("has no locks; .owner stands for one" in line for line in said) == 1
    assert not owner.path_in(tmp_path).exists() and checkpoint.found_in(tmp_path)


def test_what_a_killed_job_left_is_cleared_and_what_it_was_replacing_comes_back(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    whole = checkpoint.found_in(run)[0]
    whole.rename(whole.with_name(f".{whole.name}.replaced"))
    for left in ("writing", "deleting", "growing"):
        whole.with_name(f".{checkpoint.checkpoint_name(0, 3)}.{left}").mkdir()
    with start.held(run):
        assert list((run / "checkpoints").iterdir()) == [whole]
        assert checkpoint.damage(whole) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused = pytest.raises(ValueError, match=r"run\.out: .* cannot be written")
    with refused, start.held(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize(
    ("what", "sentence"),
    [("all", "stands at step 10; give more steps"), ("weights", "learnt that of another")],
)
def test_a_start_that_leads_nowhere(
    trained: Path, tmp_path: Path, tiny_corpus: Path, world1: World, what: str, sentence: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    if what == "weights":

        def elsewhere(state: State) -> State:
            return State(state.entries, state.record | {"tokenizer": "another"})

        rewrite(checkpoint.found_in(source)[0], elsewhere)
    init = {"from": str(source), "what": what}
    config = page(tmp_path / "run", tiny_corpus, run__steps=10, schedule__decay_steps=0, init=init)
    with pytest.raises(ValueError, match=sentence) as refused:
        world1.run(GO, config=config)
    assert "change these keys to fit it, or name another init.from" in str(refused.value)


@pytest.mark.parametrize("what", ["all", "weights"])
def test_a_start_from_another_model_says_where_its_numbers_belong(
    trained: Path, tmp_path: Path, tiny_corpus: Path, world1: World, what: str
) -> None:
    """The run folder is new: another one would not help, as it does where a run goes on."""
    changes: dict[str, Any] = {"run__steps": 20, "model__ffn": 96}
    with pytest.raises(ValueError, match=r"choose another run\.out, or restore these keys"):
        world1.run(GO, config=page(trained, tiny_corpus, **changes))
    changes["init"] = {"from": str(trained), "what": what}
    with pytest.raises(ValueError, match=r"model\.ffn: is 96, the checkpoint .* has 64") as refused:
        world1.run(GO, config=page(tmp_path / "run", tiny_corpus, **changes))
    assert "write these numbers under `model:`, or name another init.from" in str(refused.value)
    assert "run.out" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": 0}, "--samples: is 0, must be at least 1"),
        ({"seq_len": 33}, "--seq-len: is 33, must be at least 1 and at most 32"),
        ({}, "--data: .* was encoded by the tokenizer"),
    ],
)
def test_a_measure_that_means_nothing(
    trained: Path, tmp_path: Path, tiny_corpus: Path, changes: dict[str, int], sentence: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    if not changes:

        def elsewhere(state: State) -> State:
            return State(state.entries, state.record | {"tokenizer": "another"})

        rewrite(checkpoint.found_in(run)[0], elsewhere)
    with pytest.raises(ValueError, match=sentence):
        evaluate.bits(run, tiny_corpus, **changes)


def _change_content(corpus: Path) -> None:
    raw = bytearray((corpus / "train.bin").read_bytes())
    raw[100] ^= 1
    (corpus / "train.bin").write_bytes(raw)


def _change_manifest(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text("utf-8"))
    manifest["splits"]["train"]["fingerprint"] = "xxh3-128:0"
    (corpus / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_change_content, "the manifest says"),
        (_change_manifest, "the manifest says"),
        (lambda corpus: (corpus / "manifest.json").unlink(), "is no corpus"),
        (lambda corpus: (corpus / "valid.idx").unlink(), "is missing"),
    ],
)
def test_a_corpus_that_is_not_what_it_was(
    tmp_path: Path,
    tiny_corpus: Path,
    world1: World,
    spoil: Callable[[Path], None],
    sentence: str,
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(tiny_corpus, corpus)
    spoil(corpus)
    with pytest.raises(ValueError, match=sentence):
        world1.run(GO, config=page(tmp_path / "run", corpus))


def test_a_corpus_that_changed_since_the_run_began(
    trained: Path, tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)

    def started_yesterday(state: State) -> State:
        state.record["data"][0]["fingerprint"] = "xxh3-128:of-yesterday"
        return state

    rewrite(checkpoint.found_in(run)[0], started_yesterday)
    with pytest.raises(ValueError, match="has changed since the run started"):
        world1.run(GO, config=page(run, tiny_corpus, run__steps=20))


def test_no_room_for_a_checkpoint_keeps_the_old_one(
    trained: Path, tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with pytest.raises(ValueError, match="older checkpoints are untouched"):
        config = page(run, tiny_corpus, run__steps=20, schedule__decay_steps=0)
        world2.run(GO, config=config, file_limit=60_000)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["stage-00-step-00000010"]
    assert checkpoint.damage(run / "checkpoints" / "stage-00-step-00000010") == []


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    config = page(tmp_path, tiny_corpus, run__steps=20, run__save_every_steps=10)
    unbroken = world1.run(GO, config=config)[0]
    newest = Path(unbroken["checkpoint"])
    (newest / "weights-00000.safetensors").write_bytes(b"x")
    # what is written meanwhile is older by name, and not thrown away for the damaged one
    one = {"run__stop_at_step": 13, "run__keep_checkpoints": 1}
    short = page(tmp_path, tiny_corpus, run__steps=20, run__save_every_steps=10, **one)
    stopped = Path(world1.run(GO, config=short)[0]["checkpoint"])
    assert {path.name for path in checkpoint.found_in(tmp_path)} == {newest.name, stopped.name}
    again = world1.run(GO, config=config)[0]
    assert again["step"] == 20
    assert checkpoint.damage(newest) == []


def test_processes_that_tensor_parallelism_does_not_divide(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    with pytest.raises(ValueError, match=r"parallel\.tensor: is 2"):
        world1.run(GO, config=page(tmp_path, tiny_corpus, parallel__tensor=2))


def test_heads_that_tensor_parallelism_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.heads: is 2, not divisible by parallel\.tensor=3"
    ):
        go(page(tmp_path, tmp_path, parallel__tensor=3))


def test_machines_with_other_cores_are_not_refused(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    """The page that ranks compare is the same, whatever run.threads comes to on each."""
    config = page(tmp_path, tiny_corpus, run__stop_at_step=1)
    assert world2.run("tests.fault_jobs:go_on_unequal_machines", config=config) == [1, 1]
