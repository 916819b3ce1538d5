"""A job starts on the machines and devices that were named, or a sentence says why it does not."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.cli import UserError
from launch.machines import Machines, deepspeed_line, free_port
from launch.train import MARK, Job
from pretrain.parallel import cpu_threads

ROOT = Path(__file__).resolve().parent.parent
RUN = str(ROOT / "configs/runs/cpm-small-1gpu.yaml")
NO_GPU = "bajie: --gpu: PyTorch finds no NVIDIA GPU here; leave it out (没有可用的 GPU)\n"


@pytest.mark.parametrize("words", [["generate", "--prompt", "春天"], ["evaluate", "--data", "c"]])
def test_a_gpu_that_is_not_there_is_a_sentence(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main([*words, "runs/none", "--gpu"]) == 2
    assert capsys.readouterr().err == NO_GPU


def test_a_rank_without_the_gpu_that_was_asked_for_does_not_train(tmp_path: Path) -> None:
    """DeepSpeed would take the CPU without a word. The launcher itself may well have no GPU."""
    words = [ROOT / "pretrain/train.py", "--local_rank=0", RUN, f"run.out={tmp_path}", "--gpu"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, NO_GPU)
    assert not (tmp_path / "checkpoints").exists()


def test_the_cores_of_a_machine_are_those_of_its_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE; all ranks together are on more."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cpu_threads() == 2
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert cpu_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cpu_threads() == 8


def test_the_line_is_one_that_a_user_can_type(tmp_path: Path) -> None:
    def line(words: list[str], devices: int, machines: Machines, gpu: bool = False) -> list[str]:
        return deepspeed_line(words, devices, gpu=gpu, machines=machines, logs=tmp_path)

    here = line(["page.yaml", "run.steps=3"], 2, Machines())
    assert here[0] == sys.executable  # not the script's first line: a path may hold a space
    assert here[2:5] == ["--num_accelerators", "2", "--master_port"]
    assert Path(here[6]).name == "train.py"
    assert here[7:] == ["page.yaml", "run.steps=3"]
    many = line(["page.yaml"], 8, Machines("h", {"a": 8, "b": 8}), gpu=True)
    assert many[2:6] == ["--num_gpus", "8", "--hostfile", "h"]
    assert many[-2:] == ["page.yaml", "--gpu"]  # the ranks look: this machine may have none
    mine = Machines("h", {socket.gethostname(): 8})
    assert [m.several for m in (Machines(), mine, Machines("h", {"far-away": 8}))] == [
        False,
        False,
        True,
    ]
    each = line([], 4, Machines.of(3, 1, "10.0.0.7:29500", None))
    assert each[5:12] == [
        str(tmp_path / "hostfile-1"), "--no_ssh", "--node_rank", "1",
        "--master_addr", "10.0.0.7", "--master_port",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())
    Machines.of(3, 1, "10.0.0.7:29500", None).write(4, tmp_path / "logs")
    hosts = (tmp_path / "logs" / "hostfile-1").read_text().splitlines()
    assert hosts == [f"machine-{at} slots=4" for at in range(3)]


def test_gpus_are_those_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed throws CUDA_VISIBLE_DEVICES away where it is told a number: others' GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5,6,7")

    def which(devices: int, machines: Machines, gpu: bool = True) -> list[str]:
        return deepspeed_line([], devices, gpu=gpu, machines=machines, logs=tmp_path)[2:4]

    assert which(2, Machines()) == ["--include", "localhost:4,5"]
    assert which(2, Machines(), gpu=False) == ["--num_accelerators", "2"]
    two = Machines.of(2, 1, "10.0.0.7:29500", None)
    assert which(4, two) == ["--include", "machine-0:4,5,6,7@machine-1:4,5,6,7"]
    two.write(4, tmp_path, gpu=True)
    assert (tmp_path / "hostfile-1").read_text() == "machine-0 slots=8\nmachine-1 slots=8\n"
    with pytest.raises(UserError, match="--devices is 8, CUDA_VISIBLE_DEVICES names 4 GPUs"):
        which(8, Machines())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3a,GPU-11aa")
    with pytest.raises(UserError, match="knows GPUs by number alone"):
        which(1, Machines())


def test_one_machine_of_a_hostfile_is_reached_where_it_is(tmp_path: Path) -> None:
    for name, far in (("node07", True), (socket.gethostname(), False), ("localhost", False)):
        words = Machines("h", {name: 8}).words(8, tmp_path)
        assert ("--force_multi" in words) == far, name
    assert "--force_multi" not in Machines("h", {"node07": 8, "node08": 8}).words(8, tmp_path)


@pytest.mark.parametrize("words", [["train", "--dry-run"], ["cluster", "--slurm"]])
def test_what_is_only_printed_leaves_nothing_behind(words: list[str], tmp_path: Path) -> None:
    many = ["--nodes", "2", *(["--master", "h:1"] if words[0] == "train" else [])]
    assert cli.main([*words, RUN, f"run.out={tmp_path / 'run'}", *many]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("hosts", "words", "says"),
    [
        ("", [], "names no machine"),
        ("# nobody\n\n", [], "names no machine"),
        ("n1 slots=1\nn2\n", [], "line 2: is 'n2', must be like node01 slots=8"),
        ("n1 slots=1\nn1 slots=1\n", [], "line 2: is 'n1 slots=1'"),
        ("n1 slots=4\nn2 slots=2\n", ["--devices", "4"], "n2 has slots=2, --devices is 4"),
        ("n1 slots=1\nn2 slots=1\nn3 slots=1\n", ["parallel.tensor=2"], "is 2, 3 processes"),
    ],
)
def test_a_hostfile_is_read_before_anything_starts(
    hosts: str,
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DeepSpeed trains on this machine alone where it finds none, and counts nothing."""
    (tmp_path / "hosts").write_text(hosts)
    monkeypatch.setattr("launch.machines.ROOT", Path("/lab"))
    monkeypatch.setattr(sys, "executable", "/lab/python")
    monkeypatch.chdir("/")  # the checkout may lie in a path with a blank
    assert cli.main(["train", RUN, "--hostfile", str(tmp_path / "hosts"), *words]) == 2
    assert says in capsys.readouterr().err


