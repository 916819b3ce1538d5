"""Loss by position and passkeys: what `evaluate --task length` and `--task passkey` say is so.

Sums of float32 losses, in another order than the reference's: 1e-5.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.grown import Growing
from configs.model import CPMConfig, RoFormerConfig, T5PegasusConfig
from launch.cli import main
from pretrain import checkpoint, lengths
from pretrain.generate import load_model
from pretrain.growth import grow
from pretrain.state import State
from tests.growing import trained

SIZES: dict[str, Any] = {"vocab": 320, "hidden": 32, "layers": 1, "heads": 2, "head_dim": 16}
CPM = CPMConfig("cpm", **SIZES, ffn=64, positions=96)
ROFORMER = RoFormerConfig("roformer", 1, **SIZES, ffn=64)
BERT = replace(ROFORMER, positions=96)
T5 = T5PegasusConfig("t5_pegasus", **SIZES, ffn=64)


def untold(config: Any) -> State:
    """A state that says nothing of its tokenizer."""
    state = trained(config)
    return State(state.entries, {**state.record, "tokenizer": None})


@pytest.fixture
def saved(tmp_path: Path, tiny_corpus: Path) -> Path:
    """A checkpoint of a CPM with the tiny corpus' tokenizer."""
    out = tmp_path / "cpm"
    checkpoint.write_state(out, untold(CPM), tiny_corpus / "tokenizer")
    return out


def test_loss_by_position_is_the_loss_of_each_position() -> None:
    model = load_model(trained(CPM))
    rows = np.random.default_rng(1).integers(0, 320, (3, 41))
    losses, counted = lengths.by_position(model, rows)
    tokens = torch.from_numpy(rows)
    positions = torch.arange(40).expand(3, 40)
    logits = model.logits(model(tokens[:, :-1], positions))  # type: ignore[operator]
    expected = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    assert counted.all() and counted.shape == (3, 40)
    assert np.allclose(losses, expected.detach().numpy(), rtol=1e-5)
    # a row alone, or in another order of the batch, has the same loss
    part, _ = lengths.by_position(model, rows[::-1].copy())
    assert np.allclose(part[::-1], losses, rtol=1e-5)
    assert not np.allclose(losses[1:], losses[:-1], rtol=1e-3)


def test_an_encoder_is_measured_where_it_is_masked() -> None:
    model = load_model(trained(ROFORMER))
    rows = np.random.default_rng(1).integers(5, 320, (6, 65))
    losses, counted = lengths.by_position(model, rows, mask_id=3)
    assert 0.1 < counted.mean() < 0.2
    assert bool((losses[~counted] == 0).all()) and losses[counted].min() > 0
    again, same = lengths.by_position(model, rows, mask_id=3)
    assert np.array_equal(again, losses) and np.array_equal(same, counted)
    _, short = lengths.by_position(model, rows[:, :33], mask_id=3)
    assert np.array_equal(short, counted[:, :32])  # the same ones at every length


def test_an_encoder_reads_its_texts_between_cls_and_sep() -> None:
    """As it learnt them: in place of a row's last two tokens, and never masked."""
    model = load_model(trained(ROFORMER))
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    rows = np.random.default_rng(1).integers(5, 320, (40, 65))
    losses, counted = lengths.by_position(model, rows, mask_id=3, frame=(1, 2))
    tokens = torch.cat(seen).numpy()
    assert tokens.shape == (40, 64) and (tokens[:, 0] == 1).all() and (tokens[:, -1] == 2).all()
    text, hidden = tokens[:, 1:-1], counted[:, 1:-1]
    assert (text[hidden] == 3).all() and (text[~hidden] == rows[:, :62][~hidden]).all()
    assert not counted[:, [0, -1]].any() and losses[counted].min() > 0


@pytest.mark.parametrize("words", [["length", "--data", "x"], ["passkey"]])
def test_fewer_than_one_sample_is_a_sentence(
    words: list[str], saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(saved), "--task", *words, "--samples", "-1"]) == 2
    assert "--samples: is -1, must be at least 1" in capsys.readouterr().err


