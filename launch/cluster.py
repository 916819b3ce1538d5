"""Job files for clusters, from the same page of a run: a hostfile, Slurm, Kubernetes.

    python -m launch cluster RUN.yaml --slurm --nodes 4 --devices 8 --gpu --out job.sh
    python -m launch cluster RUN.yaml --kubernetes --image I --claim C --mount /share --nodes 4
    python -m launch cluster RUN.yaml --hostfile node[01-04] --devices 8 --out hostfile

    on each node: python -m launch train RUN.yaml --devices 8
                      --nodes 4 --node-rank R --master HEAD:PORT       (no ssh, no pdsh)

Nothing asks the internet while a job runs. A job that is preempted, or near its time limit, saves
and stands in the queue again; it goes on where it stood, on as many nodes as the file says.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from configs.executing import SLURM_TIME, slurm_seconds
from configs.load import ConfigError, dump, load
from configs.run import RunConfig, world_problems
from launch.cli import UserError
from launch.machines import at_least_one
from launch.train import GRACE_S
from pretrain.flags import check_read

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
PORT = 29500
STOPPED = 75
"""Exit code of a run that was told to stop before its end (EX_TEMPFAIL)."""
MISTAKEN = 2
"""Exit code of a run that says what to change in its page."""
FAILED_PODS = 100
"""For each machine, over the weeks of a job; a fault of one is one of each."""
POD_FAILURES: list[dict[str, Any]] = [
    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [MISTAKEN]}},
    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
]
"""A mistake in the page ends the Job; a pod that is evicted, or told to stop, is begun again and
counts for nothing."""
NOTICE_S = int(GRACE_S) + 30
"""From the notice that a job will end to its end: time to save. Nobody waits for it in vain: a job
that has saved ends. Of a short job it is a quarter."""
CORES_PER_GPU = 4
"""CPU cores of a process with a GPU where the page has no run.threads: Python, the loader, what
saves, NCCL. Slurm gives a task one core if it is not asked."""

READ_BY = {
    **dict.fromkeys(("nodes", "gpu", "setup", "python"), ("--slurm", "--kubernetes")),
    **dict.fromkeys(("time", "sbatch"), ("--slurm",)),
    **dict.fromkeys(("image", "claim", "mount"), ("--kubernetes",)),
}
"""Flags that only some files hold; a hostfile counts its machines itself."""

SLURM = """\
#!/bin/bash
# {config} on {nodes} x {devices} devices; written by `python -m launch cluster`.
# Slurm writes its log only where the folder stands: mkdir -p {logs}
{options}
set -u
cd {here}
{exports}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # from 22.05 on srun does not take it over

# Before the time limit the shell hears USR1: all ranks save, the steps end well, and the job stands
# in the queue again; one that was stopped by hand (touch RUN/stop) does not. On preemption Slurm
# itself says TERM and puts the job back.
# (Not by a signal through srun: the file reaches the ranks of all nodes, whatever else hears it.)
stop={stop}
rm -f "$stop"
again=
trap 'again=1; touch "$stop"' USR1
left={restarts}  # faults.restarts: here, as all nodes must begin again together
while :; do
  srun --kill-on-bad-exit=1 bash -c {on_node} - \\
    {train} \\
    --nodes "$SLURM_NNODES" --master "$head:$port" &
  step=$!
  wait "$step"; code=$?
  while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a signal ended the first wait
  # 2 is a mistake in the page, which no restart mends
  [ "$code" = 0 ] || [ "$code" = 2 ] || [ -e "$stop" ] || [ "$left" = 0 ] && break
  left=$((left - 1))
  port=$((port + 1))
