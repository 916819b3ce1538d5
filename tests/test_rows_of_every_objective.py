"""Promise: what an objective shows a model is what a plain reading of the corpus gives: whole words
hidden at the published rates, gap sentences and fields as they stand, spans and prefixes that put
together are the text again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.load import ConfigError, from_dict
from configs.objectives import SpanCorruption
from configs.run import CorpusShare, Data
from data_pipeline import sidefile
from data_pipeline.sidefile import FieldWriter, Gaps, GapUnit, GapWriter
from pretrain.batches import Batch
from pretrain.contents import Corrupted, Prefixed, Spans, longest_row, noise_of
from pretrain.corpora import trained_objective
from pretrain.masking import Controls, MaskedRows
from pretrain.pairs import PairRows
from pretrain.permutation import keyed
from pretrain.reading import _corrupted
from pretrain.rows import Layout
from tests.windows import EOD, PAD, ArrayIndex, an_index

MASK, BOS, VOCAB = 6, 4, 90
IDS = Controls(EOD, PAD, MASK, BOS, VOCAB)


def marks_of(index: ArrayIndex, seed: int = 5) -> np.ndarray:
    """Words of one to three tokens; a sentence every twenty or so."""
    rng = np.random.default_rng(seed)
    marks = (rng.random(index.tokens) < 0.6).astype(np.uint8)
    marks[rng.random(index.tokens) < 0.05] |= 3
    marks[index.offsets[:-1]] |= 3
    marks[index.ids == EOD] = 0
    return marks


def keys_of(rows: int, seed: int = 1) -> np.ndarray:
    return keyed(seed, np.arange(rows, dtype=np.uint64))


# ---------------------------------------------------------------- masked


def test_windows_stand_between_their_control_tokens() -> None:
    index = an_index(200)
    rows = MaskedRows(index, 12, IDS, marks_of(index))
    assert len(rows) == 20
    batch = rows.batch(np.arange(20), keys_of(20))
    whole = batch.targets_BT.numpy()
    assert (whole[:, 0] == BOS).all()
    assert (whole[:, -1] == EOD).all()
    assert np.array_equal(whole[:, 1:-1].reshape(-1), index.ids)
    assert batch.document_ids_BT is not None
    for row in range(20):
        place = document = 0
        for at in range(12):
            assert batch.positions_BT[row, at] == place
            assert batch.document_ids_BT[row, at] == document
            place += 1
            if whole[row, at] == EOD and at < 10:  # the row's own [SEP] stays with the last text
                place, document = 0, document + 1


@pytest.mark.parametrize("masking", ["token", "word", "word_token"])
@pytest.mark.parametrize("special", [False, True])
def test_hidden_words_are_whole_and_at_the_published_rates(masking: Any, special: bool) -> None:
    index = an_index(300_000, 3)
    marks = marks_of(index)
    rows = MaskedRows(index, 128, IDS, marks, masking=masking, mask_special=special)
    count = len(rows)
    batch = rows.batch(np.arange(count), keys_of(count))
    before, after = batch.targets_BT.numpy(), batch.tokens_BT.numpy()
    hidden = batch.loss_mask_BT.numpy()
    assert np.array_equal(before[~hidden], after[~hidden])
    control = (before == EOD) | (before == BOS)
    assert hidden[control].any() == special
    # A slow reading: the words of each row, as runs between the marks.
    inner = marks[: count * 126].reshape(count, 126) & 1
    begins = np.ones((count, 128), bool)
    if masking != "token":
        begins[:, 1:-1] = inner > 0
        begins[:, 1] = True
        begins |= control
        begins[:, 1:] |= control[:, :-1]
    word = begins.reshape(-1).cumsum() - 1
    hidden_of_word = hidden.reshape(-1)[begins.reshape(-1)]
    assert np.array_equal(hidden.reshape(-1), hidden_of_word[word])  # all of a word, or none
    eligible = begins.reshape(-1) if special else (begins & ~control).reshape(-1)
    units = int(eligible.sum())

    def near(found: float, rate: float, number: int) -> bool:
        return abs(found - rate) < 4 * (rate * (1 - rate) / number) ** 0.5  # 4 standard errors

    assert near(hidden.reshape(-1)[eligible].mean(), 0.15, units)
    # What becomes of it: one draw a word, or one a token.
    drawn = hidden if masking == "word_token" else hidden & begins
    number = int(drawn.sum())
    assert near((after[drawn] == MASK).mean(), 0.8, number)
    same = (after == before) & drawn
    lowest = 0 if masking == "word_token" else 1
    chance = 0.1 / (VOCAB - lowest)
    assert near(same.sum() / number, 0.1 + chance, number)
    others = after[drawn & (after != MASK) & ~same]
    assert others.min() == lowest
    assert others.max() == VOCAB - 1
    if masking == "word":  # the fate of the first token is that of the whole word
        masked = (after == MASK).reshape(-1)
        first = masked[begins.reshape(-1)][word]
        apart = (first != masked) & hidden.reshape(-1)
        assert apart.mean() < 0.002  # a replacement that happens to be [MASK] itself
    if masking == "word_token":  # negative control: here a word is often half hidden, half not
        masked = (after == MASK).reshape(-1)
        first = masked[begins.reshape(-1)][word]
        assert ((first != masked) & hidden.reshape(-1)).sum() > 0.1 * number * 0.2


def test_masks_are_a_function_of_the_key() -> None:
    index = an_index(3000)
    rows = MaskedRows(index, 64, IDS, marks_of(index))
    at = np.arange(len(rows))
    once, again = rows.batch(at, keys_of(len(at))), rows.batch(at, keys_of(len(at)))
    assert np.array_equal(once.tokens_BT, again.tokens_BT)
    other = rows.batch(at, keys_of(len(at), seed=2))
    assert not np.array_equal(once.tokens_BT, other.tokens_BT)  # negative control
    assert np.array_equal(once.targets_BT, other.targets_BT)
    backwards = rows.batch(at[::-1].copy(), keys_of(len(at))[::-1].copy())
    assert np.array_equal(backwards.tokens_BT.numpy()[::-1], once.tokens_BT)


def test_pieces_of_documents_are_cut_before_sentences() -> None:
    index = an_index(5000, 8)
    index = ArrayIndex(index.ids, [0, *range(100, 5001, 100)])  # long documents
    marks = marks_of(index)
    rows = MaskedRows(index, 34, IDS, marks, packing="documents")
    pieces = rows.layout.pieces
    assert pieces is not None
    for start, length in zip(pieces.start_P, pieces.length_P, strict=True):
        stop = int(start + length)
        assert 0 < length <= 32
        if stop % 100 != 99:  # not the end of a document: a sentence begins here, or none could
            assert marks[stop] & 2 or not (marks[start + 1 : start + 33] & 2).any()
    covered = np.concatenate([np.arange(s, s + n) for s, n in zip(*pieces, strict=True)])
    assert np.array_equal(covered, np.flatnonzero(np.arange(5000) % 100 != 99))


# ---------------------------------------------------------------- pairs


def sides(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(source, decoder's input, targets) of every pair of a batch, read off its document ids."""
    found = []
    for row in range(batch.rows):
        counts = batch.loss_mask_BT[row]
        for pair in range(int(batch.document_ids_BT[row].max()) + 1):
            source = batch.encoder_document_ids_BT[row] == pair
            mine = (batch.document_ids_BT[row] == pair) & counts
            assert batch.encoder_positions_BT[row][source].tolist() == list(range(source.sum()))
            assert batch.positions_BT[row][mine].tolist() == list(range(mine.sum()))
            found.append(
                tuple(
                    x.tolist()
                    for x in (
                        batch.encoder_tokens_BT[row][source],
                        batch.tokens_BT[row][mine],
                        batch.targets_BT[row][mine],
                    )
                )
            )
        behind = ~counts
        assert (batch.tokens_BT[row][behind] == PAD).all()
        assert (batch.encoder_tokens_BT[row][batch.encoder_document_ids_BT[row] == -1] == PAD).all()
    return found


