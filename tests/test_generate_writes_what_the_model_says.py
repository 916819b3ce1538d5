"""Promise: generation is exact: with a cache as without, in a batch as alone, greedily what
`transformers` writes from the same weights; and the end of a document can always be drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.load import to_dict
from configs.model import CPMConfig, shape, tensors
from data_pipeline import tokenizer
from launch import cli
from pretrain import checkpoint
from pretrain.generate import (
    Decoding,
    Written,
    choose,
    generate,
    load_model,
    main,
    truncated,
    write,
)
from pretrain.models.cpm import CPM
from pretrain.models.layers import KeyValueCache
from pretrain.state import Entry, State

EOD, PAD = 7, 5
CONFIG = CPMConfig("cpm", 97, 48, 3, 4, 12, 80, 40)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(8, 97, n).tolist() for n in (5, 1, 12, 5, 9)]


def model_of(dtype: torch.dtype = torch.float64, seed: int = 0) -> CPM:
    model = CPM(CONFIG).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.4
    return model


def written(model: CPM, prompts: list, cache: bool = True, **decoding: Any) -> list[Written]:
    return write(model, prompts, Decoding(**decoding), EOD, PAD, cache=cache)


WAYS = [
    {"greedy": True, "max_new_tokens": 20},
    {"max_new_tokens": 20, "seed": 3},
    {"max_new_tokens": 20, "seed": 3, "top_k": 5, "top_p": 0.8, "temperature": 1.7},
    {"max_new_tokens": 20, "seed": 3, "min_new_tokens": 4, "top_p": 0.5},
]


def test_logits_with_a_cache_equal_those_without() -> None:
    model = model_of()
    tokens = torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    positions = torch.arange(12).expand(2, 12)
    documents = torch.tensor([[0] * 12, [-1] * 4 + [0] * 8])
    for given in (None, documents):
        at = positions if given is None else (positions - torch.tensor([[0], [4]])).clamp(min=0)
        whole = model.logits(model(tokens, at, given))
        cache, parts, start = KeyValueCache(15), [], 0
        for length in (6, 1, 1, 3, 1):  # a prefill, single tokens, several at once
            span = slice(start, start + length)
            ids = None if given is None else given[:, span]
            parts.append(model.logits(model(tokens[:, span], at[:, span], ids, cache)))
            start += length
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12 * whole.std()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way))
def test_cache_and_batch_change_nothing(way: dict[str, Any]) -> None:
    model = model_of()
    together = written(model, PROMPTS, **way)
    assert together == written(model, PROMPTS, cache=False, **way)
    assert together == [written(model, [prompt], **way)[0] for prompt in PROMPTS]
    assert together == written(model, PROMPTS, **way)  # and it repeats
    assert len({tuple(w.ids) for w in together}) >= 4  # this model often ends at once
    assert all(EOD not in w.ids for w in together)


def test_greedy_is_what_transformers_writes() -> None:
    pytest.importorskip("transformers")
    from tests.test_cpm_equals_gpt2 import gpt2_of

    for seed in (0, 1):
        model = model_of(torch.float32, seed)
        theirs = gpt2_of(model)
        for prompts in ([PROMPTS[0], PROMPTS[3]], [PROMPTS[2]], PROMPTS):
            longest = max(map(len, prompts))
            ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            out = theirs.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=EOD,
                pad_token_id=EOD,
            )
            mine = written(model, prompts, greedy=True, max_new_tokens=20)
            for row, w in zip(out[:, longest:].tolist(), mine, strict=True):
                expected = row[: row.index(EOD)] if EOD in row else row
                assert w.ids == expected


def test_greedy_picks_the_argmax_of_the_whole_text() -> None:
    model = model_of()
    ids = written(model, [PROMPTS[0]], greedy=True, max_new_tokens=8)[0].ids
    text = PROMPTS[0] + ids
    for at in range(len(PROMPTS[0]), len(text)):
        logits = model.logits(model(torch.tensor([text[:at]]), torch.arange(at)[None]))[0, -1]
        assert int(logits.argmax()) == text[at]


# ---------------------------------------------------------------- choosing a token


def test_the_end_stays_in_every_truncated_set() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, EOD] = -20.0
    for k, p in ((1, 1.0), (3, 1.0), (0, 0.1), (0, 0.9), (4, 0.5)):
        kept = truncated(logits, k, p, EOD)
        assert torch.equal(kept[:, EOD], logits[:, EOD])
        assert torch.equal(kept[kept > -torch.inf], logits[kept > -torch.inf])
    assert (truncated(logits, 3, 1.0, EOD) > -torch.inf).sum(-1).eq(4).all()
    assert truncated(logits, 0, 1.0, EOD) is logits
    # Top-p by hand: 0.5, 0.3, 0.15, 0.05: the token that crosses p is kept.
    by_hand = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    for p, expected in ((0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.9, [0, 1, 3]), (0.99, range(4))):
        kept = truncated(by_hand, 0, p, 1)
        assert (kept[0] > -torch.inf).nonzero().flatten().tolist() == list(expected)


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    draws = torch.from_numpy(np.random.default_rng(0).random(20_000))
    logits = probabilities.log().expand(20_000, 4)
    chosen = choose(logits, Decoding(), 0, draws)
    counts = torch.bincount(chosen, minlength=4) / 20_000
    # 5 standard errors of 20,000 draws.
    assert (counts - probabilities).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    assert counts[1] == 0
    ends = choose(logits[:2], Decoding(), 0, torch.tensor([0.0, 1 - 2**-53]).double())
    assert ends.tolist() == [0, 3]
    hot = choose(logits, Decoding(temperature=100.0), 0, draws)
    assert abs((hot == 2).double().mean() - 1 / 3) < 0.02


def test_copies_of_a_prompt_differ_and_seeds_differ() -> None:
    model = model_of()
    way = {"max_new_tokens": 12, "temperature": 2.0}
    five = written(model, [PROMPTS[0]] * 5, **way)
    assert len({tuple(w.ids) for w in five}) == 5
    assert five[0] == written(model, [PROMPTS[0]], **way)[0]
    assert five[0] != written(model, [PROMPTS[0]], seed=1, **way)[0]


def test_the_generator_of_training_is_left_alone_and_so_is_the_mode() -> None:
    model = model_of().train()
    state = torch.get_rng_state()
    first = written(model, PROMPTS[:2], max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert first == written(model.eval(), PROMPTS[:2], max_new_tokens=5)


# ---------------------------------------------------------------- where it stops


class Script:
    """A model that says what it is told: at length n of the text the token script[n]."""

    def __init__(self, script: list[int], positions: int = 40) -> None:
        self.script, self.training = script, False
        self.config = CPMConfig("cpm", 97, 1, 1, 1, 1, 1, positions)

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.training = False

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, documents: Any, cache: Any
    ) -> torch.Tensor:
        assert positions.max() < self.config.positions
        return positions[:, :, None] + 1  # hidden: the length of the row's text so far

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        said = torch.tensor([self.script[n] for n in hidden[:, 0]])
        return torch.nn.functional.one_hot(said, 97).double() * 5


def test_rows_stop_at_their_own_end() -> None:
    script = Script([0, 0, 11, 12, EOD, 14, 15, EOD, *[20] * 40])
    got = written(script, [[9, 9], [9, 9, 9, 9, 9]], greedy=True, max_new_tokens=10)
    assert got == [Written([11, 12], True), Written([14, 15], True)]
    got = written(script, [[9, 9]], greedy=True, max_new_tokens=1)
    assert got == [Written([11], False)]


def test_the_end_may_not_come_before_the_minimum() -> None:
    script = Script([0, 0, 11, EOD, EOD, EOD, *[20] * 40])
    ids = written(script, [[9, 9]], greedy=True, max_new_tokens=10, min_new_tokens=3)[0].ids
    assert len(ids) == 3
    assert EOD not in ids


def test_the_last_position_ends_a_row_alone_and_in_a_batch() -> None:
    script = Script([20] * 50, positions=10)
    got = written(script, [[9] * 4, [9] * 10, [9] * 9], greedy=True, max_new_tokens=30)
    assert [len(w.ids) for w in got] == [7, 1, 2]
    assert not any(w.ended for w in got)
    model = model_of()
    prompts = [(PROMPTS[2] * 4)[:n] for n in (40, 38, 30)]
    together = written(model, prompts, greedy=True, max_new_tokens=30)
    assert together == [
        written(model, [prompt], greedy=True, max_new_tokens=30)[0] for prompt in prompts
    ]


def test_rows_of_the_table_that_are_no_tokens_are_never_written() -> None:
    model = model_of()
    ids = write(model, PROMPTS, Decoding(temperature=50.0), EOD, PAD, vocab=60)
    assert max(i for w in ids for i in w.ids) < 60
    free = write(model, PROMPTS, Decoding(temperature=50.0), EOD, PAD)
    assert max(i for w in free for i in w.ids) >= 60


def test_what_a_user_gets_wrong_is_a_sentence() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="prompt: is empty"):
        written(model, [[9], []])
    with pytest.raises(ValueError, match="has 41 tokens, the model has 40 positions"):
        written(model, [[9] * 41])
    for wrong, said in (
        ({"max_new_tokens": 0}, "max_new_tokens: is 0"),
        ({"temperature": 0.0}, r"temperature: is 0\.0, must be above 0"),
        ({"top_p": 1.5}, r"top_p: is 1\.5"),
        ({"min_new_tokens": 65}, "min_new_tokens: is 65, must be at most max_new_tokens, 64"),
        ({"top_k": -1, "min_new_tokens": -2}, "min_new_tokens: is -2.*top_k: is -1"),
    ):
        with pytest.raises(ValueError, match=said):
            Decoding(**wrong)


# ---------------------------------------------------------------- from a checkpoint, as text


class Letters:
    """A tokenizer of single letters."""

    vocab_size, eod_id, pad_id = 97, EOD, PAD

    def encode_prompt(self, text: str) -> np.ndarray:
        return np.asarray([ord(c) - 30 for c in text], np.int32)

    def decode(self, ids: Any) -> str:
        return "".join(chr(int(i) + 30) for i in ids)


def state_of(model: CPM) -> State:
    entries = {
        f"weights/{name}": Entry(tuple(p.shape), "float32", lambda p=p: p.detach().float())
        for name, p in model.named_parameters()
    }
    return State(entries, {"model": to_dict(model.config)})


def test_a_state_gives_its_model_and_texts() -> None:
    model = model_of(torch.float32)
    again = load_model(state_of(model))
    assert not again.training
    for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert not p.requires_grad
        assert p.data_ptr() != q.data_ptr()
    assert load_model(state_of(model), dtype=torch.bfloat16).embed.tokens.weight.dtype == (
        torch.bfloat16
    )
    texts = generate(again, Letters(), ["hello", "abc"], greedy=True, max_new_tokens=6)
    ids = [[ord(c) - 30 for c in text] for text in ("hello", "abc")]
    expected = written(model, ids, greedy=True, max_new_tokens=6)
    assert texts == [Letters().decode(w.ids) for w in expected]
    assert {t.name: shape(CONFIG, t) for t in tensors(CONFIG)} == {
        name: tuple(p.shape) for name, p in again.named_parameters()
    }


def run_of(model: CPM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run folder whose one checkpoint is the model, with the tokenizer of letters."""
    folder = tmp_path / "run" / "checkpoints" / checkpoint.checkpoint_name(0, 10)
    folder.parent.mkdir(parents=True)
    made = tmp_path / "tokenizer"
    made.mkdir()
    (made / "tokenizer.json").write_text("{}")
    checkpoint.write_state(folder, state_of(model), made)
    monkeypatch.setattr(tokenizer, "load", lambda folder: Letters())
    return str(tmp_path / "run")


