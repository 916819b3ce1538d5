"""Promise: a beam search gives the output that its definition names: bert4keras' published one, and
with a length penalty transformers' and, where it is wide enough, the best of all outputs; the cache
and the rows beside a row change nothing; with allowed outputs, one of them comes out.

Scores are compared to 1e-9 where both sides are in float64 (sums of 10 logarithms near 10 round at
1e-15), to 1e-5 against transformers, which adds them in float32.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.model import CPMConfig
from pretrain.allowed import AllowedOutputs, read_lines
from pretrain.answer import answer
from pretrain.decoding import Decoding, Written
from pretrain.generate import generate, write
from pretrain.models.cpm import CPM
from tests import test_generate_writes_what_the_model_says as cpm
from tests import test_roformer_equals_its_origin as roformer
from tests import test_t5_pegasus_equals_mt5 as t5

START, END, PAD = 1, 2, 0
SOURCES = [[5, 9, 30, 41, 8, 2], [7, 2], [60, 61, 62, 63, 64, 65, 66, 67, 2]]
PUBLISHED = {"beams": 4}
WAYS = [
    PUBLISHED,
    {"beams": 4, "min_ends": 2, "min_new_tokens": 3},
    {"beams": 3, "length_penalty": 0.0},
    {"beams": 4, "length_penalty": 1.0},
    {"beams": 3, "length_penalty": 2.0, "patient": True},
]
Next = Callable[[list[int]], np.ndarray]
"""Tokens so far -> the log-probabilities of the next one."""
BOTH = ("cpm", "t5_pegasus")


def family(name: str) -> tuple[Any, Callable[..., list[Written]], list[list[int]], int, Any]:
    """A model that often ends, how it writes, its inputs, its end, its next token's logits."""
    if name == "cpm":
        model = cpm.model_of()
        model.embed.tokens.weight.data[cpm.EOD] *= 1.5
        model.embed.tokens.weight.data *= 0.5

        def decode(prompts: Any, decoding: Decoding, **more: Any) -> list[Written]:
            return write(model, prompts, decoding, cpm.EOD, cpm.PAD, **more)

        def logits(prompt: list[int], ids: list[int]) -> Tensor:
            text = torch.tensor([[*prompt, *ids]])
            return model.logits(model(text, torch.arange(text.shape[1])[None]))[0, -1]

        return model, decode, cpm.PROMPTS, cpm.EOD, logits
    writer = t5.build(replace(t5.TINY, log_n=512))
    writer.head.weight.data *= 2.0

    def decode_t5(sources: Any, decoding: Decoding, **more: Any) -> list[Written]:
        return answer(writer, sources, decoding, START, END, PAD, **more)

    def logits_t5(source: list[int], ids: list[int]) -> Tensor:
        tokens = torch.tensor([[START, *ids]])
        side = [torch.tensor([source]), torch.arange(len(source))[None], None]
        hidden = writer(tokens, torch.arange(tokens.shape[1])[None], None, *side)
        return writer.logits(hidden[0, -1])

    return writer, decode_t5, SOURCES, END, logits_t5


