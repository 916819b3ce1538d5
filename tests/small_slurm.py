"""A real Slurm of one node, this machine, in a folder of its own: munged, slurmctld, slurmd.

Debian's slurm-wlm and munge are enough; nothing of the machine's own Slurm is touched.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
SBIN = os.pathsep.join(("/usr/sbin", "/usr/local/sbin"))

CONF = """
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    path = os.pathsep.join((os.environ.get("PATH", ""), SBIN))
    gone = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if gone:
        return f"{', '.join(gone)} not installed (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root alone"


@contextlib.contextmanager
def small_slurm() -> Iterator[dict[str, str]]:
    """Start it; gives the environment variables that lead to it."""
    # Not pytest's tmp_path: the name of a socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="slurm") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        for part in ("munge", "state", "spool"):
            (folder / part).mkdir(mode=0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        conf = folder / "slurm.conf"
        host = socket.gethostname().split(".")[0]
        user, cpus = getpass.getuser(), os.cpu_count()
        conf.write_text(
            CONF.format(host=host, user=user, ports=_ports(2), folder=folder, cpus=cpus)
        )
        env = {
            "SLURM_CONF": str(conf),
            "PATH": os.pathsep.join((os.environ["PATH"], SBIN)),
        }
        files = ("socket", "pid-file", "log-file", "seed-file")
        munge = [f"--{what}={folder}/munge/{what}" for what in files]
        for command in (
            ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
            ["slurmctld", "-D", "-f", str(conf)],
            ["slurmd", "-D", "-f", str(conf)],
        ):
            log = stack.enter_context((folder / f"{command[0]}.out").open("wb"))
            daemon = subprocess.Popen(
                command, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(_end, daemon)
            time.sleep(0.3)
        _until_idle(env, folder)
        try:
            yield env
        finally:
            subprocess.run(["scancel", "--user", user], env={**os.environ, **env}, check=False)
            time.sleep(1.0)


def _until_idle(env: dict[str, str], folder: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        said = subprocess.run(
            ["sinfo", "--noheader", "--format=%T"],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        if said.stdout.strip() == "idle":
            return
        time.sleep(0.3)
    logs = "\n".join(path.read_text()[-500:] for path in folder.glob("slurm*.log"))
    raise RuntimeError(f"the small Slurm did not come up: {said.stdout}{said.stderr}\n{logs}")


def _ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
