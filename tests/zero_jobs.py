"""Jobs of the engine's tests: what a rank of a warm world does (tests/worlds.py calls them)."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.model import CPMConfig, shape, split_dim, tensors
from configs.optimizers import Optimizer
from pretrain import ds_config, parallel, recompute, transient
from pretrain.batches import Batch, step_samples
from pretrain.engine import Engine
from pretrain.models.cpm import CPM
from pretrain.objectives.causal import Causal
from pretrain.optimizers import muon
from pretrain.optimizers.fragments import Logical
from pretrain.state import Entry, State, fresh

TINY = CPMConfig(
    family="cpm", vocab=96, hidden=32, layers=2, heads=4, head_dim=8, ffn=64, positions=16,
    dropout=0.0, attention_dropout=0.0, init_std=0.1,
)  # fmt: skip
SEQ, SAMPLES, LR = 12, 8, 3e-3


def optimizer_of(**changes: Any) -> Optimizer:
    """An optimizer section, AdamW unless said otherwise."""
    return Optimizer(**({"lr": LR} | changes))


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
    config: CPMConfig = TINY, born: dict[str, int] | None = None, recomputed: str = "none",
    objective: Any = None, **section: Any,
) -> Engine:  # fmt: skip
    """An engine with fresh memory; weights are zero until load()."""
    mesh = parallel.make_mesh(tensor)
    with torch.device("meta"):
        model = CPM(config)
    recompute.apply(model, recomputed)
    parallel.shard(model, config, mesh)
    return Engine(
        model,
        config,
        mesh,
        objective=objective or Causal(),
        optimizer=optimizer_of(**section),
        zero=zero,
        precision=precision,
        micro_rows=micro,
        seed=5,
        born=born,
    )


def run_steps(
    engine: Engine,
    first: int,
    steps: int,
    *,
    samples: int = SAMPLES,
    micro: int = SAMPLES,
    peak: float = LR,
) -> tuple[list[float], list[float]]:
    """Mean losses and gradient norms of some steps."""
    losses, norms = [], []
    for step in range(first, first + steps):
        batches, firsts = micro_batches(step, engine.mesh, samples, micro, engine.config)
        lr = peak * min(1.0, (step + 1) / 5)
        done = engine.train_step(batches, lr=lr, step=step, first_samples=firsts)
        assert not done.skipped
        losses.append(float(done.loss_sum / done.count))
        norms.append(float(done.grad_norm))
    return losses, norms


def pieces_of(engine: Engine) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """pieces() in a form that travels."""
    return [(key, values.cpu().numpy().copy(), runs) for key, values, runs in engine.pieces()]


def gathered(
    config: CPMConfig,
    ranks: list[list[tuple[str, Any, Any]]],
    entries: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Whole tensors from all ranks' pieces; asserts that every value came exactly once.

    entries: shapes by key, where not all state is laid out like the weights.
    """
    shapes = {t.name: shape(config, t) for t in tensors(config)}
    whole: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}

    def size_of(key: str) -> tuple[int, ...]:
        return entries[key][0] if entries else shapes[key.split("/")[-1]]

    for key, values, runs in (piece for pieces in ranks for piece in pieces):
        size = int(np.prod(size_of(key)))
        into = whole.setdefault(key, np.zeros(size, np.float32))
        count = seen.setdefault(key, np.zeros(size, np.int64))
        for logical, local, length in runs:
            into[logical : logical + length] = values[local : local + length]
            count[logical : logical + length] += 1
    for key, count in seen.items():
        assert (count == 1).all(), f"{key}: values came {np.unique(count)} times"
    return {k: torch.from_numpy(v).view(size_of(k)) for k, v in whole.items()}


def state_of(whole: dict[str, Tensor], record: dict[str, Any]) -> State:
    """A state in memory."""
    entries = {k: Entry(tuple(v.shape), "float32", lambda v=v: v) for k, v in whole.items()}
    return State(entries, record)


def train(
    *, steps: int, first: int = 0, samples: int = SAMPLES, micro: int = SAMPLES,
    state: tuple[dict[str, Tensor], dict[str, Any]] | None = None, look: bool = False,
    **layout: Any,
) -> dict[str, Any]:  # fmt: skip
    """Build, load (fresh or a state), run; losses, norms, pieces and progress of this rank.

    With `look` the model is evaluated and made to speak before the steps.
    """
    engine = make(micro=micro, **layout)
    engine.load(state_of(*state) if state else fresh(engine.config, 3))
    said = seen(engine) if look else {}
    peak = layout.get("lr", LR)
    losses, norms = run_steps(engine, first, steps, samples=samples, micro=micro, peak=peak)
    return said | {
        "losses": losses,
        "norms": norms,
        "pieces": pieces_of(engine),
        "progress": engine.progress(),
        "entries": engine.entries(),
    }


