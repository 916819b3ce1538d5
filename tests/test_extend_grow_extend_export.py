"""A whole life: trained, extended, trained on by another number of processes, grown, extended again
and exported. Every proof on the way holds, and the first model still lives in the last.

Four steps of training lie between; the last comparison is therefore of the states around each
change, which the proofs make (float64: 1e-12 of the logits' deviation).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import dump
from launch.cli import main
from pretrain import checkpoint, proof
from pretrain.convert import hf
from pretrain.growth.positions import TABLE
from tests.run_jobs import losses, page
from tests.worlds import World

pytest.importorskip("transformers")
GO = "tests.run_jobs:go"


def go_on(world: World, run: Path, corpus: Path, origin: Path, steps: int, **more: Any) -> Path:
    """Some steps more from a checkpoint, moments and progress included."""
    record = checkpoint.read(origin).record
    config = page(run, corpus, model=record["model"], run__steps=record["step"] + steps, **more)
    config |= {"init": {"from": str(origin), "what": "all"}, "schedule": {"name": "constant"}}
    (result, *_) = world.run(GO, timeout_s=600, config=config)
    return Path(result["checkpoint"])


def proven(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "proof.json").read_text("utf-8"))
    assert found["kept"], found
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_proof_on_the_way_holds(
    tmp_path: Path, tiny_corpus: Path, world1: World, world2: World
) -> None:
    short = page(tmp_path / "short", tiny_corpus, run__steps=4)
    short |= {"schedule": {"name": "constant"}}
    world2.run(GO, timeout_s=600, config=short)
    long = tmp_path / "long"
    words = ["--seq-len", "128", "--method", "hierarchical", "--out", str(long)]
    assert main(["extend", str(tmp_path / "short"), *words]) == 0
    assert proven(long)["promised"] == 32

    row = {"data__seq_len": 128, "batch": {"samples": 4, "micro": 2}}
    whole = go_on(world2, tmp_path / "two", tiny_corpus, long, 4, **row)
    stop = {"run__stop_at_step": 6, **row}
    go_on(world2, tmp_path / "one", tiny_corpus, long, 4, **stop)
    resumed = go_on(world1, tmp_path / "one", tiny_corpus, long, 4, parallel__zero=3, **row)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)

    larger = {**checkpoint.read(whole).record["model"], "hidden": 48, "layers": 3, "ffn": 96}
    larger |= {"heads": 3}
    (tmp_path / "larger.yaml").write_text(dump({"model": larger}), "utf-8")
    grown = tmp_path / "grown"
    words = ["--to", str(tmp_path / "larger.yaml"), "--out", str(grown)]
    assert main(["grow", str(resumed), *words]) == 0
    proven(grown)
    trained = go_on(world2, tmp_path / "third", tiny_corpus, grown, 2, **row)

    longer = tmp_path / "longer"
    words = ["--seq-len", "512", "--method", "hierarchical", "--out", str(longer)]
    assert main(["extend", str(trained), *words]) == 0
    found = proven(longer)
    assert found["promised"] == 128 and found["lengths"][-1]["tokens"] == 128
    last = checkpoint.read(longer)
    assert [one["seq_len"] for one in last.record["extensions"]] == [128, 512]
    assert len(last.record["growth"]) == 1 and last.entries[f"weights/{TABLE}"].shape == (32, 48)

    assert main(["convert", str(longer), str(tmp_path / "hf"), "--to", "hf"]) == 0
    proven(tmp_path / "hf")
    tokens = torch.randint(320, (1, 512), generator=torch.Generator().manual_seed(1))
    theirs = hf.outputs(tmp_path / "hf", tokens, torch.float64)["logits"]
    ours = proof.logits(last, tokens, torch.float64)
    assert (theirs - ours).abs().max() <= 2e-6 * ours.std()
