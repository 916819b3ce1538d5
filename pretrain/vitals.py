"""What the machine does while a run trains: memory and waits, and the worst of all ranks.

    this rank: waits of the last steps, peak and present memory --worst()--> of all ranks, in one
    message, where the losses are read anyway

One slow reader or one full device is enough to hold up or end a job; so what counts is the worst
rank, and it is asked for at no other time than the losses are.
"""

import resource
import sys
from collections.abc import Sequence

import psutil
import torch
import torch.distributed as dist

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of what getrusage counts."""


def memory(device: torch.device) -> tuple[float, float]:
    """(peak of what a device of this process holds or has held, memory of the process now), bytes.

    Of a GPU the peak is torch's own count since the process began (weights, states, activations;
    not the driver's); on a CPU it is the process's peak resident size.
    """
    now = float(psutil.Process().memory_info().rss)
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)), now
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT), now


def worst(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of all ranks for each value; every rank calls this with equally many."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return list(values)
    together = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return [float(value) for value in together.tolist()]
