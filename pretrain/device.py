"""Where a process computes: on the CPU unless a GPU is asked for, which must then be there.

torch is imported by the functions: `launch train` reads this page without it.
"""

import contextlib
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""The environment of a process that leaves the machine's GPUs alone."""


FILES = 65536
"""No more: what closes all that might be open, as pdsh does, counts up to the limit."""


def many_files() -> None:
    """As many open files as the system allows, up to FILES: a large model's checkpoint is hundreds,
    ranks that talk over gloo have a socket for each other, and 1,024 is the common limit."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, min(most, FILES)), most))


def check_gpu() -> None:
    """Raises ValueError where --gpu was said and there is none; DeepSpeed would take the CPU."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--gpu: PyTorch finds no NVIDIA GPU here; leave it out (没有可用的 GPU)")


def place(gpu: bool) -> tuple[str, "torch.dtype"]:
    """(device, precision) of a model that is only asked: bf16 on a GPU, float32 on the CPU."""
    import torch

    if not gpu:
        return "cpu", torch.float32
    check_gpu()
    return "cuda", torch.bfloat16
