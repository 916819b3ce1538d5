"""Promise: the examples of each objective, drawn from 100,000 real sentences cut into words by the
published vocabulary, lie within 3 standard errors of the published rates: what is hidden, kept and
replaced, by token, by word, by token within a word, with [CLS] and [SEP]; lengths of spans and of
gaps between them; where a prefix ends. Whole words are never hidden in part; gap sentences are a
rule and no draw: each unit obeys it.
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import zstandard

from data_pipeline.pseudo_summary import pick_batch
from data_pipeline.wordpiece import from_vocabulary
from pretrain.contents import Corrupted, Prefixed, noise_of
from pretrain.masking import Controls, MaskedRows
from pretrain.permutation import keyed
from pretrain.rows import CausalRows, Layout
from tests.dev_corpus import folder
from tests.windows import ArrayIndex

SENTENCES = 100_000
ROW = 512

pytestmark = pytest.mark.slow


class Real(NamedTuple):
    """The sentences as an index, with marks."""

    texts: list[str]
    index: ArrayIndex
    begins: np.ndarray
    controls: Controls


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    """Documents of the development corpus, until they hold so many sentences."""
    vocabulary = folder() / "tokenizers" / "roformer" / "vocab.txt"
    if not vocabulary.is_file():
        pytest.skip("the published vocabulary is not at hand")
    texts: list[str] = []
    seen = 0
    with (folder() / "data" / "dev-open.jsonl.zst").open("rb") as packed:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            text = json.loads(line)["text"][:20_000]
            texts.append(text)
            seen += text.count("。") + text.count("\n")
            if seen >= SENTENCES:
                break
    words = from_vocabulary(vocabulary, Path(tmp_path_factory.mktemp("words")) / "tokenizer", False)
    assert words.mask_id is not None
    ids: list[Any] = []
    marks: list[Any] = []
    offsets = [0]
    for tokens, begins in words.encode_marked(texts):
        ids += [tokens, [words.eod_id]]
        marks += [begins, [False]]
        offsets.append(offsets[-1] + len(tokens) + 1)
    index = ArrayIndex(np.concatenate(ids).astype(np.int32), offsets)
    controls = Controls(words.eod_id, words.pad_id, words.mask_id, words.bos_id, words.vocab_size)
    return Real(texts, index, np.concatenate(marks).astype(np.uint8), controls)


def near(found: float, rate: float, size: int) -> None:
    """Within 3 standard errors of a share."""
    assert abs(found - rate) < 3 * (rate * (1 - rate) / size) ** 0.5, (found, rate, size)


class Drawn(NamedTuple):
    """What masking did to rows, [rows, places]."""

    before: np.ndarray
    after: np.ndarray
    hidden: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def drawn(real: Real, masking: Any, special: bool = False) -> Drawn:
    """Rows without their frame; starts: where a word begins, ends: [SEP] of a document."""
    rows = MaskedRows(
        real.index, ROW, real.controls, real.begins, masking=masking, mask_special=special
    )
    count, room = len(rows), ROW - 2
    batch = rows.batch(np.arange(count), keyed(1, np.arange(count, dtype=np.uint64)))
    before, after = batch.targets_BT.numpy()[:, 1:-1], batch.tokens_BT.numpy()[:, 1:-1]
    starts = real.begins[: count * room].reshape(count, room) > 0
    ends = before == real.controls.eod
    starts[:, 0] = True
    starts[:, 1:] |= ends[:, :-1]
    return Drawn(before, after, batch.loss_mask_BT.numpy()[:, 1:-1], starts & ~ends, ends)


def fates(real: Real, rows: Drawn, chosen: np.ndarray) -> None:
    """8 of 10 hidden, 1 kept, 1 another at random, whose number is uniform."""
    size = int(chosen.sum())
    hidden = rows.after[chosen] == real.controls.mask
    kept = rows.after[chosen] == rows.before[chosen]
    near(hidden.mean(), 0.8, size)
    near(kept.mean(), 0.1, size)
    others = rows.after[chosen][~hidden & ~kept]
    vocab = real.controls.vocab
    assert abs(others.mean() / vocab - 0.5) < 3 / (12 * len(others)) ** 0.5


def test_whole_words_with_one_draw(real: Real) -> None:
    """RoFormerV2."""
    rows = drawn(real, "word")
    starts, ends, hidden = rows.starts, rows.ends, rows.hidden
    number = int(starts.sum())
    assert number > SENTENCES
    assert real.begins.mean() < 0.8  # characters: many a word is longer than one token
    near(hidden[starts].mean(), 0.15, number)
    fates(real, rows, hidden & starts)
    word = (starts | ends).reshape(-1).cumsum()
    fate = hidden.reshape(-1)[(starts | ends).reshape(-1)][word - 1]
    assert np.array_equal(fate, hidden.reshape(-1))  # a word wholly, or not at all
    assert not hidden[ends].any()


def test_words_with_a_draw_a_token(real: Real) -> None:
    """bert4keras' RoBERTa: a word is drawn, then each of its tokens on its own."""
    rows = drawn(real, "word_token")
    starts, hidden = rows.starts, rows.hidden
    near(hidden[starts].mean(), 0.15, int(starts.sum()))
    fates(real, rows, hidden)
    word = (starts | rows.ends).reshape(-1).cumsum()
    fate = hidden.reshape(-1)[(starts | rows.ends).reshape(-1)][word - 1]
    assert np.array_equal(fate, hidden.reshape(-1))
    second = np.zeros_like(starts)
    second[:, 1:] = starts[:, :-1] & ~starts[:, 1:] & ~rows.ends[:, 1:]
    both = second & hidden  # second tokens of words that were drawn
    mask = real.controls.mask
    first = np.zeros_like(rows.after)
    first[:, 1:] = rows.after[:, :-1]
    alike = (rows.after[both] == mask) & (first[both] == mask)
    near(alike.mean(), 0.8 * 0.8, int(both.sum()))


