"""What the server of workers and mortals imports once, so that a child of it starts in no time."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
import torch._inductor.compile_fx
import torch.utils.tensorboard  # noqa: F401

import pretrain.engine
import pretrain.faults
import pretrain.parallel
import pretrain.start
import pretrain.train  # noqa: F401
import tests.fault_jobs  # noqa: F401
