"""`python -m launch grow`: a checkpoint in, a larger checkpoint and its proof out."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from configs.load import dump, to_dict
from data_pipeline.tokenizer import load as load_tokenizer
from launch.cli import main
from pretrain import checkpoint, proof
from pretrain.growth import depth, grow
from pretrain.state import Entry, State
from tests.growing import TINY, trained


def _count(size: tuple[int, ...]) -> int:
    return int(torch.Size(size).numel())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one checkpoint, and the page of its model."""
    checkpoint.write_state(tmp_path / "run/checkpoints/stage-00-step-00000009", trained())
    (tmp_path / "tiny.yaml").write_text(dump({"model": to_dict(TINY)}), "utf-8")
    return tmp_path / "run"


def call(run: Path, *words: str) -> int:
    return main(["grow", str(run), "--to", str(run.parent / "tiny.yaml"), *words])


def test_a_run_is_grown_and_proven(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "grown"
    assert call(run, "--set", "layers=5", "--set", "model.ffn=96", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "function         kept" in said and "ffn 64 -> 96; layers 3 -> 5" in said
    assert checkpoint.damage(out) == []
    grown = checkpoint.read(checkpoint.resolve(out))
    assert grown.record["model"]["layers"] == 5 and grown.record["updates"] == 7
    assert grown.entries["optim/exp_avg_sq/decoder.layers.4.ffn.up.weight"].shape == (96, 32)
    proof = json.loads((out / "proof.json").read_text("utf-8"))
    assert proof["kept"] and proof["float64"]["within"] and proof["float32"]["within"]
    assert proof["operators"] == ["ffn 64 -> 96", "layers 3 -> 5"]


def test_the_bytes_do_not_depend_on_what_the_state_was_read_from(run: Path) -> None:
    out, target = run.parent / "grown", dataclasses.replace(TINY, ffn=96)
    assert call(run, "--set", "ffn=96", "--out", str(out), "--seed", "4") == 0
    checkpoint.write_state(run.parent / "direct", grow(trained(), target, seed=4))
    for path in out.iterdir():
        if path.name != "proof.json":
            assert path.read_bytes() == (run.parent / "direct" / path.name).read_bytes()


def test_json_is_the_proof(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run, "--set", "layers=4", "--out", str(run.parent / "grown"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] is True


def test_a_proof_that_fails_leaves_nothing_to_train_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loud(size: tuple[int, ...]) -> Entry:
        return Entry(size, "float32", lambda: torch.arange(_count(size)).sin().view(size))

    monkeypatch.setattr(depth, "zeros", loud)
    out = run.parent / "grown"
    assert call(run, "--set", "layers=4", "--out", str(out)) == 1
    said = capsys.readouterr()
    assert "CHANGED, first at decoder.layers.3.self (new, behind layer 2)" in said.out
    assert f"stands with its proof in {out.parent}/.grown.growing" in said.err and not out.exists()
    assert (
        json.loads((out.parent / ".grown.growing/proof.json").read_text("utf-8"))["kept"] is False
    )
    monkeypatch.undo()
    assert call(run, "--set", "layers=4", "--out", str(out)) == 0 and out.exists()


def test_a_proof_that_is_broken_off_leaves_nothing_to_train_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(*states: State, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "prove", broken_off)
    assert call(run, "--set", "layers=4", "--out", str(run.parent / "grown")) == 130
    assert not (run.parent / "grown").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "hidden=31"], "hidden would shrink from 32 to 31"),
        (["--set", "layrs=4"], "did you mean 'layers'"),
        (["--set", "layers=0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.parent / "grown"
    assert call(run, *words, "--out", str(out)) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_nothing_is_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run, "--set", "layers=4", "--out", str(run)) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_grown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint.found_in(run)[0]
    path = next(folder.glob("weights-*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert call(run, "--set", "layers=4", "--out", str(run.parent / "grown")) == 2
    assert "weights-00000.safetensors" in capsys.readouterr().err


def test_a_missing_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(dump({"model": to_dict(TINY)}), "utf-8")
    assert call(tmp_path / "nowhere", "--out", str(tmp_path / "grown")) == 2
    assert f"{tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_the_same_sizes_are_no_growth(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page whose larger model is in its stages, say."""
    out = run.parent / "grown"
    assert call(run, "--set", "dropout=0", "--out", str(out)) == 2
    assert "nothing grows; its `model:`, not its stages" in capsys.readouterr().err
    assert not out.exists()


def test_how_to_train_on_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "grown"
    assert (
        call(run, "--set", "layers=4", "--noise", "0.1", "--split", "0.6", "--out", str(out)) == 0
    )
    said = capsys.readouterr().out
    assert f"init: {{from: {out}, what: all}}" in said
    assert "note             split: 0.6" in said and "noise: " not in said
    drawn = run.parent / "drawn"
    begun = {"step": 0, "seed": 0, "data": [], "model": to_dict(TINY)}  # as a conversion's
    weights = State(trained().weights_only().entries, begun)
    checkpoint.write_state(drawn, weights)
    words = ["--to", str(run.parent / "tiny.yaml"), "--set", "layers=4"]
    assert main(["grow", str(drawn), *words, "--out", str(run.parent / "more")]) == 0
    assert "what: weights}" in capsys.readouterr().out


def test_the_probes_are_sentences_where_there_is_a_tokenizer(tiny_corpus: Path) -> None:
    config = dataclasses.replace(TINY, vocab=320)
    probes = proof.probes(tiny_corpus / "tokenizer", config)
    assert probes.shape == (4, 48) and int(probes.max()) < 320
    tokenizer = load_tokenizer(tiny_corpus / "tokenizer")
    assert tokenizer.decode(probes.flatten().numpy()).startswith(proof.SENTENCES[0][:8])
    with pytest.raises(proof.ProofError, match=r"has 320 tokens, model.vocab is 97"):
        proof.probes(tiny_corpus / "tokenizer", TINY)


def test_the_tokenizer_is_carried_and_asked(
    tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(TINY, vocab=320)
    words, out = tiny_corpus / "tokenizer", tmp_path / "grown"
    checkpoint.write_state(tmp_path / "small", trained(config), words)
    (tmp_path / "large.yaml").write_text(
        dump({"model": to_dict(dataclasses.replace(config, layers=4))}), "utf-8"
    )
    line = ["grow", str(tmp_path / "small"), "--to", str(tmp_path / "large.yaml")]
    assert main([*line, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["probes_from"] == "fixed sentences"
    assert sorted(p.name for p in (out / "tokenizer").iterdir()) == sorted(
        p.name for p in words.iterdir()
    )


def test_a_page_gets_every_number_that_it_lacks(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an earlier growth too: the page that grows again may know the sizes alone."""
    padded, again = run.parent / "padded", run.parent / "again"
    assert call(run, "--set", "hidden=48", "--out", str(padded)) == 0
    assert f"model.norm_eps: {TINY.norm_eps * (32 / 48)}" in capsys.readouterr().out
    words = ["--to", str(run.parent / "tiny.yaml"), "--set", "hidden=96", "--out", str(again)]
    assert main(["grow", str(padded), *words]) == 0
    assert f"model.norm_eps: {TINY.norm_eps * (32 / 48)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "dropout"),
    [([], 0.0), (["--set", "dropout=0.1"], 0.1), (["--set", "hidden=96"], 0.0)],
)
def test_what_a_page_of_sizes_leaves_out_stays_as_it_was(
    run: Path, words: list[str], dropout: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """A size says nothing of dropout: with the default's, copies that stay alike were not told."""
    none = dataclasses.replace(TINY, dropout=0.0, attention_dropout=0.0)
    small, out = run.parent / "small", run.parent / "grown"
    checkpoint.write_state(small, trained(none))
    sizes = {k: v for k, v in to_dict(TINY).items() if "dropout" not in k and k != "init_std"}
    (run.parent / "sizes.yaml").write_text(dump({"model": sizes}), "utf-8")
    line = ["grow", str(small), "--to", str(run.parent / "sizes.yaml"), "--out", str(out)]
    assert main([*line, "--set", "hidden=64", *words]) == 0
    assert ("copies of hidden" in capsys.readouterr().out) == (dropout == 0)
    grown = checkpoint.read(out).record["model"]
    assert (grown["dropout"], grown["attention_dropout"]) == (dropout, 0.0)
    assert grown["init_std"] == TINY.init_std == 0.1


def test_null_says_all_words_as_in_a_stage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked, more, out = (run.parent / name for name in ("masked", "more", "out"))
    line = ["--set", "vocab=120", "--new-words", "masked"]
    assert call(run, *line, "--out", str(masked)) == 0
    page = ["--to", str(run.parent / "tiny.yaml"), "--set", "vocab=120"]
    assert main(["grow", str(masked), *page, "--set", "ffn=96", "--out", str(more)]) == 0
    assert checkpoint.read(more).record["model"]["words_said"] == 97  # left out, it stays
    assert main(["grow", str(masked), *page, "--set", "words_said=null", "--out", str(out)]) == 0
    assert "97 -> 120 are said" in capsys.readouterr().out


@pytest.mark.parametrize(("step", "share"), [(8, None), (9, None), (12, "0.55"), (14, "0.25")])
def test_a_rate_that_has_fallen_is_told(
    run: Path, step: int, share: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    page = {
        "model": to_dict(TINY),
        "data": {"train": [{"corpus": "none"}], "seq_len": 32},
        "batch": {"samples": 8, "micro": 8},
        "optimizer": {"lr": 1e-3, "layer_decay": 0.9},
        "schedule": {"name": "wsd", "warmup_steps": 2, "decay_steps": 6},
        "run": {"out": "none", "steps": 15},
    }
    state = trained()
    record = {**state.record, "step": step, "stage": 0, "config": page}
    checkpoint.write_state(run.parent / "there", State(state.entries, record))
    words = ["--to", str(run.parent / "tiny.yaml"), "--set", "layers=5"]
    out = str(run.parent / "grown")
    assert main(["grow", str(run.parent / "there"), *words, "--out", out]) == 0
    said = capsys.readouterr().out
    told = "fallen to {} of its peak, to which it jumps back; grow from a checkpoint of step 9 or"
    assert ("has fallen" in said) == (share is not None)
    assert share is None or told.format(share) in said
    assert "what lies below 2 new ones learns at up to 0.81 of its rate" in said
