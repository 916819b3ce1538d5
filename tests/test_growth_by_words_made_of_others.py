"""`grow --tokenizer`: a longer vocabulary, each new word begun as the mean of what it is made of.

The rows are those of revocab's plan, computed here from the tokens' spelling; old logits stay to
1e-12 of their deviation in float64. It is no growth that keeps the function: an old word's chance
falls by what the new ones take; masked (`new_words: masked`) it stays. The control tells the proof
nothing of the pieces, and it finds rows that are not the growth's.
"""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from configs.corpus import CorpusConfig
from configs.load import dump, from_dict, to_dict
from configs.model import ModelConfig, tensors
from data_pipeline import wordpiece
from data_pipeline.build import build
from data_pipeline.tokenizer import load as load_tokenizer
from launch.cli import main
from pretrain import checkpoint, proof
from pretrain.growth import model_config
from pretrain.state import State
from tests.growing import held, trained
from tests.run_jobs import losses
from tests.test_growth_of_every_family import FAMILIES
from tests.test_run_of_every_objective import corpus  # noqa: F401
from tests.test_run_of_every_objective import page as page_of
from tests.worlds import World

LETTERS = [chr(ord("一") + i) for i in range(40)]
OLD = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, "。", "，"]
MORE = [LETTERS[3] + LETTERS[7], LETTERS[1] + LETTERS[2] + LETTERS[30], "琊"]
MADE_OF = [(8, 12), (6, 7, 35), (1,)]
SPARE = 2


def saved(folder: Path, tokens: list[str]) -> Path:
    words = wordpiece.WordPiece("".join(f"{token}\n" for token in tokens).encode(), True)
    words.save(folder)
    return folder


def begun(folder: Path, family: str, spare: int = 0) -> tuple[ModelConfig, Path]:
    """A model of the old words and spare rows, with its tokenizer, and the page of the larger."""
    config = dataclasses.replace(FAMILIES[family], vocab=len(OLD) + spare)
    checkpoint.write_state(folder / "small", trained(config), saved(folder / "old", OLD))
    larger = dataclasses.replace(config, vocab=len(OLD) + len(MORE) + SPARE, ffn=100)
    (folder / "page.yaml").write_text(dump({"model": to_dict(larger)}), "utf-8")
    saved(folder / "new", OLD + MORE)
    return config, folder / "page.yaml"


def call(folder: Path, out: str, *words: str) -> int:
    line = ["grow", str(folder / "small"), "--to", str(folder / "page.yaml")]
    return main([*line, "--tokenizer", str(folder / "new"), "--out", str(folder / out), *words])


@pytest.mark.parametrize("family", ["cpm", "t5", "v1", "v2"])
def test_a_word_begins_as_the_mean_of_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    config, _ = begun(tmp_path, family)
    assert call(tmp_path, "grown") == 0
    said = capsys.readouterr().out
    assert "47 -> 52 are said, 2 made of several old ones, 1 of one" in said
    before, after = (checkpoint.read(tmp_path / name) for name in ("small", "grown"))
    for tensor in tensors(config):
        if "vocab" not in tensor.out:
            continue
        old, new = (state.read(f"weights/{tensor.name}") for state in (before, after))
        assert torch.equal(new[: len(OLD)], old)
        for number, rows in enumerate(MADE_OF):
            mean = old[list(rows)].double().mean(0)
            assert torch.allclose(new[len(OLD) + number].double(), mean, rtol=1e-7, atol=1e-9)
        spare = old.double().mean(0).expand_as(new[-SPARE:])
        assert torch.allclose(new[-SPARE:].double(), spare, rtol=1e-7, atol=1e-9)
    found = json.loads((tmp_path / "grown/proof.json").read_text("utf-8"))
    assert found["kept"] and found["float64"]["max_difference"] <= 1e-12 * found["float64"]["std"]
    assert found["old_words_fall_by"] > 1e-3
    assert (tmp_path / "grown/tokenizer/vocab.txt").read_text("utf-8").split()[-1] == MORE[-1]
    assert after.record["tokenizer"] == found["new_words"]["fingerprint"]
    probes = proof.probes(None, model_config(before))
    told = proof.prove(before, after, probes)  # the control
    assert not told["kept"] and told["not_as_computed"] == "embed.tokens.weight"


def test_masked_words_take_nothing(tmp_path: Path) -> None:
    begun(tmp_path, "t5")
    assert call(tmp_path, "grown", "--new-words", "masked") == 0
    found = json.loads((tmp_path / "grown/proof.json").read_text("utf-8"))
    assert found["kept"] and abs(found["old_words_fall_by"]) < 1e-12
    assert found["to"]["words_said"] == len(OLD)
    assert found["loss"]["after"] == pytest.approx(found["loss"]["before"], rel=1e-14)


