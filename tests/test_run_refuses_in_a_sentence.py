"""What a user gets wrong about a run ends in one sentence that names the key, and loses nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.state import State
from tests.run_jobs import go, page, rewrite
from tests.worlds import World

GO = "tests.run_jobs:go"


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
    ],
)
def test_another_run_in_the_same_folder(
    trained: Path, tiny_corpus: Path, world1: World, changes: dict[str, Any], sentence: str
) -> None:
    kept = sorted(p.name for p in (trained / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=sentence):
        world1.run(GO, config=page(trained, tiny_corpus, **{"run__steps": 20, **changes}))
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == kept


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
