"""Promise: on 100,000 real sentences, cut into words by the published vocabulary, words are hidden,
kept and replaced at the published rates within 3 standard errors, and never in part."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_pipeline.wordpiece import from_vocabulary
from pretrain.masking import Controls, MaskedRows
from pretrain.permutation import keyed
from tests.dev_corpus import folder
from tests.windows import ArrayIndex

SENTENCES = 100_000


def texts() -> list[str]:
    """Documents of the development corpus, until they hold so many sentences."""
    found: list[str] = []
    seen = 0
    with (folder() / "data" / "dev-open.jsonl.zst").open("rb") as packed:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            text = json.loads(line)["text"][:20_000]
            found.append(text)
            seen += text.count("。") + text.count("\n")
            if seen >= SENTENCES:
                break
    return found


@pytest.mark.slow
def test_rates_of_whole_words_on_real_sentences(tmp_path: Path) -> None:
    vocabulary = folder() / "tokenizers" / "roformer" / "vocab.txt"
    if not vocabulary.is_file():
        pytest.skip("the published vocabulary is not at hand")
    words = from_vocabulary(vocabulary, tmp_path / "tokenizer", False)
    eod, mask = words.eod_id, words.mask_id
    assert mask is not None
    ids, marks, offsets = [], [], [0]
    for tokens, begins in words.encode_marked(texts()):
        ids += [tokens, [eod]]
        marks += [begins, [False]]
        offsets.append(offsets[-1] + len(tokens) + 1)
    index = ArrayIndex(np.concatenate(ids).astype(np.int32), offsets)
    begins = np.concatenate(marks).astype(np.uint8)
    controls = Controls(eod, words.pad_id, mask, words.bos_id, words.vocab_size)
    rows = MaskedRows(index, 512, controls, begins, masking="word")
    count = len(rows)
    batch = rows.batch(np.arange(count), keyed(1, np.arange(count, dtype=np.uint64)))
    before, after = batch.targets_BT.numpy()[:, 1:-1], batch.tokens_BT.numpy()[:, 1:-1]
    hidden = batch.loss_mask_BT.numpy()[:, 1:-1]
    starts = begins[: count * 510].reshape(count, 510) > 0
    ends = before == eod
    starts[:, 0] = True
    starts[:, 1:] |= ends[:, :-1]
    starts &= ~ends
    number = int(starts.sum())
    assert number > SENTENCES
    assert begins.mean() < 0.8  # characters: many a word is longer than one token

    def near(found: float, rate: float, size: int) -> None:
        assert abs(found - rate) < 3 * (rate * (1 - rate) / size) ** 0.5, (found, rate, size)

    near(hidden[starts].mean(), 0.15, number)
    chosen = hidden & starts
    size = int(chosen.sum())
    near((after[chosen] == mask).mean(), 0.8, size)
    near((after[chosen] == before[chosen]).mean(), 0.1, size)
    word = (starts | ends).reshape(-1).cumsum()
    fate = hidden.reshape(-1)[(starts | ends).reshape(-1)][word - 1]
    assert np.array_equal(fate, hidden.reshape(-1))  # a word wholly, or not at all