@pytest.mark.parametrize(("spare", "made"), [(1, 2), (4, 0)])
def test_words_in_spare_rows_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spare: int, made: int
) -> None:
    """Rows that the old tokenizer left over stay as they are; with four none is made of others."""
    begun(tmp_path, "cpm", spare)
    assert call(tmp_path, "grown") == 0
    taken = min(spare, len(MORE))
    assert f"{taken} new ones have rows that were spare, as they stand" in capsys.readouterr().out
    told = json.loads((tmp_path / "grown/proof.json").read_text("utf-8"))["new_words"]
    assert told["means"] + told["copies"] == made and told["spare_rows_taken"] == taken
    old, new = (checkpoint.read(tmp_path / n).read("weights/embed.tokens.weight")
                for n in ("small", "grown"))  # fmt: skip
    assert torch.equal(new[: len(old)], old)


@pytest.mark.parametrize("objective", ["span_corruption", "prefix"])
def test_words_in_the_rows_of_sentinels_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    """Spare rows are what a T5 has learnt to say for a span, if a stage of its run cut any out."""
    begun(tmp_path, "t5", 4)
    state = checkpoint.read(tmp_path / "small")
    page = {"objective": {"name": "prefix"}, "stages": [{"objective": {"name": objective}}]}
    entries = {key: held(entry.read().clone()) for key, entry in state.entries.items()}
    shutil.rmtree(tmp_path / "small")
    learnt = State(entries, {**state.record, "config": page})
    checkpoint.write_state(tmp_path / "small", learnt, tmp_path / "old")
    assert call(tmp_path, "grown") == (2 if objective == "span_corruption" else 0)
    if objective == "span_corruption":
        said = capsys.readouterr().err
        assert "3 of its new words have the rows from 47 on" in said and "--vocab 54" in said


def test_another_vocabulary_and_too_few_rows_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path, "cpm")
    assert call(tmp_path, "grown", "--set", f"vocab={len(OLD) + 1}") == 2
    assert "has 50 tokens, model.vocab is 48; --set vocab=50" in capsys.readouterr().err
    saved(tmp_path / "new", [*OLD[:9], "琊", *OLD[10:], *MORE])
    assert call(tmp_path, "grown") == 2
    assert "differs from the checkpoint's at id 9" in capsys.readouterr().err
    assert not (tmp_path / "grown").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_the_longer_vocabulary(
    tmp_path: Path,
    corpus: Path,  # noqa: F811
    world2: World,
) -> None:
    """A RoFormer on two processes, ZeRO 2, grown by the command and trained on, moments and all,
    on the same documents encoded with 30 of their commonest pairs of tokens as words."""
    go, words = "tests.run_jobs:go", load_tokenizer(corpus / "tokenizer")
    tokens = [str(piece) for piece in words.pieces(range(words.vocab_size))]
    lines = (corpus.parent / "plain.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    han = {token for token in tokens if len(token) == 1 and "一" <= token <= "鿿"}
    pairs = Counter(
        text[at : at + 2]
        for text in texts
        for at in range(len(text))
        if set(text[at : at + 2]) <= han
    )
    more = [pair for pair, _ in pairs.most_common(99) if len(pair) == 2 and pair not in tokens][:30]
    longer = saved(tmp_path / "longer", tokens + more)
    build(
        from_dict(
            CorpusConfig,
            {
                "data": {"out": str(tmp_path / "again"), "documents": str(corpus), "workers": 1},
                "tokenizer": {"kind": "wordpiece", "model": str(longer)},
                "split": {"valid_fraction": 0.1},
            },
        )
    )
    plain = page_of(tmp_path / "small", corpus, "masked", 20)
    plain["model"] = plain["model"] | {"vocab": len(tokens)}
    plain["parallel"] = {"zero": 2}
    world2.run(go, config=plain)
    page = tmp_path / "page.yaml"
    page.write_text(dump({"model": plain["model"] | {"vocab": len(tokens + more)}}), "utf-8")
    out = tmp_path / "grown"
    line = ["grow", str(tmp_path / "small"), "--to", str(page), "--out", str(out)]
    assert main([*line, "--tokenizer", str(tmp_path / "again/tokenizer")]) == 0
    on = page_of(tmp_path / "on", tmp_path / "again", "masked", 60)
    on["model"], on["parallel"] = on["model"] | {"vocab": len(tokens + more)}, {"zero": 2}
    on["init"] = {"from": str(out), "what": "all"}
    world2.run(go, config=on)
    found = losses(tmp_path / "on")
    assert len(found) == 40 and sum(found[-5:]) < sum(found[:5]) - 0.5
    folder = tmp_path / "on/checkpoints/stage-00-step-00000060"
    table, begun_as = (
        checkpoint.read(at).read("weights/embed.tokens.weight")[len(tokens) :]
        for at in (folder, out)
    )
    assert float((table - begun_as).abs().amax(1).min()) > 1e-3  # every new word has learnt