def seen(engine: Engine) -> dict[str, Any]:
    """Loss of two batches on every rank, and logits of one row computed outside of the engine."""
    loss_sum, count = engine.evaluate([rows(np.arange(4)), rows(np.arange(4, 6))])
    batch = rows(np.arange(1))
    with engine.inference() as model:
        hidden = model(batch.tokens_BT, batch.positions_BT, None)
        logits = model.logits(hidden[0])
    return {"evaluated": (float(loss_sum), int(count)), "logits": logits.float()}


def in_two_halves(*, steps: int, **layout: Any) -> dict[str, Any]:
    """Steps of one run, and the same with the state taken out and put into a new engine at half."""
    whole = train(steps=steps, **layout)
    half = train(steps=steps // 2, **layout)
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, half["pieces"])
    state = gathered(layout.get("config", TINY), everyone), half["progress"]
    rest = train(steps=steps - steps // 2, first=steps // 2, state=state, **layout)
    return {"whole": whole, "losses": half["losses"] + rest["losses"], "pieces": rest["pieces"]}


def small_turns(logits: int, **arguments: Any) -> dict[str, Any]:
    """train() with so little room for logits that the head works in turns."""
    room = dict(transient.LOGITS_AT_ONCE)
    transient.LOGITS_AT_ONCE.update(cpu=logits)
    try:
        return train(**arguments)
    finally:
        transient.LOGITS_AT_ONCE.update(room)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.device.type != "meta":
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


def largest_allocation(**layout: Any) -> tuple[int, int]:
    """Largest tensor, in bytes, that building and loading an engine makes; bytes kept here."""
    with _Largest() as largest:
        engine = make(**layout)
        engine.load(fresh(engine.config, 3))
    kept = sum(4 * p.ds_tensor.numel() for p in engine.model.parameters())
    return largest.bytes, kept


def refused(**layout: Any) -> str:
    """The sentence with which an engine is refused."""
    try:
        make(**layout)
    except ValueError as error:
        return str(error)
    raise AssertionError("was not refused")


def forgetful(
    what: str, *, steps: int, state: tuple[dict[str, Tensor], dict[str, Any]], **layout: Any
) -> list[float]:
    """Losses of a continuation that forgets the moments or the number of updates."""
    whole, record = state
    if what == "moments":
        whole = {key: value for key, value in whole.items() if not key.startswith("optim/")}
    elif what == "updates":
        record = record | {"updates": 0}
    return train(steps=steps, first=steps, state=(whole, record), **layout)["losses"]


def load_sentence(change: str) -> str:
    """What load() says of a state that does not fit."""
    engine = make(zero=1)
    state = fresh(engine.config, 3)
    entries = dict(state.entries)
    name = "weights/decoder.layers.0.self.q.weight"
    if change == "missing":
        del entries[name]
    elif change == "unknown":
        entries["weights/decoder.layers.9.self.q.weight"] = entries[name]
    elif change == "shape":
        entries[name] = Entry((16, 32), "float32", lambda: torch.zeros(16, 32))
    elif change == "buffer":
        entries["buffers/rope"] = Entry((2,), "float32", lambda: torch.zeros(2))
    try:
        engine.load(State(entries, state.record))
    except ValueError as error:
        return str(error)
    raise AssertionError("was loaded")


def adam_steps(born: dict[str, int], updates: int) -> dict[str, set[float]]:
    """Adam's counter of every tensor after a load, by tensor."""
    engine = make(zero=1, born=born)
    state = fresh(engine.config, 3)
    engine.load(State(state.entries, state.record | {"updates": updates}))
    partitions = engine._partitions
    found: dict[str, set[float]] = {}
    for fragment in partitions.fragments:
        step = float(partitions.base.state[fragment.flat]["step"])
        found.setdefault(fragment.name, set()).add(step)
    return found


def dropout_masks() -> dict[str, Any]:
    """What dropout draws on this rank of a tensor group: in the cut region, and on the stream."""
    mesh = parallel.make_mesh(2)
    drawn: dict[str, Any] = {}

    def attention(q: Tensor, *_: Any) -> Tensor:
        drawn["region"] = torch.rand(8)
        return q

    torch.manual_seed(7)
    drawn["before"] = torch.rand(4)
    parallel.split_dropout(attention, mesh)(torch.zeros(1), *[torch.zeros(1)] * 2, None, 1.0, 0.1)
    drawn["after"] = torch.rand(4)
    return drawn


def half_precision_scaler() -> tuple[Any, Any, Any]:
    """fp16 where the test lifts DeepSpeed's check: scaler out, scaler after a load, losses."""
    from deepspeed.accelerator import get_accelerator

    accelerator, kept = get_accelerator(), get_accelerator().is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        engine = make(zero=1, precision="fp16")
        engine.load(fresh(engine.config, 3))
        losses, _ = run_steps(engine, 0, 2)
        out = engine.progress()["scaler"]
        engine.destroy()
        again = make(zero=1, precision="fp16")
        state = fresh(again.config, 3)
        again.load(State(state.entries, state.record | {"scaler": out | {"cur_scale": 512.0}}))
        return out, again.progress()["scaler"], losses
    finally:
        accelerator.is_fp16_supported = kept


def replicated_after(*, steps: int, config: CPMConfig) -> dict[str, Tensor]:
    """The parameters that tensor parallelism does not cut, after some steps on two devices."""
    engine = make(zero=1, tensor=2, config=config)
    engine.load(fresh(config, 3))
    run_steps(engine, 0, steps)
    whole = {t.name for t in tensors(config) if split_dim(t) is None}
    return {n: p.detach().clone() for n, p in engine.model.named_parameters() if n in whole}


class _Poisoned(Causal):
    """An objective whose gradient is not finite once `poison` is set."""

    poison = 1.0

    def loss(self, model: Any, batch: Any, token_losses: Any) -> tuple[Tensor, Tensor]:
        """The causal loss, times what poisons it."""
        loss_sum, count = super().loss(model, batch, token_losses)
        return loss_sum * self.poison, count


def poisoned_step(**layout: Any) -> dict[str, Any]:
    """Two steps; one whose gradient is NaN on the last rank; one more."""
    engine = make(objective=(poison := _Poisoned()), **layout)
    engine.load(fresh(engine.config, 3))
    losses, _ = run_steps(engine, 0, 2)
    before = pieces_of(engine)
    if engine.mesh.rank == engine.mesh.world - 1:
        poison.poison = float("nan")
    batches, firsts = micro_batches(7, engine.mesh, SAMPLES, SAMPLES)
    done = engine.train_step(batches, lr=LR, step=7, first_samples=firsts)
    poison.poison = 1.0
    kept = all((a[1] == b[1]).all() for a, b in zip(before, pieces_of(engine), strict=True))
    more, _ = run_steps(engine, 2, 1)
    return {
        "skipped": done.skipped,
        "norm": float(done.grad_norm),
        "kept": kept,
        "updates": engine.updates,
        "losses": losses + more,
    }


def unaware(**arguments: Any) -> dict[str, Any]:
    """train() where sums over logical tensors stay on their rank."""
    reduced = Logical.reduced
    Logical.reduced = lambda self, *parts: list(parts)  # type: ignore[method-assign]
    try:
        return train(**arguments)
    finally:
        Logical.reduced = reduced  # type: ignore[method-assign]


def all_cut_by_rows(**arguments: Any) -> dict[str, Any]:
    """train() where Muon puts the parts of every matrix together as its rows."""
    joined, cut = muon._joined, muon._cut
    muon._joined = lambda logical, name, parts: parts.view(logical.shapes[name])
    muon._cut = lambda logical, name, matrix: matrix.reshape(-1)
    try:
        return train(**arguments)
    finally:
        muon._joined, muon._cut = joined, cut


class _Waits(TorchDispatchMode):
    """How often a value is asked for."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += "local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def waits_of_a_step(quiet: bool = True, **layout: Any) -> int:
    """How often a whole step, forward to update and DeepSpeed's own included, asks for a value."""
    rooms, told = (ds_config, sys.modules[Engine.__module__]), ds_config.quiet
    for room in rooms if not quiet else ():
        room.quiet = lambda *_: False  # type: ignore[attr-defined]
    try:
        engine = make(**layout)
    finally:
        for room in rooms:
            room.quiet = told  # type: ignore[attr-defined]
    engine.load(fresh(engine.config, 3))
    run_steps(engine, 0, 2)
    batches, firsts = micro_batches(2, engine.mesh, SAMPLES, layout.get("micro", SAMPLES))
    with _Waits() as waits:
        engine.train_step(batches, lr=LR, step=2, first_samples=firsts)
    return waits.count


def messages_of_an_update(**layout: Any) -> tuple[int, int]:
    """(all-reduces, values asked for) of one update of the masters, DeepSpeed's own left out."""
    engine = make(**layout)
    engine.load(fresh(engine.config, 3))
    run_steps(engine, 0, 1)
    update, sent, send = engine._partitions.base, [], torch.distributed.all_reduce
    for flat in update.flats:
        flat.grad = torch.ones_like(flat)
        update._arrived[flat] = flat.grad
    torch.distributed.all_reduce = lambda *a, **k: sent.append(send(*a, **k))
    try:
        with _Waits() as waits:
            update.step()
    finally:
        torch.distributed.all_reduce = send
    return len(sent), waits.count
