"""Jobs of the families' tests: what a rank of a warm world does (tests/worlds.py calls them).

The objectives here are the smallest that train an encoder or an encoder-decoder; the product's own
are tested where they are.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.model import ModelConfig, RoFormerConfig, T5PegasusConfig, split_dim, tensors
from pretrain import models, parallel, recompute
from pretrain import sequence as rows_shared
from pretrain.batches import Batch, step_samples
from pretrain.engine import Engine
from pretrain.state import Entry, State, fresh
from tests.zero_jobs import optimizer_of

OFF = {"dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.1}
FAMILIES: dict[str, ModelConfig] = {
    "t5_pegasus": T5PegasusConfig("t5_pegasus", 96, 32, 2, 4, 8, 64, **OFF),
    "roformer": RoFormerConfig("roformer", 1, 96, 32, 2, 4, 8, 64, **OFF),
    "bert": RoFormerConfig("roformer", 1, 96, 32, 2, 4, 8, 64, positions=16, **OFF),
    "roformer v2": RoFormerConfig("roformer", 2, 96, 32, 2, 4, 8, 64, **OFF),
}
SEQ, TARGET, SAMPLES, LR = 14, 8, 8, 3e-3


def rows(samples: np.ndarray, family: str) -> Batch:
    """Two documents packed in a row, the second sometimes padding; a function of the sample."""
    made = [np.random.default_rng(int(g)) for g in samples]
    seq2seq = family == "t5_pegasus"
    T = TARGET if seq2seq else SEQ

    def side(length: int, cut: int) -> list[Tensor]:
        places = np.arange(length)
        tokens = np.stack([r.integers(1, 96, length) for r in made])
        second = np.array([int(g) % 3 == 0 for g in samples])[:, None]
        documents = np.where(places < cut, 0, np.where(second, 1, -1))
        positions = np.broadcast_to(np.where(places < cut, places, places - cut), tokens.shape)
        parts = (tokens, positions, documents)
        return [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]

    tokens, positions, documents = side(T, T - 3)
    targets = torch.from_numpy(np.stack([r.integers(1, 96, T) for r in made]))
    chosen = torch.from_numpy(np.stack([r.random(T) < 0.6 for r in made])) & (documents >= 0)
    at = chosen.reshape(-1).nonzero().reshape(-1)
    encoder = side(SEQ, SEQ - 5) if seq2seq else [None] * 3
    return Batch(tokens, targets, chosen, positions, documents, at, *encoder)


class Predict:
    """Cross-entropy at the batch's chosen positions."""

    def loss(self, model: Any, batch: Batch, token_losses: Any) -> tuple[Tensor, Tensor]:
        """(sum, count)"""
        given = [batch.tokens_BT, batch.positions_BT, batch.document_ids_BT]
        if batch.encoder_tokens_BT is not None:
            given += [batch.encoder_tokens_BT, batch.encoder_positions_BT]
            given += [batch.encoder_document_ids_BT]
        hidden = model(*given).flatten(0, 1)
        at = batch.loss_at_N
        assert at is not None
        count = torch.tensor(len(at))
        if not len(at):
            return token_losses(
                model.logits, hidden[:1], batch.targets_BT.flatten()[:1]
            ).sum() * 0, count
        losses = token_losses(model.logits, hidden[at], batch.targets_BT.flatten()[at])
        return losses.sum(), count


def make(
    *, family: str, zero: int, tensor: int = 1, precision: str = "fp32", micro: int = SAMPLES,
    recomputed: str = "none", sequence: int = 1, **changes: Any,
) -> Engine:  # fmt: skip
    """An engine of a family; weights are zero until load()."""
    config = replace(FAMILIES[family], **changes)  # type: ignore[type-var]
    mesh = parallel.make_mesh(tensor, sequence)
    with torch.device("meta"):
        model = models.build(config)
    recompute.apply(model, recomputed)
    parallel.shard(model, config, mesh)
    rows_shared.share(model, mesh)
    return Engine(
        model, config, mesh, objective=Predict(), optimizer=optimizer_of(), zero=zero,
        precision=precision, micro_rows=micro, seed=5,
    )  # fmt: skip


def lively(config: ModelConfig) -> State:
    """A fresh state whose biases, gains and bias tables are not at their neutral values."""
    state = fresh(config, 3)

    def moved(name: str, entry: Entry) -> Entry:
        def read() -> Tensor:
            generator = torch.Generator().manual_seed(len(name))
            noise = torch.randn(entry.shape, generator=generator) * 0.1
            return entry.read() + noise if len(entry.shape) == 1 or "bias" in name else entry.read()

        return replace(entry, read=read)

    return State({k: moved(k, e) for k, e in state.entries.items()}, state.record)