def with_gaps(folder: Path, documents: int = 300) -> tuple[ArrayIndex, Path]:
    """An index and its .gaps: units of two to six sentences, some of which are long."""
    rng = np.random.default_rng(0)
    ids, offsets = [], [0]
    with GapWriter(folder / "train") as writer:
        for _ in range(documents):
            units, at = [], 0
            for _ in range(rng.integers(0, 3)):
                sizes = rng.integers(1, 20, rng.integers(2, 7))
                starts = at + np.cumsum(sizes) - sizes + np.arange(len(sizes))  # a blank between
                picked = rng.random(len(sizes)) < 0.4
                units.append(GapUnit(starts, starts + sizes, picked))
                at = int(starts[-1] + sizes[-1])
            writer.add_document(units)
            ids += [*rng.integers(8, 90, at + 2).tolist(), EOD]
            offsets.append(len(ids))
    return ArrayIndex(np.asarray(ids, np.uint16), offsets), folder / "train"


@pytest.mark.parametrize("packing", ["documents", "best_fit"])
def test_gap_sentences_become_pairs(tmp_path: Path, packing: Any) -> None:
    index, prefix = with_gaps(tmp_path)
    _, tables = sidefile.GAPS.open(prefix)
    contents = Spans.of_gaps(index, tables, 46, 18)
    rows = PairRows(index, contents, 64, 32, IDS, packing)
    found = sides(rows.batch(np.arange(len(rows))))
    gaps, expected, cut = Gaps(prefix), [], 0
    for number in range(gaps.documents):
        document = index.slice(*index.offsets[number : number + 2])
        for unit in gaps.document(number):
            source, target = (unit.tokens(document, picked).tolist() for picked in (False, True))
            if source and target:
                cut += len(source) > 46 or len(target) > 18
                text = [BOS, *target[:18]]
                expected.append(([BOS, *source[:46], EOD], text, [*text[1:], EOD]))
    assert cut > 10
    assert sorted(found) == sorted(expected)  # each exactly once
    assert len(rows) == len(found) if packing == "documents" else len(rows) < 0.8 * len(found)
    if packing == "documents":
        assert found == expected


