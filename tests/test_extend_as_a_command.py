"""`python -m launch extend`: a checkpoint in, one that reads longer rows and its proof out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.extended import Extend, extended
from configs.load import ConfigError
from configs.model import RoFormerConfig
from launch.cli import main
from pretrain import checkpoint, proof
from pretrain.growth import positions
from pretrain.growth.positions import TABLE
from pretrain.state import State, fresh
from tests.growing import TINY, trained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one checkpoint."""
    checkpoint.write_state(tmp_path / "run/checkpoints/stage-00-step-00000009", trained())
    return tmp_path / "run"


def call(run: Path, *words: str) -> int:
    return main(["extend", str(run), *words])


def test_a_run_is_extended_and_proven(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "long"
    words = ["--seq-len", "192", "--method", "hierarchical", "--alpha", "0.3", "--out", str(out)]
    assert call(run, *words) == 0
    said = capsys.readouterr().out
    assert "unchanged up to  48 tokens" in said and "proof.json: kept" in said
    assert 'model.positions: 192; model.position_table: {"method": "hierarchical"' in said
    assert checkpoint.damage(out) == []
    after = checkpoint.read(checkpoint.resolve(out))
    assert after.record["model"]["position_table"]["alpha"] == 0.3
    assert after.record["updates"] == 7 and after.record["extensions"][0]["seq_len"] == 192
    assert after.entries[f"optim/exp_avg/{TABLE}"].shape == (48, 32)
    found = json.loads((out / "proof.json").read_text("utf-8"))
    assert found["kept"] and found["promised"] == 48 and found["method"] == "hierarchical"


def test_the_rows_of_the_last_stage_are_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RoFormer's curriculum: rows of 32, then of 96. What was learnt at 96 is not unlearnt."""
    config = RoFormerConfig("roformer", 1, 96, 32, 2, 4, 8, 64)
    made = fresh(config, 1)
    stages = [{"steps": 2}, {"steps": 2, "data": {"seq_len": 96}}]
    page = {"data": {"seq_len": 32}, "stages": stages}
    record = {**made.record, "config": page, "stage": 1, "step": 3}
    checkpoint.write_state(tmp_path / "made", State(made.entries, record))
    assert call(tmp_path / "made", "--seq-len", "64", "--out", str(tmp_path / "no")) == 2
    assert "96" in capsys.readouterr().err
    words = ["--seq-len", "192", "--out", str(tmp_path / "long"), "--json"]
    assert call(tmp_path / "made", *words) == 0
    found = json.loads(capsys.readouterr().out)
    rope = checkpoint.read(tmp_path / "long").record["model"]["rope"]
    assert rope["known"] == 96 and found["promised"] <= 96


def test_the_default_is_decomposition_and_json_is_the_proof(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run, "--seq-len", "96", "--out", str(run.parent / "long"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] and found["method"] == "hierarchical"
    assert found["at_the_new_length"] == {"tokens": 96, "finite": True}


def test_a_broken_promise_exits_non_zero(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed has its rows in another order: 1, and the place is named."""
    whole = positions.extend

    def broken(state: State, *rest: object, **more: object) -> State:
        made = whole(state, *rest, **more)  # type: ignore[arg-type]
        page = made.record["model"]
        table = made.read(f"weights/{TABLE}").roll(1, 0)
        entry = made.entries[f"weights/{TABLE}"]
        from tests.growing import held

        assert entry.shape == tuple(table.shape) and page["positions"] == 96
        return State({**made.entries, f"weights/{TABLE}": held(table)}, made.record)

    monkeypatch.setattr(positions, "extend", broken)
    monkeypatch.setattr("pretrain.proof_of_length.extend", broken)
    assert call(run, "--seq-len", "96", "--out", str(run.parent / "long")) == 1
    both = capsys.readouterr()
    assert "NOT KEPT" in both.out and "was not made" in both.err
    assert not (run.parent / "long").exists()
    assert "ABOVE" in both.out
    found = json.loads((run.parent / ".long.growing/proof.json").read_text("utf-8"))
    assert "embeddings" in found["differs_at"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seq-len", "48"], "the model has 48 positions already"),
        (["--seq-len", "96", "--method", "yarn"], "this cpm can be extended by hierarchical"),
        (["--seq-len", "9999", "--method", "hierarchical"], "48 rows reach 2304 at most"),
        (["--seq-len", "96", "--method", "hierarchical", "--alpha", "0.5"], "not be 0.5"),
        (["--seq-len", "96", "--window", "-3"], "window: is -3, must not be negative"),
        (["--seq-len", "-5"], "seq_len: is -5, must be at least 2"),
        (["--seq-len", "96", "--window", "9"], "window: is 9, which hierarchical does not read"),
        (["--seq-len", "96", "--leak", "3"], "does not read, leaky_rerope would; leave it out"),
        (["--seq-len", "96", "--method", "last", "--alpha", "0.3"], "which last does not read"),
        (["--seq-len", "96", "--known", "32"], "--known: is 32, the model has 48 positions"),
    ],
)
def test_mistakes_are_sentences(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert call(run, *words, "--out", str(run.parent / "long")) == 2
    assert sentence in capsys.readouterr().err
    assert not (run.parent / "long").exists()


@pytest.mark.parametrize("page", [{"alpha": 0.3}, {"method": "rerope", "leak": 3.0}])
def test_a_number_that_the_method_does_not_read_is_refused_on_a_page_too(
    page: dict[str, Any],
) -> None:
    config = RoFormerConfig("roformer", 1, 96, 32, 2, 4, 8, 64)
    key = (page.keys() - {"method"}).pop()
    with pytest.raises(ConfigError, match=f"{key}: is .*, which rerope does not read"):
        extended(config, 96, Extend(**page, known=32))
    with pytest.raises(ConfigError, match="dynamic: is true, which rerope does not read"):
        extended(config, 96, Extend("rerope", dynamic=True, known=32))
    for method in ("interpolated", "hierarchical", "last"):  # of a model that writes
        with pytest.raises(ConfigError, match=f"dynamic: is true, which {method} does not read"):
            extended(TINY, 96, Extend(method, dynamic=True))
    static = extended(config, 96, Extend("rerope", dynamic=False, known=32))  # which is true of it
    assert static == extended(config, 96, Extend("rerope", known=32))


def test_the_numbers_to_write_are_those_that_are_read(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table that is decomposed knows no length: `dynamic` beside it would say that it does."""
    words = ["--seq-len", "96", "--static", "--out", str(run.parent / "long")]
    assert call(run, *words) == 0
    table = '{"method": "hierarchical", "rows": 48, "alpha": 0.4}'
    assert f"model.position_table: {table}" in capsys.readouterr().out


def test_what_reads_such_rows_already_is_not_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of ReRoPE depends on the length: once it has it, every length is read as it is."""
    made = fresh(RoFormerConfig("roformer", 1, 96, 32, 2, 4, 8, 64), 1)
    checkpoint.write_state(tmp_path / "made", made)
    words = ["--known", "32", "--seq-len"]
    assert call(tmp_path / "made", *words, "64", "--out", str(tmp_path / "long")) == 0
    assert call(tmp_path / "long", *words, "96", "--out", str(tmp_path / "no")) == 2
    assert "seq-len: is 96, " in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_nothing_is_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run, "--seq-len", "96", "--out", str(run)) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_extended_checkpoint_generates_at_the_new_length(run: Path) -> None:
    out = run.parent / "long"
    assert call(run, "--seq-len", "192", "--out", str(out)) == 0
    after = checkpoint.read(checkpoint.resolve(out))
    tokens = torch.randint(TINY.vocab, (1, 192))
    assert proof.logits(after, tokens, torch.float32).isfinite().all()