def loud(config: ModelConfig) -> dict[str, Entry]:
    """T5 weights by name whose feed-forward outputs and stream reach 1e5, all of them in fp16."""
    size = {"self.o": 30.0, "cross.o": 30.0, "ffn.down": 60.0, "ffn.gate": 0.5, "ffn.up": 0.5}

    def of(name: str, entry: Entry) -> Entry:
        generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        std = next((s for part, s in size.items() if part in name), 0.1)
        values = torch.randn(entry.shape, generator=generator) * std
        if len(entry.shape) == 1:
            values = 1 + 0.1 * values + 3 * ("ffn_norm" in name)
        return replace(entry, read=lambda: values.half().float())

    entries = fresh(config, 3).entries
    return {key.removeprefix("weights/"): of(key, e) for key, e in entries.items()}


def loud_run(*, precision: str, steps: int, cured: bool = True) -> list[float]:
    """Losses of a few updates from such weights on the same samples, where the test lifts
    DeepSpeed's check of fp16."""
    from deepspeed.accelerator import get_accelerator

    from pretrain.models.t5_pegasus import T5Pegasus

    accelerator, kept = get_accelerator(), get_accelerator().is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    cure = T5Pegasus.keep_in_range
    if not cured:
        T5Pegasus.keep_in_range = lambda self: None  # type: ignore[method-assign]
    try:
        engine = make(family="t5_pegasus", zero=1, precision=precision)
        state = fresh(engine.config, 3)
        weights = {f"weights/{name}": entry for name, entry in loud(engine.config).items()}
        engine.load(State(weights, state.record))
        losses: list[float] = []
        (part,) = step_samples(0, SAMPLES, engine.mesh.data_rank, engine.mesh.data, 8)
        for _ in range(steps + 24):  # the loss scale is searched from 2^16 downwards
            done = engine.train_step(
                [rows(part, "t5_pegasus")], lr=1e-2, step=0, first_samples=[int(part[0])]
            )
            losses += [] if done.skipped else [float(done.loss_sum / done.count)]
            if len(losses) == steps:
                break
        return losses
    finally:
        accelerator.is_fp16_supported = kept
        T5Pegasus.keep_in_range = cure  # type: ignore[method-assign]


def train(*, family: str, steps: int, micro: int = SAMPLES, **layout: Any) -> dict[str, Any]:
    """Build, load, run; losses, gradient norms, logits of one row, what is held whole."""
    engine = make(family=family, micro=micro, **layout)
    engine.load(lively(engine.config))
    batch = rows(np.arange(1), family)
    with engine.inference() as model:
        given = [batch.tokens_BT, batch.positions_BT, batch.document_ids_BT]
        if batch.encoder_tokens_BT is not None:
            given += [batch.encoder_tokens_BT, batch.encoder_positions_BT]
            given += [batch.encoder_document_ids_BT]
        logits = model.logits(model(*given)[0]).float()
    losses, norms = [], []
    for step in range(steps):
        parts = step_samples(
            step * SAMPLES, SAMPLES, engine.mesh.reader, engine.mesh.readers, micro
        )
        batches = [rows(part, family) for part in parts]
        done = engine.train_step(
            batches, lr=LR * min(1.0, (step + 1) / 5), step=step,
            first_samples=[int(part[0]) for part in parts],
        )  # fmt: skip
        assert not done.skipped
        losses.append(float(done.loss_sum / done.count))
        norms.append(float(done.grad_norm))
    whole = {t.name for t in tensors(engine.config) if split_dim(t) is None}
    held = {n: p.detach().clone() for n, p in engine.model.named_parameters() if n in whole}
    return {"losses": losses, "norms": norms, "logits": logits, "held": held}


def ramp_shares(steps: int) -> tuple[list[float], list[float]]:
    """The share of a block after a load and after each step of a ramp of 4; losses."""
    engine = make(family="roformer v2", zero=1, ramp_steps=4)
    state = lively(engine.config)
    engine.load(State(state.entries, state.record | {"step": 2}))
    block = engine.model.encoder.layers[0]  # type: ignore[union-attr,index]
    shares, losses = [float(block.share)], []
    for step in range(steps):
        batches = [rows(np.arange(SAMPLES), "roformer v2")]
        done = engine.train_step(batches, lr=0.0, step=step, first_samples=[0])
        shares.append(float(block.share))
        losses.append(float(done.loss_sum / done.count))
    return shares, losses
