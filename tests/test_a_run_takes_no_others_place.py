"""A run begins in no folder whose files are not a run's, and begins again in its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from pretrain import checkpoint
from pretrain.folder import strangers
from tests.run_jobs import losses, page, write
from tests.worlds import World

GO = "tests.run_jobs:go"
ROOT = Path(__file__).resolve().parent.parent
OTHERS = [
    ["config.yaml", "metrics.jsonl"],
    ["notes.md", "config.yaml"],
    ["manifest.json", "train.bin"],
    [".lock", "stages/clean/data"],  # a build of a corpus that was killed
    [".lock", "manifest.json"],
    ["state.json"],
    ["events.jsonl"],
    ["paper/chapter.txt"],
    ["checkpoints/epoch-1.pt"],
]
OURS = [
    [],
    ["logs/launcher.log"],
    ["logs/launcher.log", "stop", ".owner"],
    ["page.yaml", "job.sh", "nohup.out", "README.md", ".git/HEAD"],
    [".lock", "logs/rank-0000.json", "config.yaml"],
    [".lock", "config.yaml", "metrics.jsonl", "events.jsonl", "tensorboard/events", "mine.bin"],
    ["checkpoints/stage-00-step-00000010/state.json", "config.yaml"],  # copied without its lock
]


def _laid(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")
    return folder


def _contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text("utf-8") for path in files}


@pytest.mark.parametrize("names", OTHERS)
def test_the_verb_leaves_the_files_of_others_alone(
    tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = _laid(tmp_path / "mine", names)
    config = write(tmp_path / "run.yaml", page(mine, tmp_path / "corpus"))
    assert cli.main(["train", str(config)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith(f"bajie: run.out: {mine} holds '")
    assert "which no run wrote" in said.err and "name an empty or a new folder" in said.err
    assert _contents(mine) == dict.fromkeys(names, "years of work")


def test_so_does_a_rank_that_deepspeed_starts(tmp_path: Path) -> None:
    mine = _laid(tmp_path / "mine", OTHERS[0])
    config = write(tmp_path / "run.yaml", page(mine, tmp_path / "corpus"))
    words = [sys.executable, ROOT / "pretrain/train.py", "--local_rank=0", config]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"bajie: run.out: {mine} holds")
    assert _contents(mine) == dict.fromkeys(OTHERS[0], "years of work")


def test_so_does_training_without_a_launcher(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    mine = _laid(tmp_path / "mine", OTHERS[0])
    with pytest.raises(ValueError, match=r"holds 'config\.yaml' and 1 more, which no run wrote"):
        world2.run(GO, config=page(mine, tiny_corpus, run__steps=2, schedule={}))
    assert _contents(mine) == dict.fromkeys(OTHERS[0], "years of work")


@pytest.mark.parametrize("names", OURS)
def test_what_a_run_left_and_what_lies_beside_one_is_no_strangers(
    tmp_path: Path, names: list[str]
) -> None:
    assert strangers(_laid(tmp_path / "run", names)) == []
    (tmp_path / "run" / "tensorboard").mkdir(parents=True, exist_ok=True)
    assert strangers(tmp_path / "run") == [], "a folder without files"
    assert strangers(tmp_path / "run" / "nowhere") == []


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    """As many files as a run ever makes, none of them a checkpoint."""
    run = tmp_path / "run"
    config = page(run, tiny_corpus, run__steps=4, schedule={}, run__validate_every_steps=2)
    world1.run(GO, config=config)
    first = losses(run)
    for whole in checkpoint.found_in(run):
        whole.rename(whole.with_name(f".{whole.name}.writing"))
    assert strangers(run) == [] and checkpoint.found_in(run) == []
    world1.run(GO, config=config)
    assert losses(run) == first and len(checkpoint.found_in(run)) == 1
