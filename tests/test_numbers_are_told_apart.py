"""Promise: the loss by corpus, the gradient and the update by part are those of a plain reading.

Whatever ZeRO and tensor parallelism leave where, and with one message a step for the losses. A
plain reading: float64 over all samples at once for gradients, whole tensors before and after for
updates, rows one by one for losses.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.model import CPMConfig, RoFormerConfig, T5PegasusConfig, tensors
from pretrain.models.cpm import CPM
from pretrain.objectives.causal import Causal
from pretrain.objectives.losses import token_losses_plain
from pretrain.parts import Parts, part_of
from tests import zero_jobs
from tests.monitor_jobs import row_losses, swapped
from tests.run_jobs import metrics, page
from tests.worlds import World

MEASURED = "tests.monitor_jobs:measured"
PLAIN = {"fp32": 1e-5, "bf16": 5e-2}
"""Of a gradient beside float64: fp32 sums of a few thousand products, about 1e-6; bf16 keeps 8 bits
(4e-3), whose errors add up over a few layers."""
CHANGE = 1e-5
"""Of an update: both sides are of the same fp32 masters."""


def _plain_norms(whole: dict[str, Any], step: int) -> dict[str, float]:
    """By part, of the gradient of the mean loss over all samples of a step, in float64."""
    config = zero_jobs.TINY
    model = CPM(config).double()
    weights = {name: whole[f"weights/{name}"].double() for name in dict(model.named_parameters())}
    model.load_state_dict(weights, strict=False)
    first = step * zero_jobs.SAMPLES
    batch = zero_jobs.rows(torch.arange(first, first + zero_jobs.SAMPLES).numpy())
    loss_sum, count = Causal().loss(model, batch, token_losses_plain)
    (loss_sum / count).backward()
    parameters = dict(model.named_parameters())
    squares = []
    for tensor in tensors(config):
        grad = parameters[tensor.name].grad
        assert grad is not None
        squares.append(float(grad.square().sum()))
    return Parts(config).norms(squares)


def _plain_ratios(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    pairs = [(before[f"weights/{t.name}"], after[f"weights/{t.name}"]) for t in _table()]
    changes = [float((b.double() - a.double()).square().sum()) for a, b in pairs]
    return Parts(zero_jobs.TINY).ratios(
        changes, [float(a.double().square().sum()) for a, _ in pairs]
    )


def _table() -> Any:
    return tensors(zero_jobs.TINY)


@pytest.mark.parametrize(
    ("zero", "tensor", "precision"),
    [
        *((zero, 1, "fp32") for zero in range(4)),
        (1, 2, "fp32"),
        (1, 1, "bf16"),
    ],
)
def test_norms_and_updates_by_part_are_those_of_whole_tensors(
    world2: World, zero: int, tensor: int, precision: str
) -> None:
    layout = {"zero": zero, "tensor": tensor, "precision": precision}
    told = world2.run(MEASURED, clip_norm=0.05, **layout)
    first = told[0]
    before, after = (
        zero_jobs.gathered(zero_jobs.TINY, [rank[when] for rank in told])
        for when in ("before", "after")
    )
    assert all(rank["norms"] == first["norms"] for rank in told)
    assert first["norms"] == pytest.approx(_plain_norms(before, 1), rel=PLAIN[precision])
    # the parts are the whole: squares add up to the norm that the step reports, in fp32
    total = math.sqrt(sum(norm**2 for norm in first["norms"].values()))
    assert total == pytest.approx(first["grad_norm"], rel=1e-6) and total > 0.05  # it was clipped
    assert first["ratios"] == pytest.approx(_plain_ratios(before, after), rel=CHANGE)
    assert set(first["ratios"]) == {"embed", *(f"decoder.layers.{n}.{at}" for n in (0, 1)
        for at in ("self", "ffn")), "decoder.final_norm"}  # fmt: skip
    assert first["unasked"] is None


def test_numbers_that_stay_on_their_rank_are_seen(world2: World) -> None:
    """Negative control: without the sum over ranks neither agrees with a plain reading."""
    told = world2.run(MEASURED, zero=1, alone=True)
    whole = zero_jobs.gathered(zero_jobs.TINY, [rank["before"] for rank in told])
    assert told[0]["norms"] != pytest.approx(_plain_norms(whole, 1), rel=1e-2)


@pytest.mark.parametrize("family", ["cpm", "t5_pegasus", "roformer"])
def test_every_tensor_of_every_family_has_its_part(family: str) -> None:
    sizes = {"vocab": 64, "hidden": 16, "layers": 2, "heads": 2, "head_dim": 8, "ffn": 32}
    config: Any = {
        "cpm": lambda: CPMConfig("cpm", **sizes, positions=16),
        "t5_pegasus": lambda: T5PegasusConfig("t5_pegasus", **sizes),
        "roformer": lambda: RoFormerConfig("roformer", 1, **sizes),
    }[family]()
    parts = Parts(config)
    ones = parts.sums([1.0] * len(tensors(config)))
    assert sum(ones) == len(tensors(config)) and min(ones) >= 1
    stacks = {"cpm": ["decoder"], "t5_pegasus": ["encoder", "decoder"], "roformer": ["encoder"]}
    blocks = {
        f"{stack}.layers.{n}.{kind}"
        for stack in stacks[family]
        for n in range(2)
        for kind in ("self", "ffn", *(["cross"] * (family == "t5_pegasus" and stack == "decoder")))
    }
    assert blocks | {"embed"} <= set(parts.names)
    for tensor in tensors(config):
        if tensor.layer is not None:
            assert f".layers.{tensor.layer}." in part_of(tensor.name)
    assert {part_of("head.bias"), part_of("embed.norm.weight")} == {"head", "embed"}


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World
) -> tuple[Path, dict[str, Any]]:
    """A run over two corpora whose weights hardly move, 7 samples a step on two processes."""
    folder = tmp_path_factory.mktemp("mixed")
    other = swapped(tiny_corpus, folder / "other")
    train = [{"corpus": str(tiny_corpus), "weight": 2.0}, {"corpus": str(other)}]
    config = page(
        folder / "run",
        tiny_corpus,
        data__train=train,
        batch__samples=7,
        optimizer={"lr": 1e-12, "weight_decay": 0.0},
        schedule={},
        run__steps=6,
        run__log_every_steps=3,
        run__validate_samples=9,
    )
    world2.run("tests.run_jobs:go", config=config)
    return folder / "run", config


def _means(rows: list[Any]) -> dict[str, float]:
    names = {name for name, _, _ in rows}
    return {
        name: sum(loss for n, loss, _ in rows if n == name)
        / sum(count for n, _, count in rows if n == name)
        for name in names
    }


def test_the_loss_by_corpus_is_that_of_its_rows(mixed: tuple[Path, dict[str, Any]]) -> None:
    run, config = mixed
    trained, measured = row_losses(config, 6 * 7)
    lines = metrics(run)
    for step, line in enumerate(lines):
        rows = trained[7 * step : 7 * step + 7]
        assert line["loss_by_source"] == pytest.approx(_means(rows), rel=1e-5)
        whole = sum(loss for _, loss, _ in rows) / sum(count for _, _, count in rows)
        assert line["loss"] == pytest.approx(whole, rel=1e-5)
    assert any(len(line["loss_by_source"]) == 2 for line in lines)
    assert lines[-1]["valid_loss_by_source"] == pytest.approx(_means(measured), rel=1e-5)
    # negative control: the rows of the step before are others
    shifted = _means(trained[0:7])
    assert lines[1]["loss_by_source"] != pytest.approx(shifted, rel=1e-5)


@pytest.mark.parametrize("shared", ["sequence", "tensor"])
def test_two_devices_that_share_rows_tell_the_same(
    mixed: tuple[Path, dict[str, Any]], world2: World, tmp_path: Path, shared: str
) -> None:
    """Positions of a row, or the vocabulary, on two devices: 1e-5, the order of the sums."""
    run, config = mixed
    config = config | {"parallel": {shared: 2}, "run": config["run"] | {"out": str(tmp_path)}}
    world2.run("tests.run_jobs:go", config=config)
    for mine, theirs in zip(metrics(tmp_path), metrics(run), strict=True):
        assert mine["loss_by_source"] == pytest.approx(theirs["loss_by_source"], rel=1e-5)
    first, other = (metrics(folder)[0]["grad_norm_by_part"] for folder in (tmp_path, run))
    assert first == pytest.approx(other, rel=1e-4)


def test_one_corpus_is_not_told_apart(tmp_path: Path, tiny_corpus: Path, world1: World) -> None:
    config = page(tmp_path, tiny_corpus, run__steps=6, schedule={}, monitor__parts_every_steps=3)
    world1.run("tests.run_jobs:go", config=config)
    lines = metrics(tmp_path)
    assert not any("loss_by_source" in line for line in lines)
    measured = [line for line in lines if "grad_norm_by_part" in line]
    assert [line["step"] for line in measured] == [1, 3, 6]  # the first one: is there room?
    for line in measured:
        total = math.sqrt(sum(x**2 for x in line["grad_norm_by_part"].values()))
        assert total == pytest.approx(line["grad_norm"], rel=1e-6)
        assert all(0 < ratio < 1 for ratio in line["update_ratio_by_part"].values())
    assert all(line["loader_wait_s"] >= 0 for line in lines)
    assert lines[-1]["memory_gb"] > 0.05 and lines[-1]["host_memory_gb"] > 0.05
    assert json.loads((tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()[0])["time"] > 0
