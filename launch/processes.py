"""The processes of a job on this machine, which come and go while they are looked at."""

import os

import psutil


def family(leader: int) -> list[psutil.Process]:
    """Who descends from `leader`, and who shares its session after a parent died."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found[process.pid] = process
        except (OSError, psutil.Error):
            continue
    try:
        children = psutil.Process(leader).children(recursive=True)
        found |= {child.pid: child for child in children}
    except psutil.Error:
        pass
    return list(found.values())


def parent(process: psutil.Process) -> int:
    """The number of its parent, 0 once it is gone."""
    try:
        return int(process.ppid())
    except psutil.Error:
        return 0


def send(process: psutil.Process, number: int) -> None:
    """Send it a signal, unless it has just ended by itself."""
    try:
        process.send_signal(number)
    except (psutil.Error, OSError):
        pass
