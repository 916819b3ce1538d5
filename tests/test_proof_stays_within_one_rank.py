"""What a proof computes on one CPU is bounded by the row's length; its verdict outlives a start.

Attention in float64 over a row of 16,384 is 137 GB at 32 heads: such a batch is left out, in words.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain import probes, proof, start
from pretrain.growth import grow
from tests.growing import TINY, trained


class _Rows:
    """Measured rows of these lengths; more than the first asked for is read by nobody."""

    def __init__(self, decoder: int, encoder: int | None) -> None:
        self._sizes = decoder, encoder

    def validation(self, count: int, *_: int) -> Iterator[Any]:
        decoder, encoder = self._sizes
        tokens = None if encoder is None else torch.zeros(count, encoder, dtype=torch.int64)
        of = torch.zeros(count, decoder, dtype=torch.int64)
        return itertools.repeat(SimpleNamespace(tokens_BT=of, encoder_tokens_BT=tokens))


@pytest.mark.parametrize(
    ("decoder", "encoder", "rows"),
    [(512, None, 4), (4096, None, 1), (128, 1024, 2), (4097, None, 0), (64, 8192, 0)],
)
def test_a_batch_is_as_long_as_one_rank_can_hold(
    decoder: int, encoder: int | None, rows: int
) -> None:
    found = probes.recorded(_Rows(decoder, encoder), None, 64)
    if rows:
        assert not isinstance(found, str) and found.about["rows"] == rows
        return
    assert isinstance(found, str) and f"a row has {max(decoder, encoder or 0)} tokens" in found


def test_a_proof_without_a_batch_says_why() -> None:
    before = trained()
    after = grow(before, TINY, 1)
    tokens_BT = torch.arange(12).view(2, 6)
    found = proof.prove(before, after, tokens_BT, batch="the rows are too long")
    assert found["batch"] == {"none": "the rows are too long"}
    assert "loss on probes" in proof.sentence(found)


def test_a_failed_proof_is_there_for_the_user_after_the_next_start(tmp_path: Path) -> None:
    """Half-written states go; one that was proven wrong was the only evidence."""
    failed, half = (tmp_path / f".stage-01-step-0000000{n}.growing" for n in (5, 6))
    for folder in (failed, half):
        folder.mkdir()
    (failed / "proof.json").write_text("{}")
    start._clear(tmp_path, math.inf)
    assert (failed / "proof.json").exists() and not half.exists()