@pytest.mark.parametrize("special", [False, True])
def test_each_token_on_its_own(real: Real, special: bool) -> None:
    """WoBERT and RoFormer v1, who hid [CLS] and [SEP] too."""
    rows = drawn(real, "token", special)
    text = ~rows.ends
    near(rows.hidden[text].mean(), 0.15, int(text.sum()))
    fates(real, rows, rows.hidden & text)
    if special:
        near(rows.hidden[rows.ends].mean(), 0.15, int(rows.ends.sum()))
    else:
        assert not rows.hidden[rows.ends].any()
    # neighbours know nothing of each other
    pairs = text[:, 1:] & text[:, :-1]
    both = rows.hidden[:, 1:] & rows.hidden[:, :-1]
    near(both[pairs].mean(), 0.15**2, int(pairs.sum()))


def test_spans_and_the_gaps_between_them(real: Real) -> None:
    """T5: 15 % of a row in spans of 3 on average; each composition as likely as any other."""
    room, length = 568, 512  # 512 tokens come out of 568, as in T5's own preprocessing
    noise, spans = noise_of(room, 0.15, 3.0)
    assert (noise, spans) == (round(room * 0.15), round(noise / 3))
    assert room - noise + spans + 1 == length
    low = 10**6  # sentinels that no text has
    sentinels = np.arange(low, low + 200)
    contents = Corrupted(
        real.index, Layout(real.index, "windows", room), 0.15, 3.0, sentinels, real.controls.eod
    )
    count = len(contents)
    source = np.empty((count, contents.source_room), np.int64)
    target = np.empty((count, contents.target_room), np.int64)
    keys = keyed(1, np.arange(count, dtype=np.uint64))
    contents.write(np.arange(count), keys, source, target)

    def runs(rows: np.ndarray, behind: bool) -> np.ndarray:
        """Tokens between sentinels of each row."""
        at = np.nonzero(rows >= low)[1].reshape(count, spans)
        edge = np.full((count, 1), rows.shape[1] if behind else -1)
        places = np.concatenate([at, edge] if behind else [edge, at], 1)
        return np.diff(places, axis=1) - 1

    of_spans, of_gaps = runs(target, True), runs(source, False)
    assert (of_spans.sum(1) == noise).all() and of_spans.min() >= 1
    assert (of_gaps.sum(1) == room - noise).all() and of_gaps.min() >= 1
    assert abs(of_spans.mean() - 3) < 0.05
    for sizes, total in ((of_spans, noise), (of_gaps, room - noise)):
        # one place of each row, so that draws are independent: first, middle, last
        for place in (0, spans // 2, spans - 1):
            near((sizes[:, place] == 1).mean(), (spans - 1) / (total - 1), count)
            two = (spans - 1) * (total - spans) / ((total - 1) * (total - 2))
            near((sizes[:, place] == 2).mean(), two, count)


def test_a_prefix_ends_anywhere(real: Real) -> None:
    """UniLM: each of the places between two tokens is as likely."""
    room = 128
    contents = Prefixed(real.index, Layout(real.index, "windows", room))
    count = len(contents)
    source, target = (np.empty((count, room - 1), np.int64) for _ in range(2))
    keys = keyed(1, np.arange(count, dtype=np.uint64))
    heads, rests = contents.write(np.arange(count), keys, source, target)
    assert (heads + rests == room).all() and heads.min() == 1 and heads.max() == room - 1
    share = heads / room
    assert abs(share.mean() - 0.5) < 3 * ((room - 2) / room) / (12 * count) ** 0.5
    for part in range(4):
        low, high = 1 + part * 127 // 4, 1 + (part + 1) * 127 // 4
        rate = (high - low) / 127
        near(((heads >= low) & (heads < high)).mean(), rate, count)


def test_gap_sentences_obey_their_rule(real: Real) -> None:
    """T5 PEGASUS: sentences are taken until they hold more than a quarter of what is left or leave
    one, so without the longest of them they hold at most that; the shorter side is the target."""
    every = [unit for found in pick_batch(real.texts[::10]) for unit in found]
    assert len(every) > 200
    turned = taken = whole = 0
    for unit, picked in every:
        sizes = [len(sentence) for sentence in unit]
        sides = [[sizes[at] for at in picked]]
        sides += [[size for at, size in enumerate(sizes) if at not in set(picked)]]
        assert sum(sides[0]) <= sum(sides[1])
        turned += not _taken(*sides)
        assert _taken(*sides) or _taken(*sides[::-1])
        taken, whole = taken + sum(sides[0]), whole + sum(sizes)
    assert turned < 0.1 * len(every)
    assert 0.2 < taken / whole < 0.3


def _taken(target: list[int], source: list[int]) -> bool:
    """Whether the greedy choice may have ended with these sizes."""
    before, left = sum(target) - max(target), sum(source) + max(target)
    enough = sum(target) > 0.25 * sum(source) or len(source) == 1
    return enough and (len(target) == 1 or before <= 0.25 * left)


def test_every_token_is_predicted_once(real: Real) -> None:
    """Causal: an epoch of windows has each token of the stream as a target, but for the first and
    the rest behind the last window."""
    rows = CausalRows(real.index, ROW, real.controls.eod, real.controls.pad, True)
    batch = rows.batch(np.arange(len(rows)))
    targets = batch.targets_BT.numpy()[batch.loss_mask_BT.numpy()]
    told = real.index.ids[1 : len(rows) * ROW + 1]
    crosses = real.index.ids[: len(rows) * ROW] == real.controls.eod
    assert np.array_equal(targets, told[~crosses])  # nothing is predicted across a border