def published(step: Next, width: int, room: int, end: int, min_ends: int, least: int) -> Any:
    """The published search as its description says, one forward of the whole text for each token;
    (ids, score)."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    for length in range(1, room + 1):
        every = []
        for ids, score in beams:
            gains = np.log(np.exp(step(ids)) + 1e-12)
            if length <= least:
                gains[end] = -np.inf
            every += [([*ids, token], score + gain) for token, gain in enumerate(gains)]
        beams = sorted(every, key=lambda beam: -beam[1])[:width]
        over = [ids[-1] == end and ids.count(end) >= min_ends for ids, _ in beams]
        if over[0]:
            return beams[0]
        beams = [beam for beam, ended in zip(beams, over, strict=True) if not ended]
        width = len(beams)
    return beams[0]


@torch.no_grad()
def next_of(logits: Any, given: list[int], vocab: int) -> Next:
    def step(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return logits(given, ids)[:vocab].log_softmax(-1).numpy().copy()

    return step


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_beams_are_those_published(name: str, width: int) -> None:
    _, decode, given, end, logits = family(name)
    seen = set()
    for min_ends, least in ((1, 0), (2, 3)):
        decoding = Decoding(8, least, beams=width, min_ends=min_ends)
        found = decode(given, decoding, vocab=90)
        for one, wrote in zip(given, found, strict=True):
            step = next_of(logits, one, 90)
            ids, score = published(step, width, 8, end, min_ends, least)
            assert [*wrote.ids, *[end] * wrote.ended] == ids
            assert wrote.score == pytest.approx(score, abs=1e-9)
            seen.add((wrote.ended, len(ids)))
    assert {ended for ended, _ in seen} == {True, False} or len(seen) > 3, "a dull model"
    greedy = decode(given, Decoding(8, greedy=True), vocab=90)
    assert (greedy == decode(given, Decoding(8, beams=width), vocab=90)) is (width == 1)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way))
def test_cache_and_batch_change_nothing(name: str, way: dict[str, Any]) -> None:
    _, decode, given, _, _ = family(name)
    decoding = Decoding(10, **way)
    together = decode(given, decoding)
    assert together == decode(given, decoding, cache=False)
    assert together == [decode([one], decoding)[0] for one in given]
    assert len({tuple(wrote.ids) for wrote in together}) > 1, "the inputs must matter"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("width", "penalty"), [(2, 1.0), (5, 0.0), (4, 2.5), (3, -1.0)])
@pytest.mark.parametrize("patient", [False, True])
def test_beams_are_those_of_transformers(
    name: str, width: int, penalty: float, patient: bool
) -> None:
    pytest.importorskip("transformers")
    from tests.test_cpm_equals_gpt2 import gpt2_of

    model, _, given, end, _ = family(name)
    if name == "t5_pegasus":
        model = t5.build(replace(t5.TINY, **t5.MT5))
        model.head.weight.data *= 0.1
    theirs = gpt2_of(model) if name == "cpm" else t5.mt5_of(model)
    ended = set()
    for one in given[:3:2]:
        source = torch.tensor([one])
        way: dict[str, Any] = {
            "num_beams": width, "length_penalty": penalty, "max_new_tokens": 9,
            "early_stopping": "never" if patient else False, "do_sample": False,
            "eos_token_id": end, "pad_token_id": PAD, "return_dict_in_generate": True,
            "output_scores": True,
        }  # fmt: skip
        if name == "t5_pegasus":
            way["decoder_start_token_id"] = START
        out = theirs.generate(source, attention_mask=torch.ones_like(source), **way)
        expected = out.sequences[0].tolist()[1 if name == "t5_pegasus" else len(one) :]
        if end in expected:
            expected = expected[: expected.index(end) + 1]
        decoding = Decoding(9, beams=width, length_penalty=penalty, patient=patient)
        known = (end, PAD) if name == "cpm" else (START, end, PAD)
        (found,) = (write if name == "cpm" else answer)(model, [one], decoding, *known)
        assert [*found.ids, *[end] * found.ended] == expected
        assert found.score == pytest.approx(float(out.sequences_scores[0]), rel=1e-5)
        ended.add(found.ended)


def tiny() -> tuple[CPM, Next]:
    """A model of a vocabulary of 5, of which 2 ends; and its next token."""
    model = CPM(CPMConfig("cpm", 5, 16, 2, 2, 8, 32, 16)).double().eval()
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.35

    def logits(prompt: list[int], ids: list[int]) -> Tensor:
        text = torch.tensor([[*prompt, *ids]])
        return model.logits(model(text, torch.arange(text.shape[1])[None]))[0, -1]

    return model, logits


def test_a_wide_beam_finds_the_best_of_all_outputs() -> None:
    model, logits = tiny()
    winners = set()
    for prompt in ([0, 1], [4, 4, 0]):
        step = functools.cache(lambda *ids, p=prompt: next_of(logits, p, 5)(list(ids)))
        totals: dict[tuple[int, ...], float] = {}
        for ids in itertools.product(range(5), repeat=4):  # every output of at most 4 tokens
            cut = ids[: ids.index(END) + 1] if END in ids else ids
            totals[cut] = sum(step(*cut[:at])[token] for at, token in enumerate(cut))
        for penalty in (-0.5, 0.0, 0.7, 1.0, 3.0):
            scores = {ids: total / len(ids) ** penalty for ids, total in totals.items()}
            best = max(scores, key=lambda ids: scores[ids])
            decoding = Decoding(4, beams=4**4, length_penalty=penalty, patient=True)
            (found,) = write(model, [prompt], decoding, END, PAD)
            assert (*found.ids, *[END] * found.ended) == best
            assert found.score == pytest.approx(scores[best], abs=1e-9)
            (narrow,) = write(model, [prompt], replace(decoding, beams=1), END, PAD)
            assert narrow.score is not None and narrow.score <= found.score + 1e-12
            winners.add(best)
    assert len(winners) > 1, "the penalty must matter"


def test_a_length_penalty_lengthens() -> None:
    _, decode, given, _, _ = family("t5_pegasus")

    def length(penalty: float) -> int:
        wrote = decode(given, Decoding(12, beams=4, length_penalty=penalty, patient=True))
        return sum(len(w.ids) for w in wrote)

    lengths = [length(penalty) for penalty in (-2.0, 0.0, 1.0, 4.0)]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


# ---------------------------------------------------------------- allowed outputs

OUTPUTS = [[11, 12], [11, 13, 14], [20], [20, 21, 22], [33, 34, 35, 36]]


@pytest.mark.parametrize("name", BOTH)
def test_the_best_of_the_allowed_outputs_comes_out(name: str) -> None:
    _, decode, given, end, logits = family(name)
    allowed = AllowedOutputs(OUTPUTS, end)
    penalised = Decoding(6, beams=9, length_penalty=1.0, patient=True)
    for one in given:
        scores = []
        for output in OUTPUTS:
            step = next_of(logits, one, 97)
            ids = [*output, end]
            total = sum(step(ids[:at])[token] for at, token in enumerate(ids))
            scores.append(total / len(ids))
        (found,) = decode([one], penalised, allowed=allowed)
        assert found.ids == OUTPUTS[int(np.argmax(scores))] and found.ended
        assert found.score == pytest.approx(max(scores), abs=1e-9)
    for way in (Decoding(6, beams=2), Decoding(6, greedy=True), Decoding(6, top_p=0.9, seed=1)):
        together = decode(given, way, allowed=allowed)
        assert all(wrote.ids in OUTPUTS and wrote.ended for wrote in together)
        assert together == decode(given, way, allowed=allowed, cache=False)
        assert together == [decode([one], way, allowed=allowed)[0] for one in given]
        assert all(wrote.ids not in OUTPUTS for wrote in decode(given, way)), "no wonder"


def test_allowed_beams_are_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    model = t5.build(replace(t5.TINY, **t5.MT5))
    theirs = t5.mt5_of(model)
    allowed = AllowedOutputs(OUTPUTS, END)
    source = torch.tensor([SOURCES[0]])
    for penalty in (0.0, 1.0, 3.0):
        out = theirs.generate(
            source, attention_mask=torch.ones_like(source), num_beams=3, length_penalty=penalty,
            max_new_tokens=6, do_sample=False, eos_token_id=END, pad_token_id=PAD,
            decoder_start_token_id=START,
            prefix_allowed_tokens_fn=lambda _, ids: list(allowed.after(ids.tolist()[1:])) or [PAD],
        )[0].tolist()[1:]  # fmt: skip
        decoding = Decoding(6, beams=3, length_penalty=penalty)
        (found,) = answer(model, SOURCES[:1], decoding, START, END, PAD, allowed=allowed)
        assert found.ids == out[: out.index(END)]


class Letters:
    """A tokenizer of 90 characters behind four controls; no é."""

    vocab_size, eod_id, pad_id, bos_id, mask_id, unknown_id = 94, END, PAD, START, 3, 93

    def encode_prompt(self, text: str) -> np.ndarray:
        return np.array([93 if c == "é" else 4 + (ord(c) - 33) % 89 for c in text], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(chr(33 + int(i) - 4) for i in ids if i > 3).lower()


def test_the_lines_of_a_file_are_what_is_written(tmp_path: Path) -> None:
    writer = t5.build(t5.TINY)
    lines = ["Yes", "No", "Perhaps", "No"]
    (tmp_path / "lines.txt").write_text("\n\n".join(lines) + "\n", "utf-8")
    _, spelt = read_lines(tmp_path / "lines.txt", Letters())
    assert list(spelt.values()) == ["Yes", "No", "Perhaps"]
    way = {"allowed": tmp_path / "lines.txt", "beams": 3, "max_new_tokens": 10}
    said = generate(writer, Letters(), ["is it?", "who?"], **way)
    assert set(said) <= set(lines), "as the file spells it"
    for content, message in (("", "has no line"), ("caf\u00e9\n", "line 1, 'caf\u00e9', cannot")):
        (tmp_path / "wrong.txt").write_text(content, "utf-8")
        with pytest.raises(ValueError, match=message):
            read_lines(tmp_path / "wrong.txt", Letters())
    (tmp_path / "wrong.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_lines(tmp_path / "wrong.txt", Letters())


def test_what_a_user_gets_wrong_is_a_sentence() -> None:
    for wrong, said in (
        ({"length_penalty": 1.0}, "length_penalty: needs beams"),
        ({"min_ends": 2}, "min_ends: needs beams"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty: is nan"),
        ({"beams": -1}, "beams: is -1"),
        ({"beams": 2, "patient": True}, "patient: needs a length_penalty"),
    ):
        with pytest.raises(ValueError, match=said):
            Decoding(**wrong)
    _, decode, given, end, _ = family("cpm")
    allowed = AllowedOutputs(OUTPUTS, end)
    with pytest.raises(ValueError, match="room for 4 tokens, the longest allowed output has 5"):
        decode(given, Decoding(4, beams=2), allowed=allowed)
    with pytest.raises(ValueError, match="allowed outputs end once"):
        decode(given, Decoding(6, beams=2, min_ends=2), allowed=allowed)
    for beams in (0, 2):
        with pytest.raises(ValueError, match="min_new_tokens: forbids the end"):
            decode(given, Decoding(6, 5, beams=beams), allowed=AllowedOutputs([[20]], end))
        both = AllowedOutputs([[20], [20, 21, 22]], end)  # the short one is forbidden
        wrote = decode(given, Decoding(6, 2, beams=beams, greedy=not beams), allowed=both)
        assert [one.ids for one in wrote] == [[20, 21, 22]] * len(given)
    with pytest.raises(ValueError, match="holds no output"):
        AllowedOutputs([], end)
    reader = roformer.build(roformer.TINY)
    with pytest.raises(ValueError, match="beams, allowed: are for models that write"):
        generate(reader, Letters(), ["hello"], beams=2)
