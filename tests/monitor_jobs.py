"""Jobs of the monitoring tests: steps that are measured, and runs whose reading is slow."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from configs.load import from_dict
from configs.run import RunConfig
from pretrain.corpora import Corpora, open_corpora
from pretrain.objectives.causal import Causal
from pretrain.objectives.losses import token_losses_plain
from pretrain.optimizers.fragments import Logical
from pretrain.parts import Parts
from pretrain.state import fresh
from pretrain.train import train
from tests import zero_jobs


def measured(*, steps: int = 2, alone: bool = False, **layout: Any) -> dict[str, Any]:
    """Some steps, the last one measured: its numbers by part, and the pieces around it.

    `alone`: sums over logical tensors stay on their rank (what a wrong sum would tell).
    """
    engine = zero_jobs.make(micro=3, **layout)
    engine.load(fresh(engine.config, 3))
    zero_jobs.run_steps(engine, 0, steps - 1, micro=3)
    before = zero_jobs.pieces_of(engine)
    batches, firsts = zero_jobs.micro_batches(steps - 1, engine.mesh, zero_jobs.SAMPLES, 3)
    reduced = Logical.reduced
    if alone:
        Logical.reduced = lambda self, *parts: list(parts)  # type: ignore[method-assign]
    try:
        done = engine.train_step(
            batches, lr=1e-2, step=steps - 1, first_samples=firsts, measure=True
        )
    finally:
        Logical.reduced = reduced  # type: ignore[method-assign]
    assert done.measured is not None and not bool(done.skipped)
    grads, changes, weights = done.measured.tolist()
    parts = Parts(engine.config)
    return {
        "grad_norm": float(done.grad_norm),
        "norms": parts.norms(grads),
        "ratios": parts.ratios(changes, weights),
        "before": before,
        "after": zero_jobs.pieces_of(engine),
        "unasked": engine.train_step(
            batches, lr=1e-2, step=steps, first_samples=firsts
        ).measured,
    }  # fmt: skip


def go_slowly(config: dict[str, Any], rank: int, sample: int, seconds: float) -> dict[str, Any]:
    """Train while one rank's reading thread sleeps before the step that holds a sample."""
    honest = Corpora.step

    def step(self: Corpora, first: int, count: int, data_rank: int, *rest: Any) -> Any:
        if data_rank == rank and first <= sample < first + count:
            time.sleep(seconds)
        return honest(self, first, count, data_rank, *rest)

    with mock.patch.object(Corpora, "step", step):
        return train(from_dict(RunConfig, config))


def row_losses(config: dict[str, Any], samples: int) -> tuple[list[Any], list[Any]]:
    """(corpus, summed loss, positions) of each of the first samples, and of each validation row,
    one row at a time through a plain model of the run's fresh weights."""
    from pretrain import models

    page = from_dict(RunConfig, config)
    corpora = open_corpora(page.data, page.objective, page.run.seed, page.model.vocab)
    model: Any = models.build(page.model)
    state = fresh(page.model, page.run.seed)
    weights = {name: state.read(f"weights/{name}") for name in state.names("weights")}
    model.load_state_dict(weights, strict=False)
    model.eval()

    def told(batch: Any, dataset: int) -> tuple[str, float, int]:
        loss, count = Causal().loss(model, batch, token_losses_plain)
        return corpora.record[dataset]["corpus"], float(loss), int(count)

    with torch.no_grad():
        _, dataset, _ = corpora.order.locate(range(samples))
        rows = [corpora.step(n, 1, 0, 1, 1)[0][0] for n in range(samples)]
        trained = [told(row, int(d)) for row, d in zip(rows, dataset, strict=True)]
        measured, _ = corpora.measured(page.run.validate_samples)
        rows = list(corpora.validation(page.run.validate_samples, 0, 1, 1))
        return trained, [told(row, int(d)) for row, d in zip(rows, measured, strict=True)]


def swapped(corpus: Path, folder: Path) -> Path:
    """Another corpus of the same tokenizer: the splits of one exchanged."""
    import json
    import shutil

    shutil.copytree(corpus, folder)
    for path in corpus.iterdir():
        split, dot, rest = path.name.partition(".")
        if split in ("train", "valid"):
            other = {"train": "valid", "valid": "train"}[split]
            shutil.copyfile(path, folder / f"{other}{dot}{rest}")
    manifest = json.loads((corpus / "manifest.json").read_text("utf-8"))
    splits = manifest["splits"]
    splits["train"], splits["valid"] = splits["valid"], splits["train"]
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder
