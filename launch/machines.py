"""The line that starts DeepSpeed's launcher: here, on many machines by ssh, on each by itself.

one machine               deepspeed --num_gpus 8 --master_port FREE pretrain/train.py ...
--hostfile FILE           the same, which reaches the others by pdsh and ssh; of our environment
                          they get PYTHON* and NCCL*, all else must be a word of the command
--nodes 4 --node-rank R   each machine starts its own ranks; machine 0 is where they meet
  --master HOST:PORT
"""

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
            if blank := next((at for at in (sys.executable, str(ROOT)) if " " in at), None):
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
            return ["--hostfile", self.hostfile, "--master_port", str(free_port())]
        if self.nodes == 1:
            return ["--master_port", str(free_port())]
        where = ["--master_addr", self.host, "--master_port", self.port]
        file = str(logs / f"hostfile-{self.rank}")
        return ["--hostfile", file, "--no_ssh", "--node_rank", str(self.rank), *where]

    def write(self, devices: int, logs: Path) -> None:
        """The folder of the logs, and in it the hostfile that words() names, where there is one."""
        logs.mkdir(parents=True, exist_ok=True)
        if self.nodes > 1:
            lines = [f"machine-{at} slots={devices}\n" for at in range(self.nodes)]
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
    line = [sys.executable, program, "--num_gpus" if gpu else "--num_accelerators", str(devices)]
    line += [*machines.words(devices, logs), str(ROOT / "pretrain" / "train.py"), *words]
    return [*line, "--gpu"] if gpu else line


def at_least_one(name: str, value: int) -> None:
    """UserError for a number of machines or devices that is none."""
    if value < 1:
        raise UserError(f"{name} is {value}, must be at least 1 (至少为 1)")


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
