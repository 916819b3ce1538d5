"""Promise: batches show every token of an index, with the positions, documents and losses that a
plain loop over the tokens finds; any split of a step holds the same samples."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pretrain.batches import Prefetcher, read_rows, step_samples
from pretrain.rows import CausalRows
from tests.windows import EOD, PAD, an_index, causal_batch, empty_batch


def test_rows_cover_the_stream_and_every_target_comes_once() -> None:
    index = an_index(101)
    rows = CausalRows(index, 10, EOD, PAD, document_boundaries=False)
    assert len(rows) == 10
    batch = rows.batch(np.arange(10))
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.tokens_BT.flatten().tolist() == index.ids[:100].tolist()
    assert batch.targets_BT.flatten().tolist() == index.ids[1:101].tolist()
    assert batch.loss_mask_BT.all()
    assert batch.counted == 100
    assert batch.document_ids_BT is None
    assert batch.positions_BT.tolist() == [list(range(10))] * 10
    # A last window short of a token is dropped, and one token more completes it.
    assert len(CausalRows(an_index(100), 10, EOD, PAD)) == 9
    assert rows.batch(np.asarray([3, 3, 9])).rows == 3


def test_documents_are_what_a_plain_loop_finds() -> None:
    windows = an_index(4 * 33, seed=3).ids.astype(np.int64).reshape(4, 33)
    windows[0, :3] = EOD  # empty documents at the head of a row
    batch = causal_batch(windows, EOD, True)
    assert batch.document_ids_BT is not None
    for row in range(4):
        position = document = 0
        for at in range(32):
            token, target = windows[row, at], windows[row, at + 1]
            assert batch.tokens_BT[row, at] == token
            assert batch.targets_BT[row, at] == target
            assert batch.positions_BT[row, at] == position
            assert batch.document_ids_BT[row, at] == document
            # The end of a document is predicted; the first token behind it is not.
            assert batch.loss_mask_BT[row, at] == (token != EOD)
            position, document = (0, document + 1) if token == EOD else (position + 1, document)
    at = batch.loss_mask_BT.flatten().nonzero().flatten()
    assert torch.equal(batch.loss_at_N, at)


def test_rows_of_several_datasets_come_in_the_order_asked() -> None:
    a = CausalRows(an_index(300, 1), 16, EOD, PAD)
    b = CausalRows(an_index(200, 2), 16, EOD, PAD)
    dataset, row = np.asarray([1, 0, 0, 1, 0]), np.asarray([3, 2, 11, 0, 0])
    mixed = read_rows([a, b], dataset, row)
    for i in range(5):
        alone = (a, b)[dataset[i]].batch(row[i : i + 1])
        assert torch.equal(mixed.tokens_BT[i], alone.tokens_BT[0])
        assert torch.equal(mixed.targets_BT[i], alone.targets_BT[0])
        assert torch.equal(mixed.positions_BT[i], alone.positions_BT[0])


def test_a_batch_of_nothing_counts_nothing() -> None:
    for boundaries in (True, False):
        batch = CausalRows(an_index(300), 16, EOD, PAD, boundaries).batch(np.empty(0, np.int64))
        assert batch.tokens_BT.shape == (1, 16)
        assert not batch.loss_mask_BT.any()
        assert batch.counted == 0
        assert (batch.tokens_BT == PAD).all()
    assert (empty_batch(4, PAD, True).document_ids_BT == -1).all()


def test_too_little_text_and_rows_out_of_range_are_sentences() -> None:
    with pytest.raises(ValueError, match=r"has 16 tokens.*seq_len=16 needs 17"):
        CausalRows(an_index(16), 16, EOD, PAD)
    assert len(CausalRows(an_index(17), 16, EOD, PAD)) == 1
    with pytest.raises(IndexError, match="rows 1 to 1 of 1"):
        CausalRows(an_index(17), 16, EOD, PAD).batch(np.asarray([1]))


def test_to_a_device_and_back_changes_nothing() -> None:
    batch = CausalRows(an_index(300), 16, EOD, PAD).batch(np.arange(3))
    there = batch.to("cpu")
    assert torch.equal(there.tokens_BT, batch.tokens_BT)
    assert there.encoder_tokens_BT is None
    assert batch.to("meta").tokens_BT.is_meta


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 16, 23])
def test_any_split_of_a_step_holds_the_same_samples(count: int) -> None:
    for size in (1, 2, 3, 8):
        for micro in (1, 2, 4, 100):
            ranks = [step_samples(50, count, rank, size, micro) for rank in range(size)]
            assert len({len(parts) for parts in ranks}) == 1  # as many micro-batches everywhere
            assert all(len(part) <= micro for parts in ranks for part in parts)
            every = [s for parts in ranks for part in parts for s in part.tolist()]
            assert every == list(range(50, 50 + count))
            sizes = [sum(map(len, parts)) for parts in ranks]
            assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- the prefetcher


def alive() -> int:
    return sum(t.name == "prefetch" for t in threading.enumerate())


def test_prefetched_items_are_the_items() -> None:
    with Prefetcher(range(50), depth=3) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    assert alive() == 0


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    got = []
    with Prefetcher(broken(), depth=5) as items, pytest.raises(OSError, match="the disk is gone"):
        for item in items:
            got.append(item)
    assert got == [1, 2]
    assert alive() == 0


def test_leaving_early_stops_the_thread_and_closes_the_source() -> None:
    closed = threading.Event()
    produced = []

    def endless() -> Iterator[int]:
        try:
            while True:
                produced.append(len(produced))
                yield produced[-1]
        finally:
            closed.set()

    with Prefetcher(endless(), depth=2) as items:
        assert next(items) == 0
        time.sleep(0.05)
        assert len(produced) <= 4  # one taken, two waiting, one in hand
    assert closed.is_set()
    assert alive() == 0
    abandoned = Prefetcher(endless(), depth=1)
    next(abandoned)
    del abandoned
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive() == 0
