"""Promise: a flag that would do nothing where it was given is refused in a sentence; where it is
read it is taken. (`evaluate`'s: test_tasks_measure_what_they_say.py.)"""

import argparse
from pathlib import Path

import pytest

from launch import cli, cluster, convert
from pretrain import decoding
from tests.test_tasks_measure_what_they_say import SIZES, saved

ROOT = Path(__file__).resolve().parent.parent
RUN = str(ROOT / "configs/runs/cpm-tiny-cpu.yaml")
MOUNTED = ["--image", "i", "--claim", "c", "--mount", "/share"]


@pytest.mark.parametrize("to", convert.FORMATS)
def test_ranks_are_for_formats_that_have_them(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["convert", str(tmp_path / "nowhere"), str(tmp_path / "x"), "--to", to, "--ranks", "2"]
    assert cli.main(line) == 2
    refused = f"--ranks: is 2, which --to {to} does not read, only cpm1, megatron; leave it out"
    assert (refused in capsys.readouterr().err) == (to not in ("cpm1", "megatron"))


@pytest.mark.parametrize(
    ("kind", "flag", "readers"),
    [
        ("--slurm", ["--image", "foo"], "--kubernetes"),
        ("--slurm", ["--claim", "b"], "--kubernetes"),
        ("--slurm", ["--mount", "/share"], "--kubernetes"),
        ("--kubernetes", ["--time", "1:00:00"], "--slurm"),
        ("--kubernetes", ["--sbatch", "partition=big", "account=lab"], "--slurm"),
        ("--hostfile", ["--nodes", "4"], "--slurm, --kubernetes"),
        ("--hostfile", ["--gpu"], "--slurm, --kubernetes"),
        ("--hostfile", ["--setup", "module load cuda"], "--slurm, --kubernetes"),
        ("--hostfile", ["--python", "python3"], "--slurm, --kubernetes"),
    ],
)
def test_a_job_file_holds_every_flag_that_is_given(
    kind: str, flag: list[str], readers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [kind, "n[1-2]"] if kind == "--hostfile" else [kind]
    more = MOUNTED if kind == "--kubernetes" else []
    assert cli.main(["cluster", RUN, *asked, *more, *flag]) == 2
    said, value = capsys.readouterr().err, " ".join(flag[1:]) or "given"
    assert f"{flag[0]}: is {value}, which {kind} does not read, only {readers}; leave" in said


def test_every_flag_of_a_job_file_is_known_to_be_one() -> None:
    """The control: each flag of the table is read by a kind of file, and none by all."""
    kinds = {"--slurm", "--kubernetes", "--hostfile"}
    assert all(readers and set(readers) < kinds for readers in cluster.READ_BY.values())


@pytest.mark.parametrize(
    ("way", "flag", "said"),
    [
        (["--beams", "2"], ["--temperature", "0.5"], "--temperature: is 0.5, which --beams does"),
        (["--beams", "2"], ["--top-k", "3"], "--top-k: is 3, which --beams does not read, only"),
        (["--greedy"], ["--top-k", "3"], "--top-k: is 3, which --greedy does not read, only"),
        (["--greedy"], ["--top-p", "0.5"], "--top-p: is 0.5, which --greedy does not read"),
        (["--greedy"], ["--seed", "3"], "--seed: is 3, which --greedy does not read"),
    ],
)
def test_what_only_sampling_reads_is_refused_elsewhere(
    way: list[str],
    flag: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["generate", str(tmp_path), "--prompt", "今天"]
    assert cli.main([*line, *way, *flag]) == 2
    assert said in capsys.readouterr().err
    for alone in (way, flag):  # the control
        assert cli.main([*line, *alone]) == 2
        assert "holds no checkpoint" in capsys.readouterr().err


def test_beams_and_greedy_are_two_ways(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "run", "--prompt", "今天", "--greedy", "--beams", "2"])
    assert ended.value.code == 2
    assert "--beams: not allowed with argument --greedy" in capsys.readouterr().err


def test_an_encoder_reads_no_flag_of_decoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", str(saved(tmp_path, SIZES["roformer"])), "--prompt", "今[MASK]气"]
    assert cli.main(line) == 0
    given = {"--temperature": "0.5", "--max-new-tokens": "8", "--min-new-tokens": "2"}
    given |= {"--top-k": "3", "--top-p": "0.5", "--seed": "1", "--beams": "2", "--allowed": "f"}
    for flag, value in given.items():
        assert cli.main([*line, flag, value]) == 2
        refused = f"{flag}: is {value}, which an encoder does not read, only models that write"
        assert refused in capsys.readouterr().err
    assert cli.main([*line, "--greedy"]) == 2
    assert "--greedy: is given, which an encoder does not read" in capsys.readouterr().err


def test_the_flags_of_decoding_are_its_settings() -> None:
    """Each setting has a flag, and what nobody gave is a decoding that can be."""
    parser = argparse.ArgumentParser()
    decoding.add_flags(parser)
    assert decoding.from_flags(parser.parse_args([]), parser).max_new_tokens == 64
