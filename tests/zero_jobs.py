"""Jobs of the engine's tests: what a rank of a warm world does (tests/worlds.py calls them)."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.model import CPMConfig, shape, tensors
from pretrain import parallel
from pretrain.batches import Batch, step_samples
from pretrain.engine import Engine
from pretrain.models.cpm import CPM
from pretrain.objectives.causal import Causal
from pretrain.state import Entry, State, fresh

TINY = CPMConfig(
    family="cpm", vocab=96, hidden=32, layers=2, heads=4, head_dim=8, ffn=64, positions=16,
    dropout=0.0, attention_dropout=0.0, init_std=0.1,
)  # fmt: skip
SEQ, SAMPLES, LR = 12, 8, 3e-3


@dataclass(frozen=True)
class Section:
    """As configs.run.Optimizer."""

    name: str = "adamw"
    lr: float = LR
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 0.1
    clip_norm: float = 1.0


def rows(samples: np.ndarray, config: CPMConfig = TINY) -> Batch:
    """Rows that are a function of the sample number; about a quarter of the positions masked."""
    made = [np.random.default_rng(int(g)) for g in samples]
    windows = np.stack([r.integers(0, config.vocab, SEQ + 1) for r in made])
    mask = np.stack([r.random(SEQ) < 0.75 for r in made])
    tokens, targets, counts = map(torch.from_numpy, (windows[:, :-1], windows[:, 1:], mask))
    positions = torch.arange(SEQ).expand(len(samples), SEQ)
    at = counts.reshape(-1).nonzero().reshape(-1)
    return Batch(tokens, targets, counts, positions, None, at)


def nothing(config: CPMConfig = TINY) -> Batch:
    """A micro-batch for a rank that has no sample left."""
    batch = rows(np.array([0]), config)
    none = torch.zeros(0, dtype=torch.int64)
    return replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT), loss_at_N=none)


def micro_batches(
    step: int, mesh: Any, samples: int, micro: int, config: CPMConfig = TINY
) -> tuple[list[Batch], list[int]]:
    """This rank's micro-batches of a step, and their first samples."""
    parts = step_samples(step * samples, samples, mesh.data_rank, mesh.data, micro)
    firsts = [int(p[0]) if len(p) else -1 for p in parts]
    return [rows(p, config) if len(p) else nothing(config) for p in parts], firsts


def make(
    *, zero: int, tensor: int = 1, precision: str = "fp32", micro: int = SAMPLES,
    config: CPMConfig = TINY, born: dict[str, int] | None = None, **section: Any,
) -> Engine:  # fmt: skip
    """An engine with fresh memory; weights are zero until load()."""
    mesh = parallel.make_mesh(tensor)
    with torch.device("meta"):
        model = CPM(config)
    parallel.shard(model, config, mesh)
    return Engine(
        model, config, mesh, objective=Causal(), optimizer=Section(**section), zero=zero,
        precision=precision, micro_rows=micro, seed=5, born=born,
    )  # fmt: skip


def run_steps(
    engine: Engine, first: int, steps: int, *, samples: int = SAMPLES, micro: int = SAMPLES
) -> tuple[list[float], list[float]]:
    """Mean losses and gradient norms of some steps."""
    losses, norms = [], []
    for step in range(first, first + steps):
        batches, firsts = micro_batches(step, engine.mesh, samples, micro, engine.config)
        lr = LR * min(1.0, (step + 1) / 5)
        done = engine.train_step(batches, lr=lr, step=step, first_samples=firsts)
        assert not done.skipped
        losses.append(float(done.loss_sum / done.count))
        norms.append(float(done.grad_norm))
    return losses, norms


def pieces_of(engine: Engine) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """pieces() in a form that travels."""
    return [(key, values.cpu().numpy().copy(), runs) for key, values, runs in engine.pieces()]


def gathered(config: CPMConfig, ranks: list[list[tuple[str, Any, Any]]]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' pieces; asserts that every value came exactly once."""
    sizes = {t.name: shape(config, t) for t in tensors(config)}
    whole: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for key, values, runs in (piece for pieces in ranks for piece in pieces):
        size = int(np.prod(sizes[key.split("/")[-1]]))
        into = whole.setdefault(key, np.zeros(size, np.float32))
        count = seen.setdefault(key, np.zeros(size, np.int64))
        for logical, local, length in runs:
            into[logical : logical + length] = values[local : local + length]
            count[logical : logical + length] += 1
    for key, count in seen.items():
        assert (count == 1).all(), f"{key}: values came {np.unique(count)} times"
    return {k: torch.from_numpy(v).view(sizes[k.split("/")[-1]]) for k, v in whole.items()}


def state_of(whole: dict[str, Tensor], record: dict[str, Any]) -> State:
    """A state in memory."""
    entries = {k: Entry(tuple(v.shape), "float32", lambda v=v: v) for k, v in whole.items()}
    return State(entries, record)


def train(
    *, steps: int, first: int = 0, samples: int = SAMPLES, micro: int = SAMPLES,
    state: tuple[dict[str, Tensor], dict[str, Any]] | None = None, **layout: Any,
) -> dict[str, Any]:  # fmt: skip
    """Build, load (fresh or a state), run; losses, norms, pieces and progress of this rank."""
    engine = make(micro=micro, **layout)
    engine.load(state_of(*state) if state else fresh(engine.config, 3))
    losses, norms = run_steps(engine, first, steps, samples=samples, micro=micro)
    return {
        "losses": losses,
        "norms": norms,
        "pieces": pieces_of(engine),
        "progress": engine.progress(),
        "entries": engine.entries(),
    }
