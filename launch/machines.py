"""The line that starts DeepSpeed's launcher: here, on many machines by ssh, on each by itself.

one machine               deepspeed --num_gpus 8 --master_port FREE pretrain/train.py ...
--hostfile FILE           the same, which reaches the others by ssh
--nodes 4 --node-rank R   each machine starts its own ranks; machine 0 is where they meet
  --master HOST:PORT
"""

import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.cli import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machines:
    """Those that the job runs on, where there are several."""

    hostfile: str | None = None
    """One start on one machine for all, by ssh."""
    nodes: int = 1
    rank: int = 0
    host: str = ""
    port: str = ""
    """Or a start on each, without ssh, as Slurm and Kubernetes do it."""

    @classmethod
    def of(cls, nodes: int, rank: int, master: str | None, hostfile: str | None) -> "Machines":
        """From the words of the command; UserError for what does not go together."""
        if nodes == 1:
            return cls(hostfile)
        host, _, port = (master or "").rpartition(":")
        if hostfile or not host or not port.isdigit() or not 0 <= rank < nodes:
            raise UserError(
                f"--nodes {nodes}: needs --node-rank from 0 to {nodes - 1} (is {rank}) and "
                f"--master HOST:PORT (is {master}), and no --hostfile (多机参数有误)"
            )
        return cls(None, nodes, rank, host, port)

    def words(self, devices: int, logs: Path) -> list[str]:
        """What DeepSpeed's launcher is told; without ssh the names of machines are only counted."""
        if self.hostfile:
            return ["--hostfile", self.hostfile, "--master_port", str(free_port())]
        if self.nodes == 1:
            return ["--master_port", str(free_port())]
        file = logs / f"hostfile-{self.rank}"
        lines = [f"machine-{at} slots={devices}\n" for at in range(self.nodes)]
        file.write_text("".join(lines), "utf-8")
        where = ["--master_addr", self.host, "--master_port", self.port]
        return ["--hostfile", str(file), "--no_ssh", "--node_rank", str(self.rank), *where]


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


def free_port() -> int:
    """A TCP port that nobody holds now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
