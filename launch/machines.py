"""The line that starts DeepSpeed's launcher: here, on many machines by ssh, on each by itself.

one machine               deepspeed --num_gpus 8 --master_port FREE pretrain/train.py ...
  CUDA_VISIBLE_DEVICES    deepspeed --include localhost:4,5 ..., which would else take 0 and 1
--hostfile FILE           the same, which reaches the others by pdsh and ssh; of our environment
                          they get PYTHON* and NCCL*, all else must be a word of the command
--nodes 4 --node-rank R   each machine starts its own ranks; machine 0 is where they meet
  --master HOST:PORT
"""

import os
import re
import shutil
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from launch.cli import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machines:
    """Those that the job runs on, where there are several."""

    hostfile: str | None = None
    """One start on one machine for all, by ssh."""
    slots: dict[str, int] = field(default_factory=dict)
    """What the hostfile says of each machine."""
    nodes: int = 1
    rank: int = 0
    host: str = ""
    port: str = ""
    """Or a start on each, without ssh, as Slurm and Kubernetes do it."""

    @classmethod
    def of(cls, nodes: int, rank: int, master: str | None, hostfile: str | None) -> "Machines":
        """From the words of the command; UserError for what does not go together."""
        at_least_one("--nodes", nodes)
        if nodes == 1:
            if hostfile is None:
                return cls()
            slots = slots_of(hostfile)
            places = (sys.executable, str(ROOT), str(Path.cwd()))  # it says `cd` here to them
            if blank := next((at for at in places if " " in at), None):
                raise UserError(
                    f"--hostfile: '{blank}' has a blank in it, which DeepSpeed's line to the other "
                    "machines would break at; move it, or start each by --nodes (路径含空格)"
                )
            return cls(hostfile, slots)
        host, _, port = (master or "").rpartition(":")
        if hostfile or not host or not port.isdigit() or not 0 <= rank < nodes:
            raise UserError(
                f"--nodes {nodes}: needs --node-rank from 0 to {nodes - 1} (is {rank}) and "
                f"--master HOST:PORT (is {master}), and no --hostfile (多机参数有误)"
            )
        return cls(None, {}, nodes, rank, host, port)

    @property
    def several(self) -> bool:
        """Whether there is more than this machine."""
        alone = len(self.slots) == 1 and here(*self.slots)
        return self.nodes > 1 or (bool(self.slots) and not alone)

    @property
    def prefixes(self) -> frozenset[str]:
        """The names of the hostfile as pdsh says them, whole or without their domain."""
        return frozenset({*self.slots, *(host.partition(".")[0] for host in self.slots)})

    def processes(self, devices: int) -> int:
        """How many the job has; UserError where the hostfile has less room for those of a node."""
        at_least_one("--devices", devices)
        for host, slots in self.slots.items():
            if slots < devices:
                raise UserError(
                    f"{self.hostfile}: {host} has slots={slots}, --devices is {devices}; it must "
                    "be at most that (设备数超过 slots)"
                )
        return devices * (len(self.slots) or self.nodes)

    def words(self, devices: int, logs: Path) -> list[str]:
        """What DeepSpeed's launcher is told; without ssh the names of machines are only counted."""
        if self.hostfile:
            # One machine in the file, and DeepSpeed would start its ranks here.
            far = ["--force_multi"] if len(self.slots) == 1 and not here(*self.slots) else []
            return [*far, "--hostfile", self.hostfile, "--master_port", str(free_port())]
        if self.nodes == 1:
            return ["--master_port", str(free_port())]
        where = ["--master_addr", self.host, "--master_port", self.port]
        file = str(logs / f"hostfile-{self.rank}")
        return ["--hostfile", file, "--no_ssh", "--node_rank", str(self.rank), *where]

    def which(self, devices: int, gpu: bool) -> list[str]:
        """Which devices of a machine: the first ones, or those that CUDA_VISIBLE_DEVICES names,
        which DeepSpeed throws away. By ssh it does not reach the other machines."""
        ids = visible_gpus(devices) if gpu and not self.hostfile else None
        if ids is None:
            return ["--num_gpus" if gpu else "--num_accelerators", str(devices)]
        names = [f"machine-{at}" for at in range(self.nodes)] if self.nodes > 1 else ["localhost"]
        return ["--include", "@".join(f"{name}:{','.join(map(str, ids))}" for name in names)]

    def write(self, devices: int, logs: Path, gpu: bool = False) -> None:
        """The folder of the logs, and in it the hostfile that words() names, where there is one."""
        logs.mkdir(parents=True, exist_ok=True)
        if self.nodes > 1:
            ids = visible_gpus(devices) if gpu else None
            slots = max(ids) + 1 if ids else devices
            lines = [f"machine-{at} slots={slots}\n" for at in range(self.nodes)]
            (logs / f"hostfile-{self.rank}").write_text("".join(lines), "utf-8")


def deepspeed_line(
    words: list[str], devices: int, *, gpu: bool, machines: Machines, logs: Path
) -> list[str]:
    """The command that runs pretrain/train.py on `devices` processes and on a port that is free."""
    beside = Path(sys.executable).parent / "deepspeed"
    program = str(beside) if beside.exists() else shutil.which("deepspeed")
    if program is None:
        raise UserError(f"no `deepspeed` beside {sys.executable}; run ./launch/setup.sh (缺少安装)")
    # Python is named: the script's own first line breaks where the environment's path has a space.
    line = [sys.executable, program, *machines.which(devices, gpu)]
    line += [*machines.words(devices, logs), str(ROOT / "pretrain" / "train.py"), *words]
    return [*line, "--gpu"] if gpu else line


def at_least_one(name: str, value: int) -> None:
    """UserError for a number of machines or devices that is none."""
    if value < 1:
        raise UserError(f"{name} is {value}, must be at least 1 (至少为 1)")


def visible_gpus(devices: int) -> list[int] | None:
    """The first `devices` of the GPUs that CUDA_VISIBLE_DEVICES names, None where it is not set;
    UserError for fewer, and for names that are no numbers."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not said:
        return None
    names = [name.strip() for name in said.split(",")]
    if not all(map(str.isdigit, names)):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: is '{said}', DeepSpeed's launcher knows GPUs by number alone; "
            "write it like 0,1 (须为编号)"
        )
    if len(names) < devices:
        raise UserError(
            f"--devices is {devices}, CUDA_VISIBLE_DEVICES names {len(names)} GPUs: {said}; "
            "it must be at most that (超过可见的 GPU 数)"
        )
    return [int(name) for name in names[:devices]]


def here(host: str) -> bool:
    """Whether a name of a hostfile is this machine's."""
    own = {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}
    return host in own or host.partition(".")[0] == socket.gethostname().partition(".")[0]


def slots_of(hostfile: str) -> dict[str, int]:
    """The machines of DeepSpeed's hostfile and their slots, read as DeepSpeed does, which trains on
    this machine alone where there is no such file; UserError for that and for what names none."""
    try:
        lines = Path(hostfile).read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{hostfile}: there is no such hostfile (没有这个 hostfile)") from None
    found: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        said = re.match(r"(\S+)\s+slots=(\d+)", line)
        if said is None or said[1] in found:
            raise UserError(
                f"{hostfile}, line {number}: is '{line}', must be like node01 slots=8, each "
                "machine once (hostfile 有误)"
            )
        found[said[1]] = int(said[2])
    if not found:
        raise UserError(
            f"{hostfile}: names no machine; a line is like node01 slots=8 (空 hostfile)"
        )
    return found


def free_port() -> int:
    """A TCP port that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