def test_a_path_that_ssh_would_break_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("node01 slots=1\n")
    monkeypatch.setattr(sys, "executable", "/my lab/.venv/bin/python")
    assert cli.main(["train", RUN, "--hostfile", str(tmp_path / "hosts")]) == 2
    assert "'/my lab/.venv/bin/python' has a blank in it" in capsys.readouterr().err
    monkeypatch.setattr("launch.machines.ROOT", Path("/lab"))
    monkeypatch.setattr(sys, "executable", "/lab/python")
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")  # DeepSpeed says `cd` there to the other machines
    assert cli.main(["train", RUN, "--hostfile", str(tmp_path / "hosts")]) == 2
    assert "/my runs' has a blank in it" in capsys.readouterr().err


def test_a_free_port_is_free() -> None:
    assert 1024 < free_port() < 65536


@pytest.mark.parametrize(
    ("line", "said", "last"),
    [
        (MARK + "bajie: batch.micro: is 0", "bajie: batch.micro: is 0\n", ""),
        ("bajie: n: run.out: Permission denied", "bajie: n: run.out: Permission denied\n", ""),
        ("RuntimeError: ValueError: ill", "", "RuntimeError: ValueError: ill"),
        ("[rank1]: OSError: full", "", "OSError: full"),
    ],
)
@pytest.mark.parametrize("host", ["", "node01: ", "node02: "])
def test_a_line_means_the_same_from_another_machine(
    host: str, line: str, said: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """pdsh puts "HOST: " in front, without the domain."""
    machines = Machines("hosts", {"node01.lab": 1, "node02": 1})
    job = Job([], {}, io.BytesIO(), hosts=machines.prefixes)
    job._line(host + line)
    assert (capsys.readouterr().err, job.last_error) == (said, last)