def test_what_the_corpus_picked_stays_the_target(tmp_path: Path) -> None:
    """English words in a Chinese document: more characters, fewer tokens. The corpus compared
    characters, as published; tokens turn nothing round."""
    index = ArrayIndex(np.asarray([*range(10, 23), *range(30, 56), EOD], np.uint16), [0, 40])
    with GapWriter(tmp_path / "train") as writer:
        picked = np.asarray([False, True])
        writer.add_document([GapUnit(np.asarray([0, 13]), np.asarray([13, 39]), picked)])
    _, tables = sidefile.GAPS.open(tmp_path / "train")
    rows = PairRows(index, Spans.of_gaps(index, tables, 46, 40), 64, 64, IDS, "documents")
    ((source, _, target),) = sides(rows.batch(np.arange(1)))
    assert source == [BOS, *range(10, 23), EOD] and target == [*range(30, 56), EOD]


class Unused:
    """A vocabulary of BERT's with three sentinels."""

    kind, vocab_size, eod_id = "wordpiece", 8, EOD

    @staticmethod
    def pieces(ids: range) -> list[str]:
        return [*"abcde", "[unused1]", "[unused2]", "[unused3]"]


def test_too_few_sentinels_are_told_by_what_helps() -> None:
    """More rows of the model give a BERT vocabulary no sentinel; they do where ids above are."""
    data = Data((CorpusShare("x"),), seq_len=512, target_len=128)
    objective = from_dict(SpanCorruption, {"name": "span_corruption"}, "objective")
    with pytest.raises(ConfigError, match=r"the vocabulary has 3 of \[unused1\].*objective\.span"):
        _corrupted(an_index(60_000), data, objective, Unused(), 5000, (512, 128))
    plain = Unused()
    plain.kind = "cpm"
    with pytest.raises(ConfigError, match=r"raise model\.vocab to"):
        _corrupted(an_index(60_000), data, objective, plain, 10, (512, 128))


@pytest.mark.parametrize(
    ("stage", "found"),
    [
        (0, {"name": "causal", "document_boundaries": True}),
        (1, {"name": "causal", "document_boundaries": False}),
        (2, {"name": "masked", "masking": "word"}),
    ],
)
def test_a_checkpoint_is_measured_by_what_its_stage_learnt(stage: int, found: Any) -> None:
    page = {
        "objective": {"name": "causal", "document_boundaries": True},
        "stages": [
            {"objective": {}},
            {"objective": {"document_boundaries": False}},
            {"objective": {"name": "masked", "masking": "word"}},
        ],
    }
    assert trained_objective({"config": page, "stage": stage}) == found
    assert trained_objective({}) == {}