def test_the_command_prints_a_table_json_and_a_plot(
    saved: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(saved), "--task", "length", "--data", str(tiny_corpus)]
    words += ["--lengths", "16,32", "--samples", "3"]
    plot = tmp_path / "curve.svg"
    assert main([*words, "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["length"] for one in found["lengths"]] == [16, 32]
    for one in found["lengths"]:
        loss = sum(p["loss"] * (p["to"] - p["from"]) for p in one["buckets"]) / one["length"]
        assert one["loss"] == pytest.approx(loss, rel=1e-6)
        assert one["perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
        assert one["tokens"] == found["rows"] * one["length"]
        assert one["loss"] == pytest.approx(np.mean(one["documents"]), rel=1e-6)
        assert one["error"] == pytest.approx(np.std(one["documents"], ddof=1) / 3**0.5, rel=1e-6)
    # the shorter rows are the beginnings of the longer ones, and attention looks back only
    short, long = (one["buckets"] for one in found["lengths"])
    first = sum(part["loss"] for part in short) / len(short)
    assert first == pytest.approx(sum(part["loss"] for part in long[:4]) / 4, rel=1e-5)
    assert plot.read_text("utf-8").count("<polyline") == 2
    assert main(words) == 0
    assert "nats a token by positions" in capsys.readouterr().out


def test_a_passkey_lies_where_it_is_said_to(tiny_corpus: Path) -> None:
    from data_pipeline import tokenizer as tokenizers

    words = tokenizers.load(tiny_corpus / "tokenizer")
    places = []
    for depth in (0.0, 0.5, 1.0):
        text, key = lengths.passkey(words, 200, depth, 7)
        assert len(text) + len(key) == 200
        needle = words.decode(key)
        spelled = words.decode(text)
        assert spelled.count(needle) == 2 and spelled.endswith(words.decode(text[-1:]))
        places.append(spelled.index(needle) / len(spelled))
    assert places[0] < 0.1 < 0.3 < places[1] < 0.7 < places[2]
    assert lengths.passkey(words, 200, 0.5, 8)[1] != lengths.passkey(words, 200, 0.5, 7)[1]
    with pytest.raises(lengths.LengthError, match="5 tokens are too few"):
        lengths.passkey(words, 5, 0.5, 7)


@pytest.mark.parametrize("config", [CPM, BERT, T5], ids=lambda c: c.family)
def test_lengths_of_passkeys_have_the_frame_in_them(
    config: Any, tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At exactly the model's positions: as long as they are, no longer."""
    out, rows, says = tmp_path / "x", list[int](), lengths._says
    checkpoint.write_state(out, untold(config), tiny_corpus / "tokenizer")

    def counted(model: Any, words: Any, text: list[int], key: list[int]) -> bool:
        rows.append(len(text) + len(key) + (0 if config is CPM else 1 + (words.bos_id is not None)))
        return says(model, words, text, key)

    monkeypatch.setattr(lengths, "_says", counted)
    found = lengths.passkeys(out, [95, 96], (0.0, 1.0), samples=1)
    assert rows == [95, 95, 96, 96] and [one["length"] for one in found["lengths"]] == [95, 96]
    with pytest.raises(lengths.LengthError, match="5 tokens are too few"):
        lengths.passkeys(out, [5])


def test_an_encoder_without_a_mask_cannot_be_asked() -> None:
    class Words:
        mask_id = None

    with pytest.raises(lengths.LengthError, match="the tokenizer has no mask"):
        lengths._check(ROFORMER, Words, [8])
    lengths._check(CPM, Words, [8])


@pytest.mark.parametrize("config", [CPM, ROFORMER, T5], ids=lambda c: c.family)
def test_a_key_is_said_if_every_token_is_the_likeliest(config: Any) -> None:
    """The key that a model would say is found said, another one is not."""

    class Words:
        vocab_size, pad_id, bos_id, eod_id, mask_id = 320, 0, 1, 2, 3

    model = load_model(trained(config))
    text = list(range(20, 60))
    best: list[int] = []
    for _ in range(2):  # what greedy writes, token by token; masks are filled together
        for guess in range(320):
            trial = [*best, guess]
            padded = trial + [9] * (2 - len(trial)) if config.family == "roformer" else trial
            if lengths._says(model, Words, text, padded) or (
                config.family == "roformer" and _first(model, text, padded, len(best))
            ):
                best = trial
                break
    assert len(best) == 2 and lengths._says(model, Words, text, best)
    assert not lengths._says(model, Words, text, [best[0], (best[1] + 1) % 320])


def _first(model: Any, text: list[int], trial: list[int], place: int) -> bool:
    """Whether the mask at `place` of two is filled with what stands there."""
    tokens = torch.tensor([[*text, 3, 3]])
    hidden = model(tokens, torch.arange(tokens.shape[1])[None], None)[0, -2:]
    return bool(model.logits(hidden)[place].argmax() == trial[place])


def test_passkeys_by_length_and_depth(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(saved), "--task", "passkey", "--lengths", "64,96", "--samples", "2"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["length"] for one in found["lengths"]] == [64, 96]
    assert all(len(one["accuracy"]) == len(found["depths"]) == 5 for one in found["lengths"])
    assert main(words) == 0 and "by depth of the key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "length", "--lengths", "97"], "97 is more than the model's 96 positions"),
        (["--task", "passkey", "--lengths", "97"], "97 is more than the model's 96 positions"),
        (["--task", "length", "--lengths", "1"], "each must be at least 2"),
        (["--task", "passkey", "--lengths=-3"], "each must be at least 2"),
        (["--task", "length", "--lengths", "a,b"], "must be whole numbers with commas"),
        (["--task", "mlm"], "--data: must be given for --task mlm"),
    ],
)
def test_mistakes_are_sentences(
    saved: Path, tiny_corpus: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(tiny_corpus)] if "length" in words else []
    assert main(["evaluate", str(saved), *data, *words]) == 2
    assert said in capsys.readouterr().err


def test_no_document_is_long_enough(tmp_path: Path, tiny_corpus: Path) -> None:
    out = tmp_path / "roformer"
    checkpoint.write_state(out, untold(ROFORMER), tiny_corpus / "tokenizer")
    with pytest.raises(lengths.LengthError, match="has no document of 1000001 tokens"):
        lengths.lengths(out, tiny_corpus, [1000000])


def test_a_t5_is_measured_where_spans_are_cut_out() -> None:
    """The loss of a bucket's spans, said in turn, from a source without them: one pair by hand."""

    class Words:
        kind, vocab_size, pad_id, bos_id, eod_id = "byte_bpe", 300, 0, 1, 2

    model = load_model(trained(T5))
    rows = np.random.default_rng(1).integers(5, 300, (3, 80))
    losses, counted = lengths.by_span(model, rows, [0, 40, 80], Words)
    (a, b), (c, d) = lengths._spans(40, 80)
    assert 40 <= a < b < c < d <= 80 and [b - a, d - c] == [3, 3]
    assert np.flatnonzero(counted[0, 40:]).tolist() == [
        *range(a - 40, b - 40),
        *range(c - 40, d - 40),
    ]
    assert (counted == counted[0]).all() and counted[:, :40].sum() == 3 * 6
    row = rows[1].tolist()
    source = [1, *row[:a], 300, *row[b:c], 301, *row[d:], 2]
    target = [300, *row[a:b], 301, *row[c:d]]
    tokens, encoder = torch.tensor([[1, *target[:-1]]]), torch.tensor([source])
    places = (torch.arange(len(target))[None], torch.arange(len(source))[None])
    hidden = model(tokens, places[0], None, encoder, places[1], None)
    expected = F.cross_entropy(model.logits(hidden[0]), torch.tensor(target), reduction="none")  # type: ignore[operator]
    said = expected.detach().numpy()
    assert np.allclose(losses[1, a:b], said[1:4], rtol=1e-5)
    assert np.allclose(losses[1, c:d], said[5:8], rtol=1e-5)
    assert not np.allclose(losses[1, a:b], losses[1, c:d], rtol=1e-3)
    with pytest.raises(lengths.LengthError, match="needs 30 sentinels"):
        lengths.by_span(model, np.resize(rows, (1, 600)), [0, 600], Words)


def test_words_that_wait_are_no_sentinels() -> None:
    """A T5 that got 80 rows which are not said yet is measured as before: the spans are cut out
    with the sentinels that it learns by. The control takes the rows that wait."""

    class Words:
        kind, vocab_size, pad_id, bos_id, eod_id = "byte_bpe", 300, 0, 1, 2

    small = trained(T5)
    more = grow(small, replace(T5, vocab=400), 1, Growing(new_words="masked"))
    rows = np.random.default_rng(1).integers(5, 300, (3, 80))
    before, after = (
        lengths.by_span(load_model(state), rows, [0, 40, 80], Words)[0] for state in (small, more)
    )
    assert np.allclose(after, before, rtol=1e-5)
    shown = load_model(grow(small, replace(T5, vocab=400), 1))
    assert not np.allclose(lengths.by_span(shown, rows, [0, 40, 80], Words)[0], before, rtol=1e-3)
