"""Promise: the global batches of a run are the same for any number of ranks, any micro-batch, and
after a resume with others of each, for every objective; an epoch holds every row exactly once, and
packed rows hold every piece exactly once."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import sidefile
from pretrain.batches import Batch, Rows
from pretrain.contents import Corrupted, Prefixed, Spans
from pretrain.corpora import Corpora
from pretrain.masking import MaskedRows
from pretrain.order import Dataset, Order
from pretrain.packing import best_fit, best_fit_pairs, cut
from pretrain.pairs import PairRows
from pretrain.rows import CausalRows, Layout
from tests.test_rows_of_every_objective import IDS, marks_of, with_gaps
from tests.windows import EOD, PAD, ArrayIndex

Make = Callable[[ArrayIndex, Path], Rows]


def gaps(packing: Any) -> Make:
    def made(index: ArrayIndex, prefix: Path) -> Rows:
        _, tables = sidefile.GAPS.open(prefix)
        return PairRows(index, Spans.of_gaps(index, tables, 46, 18), 64, 32, IDS, packing)

    return made


def corrupted(index: ArrayIndex, prefix: Path) -> Rows:
    layout = Layout(index, "windows", 40)
    contents = Corrupted(index, layout, 0.15, 3.0, np.arange(99, 89, -1), EOD)
    return PairRows(index, contents, 64, 32, IDS, "windows")


def prefixed(index: ArrayIndex, prefix: Path) -> Rows:
    contents = Prefixed(index, Layout(index, "documents", 30, end_tokens=1))
    return PairRows(index, contents, 64, 32, IDS, "documents")


EVERY: dict[str, Make] = {
    "causal": lambda index, _: CausalRows(index, 32, EOD, PAD),
    "causal, packed": lambda index, _: CausalRows(index, 32, EOD, PAD, packing="best_fit"),
    "masked": lambda index, _: MaskedRows(index, 32, IDS, marks_of(index)),
    "masked, packed": lambda index, _: MaskedRows(
        index, 64, IDS, marks_of(index), masking="word_token", packing="best_fit"
    ),
    "pseudo_summary": gaps("documents"),
    "pseudo_summary, packed": gaps("best_fit"),
    "span_corruption": corrupted,
    "prefix": prefixed,
}


def a_run(make: Make, folder: Path) -> Corpora:
    """Two corpora 3 to 1, as a run reads them."""
    train = []
    for number, documents in enumerate((90, 30)):
        (folder / str(number)).mkdir(exist_ok=True)
        train.append(make(*with_gaps(folder / str(number), documents)))
    shares = [
        Dataset(len(rows), w, k) for k, (rows, w) in enumerate(zip(train, (3, 1), strict=True))
    ]
    order = Order(7, [(0, shares)], skips=[(20, 25)])
    return Corpora(tuple(train), tuple(train), order, SimpleNamespace(), folder, [], [])


def of_step(run: Corpora, first: int, count: int, ranks: int, micro: int) -> list[tuple]:
    """The samples of a step, over all ranks, as plain values: every field of every row."""
    found = []
    for rank in range(ranks):
        batches, firsts = run.step(first, count, rank, ranks, micro)
        assert len(firsts) == len(batches)
        for batch in batches:
            if batch.counted:
                found += [row_of(batch, row) for row in range(batch.rows)]
    return found


def row_of(batch: Batch, row: int) -> tuple:
    fields = {k: v for k, v in vars(batch).items() if k != "loss_at_N" and v is not None}
    return tuple((name, tuple(value[row].reshape(-1).tolist())) for name, value in fields.items())


@pytest.mark.parametrize("name", EVERY)
def test_the_same_batches_for_any_layout_and_after_any_resume(name: str, tmp_path: Path) -> None:
    run = a_run(EVERY[name], tmp_path)
    steps = [of_step(run, first, 10, 1, 10) for first in range(0, 60, 10)]
    assert all(len(step) == 10 for step in steps)
    assert steps[0] != steps[1]  # negative control
    for ranks, micro in ((1, 3), (2, 2), (4, 1), (8, 4)):
        again = a_run(EVERY[name], tmp_path)  # a new process: nothing is remembered
        for number in (3, 5, 0):  # a resume at any step
            assert of_step(again, number * 10, 10, ranks, micro) == steps[number]


@pytest.mark.parametrize("name", EVERY)
def test_an_epoch_holds_every_row_once(name: str, tmp_path: Path) -> None:
    run = a_run(EVERY[name], tmp_path)
    rows = run.train[0]
    order = Order(3, [(0, [Dataset(len(rows), 1.0, 5)])])
    for epoch in range(2):
        at = np.arange(epoch * len(rows), (epoch + 1) * len(rows))
        assert np.array_equal(np.sort(order.locate(at)[2]), np.arange(len(rows)))
    # Masks and spans of a second epoch are others; what they hide is the same text.
    alone = Corpora((rows,), (rows,), order, SimpleNamespace(), tmp_path, [], [])
    twice = [alone.step(k * len(rows), len(rows), 0, 1, len(rows))[0][0] for k in (0, 1)]
    rows_of = [order.locate(np.arange(k * len(rows), (k + 1) * len(rows)))[2] for k in (0, 1)]
    sides = [
        batch.tokens_BT[torch.from_numpy(np.argsort(row))]
        for batch, row in zip(twice, rows_of, strict=True)
    ]
    drawn = name.split(",")[0] in ("masked", "span_corruption", "prefix")
    assert torch.equal(*sides) == (not drawn)


def test_measured_rows_are_always_the_same(tmp_path: Path) -> None:
    for name in ("masked", "span_corruption"):
        run = a_run(EVERY[name], tmp_path)
        once = [row_of(b, r) for b in run.validation(20, 0, 1, 7) for r in range(b.rows)]
        halves = [
            row_of(b, r)
            for rank in (0, 1)
            for b in a_run(EVERY[name], tmp_path).validation(20, rank, 2, 3)
            if b.counted
            for r in range(b.rows)
        ]
        assert halves == once


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("room", [7, 32, 100])
def test_packed_rows_hold_every_token_of_every_document_once(room: int) -> None:
    rng = np.random.default_rng(room)
    sizes = rng.integers(1, 60, 500)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    pieces = cut(offsets, room, 0)
    covered = np.concatenate([np.arange(s, s + n) for s, n in zip(*pieces, strict=True)])
    assert np.array_equal(covered, np.arange(offsets[-1]))
    # A document that fits a row is never cut; a longer one as seldom as can be.
    assert len(pieces.start_P) == sum(-(-int(size) // room) for size in sizes)
    plan = best_fit(pieces.length_P, room)
    assert np.array_equal(np.sort(plan.item_P), np.arange(len(pieces.start_P)))
    loads = np.add.reduceat(pieces.length_P[plan.item_P], plan.first_R1[:-1])
    assert loads.max() <= room
    assert loads.sum() == offsets[-1]
    assert loads.sum() / (plan.rows * room) > 0.98
    first, items = plan.of(np.asarray([3, 0, 3]))
    assert items[first[0] : first[1]].tolist() == items[first[2] : first[3]].tolist()
    assert items[first[1]] == plan.item_P[0]


def test_best_fit_is_the_plain_one() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 50, 400).astype(np.int32)
    rows: list[list[int]] = []  # the textbook: longest first, each where the least room is left
    for piece in np.argsort(-lengths, kind="stable").tolist():
        left = [50 - sum(lengths[p] for p in row) - lengths[piece] for row in rows]
        fits = [(room, -number) for number, room in enumerate(left) if room >= 0]
        if fits:
            rows[-min(fits)[1]].append(piece)
        else:
            rows.append([piece])
    plan = best_fit(lengths, 50)
    assert plan.rows == len(rows)


def test_pairs_are_packed_within_both_rooms() -> None:
    rng = np.random.default_rng(4)
    source = rng.integers(1, 100, 3000).astype(np.int32)
    target = (source // 4 + rng.integers(1, 8, 3000)).clip(1, 30).astype(np.int32)
    plan = best_fit_pairs(source, target, 128, 40)
    assert np.array_equal(np.sort(plan.item_P), np.arange(3000))
    for lengths, room, share in ((source, 128, 0.85), (target, 40, 0.7)):
        loads = np.add.reduceat(lengths[plan.item_P], plan.first_R1[:-1])
        assert loads.max() <= room
        assert loads.mean() / room > share


def test_rows_that_lack_the_other_room_do_not_stand_in_the_way() -> None:
    # Sizes nearly alike, targets scarcer: four pairs a row, whatever is left for sources.
    rng = np.random.default_rng(6)
    source = rng.integers(300, 350, 5000).astype(np.int32)
    target = rng.integers(100, 127, 5000).astype(np.int32)
    assert best_fit_pairs(source, target, 2048, 512).rows < 5000 / 4 * 1.02
    assert best_fit_pairs(target, source, 512, 2048).rows < 5000 / 4 * 1.02


def test_a_packed_causal_row_predicts_every_token_but_the_first_of_a_document() -> None:
    rng = np.random.default_rng(5)
    ids = rng.integers(8, 90, 4000).astype(np.uint16)
    ids[rng.random(4000) < 0.04] = EOD
    ids[-1] = EOD
    rows = CausalRows(ArrayIndex(ids), 32, EOD, PAD, packing="best_fit")
    batch = rows.batch(np.arange(len(rows)))
    counts = batch.loss_mask_BT
    assert counts.sum() == 4000 - (ids == EOD).sum()
    predicted = np.sort(batch.targets_BT[counts].numpy())
    first = np.r_[True, ids[:-1] == EOD]
    assert np.array_equal(predicted, np.sort(ids[~first].astype(np.int64)))
    inside = batch.document_ids_BT >= 0
    assert torch.equal(inside.sum(), torch.tensor(4000))
    assert (batch.tokens_BT[~inside] == PAD).all()
    follows = (batch.document_ids_BT[:, 1:] == batch.document_ids_BT[:, :-1]) & inside[:, 1:]
    places = batch.positions_BT
    assert torch.equal(places[:, 1:][follows], places[:, :-1][follows] + 1)
    assert (places[:, 0] == 0).all()
    assert (places[:, 1:][~follows & inside[:, 1:]] == 0).all()
