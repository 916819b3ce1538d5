"""Jobs of the fault tests: runs in which something is made to go wrong, on purpose."""

import errno
import fcntl
import io
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs.load import from_dict
from configs.run import RunConfig
from pretrain import checkpoint, parallel, proof, start
from pretrain.corpora import open_corpora
from pretrain.engine import Engine
from pretrain.monitor import Terminal
from pretrain.objectives.causal import Causal
from pretrain.state import State, fresh
from pretrain.train import train
from pretrain.watch import enlist


def go_poisoned(config: dict[str, Any], first: int, count: int, factor: float) -> dict[str, Any]:
    """Train while the samples [first, first + count) multiply the loss of their batch by `factor`.

    The rows are known by their tokens: the poison follows them wherever they are met. Returns
    train()'s summary or the sentence of its end, and how often the poison was met.
    """
    page = from_dict(RunConfig, config)
    corpora = open_corpora(page.data, page.objective, page.run.seed, page.model.vocab)
    [batch], _ = corpora.step(first, count, 0, 1, count)
    marks = {tuple(row) for row in batch.tokens_BT.tolist()}
    met = 0
    honest = Causal.loss

    def loss(self: Causal, model: Any, batch: Any, token_losses: Any) -> Any:
        nonlocal met
        loss_sum, positions = honest(self, model, batch, token_losses)
        poisoned = marks & {tuple(row) for row in batch.tokens_BT.tolist()}
        if not (torch.is_grad_enabled() and poisoned):
            return loss_sum, positions
        met += 1
        return loss_sum * factor, positions

    with mock.patch.object(Causal, "loss", loss):
        try:
            summary = train(page)
        except ValueError as error:
            return {"sentence": str(error), "met": met}
    return summary | {"met": met}


def go_stalling(config: dict[str, Any], rank: int, step: int, seconds: float) -> dict[str, Any]:
    """Train as a launched rank does; `rank` sleeps before it computes `step`."""
    page = from_dict(RunConfig, config)
    enlist(Path(page.run.out), dist.get_rank())
    honest = Causal.loss
    steps = 0

    def loss(self: Causal, model: Any, batch: Any, token_losses: Any) -> Any:
        nonlocal steps
        steps += torch.is_grad_enabled()
        if steps == step and dist.get_rank() == rank:
            time.sleep(seconds)
        return honest(self, model, batch, token_losses)

    with mock.patch.object(Causal, "loss", loss):
        return train(page)


def go_proving(config: dict[str, Any], seconds: float, reads: bool) -> dict[str, Any]:
    """Train as a launched rank does, through a growth whose proof takes so long, in a job whose
    collectives wait for less; tensors are read meanwhile, or nothing is (a disk that hangs)."""
    page = from_dict(RunConfig, config)
    enlist(Path(page.run.out), dist.get_rank())
    honest = proof.prove
    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds * 0.8))

    def prove(*states: Any, **how: Any) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.5)
            if reads:  # of the small model alone, as for most of a proof
                states[0].read(next(iter(states[0].entries)))
        return honest(*states, **how)

    with mock.patch.object(proof, "prove", prove):
        return train(page)


def go_on_unequal_machines(config: dict[str, Any]) -> int:
    """Train where each rank has another number of cores; returns the steps made."""
    with mock.patch.object(parallel, "cpu_threads", lambda: dist.get_rank() + 1):
        return int(train(from_dict(RunConfig, config))["step"])


def go_tampered(config: dict[str, Any], what: str) -> dict[str, Any]:
    """Train, but every load loses something: a master, a moment, or the forward pass's weights."""
    honest = Engine.load

    def load(self: Engine, state: State) -> None:
        honest(self, state)
        if what == "forward":
            with torch.no_grad():
                for values in _forward_weights(self):
                    values.mul_(1.5)
            return
        kind = {"master": "weights", "moment": "optim/exp_avg"}[what]
        for key, values, _ in self.pieces():
            if key.startswith(f"{kind}/decoder") and values.numel():
                values[0] += 0.25
                return

    with mock.patch.object(Engine, "load", load):
        return train(from_dict(RunConfig, config))


def _forward_weights(engine: Engine) -> list[torch.Tensor]:
    partitioned = [p.ds_tensor for p in engine.model.parameters() if hasattr(p, "ds_tensor")]
    return partitioned or [p.data for p in engine.model.parameters()]


def go_listening(config: dict[str, Any]) -> list[str]:
    """Train; returns what was said."""
    heard = io.StringIO()
    train(from_dict(RunConfig, config), Terminal(heard))
    return heard.getvalue().splitlines()


def go_without_locks(config: dict[str, Any]) -> list[str]:
    """Train on a file system without locks; returns what was said."""
    with mock.patch.object(fcntl, "flock", side_effect=OSError(errno.ENOSYS, "no such function")):
        return go_listening(config)


def saved_by_deepspeed(folder: str, zero: int) -> list[tuple[str, Any, Any]]:
    """Three steps, DeepSpeed's own save_checkpoint; returns our pieces."""
    from tests import zero_jobs

    engine = zero_jobs.make(zero=zero)
    engine.load(fresh(engine.config, 3))
    zero_jobs.run_steps(engine, 0, 3)
    engine._deepspeed.save_checkpoint(folder)
    return zero_jobs.pieces_of(engine)


def go_beginning(config: dict[str, Any]) -> list[Any]:
    """Train where another job is at work, then where none is: what was said, and how often it had
    begun by then."""
    page = from_dict(RunConfig, config)
    begun: list[int] = []
    run = Path(page.run.out)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as lock, mock.patch.object(start, "PATIENCE_S", 0.1):
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            train(page, begins=lambda: begun.append(1))
        except checkpoint.StorageError as error:
            said = str(error)
    found = ["another job is at work" if "another job is at work" in said else said, len(begun)]
    train(page, begins=lambda: begun.append(1))
    return [*found, len(begun)]
