"""Promise: one page of a run becomes the job file of a cluster, and the job runs as the page says.

The slow ones start two "machines" on this one, and a real Slurm of one node that stops the job
before its limit and puts it back in the queue.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.cli import UserError
from launch.cluster import expanded, main
from launch.machines import Machines, free_port
from launch.train import GRACE_S
from pretrain.watch import STALLED
from tests import small_slurm
from tests.run_jobs import losses, page, write

ROOT = Path(__file__).resolve().parent.parent
RUN = str(ROOT / "configs/runs/cpm-small-1gpu.yaml")


def test_machines_are_counted_as_slurm_writes_them() -> None:
    assert expanded("node[01-03,7],extra") == ["node01", "node02", "node03", "node7", "extra"]
    assert expanded("a-b.c") == ["a-b.c"]
    for wrong, says in {
        "a,b,a": "names a more than once",
        "n[1-3,2]": "names n2 more than once",
        "a[1-": "names no machine",
        "a b": "names no machine",
        "": "names no machine",
        "node[-]": "'-' in 'node[-]' must be a number or two that rise",
        "node[04-01]": "'04-01' in 'node[04-01]' must be",
        "x, node[1-]": "'1-' in 'node[1-]' must be",
        "node[1,,2]": "'' in 'node[1,,2]' must be",
        "node[1-2-3]": "'1-2-3' in",
    }.items():
        with pytest.raises(UserError, match="--hostfile") as raised:
            expanded(wrong)
        assert says in str(raised.value)


def test_the_hostfile_names_each_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([RUN, "--hostfile", "n[1-2]", "--devices", "8"]) == 0
    assert capsys.readouterr().out == "n1 slots=8\nn2 slots=8\n"


def test_the_slurm_file_is_a_script_that_keeps_odd_names_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a run"
    words = [RUN, f"run.out={out}", "--slurm", "--nodes", "2", "--devices", "8", "--gpu"]
    assert main([*words, "--sbatch", "partition=big", "--setup", "module load cuda"]) == 0
    text = capsys.readouterr().out
    options = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=2", "--gpus-per-node=8", "--requeue", "--partition=big"} <= set(options)
    assert "--cpus-per-task=32" in options  # 4 a process; Slurm alone would give the 8 one core
    assert f'--output="{out}/logs/slurm-%j.log"' in options
    assert f"'run.out={out}'" in text and "module load cuda" in text
    assert "export HF_HUB_OFFLINE=1" in text
    script = tmp_path / "job.sh"
    script.write_text(text)
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("words, cores", [([], 2), (["run.threads=6"], 12), (["--gpu"], 8)])
def test_a_task_has_the_cores_of_its_processes(
    words: list[str], cores: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([RUN, "--slurm", "--devices", "2", *words]) == 0
    assert f"#SBATCH --cpus-per-task={cores}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("limit", "notice"),
    [
        ("24:00:00", 630),
        ("infinite", 630),
        ("1-0", 630),
        ("30", 450),
        ("8:00", 120),
        ("0:40:00", 600),
    ],
)
def test_a_job_hears_of_its_limit_in_time_to_save(
    limit: str, notice: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Longer before it than the launcher lets its ranks save, and never at the job's begin."""
    assert GRACE_S < 630 and main([RUN, "--slurm", "--time", limit]) == 0
    assert f"#SBATCH --signal=B:USR1@{notice}\n" in capsys.readouterr().out


SRUN = """#!/bin/sh
shift
[ -z "$NEAR_ITS_LIMIT" ] || { kill -USR1 $PPID; sleep 0.3; }
for SLURM_NODEID in 0 1; do
  export SLURM_NODEID; "$@" || code=$?
done
exit ${code:-0}
"""
SCONTROL = '#!/bin/sh\n[ "$1" = show ] && echo node01 || echo "scontrol $*"\n'
TRAIN = '#!/bin/sh\necho "node $SLURM_NODEID: $SETUP, $SRUN_CPUS_PER_TASK cores"\nexit {code}\n'


