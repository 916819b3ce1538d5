"""Jobs of tests/test_engines_leave_nothing_behind.py: what an engine holds, and for how long."""

import gc
import time

import torch
from torch import Tensor

from pretrain.state import fresh
from tests.zero_jobs import make, run_steps


def left_after_destroying(zero: int, precision: str) -> tuple[int, int]:
    """Bytes of tensors that an engine holds, and of those that destroy() leaves."""

    def held() -> int:
        found = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
        return sum(
            {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}.values()
        )

    gc.collect()
    before = held()
    engine = make(zero=zero, precision=precision, micro=2)
    engine.load(fresh(engine.config, 1))
    run_steps(engine, 0, 2, micro=2)
    during = held() - before
    engine.destroy()  # the name is still bound, as in train()
    gc.disable()  # from here on nothing may need another look
    try:
        deadline = time.monotonic() + 10
        while (left := held() - before) > 1000 and time.monotonic() < deadline:
            time.sleep(0.01)  # gloo's thread lets a message's tensor go when it runs next
    finally:
        gc.enable()
    return during, left


def gradients_between_micro_batches(zero: int, precision: str) -> list[int]:
    """Parameters that have a gradient of their own when a micro-batch's forward begins."""
    engine = make(zero=zero, precision=precision, micro=2)
    engine.load(fresh(engine.config, 1))
    seen: list[int] = []
    engine._step.register_forward_pre_hook(
        lambda *_: seen.append(sum(p.grad is not None for p in engine.model.parameters()))
    )
    run_steps(engine, 0, 2, micro=2)
    engine.destroy()
    return seen
