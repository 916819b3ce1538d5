"""Promise: an encoder-decoder answers, and an encoder fills masks, as one forward after another
says; the cache and the rows beside a row change nothing; `transformers` writes the same.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.answer import answer, fill, framed
from pretrain.generate import Decoding, generate
from pretrain.models.roformer import RoFormer
from pretrain.models.t5_pegasus import T5Pegasus
from tests import test_roformer_equals_its_origin as roformer
from tests import test_t5_pegasus_equals_mt5 as t5

START, END, PAD, MASK = 1, 2, 0, 3
SOURCES = [[5, 9, 30, 41, 8, 2], [7, 2], [60, 61, 62, 63, 64, 65, 66, 67, 2]]
DECODINGS = [
    Decoding(12, greedy=True),
    Decoding(12, temperature=0.7, top_k=20, top_p=0.9, seed=3),
    Decoding(12, min_new_tokens=6, seed=4),
]


@pytest.fixture(scope="module")
def writer() -> T5Pegasus:
    """A model whose next token is in doubt."""
    return t5.build(replace(t5.TINY, log_n=512))


@pytest.mark.parametrize("decoding", DECODINGS, ids=["greedy", "truncated", "sampled"])
def test_cache_and_batch_change_nothing(writer: T5Pegasus, decoding: Decoding) -> None:
    known = (START, END, PAD, 90)
    together = answer(writer, SOURCES, decoding, *known)
    assert together == answer(writer, SOURCES, decoding, *known, cache=False)
    alone = [answer(writer, [source], decoding, *known)[0] for source in SOURCES]
    assert together == alone
    assert all(len(w.ids) <= 12 and max([0, *w.ids]) < 90 for w in together)
    assert len({tuple(w.ids) for w in together}) == 3, "the sources must matter"


def test_greedy_is_one_forward_after_another(writer: T5Pegasus) -> None:
    for source, found in zip(
        SOURCES, answer(writer, SOURCES, Decoding(8, greedy=True), START, END, PAD), strict=True
    ):
        tokens = [START]
        while len(tokens) <= 8 and tokens[-1] != END:
            side = [torch.tensor([source]), torch.arange(len(source))[None], None]
            places = torch.arange(len(tokens))[None]
            hidden = writer(torch.tensor([tokens]), places, None, *side)
            tokens.append(int(writer.logits(hidden[0, -1]).argmax()))
        assert found.ids == [token for token in tokens[1:] if token != END]


def test_transformers_writes_the_same() -> None:
    """Greedy, on mT5's own options, in float64."""
    ours = t5.build(replace(t5.TINY, **t5.MT5))
    theirs = t5.mt5_of(ours)
    source = torch.tensor([SOURCES[2]])
    theirs.generation_config.update(
        decoder_start_token_id=START, eos_token_id=END, pad_token_id=PAD, max_new_tokens=10,
        do_sample=False,
    )  # fmt: skip
    expected = theirs.generate(source, attention_mask=torch.ones_like(source))[0].tolist()[1:]
    found = answer(ours, [SOURCES[2]], Decoding(10, greedy=True), START, END, PAD)[0]
    assert [*found.ids, *[END] * found.ended] == expected


@pytest.mark.parametrize("config", [roformer.TINY, roformer.TINY_V2], ids=["v1", "v2"])
def test_masks_are_filled_with_the_likeliest(config: roformer.RoFormerConfig) -> None:
    model: RoFormer = roformer.build(config)
    rows = [[1, 9, MASK, 41, MASK, 2], [1, MASK, 2], [1, 60, 61, 62, 63, 64, 2]]
    filled = fill(model, rows, MASK, PAD, vocab=90, best=4)
    for row, found in zip(rows, filled, strict=True):
        places = torch.arange(len(row))[None]
        logits = model.logits(model(torch.tensor([row]), places)[0])[:, :90]
        masks = [i for i, token in enumerate(row) if token == MASK]
        assert [at for at, (a, b) in enumerate(zip(row, found.ids, strict=True)) if a != b] == masks
        for at, choices in zip(masks, found.choices, strict=True):
            probability = logits[at].softmax(-1)
            assert [i for i, _ in choices] == probability.topk(4).indices.tolist()
            assert choices[0][1] == pytest.approx(probability.max().item(), rel=1e-6)
            assert found.ids[at] == choices[0][0]
    assert filled[2].ids == rows[2] and filled[2].choices == []


class Letters:
    """A tokenizer of 90 characters behind four controls."""

    vocab_size, eod_id, pad_id, bos_id, unknown_id = 94, END, PAD, START, 4
    mask_id: int | None = MASK

    def encode_prompt(self, text: str) -> np.ndarray:
        return np.array([MASK if c == "_" else 4 + (ord(c) - 33) % 90 for c in text], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces(i for i in ids if i > 4))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [chr(33 + int(i) - 4) if i > 4 else f"<{int(i)}>" for i in ids]


def test_generate_knows_what_each_family_does(writer: T5Pegasus) -> None:
    letters = Letters()
    text = generate(writer, letters, ["hello"], greedy=True, max_new_tokens=6)
    ids = framed([int(i) for i in letters.encode_prompt("hello")], START, END)
    wanted = answer(writer, [ids], Decoding(6, greedy=True), START, END, PAD, 94)[0].ids
    assert text == [letters.decode(wanted)]
    reader = roformer.build(roformer.TINY)
    (filled,) = generate(reader, letters, ["he_lo"])
    assert filled.startswith("he[") and filled.endswith("]lo") and filled.count("||") == 4
    (unknown,) = generate(reader, letters, ["h!l_!"])
    assert unknown.startswith("h<4>l[") and unknown.endswith("]<4>")
    (middle,) = generate(reader, letters, ["hello"])
    assert middle.startswith("he[") and middle.endswith("]lo")
    letters.mask_id = None
    with pytest.raises(ValueError, match="no mask to fill"):
        generate(reader, letters, ["hello"])
    with pytest.raises(ValueError, match="prompt: is empty"):
        answer(writer, [[]], Decoding(4), START, END, PAD)