def test_the_command_reads_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(torch.float32)
    words = [
        run_of(model, tmp_path, monkeypatch),
        "--prompt",
        "hello",
        "--prompt",
        "abc",
        "--greedy",
    ]
    assert main([*words, "--max-new-tokens", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    texts = generate(model, Letters(), ["hello", "abc"], greedy=True, max_new_tokens=6)
    assert [row["text"] for row in found["generated"]] == texts
    assert [row["prompt"] for row in found["generated"]] == ["hello", "abc"]
    assert found["tokens_per_s"] > 0
    assert main([*words, "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == "".join(
        f"{prompt}{text}\n" for prompt, text in zip(("hello", "abc"), texts, strict=True)
    )


@pytest.mark.parametrize("way", ["--greedy", "--beams=2"])
def test_a_text_that_the_positions_cut_is_told(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 positions: 36 tokens fit behind five, 38 behind three. One that ended is not cut, nor one
    that wrote all that was asked for."""
    run = run_of(model_of(torch.float32), tmp_path, monkeypatch)
    line = ["generate", run, "--prompt", "hello", "--prompt", "abc", way]
    cut = [*line, "--max-new-tokens", "50", "--min-new-tokens", "36"]
    assert cli.main([*cut, "--json"]) == 0
    both = capsys.readouterr()
    rows = json.loads(both.out)["generated"]
    full = {r["tokens"] for r, n in zip(rows, (36, 38), strict=True) if r["tokens"] == n}
    assert 36 in full
    told = f"--max-new-tokens: is 50, {', '.join(map(str, sorted(full)))} fit behind the prompt"
    assert both.err.startswith(told) and "`launch extend` makes room" in both.err
    assert both.err.count("\n") == 1
    assert cli.main([*line, "--max-new-tokens", "36", "--min-new-tokens", "36"]) == 0
    assert capsys.readouterr().err == ""
    ends = Script([0, 0, 11, EOD, EOD, EOD, EOD, *[20] * 40])
    monkeypatch.setattr("pretrain.generate.load_model", lambda *_: ends)
    assert cli.main([*line, "--max-new-tokens", "50"]) == 0
    assert capsys.readouterr().err == ""


def test_a_minimum_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(model_of(torch.float32), tmp_path, monkeypatch)
    line = ["generate", run, "--prompt", "abc", "--prompt", "hello", "--greedy"]
    for least, said in (
        (["37"], "--min-new-tokens: is 37, 36 fit behind the prompt of 5 tokens in the model's 40"),
        (["65"], "min_new_tokens: is 65, must be at most max_new_tokens, 64"),
    ):
        assert cli.main([*line, "--min-new-tokens", *least]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["generate", run, "--prompt", "a" * 41, "--min-new-tokens", "9"]) == 2
    assert "prompt: has 41 tokens, the model has 40 positions" in capsys.readouterr().err