def test_fields_become_pairs(tmp_path: Path) -> None:
    rng, ids, offsets, expected = np.random.default_rng(1), [], [0], []
    with FieldWriter(tmp_path / "train", ["title", "text", "note"], []) as writer:
        for number in range(50):
            parts = {n: rng.integers(8, 90, rng.integers(1, 9)).tolist() for n in ("note", "text")}
            parts["title"] = rng.integers(8, 90, 4).tolist()
            if number % 10 == 0:
                del parts["title"]  # no target: no pair
            spans, at = [], 0
            for name, tokens in parts.items():
                spans.append((name, at, at + len(tokens)))
                ids += [*tokens, 89]
                at += len(tokens) + 1
            writer.add_document(spans)
            ids.append(EOD)
            offsets.append(len(ids))
            if "title" in parts:
                title = [BOS, *parts["title"]]
                expected.append(([BOS, *parts["text"], EOD], title, [*title[1:], EOD]))
    index = ArrayIndex(np.asarray(ids, np.uint16), offsets)
    _, tables = sidefile.FIELDS.open(tmp_path / "train")
    names = sidefile.Fields(tmp_path / "train").names
    contents = Spans.of_fields(index, tables, names, ("text",), ("title",), 20, 20)
    rows = PairRows(index, contents, 22, 22, IDS, "documents")
    assert sides(rows.batch(np.arange(len(rows)))) == expected


def test_corrupted_spans_put_back_are_the_text() -> None:
    index, sentinels = an_index(60_000), np.arange(200, 180, -1)
    room = longest_row(126, 60, 0.15, 3.0)
    noise, spans = noise_of(room, 0.15, 3.0)
    assert (room - noise + spans, noise + spans) <= (126, 60)
    assert noise_of(100, 0.15, 3.0) == (15, 5)  # T5's own numbers: round(15 / 3)
    contents = Corrupted(index, Layout(index, "windows", room), 0.15, 3.0, sentinels, EOD)
    rows = PairRows(index, contents, 128, 61, IDS, "windows")
    count = len(rows)
    lengths = []
    for row, pair in enumerate(sides(rows.batch(np.arange(count), keys_of(count)))):
        source, target = pair[0][1:-1], pair[2][:-1]
        cut: dict[int, list[int]] = {}
        for token in target:
            if token > 180:
                cut[token] = []
            else:
                cut[list(cut)[-1]].append(token)
        assert list(cut) == sentinels[:spans].tolist()
        lengths += [len(tokens) for tokens in cut.values()]
        whole = [t for token in source for t in (cut.get(token, [token]))]
        assert whole == index.slice(row * room, (row + 1) * room).tolist()
        assert source[0] < 180  # the first gap is in front, and none is empty
    assert abs(np.mean(lengths) - noise / spans) < 1e-9
    # A random composition: a span of one token has the chance (spans - 1) / (noise - 1).
    one = np.mean(np.asarray(lengths) == 1)
    chance = (spans - 1) / (noise - 1)
    assert abs(one - chance) < 4 * (chance * (1 - chance) / len(lengths)) ** 0.5


def test_a_prefix_and_the_rest_are_the_text() -> None:
    index = an_index(30_000)
    rows = PairRows(index, Prefixed(index, Layout(index, "windows", 20)), 21, 20, IDS, "windows")
    count, heads = len(rows), []
    for row, pair in enumerate(sides(rows.batch(np.arange(count), keys_of(count)))):
        whole = pair[0][1:-1] + pair[2][:-1]
        assert whole == index.slice(row * 20, (row + 1) * 20).tolist()
        heads.append(len(pair[0]) - 2)
    counts = np.bincount(heads, minlength=20)[1:]
    assert len(counts) == 19
    # each of 19 lengths is expected count / 19 times; 5 standard deviations
    assert abs(counts - count / 19).max() < 5 * (count / 19) ** 0.5
