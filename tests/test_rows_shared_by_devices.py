"""Rows that several devices share (sequence parallelism) are learnt from as whole ones are.

Losses within 1e-5 over the steps of a run in fp32, where only the order of sums differs (measured:
below 1e-6). An exchange that is left out, forwards or backwards alone, must be caught by the same
comparison.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import ConfigError, from_dict
from configs.model import CPMConfig, RoFormerConfig, T5PegasusConfig
from configs.positions import PositionTable, Rope
from configs.run import RunConfig
from pretrain.costs import Row
from pretrain.kept import kept_of
from tests import family_jobs, sequence_jobs
from tests.run_jobs import losses, metrics, page
from tests.worlds import World

GO = "tests.run_jobs:go"
STEPS = 10
SIZES = {"vocab": 320, "hidden": 32, "layers": 2, "heads": 2, "head_dim": 16, "ffn": 64}
OFF = {"dropout": 0.0, "attention_dropout": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "cpm": {},
    "roformer": {
        "model": SIZES | OFF | {"family": "roformer", "version": 1},
        "objective": {"name": "masked", "masking": "token"},
    },
    "t5_pegasus": {
        "model": SIZES | OFF | {"family": "t5_pegasus", "vocab": 352},
        "objective": {"name": "span_corruption"},
        "data__target_len": 16,
    },
}


def config(run: Path, corpus: Path, family: str = "cpm", **changes: Any) -> dict[str, Any]:
    """A run of a family; rows of 32 tokens, of which two devices hold 16 each."""
    end: dict[str, Any] = {"run__steps": STEPS, "run__validate_every_steps": STEPS}
    end |= {"schedule": {"warmup_steps": 2, "decay_steps": 4}}
    return page(run, corpus, **(end | FAMILIES[family] | changes))


SHARED = {"parallel__sequence": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world1: World) -> Any:
    """family -> the folder of its run on one process, rows whole."""
    folder = tmp_path_factory.mktemp("alone")

    def run(family: str) -> Path:
        if not (folder / family).exists():
            world1.run(GO, config=config(folder / family, tiny_corpus, family))
        return folder / family

    return run


def same(run: Path, other: Path, steps: int = STEPS) -> None:
    """Losses of all steps, and of the validation."""
    assert len(losses(run)) == steps
    assert losses(run) == pytest.approx(losses(other), rel=1e-5)
    measured = (metrics(folder)[-1]["valid_loss"] for folder in (run, other))
    assert next(measured) == pytest.approx(next(measured), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "zero", "recompute"),
    [
        ("cpm", 1, "none"),
        ("cpm", 3, "full"),
        ("roformer", 1, "sublayer"),
        ("t5_pegasus", 1, "sublayer"),
        pytest.param("roformer", 3, "full", marks=pytest.mark.slow),
        pytest.param("t5_pegasus", 3, "full", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_at_the_full_length(
    tmp_path: Path,
    tiny_corpus: Path,
    alone: Any,
    world2: World,
    family: str,
    zero: int,
    recompute: str,
) -> None:
    changes = SHARED | {"parallel__zero": zero, "recompute": recompute}
    world2.run(GO, config=config(tmp_path, tiny_corpus, family, **changes))
    same(tmp_path, alone(family))


@pytest.mark.parametrize("what", ["tokens", "gradient"])
def test_an_exchange_left_out_is_caught(
    tmp_path: Path, tiny_corpus: Path, alone: Any, world2: World, what: str
) -> None:
    """Negative control: attention to a rank's own tokens, and gradients that stay where they are
    (whose first loss is still right)."""
    data = config(tmp_path, tiny_corpus, **SHARED, run__stop_at_step=STEPS)
    world2.run(sequence_jobs.go_wrong, config=data, what=what)
    right, wrong = losses(alone("cpm")), losses(tmp_path)
    assert (wrong[0] == pytest.approx(right[0], rel=1e-6)) == (what == "gradient")
    assert wrong[-1] != pytest.approx(right[-1], rel=1e-4)  # ten times the tolerance


@pytest.mark.parametrize("tensor", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_sequence_2_by_tensor_2_and_by_data_2(
    tmp_path: Path, tiny_corpus: Path, world1: World, world4: World, tensor: int
) -> None:
    """On four processes, each with its own group of devices that share a row."""
    four = {"model__heads": 4, "model__head_dim": 8, "run__stop_at_step": 4}
    world1.run(GO, config=config(tmp_path / "one", tiny_corpus, **four))
    layout = SHARED | {"parallel__tensor": tensor} | four
    world4.run(GO, config=config(tmp_path / "four", tiny_corpus, **layout))
    same(tmp_path / "four", tmp_path / "one", 4)


@pytest.mark.parametrize(("before", "after"), [(SHARED, {}), ({}, SHARED)])
def test_a_checkpoint_knows_no_layout(
    tmp_path: Path, tiny_corpus: Path, alone: Any, world2: World, before: Any, after: Any
) -> None:
    """Stopped at step 5 with shared rows and resumed without them, and the other way round."""
    stop = {"run__stop_at_step": 5, "parallel__zero": 3}
    world2.run(GO, config=config(tmp_path, tiny_corpus, **before, **stop))
    assert len(losses(tmp_path)) == 5
    world2.run(GO, config=config(tmp_path, tiny_corpus, **after))
    same(tmp_path, alone("cpm"))


def test_a_resume_of_shared_rows_is_bit_for_bit_with_dropout(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    """Each rank of a group draws its own dropout, and draws it again."""
    dropout = {"model__dropout": 0.1, "model__attention_dropout": 0.1}
    short = SHARED | dropout | {"run__stop_at_step": 8}
    world2.run(GO, config=config(tmp_path / "whole", tiny_corpus, **short))
    stopped = SHARED | dropout | {"run__stop_at_step": 4}
    world2.run(GO, config=config(tmp_path / "broken", tiny_corpus, **stopped))
    world2.run(GO, config=config(tmp_path / "broken", tiny_corpus, **short))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed documents": ("roformer", {}),
    "v2": ("roformer v2", {}),
    "learned positions": ("bert", {}),
    "a table that is stretched": (
        "bert", {"positions": 16, "position_table": PositionTable("interpolated", 8)},
    ),
    "a table that is decomposed": (
        "bert", {"positions": 64, "position_table": PositionTable("hierarchical", 8)},
    ),
    "yarn by document": ("roformer", {"rope": Rope("yarn", 8, 2.0, dynamic=True)}),
    "ReRoPE and log n": ("roformer", {"rope": Rope("rerope", 8, window=4), "log_n": 8}),
    "T5": ("t5_pegasus", {}),
    "T5 as published": (
        "t5_pegasus", {"cross_position_bias": True, "activation": "gelu_erf", "log_n": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_know_positions(world1: World, world2: World, kind: str) -> None:
    """Rows with two documents, or one and padding; logits of whole rows too, as in generation."""
    family, changes = KINDS[kind]
    one = world1.run(family_jobs.train, family=family, zero=1, steps=6, **changes)[0]
    two = world2.run(family_jobs.train, family=family, zero=1, steps=6, sequence=2, **changes)
    for what, most in (("losses", 1e-5), ("norms", 1e-4)):
        assert two[0][what] == two[1][what] == pytest.approx(one[what], rel=most), what
    assert (two[1]["logits"] - one["logits"]).abs().max() < 1e-5  # fp32, logits of size 1
    for name, value in two[0]["held"].items():
        assert torch.equal(value, two[1]["held"][name]), name


MODELS = {
    "cpm": CPMConfig("cpm", 500, 128, 3, 4, 32, 512, 2048, **OFF),
    "roformer": RoFormerConfig("roformer", 1, 500, 128, 3, 4, 32, 512, **OFF),
    "t5_pegasus": T5PegasusConfig("t5_pegasus", 500, 128, 3, 4, 32, 192, **OFF),
}


@pytest.mark.parametrize(
    ("family", "documents", "how"),
    [
        ("cpm", True, "none"),
        ("cpm", False, "none"),
        ("cpm", False, "full"),
        ("roformer", True, "none"),
        ("roformer", False, "full"),
        ("t5_pegasus", True, "none"),
    ],
)
def test_memory_of_a_rank_by_length_is_what_plan_says(
    world2: World, family: str, documents: bool, how: str
) -> None:
    """Within 5 % of what autograd keeps, at every length; on a CPU rows share T5's buckets, so one
    row. Recompute is looked at before its backward pass, which holds one block more."""
    config, rows = MODELS[family], 1 if family == "t5_pegasus" else 2
    for length in (128, 256, 512):
        asked = {"seq_len": length, "target_len": length // 2, "rows": rows, "how": how}
        found = world2.run(sequence_jobs.kept, config=config, **asked, documents=documents)

        def planned(how: str, layers: int, length: int = length) -> float:
            row, model = Row(length, length // 2), replace(config, layers=layers)
            return kept_of(model, row, rows, "fp32", how, 1, documents, 2).device

        block = planned("none", 3) - planned("none", 2) if how == "full" else 0.0
        assert found == [pytest.approx(planned(how, 3) - block, rel=0.05)] * 2, length


REFUSED: dict[str, dict[str, Any]] = {
    "model.heads: is 6, not divisible by parallel.sequence=4, and in attention a device has whole "
    "heads; the nearest that is: 8": {"parallel__sequence": 4, "model__heads": 6},
    "model.heads: is 6, not divisible by parallel.tensor=2 times parallel.sequence=2": {
        "parallel__sequence": 2, "parallel__tensor": 2, "model__heads": 6,
    },
    "data.seq_len: is 31, not divisible by parallel.sequence=2, whose devices share a row evenly; "
    "the nearest that is: 32": SHARED | {"data__seq_len": 31},
    "stages.1.data.seq_len: is 33, not divisible by parallel.sequence=2": {
        **SHARED, "stages": [{"steps": 30}, {"steps": 5, "data": {"seq_len": 33}}],
    },
    "data.target_len: is 15, not divisible by parallel.sequence=2": {
        **FAMILIES["t5_pegasus"], **SHARED, "data__target_len": 15,
    },
    "parallel.sequence: is 0, must be at least 1": {"parallel__sequence": 0},
    "parallel.tensor: is 0, must be at least 1": {"parallel__tensor": 0},
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_what_cannot_be_shared_is_refused_in_a_sentence(tmp_path: Path, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_dict(RunConfig, page(tmp_path, tmp_path, **REFUSED[says]))
    assert says in str(refused.value)


def test_processes_that_groups_do_not_divide(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    with pytest.raises(ValueError, match=r"parallel\.sequence: is 2, 1 processes"):
        world1.run(GO, config=config(tmp_path, tiny_corpus, **SHARED))
