"""Promise: a checkpoint taken to another vocabulary says of the tokens that it keeps what it said;
new tokens begin as the means of their pieces; and mT5 becomes T5 PEGASUS in the published order.

Kept rows are compared to the last bit, logits to 1e-12 of their standard deviation in float64 (a
product of another shape may add in another order).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import to_dict
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from data_pipeline import wordpiece
from launch import cli
from pretrain import checkpoint, growth, state
from pretrain.convert import vocabulary
from pretrain.convert.rules import ConversionError
from pretrain.convert.vocabulary import Plan, Vocabulary, applied, plan, published, through
from pretrain.generate import load_model

CONTROLS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
OLD = [*CONTROLS, "今", "天", "很", "好", "气", "##s", "a", "##b", "，", "。", "[unused1]"]
NEW = [*CONTROLS, "好", "今天", "天气", "ab", "##s", "很", "[unused2]", "琊", "。"]
REAL = Path(os.environ.get("BAJIE_DEV_DATA", "nowhere")) / "tokenizers"


def words(tokens: Sequence[str], word: bool = True) -> wordpiece.WordPiece:
    return wordpiece.WordPiece("".join(f"{token}\n" for token in tokens).encode(), word)


def seen(tokens: Sequence[str]) -> Vocabulary:
    from launch.revocab import of

    return of(words(tokens))


def random_state(config: ModelConfig) -> state.State:
    """Random weights, biases too, and moments."""
    entries = {}
    for number, (key, entry) in enumerate(state.fresh(config, 0).entries.items()):
        generator = torch.Generator().manual_seed(number)
        value = torch.randn(entry.shape, generator=generator) * 0.3 + ("norm" in key)
        entries[key] = state.Entry(entry.shape, "float32", lambda value=value: value)
        moment = key.replace("weights/", "optim/exp_avg/")
        entries[moment] = state.Entry(entry.shape, "float32", lambda value=value: value)
    return state.State(entries, {"model": to_dict(config)})


def test_a_plan_by_hand() -> None:
    made = plan(seen(OLD), seen(NEW))
    of = {token: tuple(OLD[i] for i in made.rows[n]) for n, token in enumerate(NEW)}
    assert {token: of[token] for token in CONTROLS} == {token: (token,) for token in CONTROLS}
    assert of["好"] == ("好",) and of["##s"] == ("##s",) and of["。"] == ("。",)
    assert of["今天"] == ("今", "天") and of["ab"] == ("a", "##b")
    assert of["[unused2]"] == of["琊"] == ("[UNK]",)
    assert made.weights[NEW.index("今天")] == (0.5, 0.5)
    assert [NEW[n] for n, kept in enumerate(made.kept) if not kept] == [
        "今天", "天气", "ab", "[unused2]", "琊",
    ]  # fmt: skip
    assert made.said() == {"tokens": 14, "kept_tokens": 9, "means": 3, "copies_of_another": 2}
    longer = plan(seen([*OLD, "今天"]), seen([*NEW, "今天好"]), by_length=True)
    assert longer.weights[-1] == pytest.approx((2 / 3, 1 / 3))


def test_pieces_of_one_kind_are_found_in_the_other() -> None:
    ways = vocabulary.spellings
    assert ways("##x", "\u2581", "##") == ("x",)
    assert ways("水", "\u2581", "##") == ("\u2581水", "水")
    assert ways("\u2581水", "##", "\u2581") == ("水",)
    assert ways("水", "##", "\u2581") == ("水", "##水")
    assert ways("##x", "##", "##") == ("##x",)


CONFIGS: list[ModelConfig] = [
    CPMConfig("cpm", 16, 24, 2, 2, 12, 32, 32),
    T5PegasusConfig("t5_pegasus", 16, 24, 2, 2, 12, 32),
    RoFormerConfig("roformer", 1, 16, 24, 2, 2, 12, 32),
    RoFormerConfig("roformer", 2, 16, 24, 2, 2, 12, 32),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.family}{getattr(c, 'version', '')}")
def test_every_tensor_of_the_vocabulary_has_the_new_rows(config: ModelConfig) -> None:
    before, made = random_state(config), plan(seen(OLD), seen(NEW))
    after = applied(before, config, made)
    assert growth.model_config(after).vocab == len(NEW)
    assert not after.names("optim/exp_avg")
    changed = {name for name in after.names() if after.entries[f"weights/{name}"].shape[0] == 14}
    assert (
        changed
        == {
            "cpm": {"embed.tokens.weight"},
            "t5_pegasus": {"embed.tokens.weight", "head.weight"},
            "roformer1": {"embed.tokens.weight", "head.bias"},
            "roformer2": {"embed.tokens.weight"},
        }[f"{config.family}{getattr(config, 'version', '')}"]
    )
    for name in after.names():
        old, new = before.read(f"weights/{name}"), after.read(f"weights/{name}")
        if name not in changed:
            assert torch.equal(old, new)
            continue
        for number, rows in enumerate(made.rows):
            mean = old[list(rows)].double().mean(0).float()
            assert torch.equal(new[number], old[rows[0]] if len(rows) == 1 else mean), name


def test_the_command_proves_what_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIGS[2]
    words(OLD).save(tmp_path / "old")
    words(NEW).save(tmp_path / "new")
    begin = {"step": 9, "tokenizer": words(OLD).fingerprint}
    before = random_state(config)
    source = state.State(before.entries, before.record | begin)
    checkpoint.write_state(tmp_path / "source", source, tmp_path / "old")
    line = ["revocab", str(tmp_path / "source"), "--tokenizer", str(tmp_path / "new")]
    assert cli.main([*line, "--out", str(tmp_path / "out")]) == 0
    assert "9 tokens" in capsys.readouterr().out
    after = checkpoint.read(tmp_path / "out")
    assert after.record["step"] == 0 and after.record["tokenizer"] == words(NEW).fingerprint
    proof = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert proof["kept"] and proof["logits_of_kept_tokens"]["probe_tokens"] > 10
    assert cli.main([*line, "--out", str(tmp_path / "out")]) == 2
    # Spare rows are the mean of all, and change nothing of what is said of the tokens.
    assert cli.main([*line, "--out", str(tmp_path / "spare"), "--vocab", "64"]) == 0
    spare = checkpoint.read(tmp_path / "spare")
    assert spare.record["model"]["vocab"] == 64
    table = spare.read("weights/embed.tokens.weight")
    number = after.record["model"]["vocab"]
    assert torch.equal(table[:number], after.read("weights/embed.tokens.weight"))
    expected = table[:number].double().mean(0).expand(64 - number, -1)
    assert torch.allclose(table[number:].double(), expected, atol=1e-7)
    assert cli.main([*line, "--out", str(tmp_path / "few"), "--vocab", "3"]) == 2
    capsys.readouterr()
    # A row in another's place is seen.
    right = vocabulary.plan

    def wrong(*given: Any) -> Plan:
        made = right(*given)
        rows = list(made.rows)
        rows[5], rows[10] = rows[10], rows[5]
        return Plan(tuple(rows), made.weights, made.kept)

    def crooked(old: state.State, config: ModelConfig, made: Plan) -> state.State:
        return applied(old, config, wrong(seen(OLD), seen(NEW), False))

    monkeypatch.setattr(vocabulary, "applied", crooked)
    assert cli.main([*line, "--out", str(tmp_path / "bad"), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["logits_of_kept_tokens"]["within"]


def test_a_ramp_stands_where_it_stood(tmp_path: Path) -> None:
    """RoFormer v2 of 100 steps of ramp, all made: its layers speak in another vocabulary too."""
    config = RoFormerConfig("roformer", 2, len(OLD), 24, 2, 2, 12, 32, ramp_steps=100)
    before = random_state(config)
    words(OLD).save(tmp_path / "old")
    words(NEW).save(tmp_path / "new")
    record = before.record | {"step": 250}
    checkpoint.write_state(tmp_path / "made", state.State(before.entries, record), tmp_path / "old")
    line = ["revocab", str(tmp_path / "made"), "--tokenizer", str(tmp_path / "new")]
    assert cli.main([*line, "--out", str(tmp_path / "out")]) == 0
    seen_by = [load_model(checkpoint.read(tmp_path / at)) for at in ("made", "out")]
    places = torch.arange(3)[None]
    with torch.no_grad():
        first, second = (
            model(torch.tensor([[tokens.index(w) for w in ("[CLS]", "好", "。")]]), places)
            for model, tokens in zip(seen_by, (OLD, NEW), strict=True)
        )
    assert torch.allclose(first, second, atol=1e-6) and first.std() > 0.1


def test_labels_keep_their_names() -> None:
    """A head over labels has no rows of the vocabulary; what its labels are called stays."""
    config = RoFormerConfig("roformer", 1, len(OLD), 24, 2, 2, 12, 32, labels=2)
    state_ = random_state(config)
    known = state.State(state_.entries, state_.record | {"labels": ["坏", "好"]})
    after = applied(known, config, plan(seen(OLD), seen(NEW)))
    assert after.record["labels"] == ["坏", "好"] and after.record["model"]["labels"] == 2


def mt5(tokens: Sequence[str], pieces: dict[str, list[int]]) -> Vocabulary:
    return Vocabulary(
        "\u2581", tuple(tokens), {"unknown": 2}, {}, str, lambda t: [pieces[x] for x in t]
    )


HEAD = ["[PAD]", *[f"[unused{i}]" for i in range(1, 100)], *CONTROLS[1:], "<S>", "<T>"]


def test_mt5_becomes_t5_pegasus_in_the_published_order() -> None:
    theirs = ["<pad>", "</s>", "<unk>", "\u2581", "天", "\u2581水", "水", "s", "今", "多"]
    counted = [*HEAD, "今天", "水", "##s", "天", "##多多", "天水", "琊"]
    pieces = {"今天": [8, 4], "##多多": [3, 9, 9], "天水": [4, 6], "琊": [2]}
    order, made = published(mt5(theirs, pieces), counted)
    assert order == [*HEAD, "水", "##s", "天", "今天", "##多多", "天水", "琊"]
    assert set(made.rows[:106]) == {(2,)} and not any(made.kept[:106])
    # ▁水 before 水; ##s is s; pieces that no token kept (今, ▁, 多, 水 itself) count as <unk>
    assert made.rows[106:] == ((5,), (7,), (4,), (2, 4), (2, 2, 2), (4, 2), (2,))
    assert made.kept[106:] == (True, True, True, False, False, False, False)
    kept_ids = through(made, [100 + i for i in range(10)])
    assert kept_ids.rows[106:109] == ((105,), (107,), (104,))
    with pytest.raises(ConversionError, match="needs BERT's first 106"):
        published(mt5(theirs, pieces), counted[:50])
    with pytest.raises(ConversionError, match="has a token 107, model"):
        applied(random_state(CONFIGS[1]), CONFIGS[1], kept_ids)


@pytest.mark.skipif(not REAL.is_dir(), reason="BAJIE_DEV_DATA has no tokenizers/")
def test_the_real_vocabularies_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mT5's pruned sentencepiece on a table of all 250,112 rows -> 50,000 Chinese words."""
    config = T5PegasusConfig("t5_pegasus", 250112, 2, 1, 1, 2, 2)
    checkpoint.write_state(tmp_path / "mt5", state.fresh(config, 0))
    wordpiece.from_vocabulary(REAL / "roformer" / "vocab.txt", tmp_path / "words", True)
    given = [
        "revocab", str(tmp_path / "mt5"), "--tokenizer", str(tmp_path / "words"),
        "--from-pieces", str(REAL / "mt5-zh" / "sentencepiece_cn.model"),
        "--rows", str(REAL / "mt5-zh" / "sentencepiece_cn_keep_tokens.json"),
        "--recipe", "t5-pegasus", "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    assert cli.main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 50000 and found["from_tokens"] == 32596
    assert found["kept_tokens"] > 10_000 and found["means"] > 10_000
    made = wordpiece.WordPiece((tmp_path / "out/tokenizer/vocab.txt").read_bytes(), True)
    assert made.pieces(range(106))[-6:] == ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", "<T>"]
    old, new = checkpoint.read(tmp_path / "mt5"), checkpoint.read(tmp_path / "out")
    rows = new.read("weights/head.weight")
    assert torch.equal(rows[:106], old.read("weights/head.weight")[2].expand(106, -1))
    without = [*given[:4], *given[8:10], "--out", str(tmp_path / "no")]
    assert cli.main(without[:4] + without[6:]) == 2
    assert "has no tokenizer beside it" in capsys.readouterr().err