@pytest.mark.parametrize("code", [0, STALLED, 1])
@pytest.mark.parametrize("limit", ["", "near"])
def test_each_node_is_set_up_and_only_what_met_its_limit_is_put_back(
    code: int, limit: str, tmp_path: Path
) -> None:
    """The script itself, on two nodes of a Slurm that is played; --setup ends in a comment."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("train", TRAIN.format(code=code))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    setup = 'export SETUP="it\'s node $SLURM_NODEID"\n\nif true; then\n  true  # well\nfi  # said'
    words = [RUN, f"run.out={tmp_path / 'run'}", "--slurm", "--nodes", "2", "--setup", setup]
    script = tmp_path / "job.sh"
    assert main([*words, "--python", str(tmp_path / "train"), "--out", str(script)]) == 0
    assert (tmp_path / "run" / "logs").is_dir()  # or Slurm would have nowhere to write to
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node[01-02]", "NNODES": "2", "CPUS_PER_TASK": "1"}
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **{f"SLURM_{k}": v for k, v in slurm.items()}}
    env["NEAR_ITS_LIMIT"] = limit
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    said = done.stdout.splitlines()
    assert said[:2] == [f"node {n}: it's node {n}, 1 cores" for n in (0, 1)]
    assert said[2:] == (["scontrol requeue 7"] if limit and not code else [])
    assert (tmp_path / "run" / "stop").exists() == bool(limit)


@pytest.mark.parametrize(
    ("nodes", "codes", "lives", "code"),
    [
        (2, [1, STALLED, 0], 3, 0),
        (2, [1, 1, 1, 1], 3, 1),
        (2, [2, 0], 1, 2),
        (1, [1, 0], 1, 1),
    ],
)
def test_slurm_begins_again_on_all_nodes_together(
    nodes: int, codes: list[int], lives: int, code: int, tmp_path: Path
) -> None:
    """faults.restarts: 2; a mistake is not repeated; one node's launcher does it itself."""
    played = f'#!/bin/sh\necho >>"{tmp_path}/lives"\nset -- {" ".join(map(str, codes))}\n'
    played += f'shift $(($(wc -l <"{tmp_path}/lives") - 1))\nexit $1\n'
    for name, text in (("srun", played), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    words = [RUN, f"run.out={tmp_path / 'run'}", "faults.restarts=2", "--slurm"]
    script = tmp_path / "job.sh"
    assert main([*words, "--nodes", str(nodes), "--out", str(script)]) == 0
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node[01-02]", "NNODES": "2", "CPUS_PER_TASK": "1"}
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **{f"SLURM_{k}": v for k, v in slurm.items()}}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert (done.returncode, (tmp_path / "lives").read_text().count("\n")) == (code, lives)


@pytest.mark.parametrize(
    ("setup", "code"),
    [
        ("true  # well", 0),
        ("false", 1),
        ("bash -c 'exit 2'", 1),  # 2 would end the whole Job
        ("true\nfalse  # no\ntrue", 1),
        ("if true; then\n :\nfi", 0),
    ],
)
def test_no_node_trains_whose_setup_failed(setup: str, code: int, tmp_path: Path) -> None:
    """The command of a pod, run; Slurm's is run above."""
    (tmp_path / "train").write_text("#!/bin/sh\necho trained\n")
    (tmp_path / "train").chmod(0o755)
    words = [RUN, "--kubernetes", "--image", "i", "--claim", "c", "--mount", "/share"]
    words += ["--setup", setup, "--python", str(tmp_path / "train"), "--out", str(tmp_path / "job")]
    assert main(words) == 0
    _, job = yaml.safe_load_all((tmp_path / "job").read_text())
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "" if code else "trained\n"), done.stderr


def test_the_kubernetes_file_is_a_job_of_a_pod_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    words = [RUN, "--kubernetes", "--nodes", "3", "--devices", "8", "--gpu", "--image", "lab/bajie"]
    assert main([*words, "--claim", "shared", "--mount", "/share"]) == 0
    service, job = yaml.safe_load_all(capsys.readouterr().out)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
    pod = spec["template"]["spec"]
    line = pod["containers"][0]["command"][-1]
    assert "--node-rank $JOB_COMPLETION_INDEX" in line and "--nodes 3" in line
    assert f"--master bajie-cpm-small-0.{pod['subdomain']}:29500" in line
    assert "--stopped-code 75" in line  # a pod that was told to stop has not completed its index
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    assert rules[1] == {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}}
    assert rules[2]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never"  # or a policy of failures is refused


@pytest.mark.parametrize(
    "words, says",
    [
        (["--slurm", "--nodes", "0"], "--nodes is 0"),
        (["--slurm", "--time", "soon"], "--time: is 'soon'"),
        (["--slurm", "--sbatch", "--evil"], "--sbatch"),
        (["--kubernetes", "--image", "i"], "--image, --claim, --mount"),
        (["--slurm", "parallel.tensor=2", "--devices", "3"], "parallel.tensor: is 2, 3 processes"),
    ],
)
def test_mistakes_are_a_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        main([RUN, *words])
    except (ValueError, SystemExit) as error:
        said = str(error) + capsys.readouterr().err
        assert says in said
    else:
        pytest.fail("accepted")


def test_machines_must_know_where_they_meet() -> None:
    for rank, master in ((0, None), (2, "h:1"), (0, "h"), (0, "h:port")):
        with pytest.raises(UserError, match="--nodes 2: needs --node-rank from 0 to 1"):
            Machines.of(2, rank, master, None)


@pytest.mark.slow
def test_two_machines_without_ssh_train_as_one(tmp_path: Path, tiny_corpus: Path) -> None:
    """Both on this one; the same run on one machine has the same losses."""
    config = write(tmp_path / "two.yaml", page(tmp_path / "two", tiny_corpus, run__steps=20))
    line = [sys.executable, "-m", "launch", "train", str(config), "--devices", "1", "--nodes", "2"]
    line += ["--master", f"127.0.0.1:{free_port()}", "--node-rank"]
    started = [subprocess.Popen([*line, str(rank)], cwd=ROOT) for rank in (0, 1)]
    assert [process.wait(240) for process in started] == [0, 0]
    config = write(tmp_path / "one.yaml", page(tmp_path / "one", tiny_corpus, run__steps=20))
    line = [sys.executable, "-m", "launch", "train", str(config), "--devices", "2"]
    assert subprocess.run(line, cwd=ROOT, timeout=240).returncode == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(small_slurm.missing() is not None, reason=str(small_slurm.missing()))
def test_a_slurm_job_saves_before_its_limit_and_is_put_back(
    tmp_path: Path, tiny_corpus: Path
) -> None:
    """USR1 as Slurm would send it before the limit; the second life ends the run."""
    config = write(
        tmp_path / "run.yaml",
        page(tmp_path / "run", tiny_corpus, run__steps=300, run__log_every_steps=1),
    )
    script, out = tmp_path / "job.sh", tmp_path / "run"
    assert main([str(config), "--slurm", "--devices", "2", "--out", str(script)]) == 0
    with small_slurm.small_slurm() as variables:
        env = os.environ | variables

        def ask(*line: str) -> str:
            path = shutil.which(line[0], path=env["PATH"])
            done = subprocess.run([str(path), *line[1:]], env=env, capture_output=True, text=True)
            return done.stdout.strip()

        def until(what: str, ready: object, limit_s: float = 240) -> None:
            deadline = time.monotonic() + limit_s
            while not ready():  # type: ignore[operator]
                assert time.monotonic() < deadline, (what, ask("squeue"), _logs(out))
                time.sleep(0.5)

        job = ask("sbatch", "--parsable", str(script))
        until("steps", lambda: (out / "metrics.jsonl").exists() and len(losses(out)) > 3)
        ask("scancel", "--signal=USR1", "--batch", job)
        until("requeue", lambda: "PENDING" in ask("squeue", "-j", job, "-o", "%T", "-h"))
        assert (out / "stop").exists()
        saved = [path for path in (out / "checkpoints").iterdir() if path.name[0] != "."]
        assert len(saved) == 1 and 3 < int(saved[0].name[-8:]) < 300
        ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        until("the end", lambda: len(losses(out)) == 300)
        until("leaving", lambda: ask("squeue", "-j", job, "-h") == "")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step] == list(range(1, 301))


def _logs(out: Path) -> str:
    return "".join(path.read_text(errors="replace")[-2000:] for path in out.glob("logs/slurm-*"))
