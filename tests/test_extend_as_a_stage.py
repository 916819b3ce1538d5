"""A stage with longer rows: the model is extended at its border, trained on, resumed anywhere.

The border writes a second checkpoint of the same step with its proof. A run that dies around it
goes on without a difference to the last bit; on another world size to 1e-5 (fp32, another order of
summation).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import ConfigError, from_dict
from configs.run import RunConfig, at_stage, stage_model, step_samples
from pretrain import checkpoint
from pretrain.growth.positions import TABLE
from tests.run_jobs import digests, losses, metrics, page
from tests.worlds import World

GO = "tests.run_jobs:go"
KEYS = {"run__steps": None, "run__save_every_steps": 3, "run__keep_checkpoints": 9}
ROFORMER = {
    "family": "roformer", "version": 1, "vocab": 320, "hidden": 32, "layers": 2, "heads": 2,
    "head_dim": 16, "ffn": 64, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def config(run: Path, corpus: Path, extend: dict[str, Any], **changes: Any) -> dict[str, Any]:
    long = {"steps": 6, "data": {"seq_len": 128}, "batch": {"samples": 4, "micro": 1}}
    stages = [{"steps": 6}, {**long, "extend": extend}]
    rhythm = {"schedule__warmup_steps": 0, "schedule__decay_steps": 0}
    return page(run, corpus, **{"stages": stages, **KEYS, **rhythm, **changes})


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World) -> Path:
    """6 steps of rows of 32 tokens, 6 of 128, by rows that are added to the table."""
    run = tmp_path_factory.mktemp("extended") / "run"
    world2.run(GO, config=config(run, tiny_corpus, {"method": "hierarchical_rows"}))
    return run


def test_the_border_is_proven_and_long_rows_are_learnt(extended: Path) -> None:
    found = json.loads((extended / "checkpoints/stage-01-step-00000006/proof.json").read_text())
    assert found["kept"] and found["promised"] == 32 and found["seq_len"] == 128
    last = checkpoint.read(extended / "checkpoints/stage-01-step-00000012")
    table = last.read(f"weights/{TABLE}")
    assert table.shape == (128, 32) and last.record["model"]["positions"] == 128
    begun = checkpoint.read(extended / "checkpoints/stage-01-step-00000006")
    moved = (table - begun.read(f"weights/{TABLE}")).abs().amax(1)
    assert bool((moved > 0).all())  # every new row has had its gradient
    assert last.record["samples"] == 6 * 8 + 6 * 4
    assert [line["tokens"] for line in metrics(extended)][-1] == 6 * 8 * 32 + 6 * 4 * 128
    moments = last.read(f"optim/exp_avg_sq/{TABLE}")
    assert torch.isfinite(moments).all() and bool((moments > 0).any(1).all())


@pytest.mark.parametrize(
    "last", ["stage-00-step-00000006", "stage-01-step-00000006", "stage-01-step-00000009"]
)
def test_killed_and_resumed_around_the_border(
    extended: Path, tmp_path: Path, tiny_corpus: Path, world2: World, last: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(extended, run)
    for path in checkpoint.found_in(run):
        if path.name > last:
            shutil.rmtree(path)
    world2.run(GO, config=config(run, tiny_corpus, {"method": "hierarchical_rows"}))
    assert losses(run) == losses(extended)
    final = "checkpoints/stage-01-step-00000012"
    assert digests(run / final) == digests(extended / final)


@pytest.mark.parametrize(("method", "sequence"), [("hierarchical", 1), ("interpolated", 2)])
def test_resumed_on_one_process_under_zero_3(
    method: str, sequence: int, tmp_path: Path, tiny_corpus: Path, world1: World, world2: World
) -> None:
    """The longer rows shared by both processes, too, before they are whole on one."""
    how = {"method": method}
    world2.run(GO, config=config(tmp_path / "whole", tiny_corpus, how))
    parts = {"run__stop_at_step": 8, "parallel__sequence": sequence}
    stop = config(tmp_path / "broken", tiny_corpus, how, **parts)
    world2.run(GO, config=stop)
    rest = config(tmp_path / "broken", tiny_corpus, how, parallel__zero=3)
    world1.run(GO, config=rest)
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    last = checkpoint.read(tmp_path / "broken/checkpoints/stage-01-step-00000012")
    assert last.entries[f"weights/{TABLE}"].shape == (32, 32)
    assert last.record["extensions"][0]["method"] == method


@pytest.mark.parametrize("how", [{"method": "rerope"}, {"method": "yarn", "dynamic": False}])
def test_a_rotary_encoder_goes_on_at_longer_rows(
    how: dict[str, Any], tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    pytest.importorskip("jieba")
    changes = {"model": ROFORMER, "objective": {"name": "masked", "masking": "token"}}
    made = config(tmp_path / "run", tiny_corpus, how, **changes)
    try:
        world2.run(GO, config=made)
    except ValueError as error:
        pytest.skip(f"the tiny corpus has no mask: {error}")
    found = json.loads((tmp_path / "run/checkpoints/stage-01-step-00000006/proof.json").read_text())
    assert found["kept"] and found["promised"] == (16 if how["method"] == "rerope" else 0)
    assert len(losses(tmp_path / "run")) == 12


def test_a_page_that_cannot_be_is_refused_ahead(tmp_path: Path, tiny_corpus: Path) -> None:
    def said(extend: dict[str, Any], **stage: Any) -> str:
        data = config(tmp_path / "run", tiny_corpus, extend)
        data["stages"][1] |= stage
        with pytest.raises(ConfigError) as error:
            from_dict(RunConfig, data)
        return str(error.value)

    assert "stages.1.extend: method: is yarn, this cpm can be" in said({"method": "yarn"})
    assert "one stage extends or grows" in said({}, model={"layers": 3})
    assert "needs data.seq_len of the same stage" in said({}, data={})
    assert "stages.1.data.seq_len: is 128" in said(None)  # type: ignore[arg-type]


def test_the_length_that_was_known_is_that_of_the_stage_before(
    tmp_path: Path, tiny_corpus: Path
) -> None:
    data = config(tmp_path / "run", tiny_corpus, {"method": "ntk"}, model=ROFORMER)
    data["objective"] = {"name": "masked", "masking": "token"}
    data["stages"].append({"steps": 3, "data": {"seq_len": 512}, "extend": {"method": "ntk"}})
    whole = from_dict(RunConfig, data)
    for view in (whole, at_stage(whole, 1), at_stage(whole, 2)):
        rope = stage_model(view, 2).rope  # type: ignore[union-attr]
        assert rope is not None and rope.known == 32
    assert step_samples(at_stage(whole, 1)) == 4
