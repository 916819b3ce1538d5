"""Adafactor's rows and columns grow as the matrix that they stand for, and a run under adafactor
that is widened by tiling goes on as the small one would have.

Two summation orders of fp32 drift apart by a few 1e-6 of the loss in 15 steps: 2e-5 leaves room,
and the control, which begins the factors anew, is outside of it.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from configs.extended import Extend, extended
from pretrain import checkpoint
from pretrain.growth import grow
from pretrain.growth.positions import extend
from pretrain.state import Entry, State
from tests.growing import TINY, held, trained
from tests.run_jobs import losses, page, rewrite
from tests.worlds import World

GO = "tests.run_jobs:go"
ROWS, COLUMNS, SQUARES = "optim/exp_avg_sq_row", "optim/exp_avg_sq_col", "optim/exp_avg_sq"
WIDER = dataclasses.replace(TINY, hidden=64)
LARGER = dataclasses.replace(TINY, hidden=48, layers=5, ffn=96, vocab=101)


def pair() -> tuple[State, State]:
    """A state with second moments that are products, as matrices; the same in factors."""
    whole = trained()
    entries, factors = dict(whole.entries), {}
    for name in whole.names():
        size = entries[f"weights/{name}"].shape
        if len(size) == 2:
            r, c = (torch.rand(n, dtype=torch.float64) + 0.1 for n in size)
            product = (torch.outer(r, c) / r.mean()).float()
            entries[f"{SQUARES}/{name}"] = held(product)
            factors[f"{ROWS}/{name}"] = held(product.double().mean(1).float())
            factors[f"{COLUMNS}/{name}"] = held(product.double().mean(0).float())
    kept = {k: e for k, e in entries.items() if not (k.startswith(SQUARES) and len(e.shape) == 2)}
    return State(entries, whole.record), State(kept | factors, whole.record)


def matrices(state: State) -> list[str]:
    return [name for name in state.names() if len(state.entries[f"weights/{name}"].shape) == 2]


@pytest.mark.parametrize("to", [WIDER, LARGER], ids=["tiled", "every size"])
def test_factors_are_the_means_of_the_matrix_that_grew(to: object) -> None:
    """To a few roundings of fp32; and tiled, their product is that matrix still."""
    whole, factors = (grow(state, to, 5) for state in pair())  # type: ignore[arg-type]
    assert not [
        k for k, e in factors.entries.items() if k.startswith(SQUARES + "/") and len(e.shape) == 2
    ]
    for name in matrices(factors):
        matrix = whole.read(f"{SQUARES}/{name}").double()
        r, c = (factors.read(f"{kind}/{name}").double() for kind in (ROWS, COLUMNS))
        assert r.numpy() == pytest.approx(matrix.mean(1).numpy(), rel=1e-6)
        assert c.numpy() == pytest.approx(matrix.mean(0).numpy(), rel=1e-6)
        if to is WIDER:
            assert (torch.outer(r, c) / r.mean() / matrix - 1).abs().max() < 1e-5
    assert factors.record["scales"] == whole.record["scales"]
    for name in whole.names():
        if len(whole.entries[f"weights/{name}"].shape) == 1:
            assert torch.equal(factors.read(f"{SQUARES}/{name}"), whole.read(f"{SQUARES}/{name}"))


def test_factors_of_a_longer_table_are_those_of_its_rows() -> None:
    how = Extend(method="random", known=TINY.positions)
    to = extended(TINY, 2 * TINY.positions, how)
    whole, factors = (extend(state, to, how, 2 * TINY.positions, 5) for state in pair())
    name = "embed.positions.weight"
    matrix = whole.read(f"{SQUARES}/{name}").double()
    assert factors.read(f"{ROWS}/{name}").numpy() == pytest.approx(matrix.mean(1).numpy(), rel=1e-6)
    assert factors.read(f"{COLUMNS}/{name}").numpy() == pytest.approx(
        matrix.mean(0).numpy(), rel=1e-6
    )


def test_a_grown_state_is_extended_and_written(tmp_path: Path) -> None:
    """Averages that weigh otherwise since the growth stay float32, and their values."""
    grown = grow(pair()[1], LARGER, 5)
    assert any(scale["clip"] != 1.0 for scale in grown.record["scales"].values())
    how = Extend(method="random", known=LARGER.positions)
    to = extended(LARGER, 2 * LARGER.positions, how)
    longer = extend(grown, to, how, 2 * LARGER.positions, 5)
    read = checkpoint.read(checkpoint.write_state(tmp_path / "stage-00-step-00000009", longer))
    for name in grown.names("optim/exp_avg"):
        kept, was = read.read(f"optim/exp_avg/{name}"), grown.read(f"optim/exp_avg/{name}")
        assert torch.equal(kept[: len(was)], was), name


def begun_anew(state: State) -> State:
    """The same with second moments of nothing."""

    def small(entry: Entry) -> Entry:
        values = torch.full(entry.shape, 1e-6)
        return dataclasses.replace(entry, read=lambda: values)

    entries = {k: small(e) if k.startswith(SQUARES) else e for k, e in state.entries.items()}
    return State(entries, state.record)


@pytest.mark.parametrize("beta1", [0.9, pytest.param(0.0, marks=pytest.mark.slow)])
def test_a_run_widened_by_tiling_follows_the_small_one(
    tmp_path: Path, tiny_corpus: Path, world2: World, beta1: float
) -> None:
    common = {
        "optimizer__name": "adafactor", "optimizer__lr": 2e-2, "optimizer__beta1": beta1,
        "optimizer__clip_norm": 0.3,
    }  # fmt: skip
    world2.run(GO, config=page(tmp_path / "small", tiny_corpus, **common))
    staged = {
        "stages": [{"steps": 15}, {"steps": 15, "model": {"hidden": 64}}], "run__steps": None,
        "run__save_every_steps": 5, "run__keep_checkpoints": 9,
    }  # fmt: skip
    wide = page(tmp_path / "wide", tiny_corpus, **common, **staged)
    world2.run(GO, config=wide)
    expected = losses(tmp_path / "small")
    assert losses(tmp_path / "wide") == pytest.approx(expected, rel=2e-5)

    checkpoints = tmp_path / "wide" / "checkpoints"
    for path in list(checkpoints.iterdir()):
        if int(path.name[-8:]) > 15:
            path.rename(tmp_path / path.name)
    rewrite(checkpoints / "stage-01-step-00000015", begun_anew)
    world2.run(GO, config=wide)
    found = losses(tmp_path / "wide")
    assert max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)) > 5e-5