done
[ "$code" = 0 ] && [ -n "$again" ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""


def main(argv: list[str]) -> int:
    """The verb: prints the file, or writes it to --out."""
    parser = argparse.ArgumentParser("python -m launch cluster", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="the page of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="go into the job as well"
    )
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--slurm", action="store_true", help="an sbatch file")
    kind.add_argument("--kubernetes", action="store_true", help="an indexed Job and its Service")
    kind.add_argument("--hostfile", metavar="HOSTS", help="a hostfile, e.g. node[01-04],extra")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--devices", type=int, default=1, help="processes on each")
    parser.add_argument("--gpu", action="store_true", help="GPUs; without it CPUs are used")
    parser.add_argument("--time", default="24:00:00", help="Slurm: limit of the job")
    parser.add_argument("--sbatch", nargs="*", default=[], help="Slurm: e.g. partition=a account=b")
    parser.add_argument("--setup", default="", help="shell lines each node runs first")
    parser.add_argument("--python", default=sys.executable, help="Python on the nodes")
    parser.add_argument("--image", help="Kubernetes: image that holds the environment")
    parser.add_argument("--claim", help="Kubernetes: volume claim of the shared file system")
    parser.add_argument("--mount", help="Kubernetes: where it is mounted")
    parser.add_argument("--out", type=Path, help="the file to write")
    words = parser.parse_intermixed_args(argv)
    kinds = ("slurm", "kubernetes", "hostfile")
    asked = next(name for name in kinds if getattr(words, name))
    check_read(words, parser, READ_BY, f"--{asked}")
    text = job_file(words)
    if words.out is None:
        print(text, end="")
    else:
        words.out.write_text(text, "utf-8")
        how = {"slurm": "sbatch", "kubernetes": "kubectl apply -f"}
        verb = next((how[key] for key in how if getattr(words, key)), "launch train --hostfile")
        print(f"{words.out}: written; {verb} {words.out} (已写入)")
    return 0


def job_file(words: argparse.Namespace) -> str:
    """The text for the words of the command; UserError, ConfigError for what cannot be."""
    if words.hostfile:
        hosts = expanded(words.hostfile)
        _check(words, len(hosts))
        return "".join(f"{host} slots={words.devices}\n" for host in hosts)
    config = _check(words, words.nodes)
    return kubernetes(words, config) if words.kubernetes else slurm(words, config)


def _check(words: argparse.Namespace, nodes: int) -> RunConfig:
    config = load(words.config, RunConfig, words.overrides)
    for name, value in (("--nodes", nodes), ("--devices", words.devices)):
        at_least_one(name, value)
    if problems := world_problems(config, nodes * words.devices):
        raise ConfigError("\n".join(problems))
    return config


def expanded(hosts: str) -> list[str]:
    """node[01-03,7],extra -> node01, node02, node03, node7, extra; UserError for what is none."""
    found = []
    for part in re.split(r",(?![^\[]*\])", hosts):  # commas outside brackets
        name = re.fullmatch(r"([\w.-]*)(?:\[([\d,-]+)\])?([\w.-]*)", part.strip())
        if not part.strip() or name is None:
            raise UserError(f"--hostfile: '{part}' names no machine, e.g. node[01-04] (主机名有误)")
        before, inner, after = name.groups()
        if inner is None:
            found.append(before + after)
            continue
        for piece in inner.split(","):
            ends = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
            low, high = (ends[1], ends[2] or ends[1]) if ends else ("1", "0")
            if int(low) > int(high):
                raise UserError(
                    f"--hostfile: '{piece}' in '{part.strip()}' must be a number or two that rise, "
                    "e.g. node[01-04,7] (编号范围有误)"
                )
            numbers = range(int(low), int(high) + 1)
            found += [f"{before}{number:0{len(low)}d}{after}" for number in numbers]
    if twice := [host for host in dict.fromkeys(found) if found.count(host) > 1]:
        raise UserError(f"--hostfile: '{hosts}' names {', '.join(twice)} more than once (主机重复)")
    return found


def train_words(words: argparse.Namespace) -> list[str]:
    """The command of a node, without what differs from node to node."""
    gpu = ["--gpu"] if words.gpu else []
    config = str(Path(words.config).resolve())
    line = [words.python, "-m", "launch", "train", config, *words.overrides]
    return [*line, "--devices", str(words.devices), *gpu]


def on_node(words: argparse.Namespace, last: str) -> str:
    """What the shell of each node does: the lines of --setup, then `last` if none has failed."""
    if not words.setup.strip():
        return last
    fails = "trap 'exit 1' ERR"  # not with the line's own code: 2 is a mistake in the page
    return "\n".join(["set -eE", fails, words.setup, "set +eE", "trap - ERR", last])


def slurm(words: argparse.Namespace, config: RunConfig) -> str:
    """The sbatch file."""
    if not SLURM_TIME.fullmatch(words.time):
        raise UserError(f"--time: is '{words.time}', must be minutes, H:M:S or D-H:M:S (时限格式)")
    if wrong := [o for o in words.sbatch if not re.fullmatch(r"[a-z][a-z-]*(=.*)?", o)]:
        raise UserError(f"--sbatch: '{wrong[0]}' must be like account=lab (写长选项名，不带横线)")
    out = Path(config.run.out)
    notice_s = int(min(NOTICE_S, slurm_seconds(words.time) / 4))
    cores = config.run.threads or (CORES_PER_GPU if words.gpu else 1)
    log = out.absolute() / "logs" / "slurm-%j.log"
    if words.out is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    options = [
        f"job-name=bajie-{out.name}",
        f"nodes={words.nodes}",
        "ntasks-per-node=1",
        f"time={words.time}",
        f"signal=B:USR1@{notice_s}",
        "requeue",
        "open-mode=append",
        f'output="{log}"',
        *([f"gpus-per-node={words.devices}"] if words.gpu else []),
        f"cpus-per-task={words.devices * cores}",
        *words.sbatch,
    ]
    exports = [f"export {name}={value}" for name, value in OFFLINE.items()]
    exports.append(f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}")
    return SLURM.format(
        config=words.config,
        nodes=words.nodes,
        devices=words.devices,
        restarts=config.faults.restarts if words.nodes > 1 else 0,
        options="\n".join(f"#SBATCH --{option}" for option in options),
        here=shlex.quote(str(Path.cwd())),
        logs=shlex.quote(str(log.parent)),
        exports="\n".join(exports),
        on_node=shlex.quote(on_node(words, 'exec "$@" --node-rank "$SLURM_NODEID"')),
        train=shlex.join(train_words(words)),
        stop=shlex.quote(str(out.absolute() / "stop")),
    )


def kubernetes(words: argparse.Namespace, config: RunConfig) -> str:
    """An indexed Job, a pod a node, and the headless Service by which they find the first."""
    if not (words.image and words.claim and words.mount):
        raise UserError(
            "--image, --claim, --mount: must be given for Kubernetes, the image with the "
            "environment, the volume claim of the shared file system, and its path, which holds "
            "this folder (须给出镜像、存储卷与挂载路径)"
        )
    name = re.sub(r"[^a-z0-9]+", "-", f"bajie-{Path(config.run.out).name}".lower()).strip("-")[:40]
    per_node = ["--nodes", str(words.nodes), "--node-rank", "$JOB_COMPLETION_INDEX"]
    # A pod that was told to stop has not completed its index.
    line = shlex.join([*train_words(words), "--stopped-code", str(STOPPED)])
    line += " " + " ".join(per_node)
    line += f" --master {name}-0.{name}:{PORT}"
    shell = f"cd {shlex.quote(str(Path.cwd()))} || exit\n" + on_node(words, f"exec {line}")
    needs = {"nvidia.com/gpu": words.devices} if words.gpu else {"cpu": words.devices}
    container: dict[str, Any] = {
        "name": "train",
        "image": words.image,
        "command": ["bash", "-c", shell],
        "env": [
            {"name": key, "value": value}
            for key, value in {**OFFLINE, "PYTHONPATH": str(ROOT)}.items()
        ],
        "resources": {"limits": needs},
        "volumeMounts": [
            {"name": "shared", "mountPath": words.mount},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": NOTICE_S,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": words.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},  # for NCCL and gloo
        ],
    }
    meta = {"name": name, "labels": {"app": name}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        # Pods must find one another before they are ready.
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": name},
            "ports": [{"port": PORT}],
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {
            "completions": words.nodes,
            "parallelism": words.nodes,
            "completionMode": "Indexed",
            "backoffLimit": FAILED_PODS * words.nodes,
            "podFailurePolicy": {"rules": POD_FAILURES},
            "template": {"metadata": {"labels": {"app": name}}, "spec": pod},
        },
    }
    head = f"# {words.config} on {words.nodes} x {words.devices} devices; kubectl apply -f THIS\n"
    return head + dump(service) + "---\n" + dump(job)
