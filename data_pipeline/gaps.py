"""Where the sentences of a pseudo-summary lie in the tokens of their document.

    text    盘古开天。　女娲补天。\\n后羿射日。
    parts   [盘古开天。][　][女娲补天。][\\n][后羿射日。]      sentences, and the blanks between
    tokens  2 3 9 | | 7 5 9 | 1 | 8 4 9                        each part on its own
    equal?  2 3 9 7 5 9 1 8 4 9                                the document's own tokens

The tokens of kept sentences laid end to end must be slices of the document's: so borders are those
of the parts encoded alone, and only where the parts together are the document's tokens. Tokenizers
that cut words first (cpm, wordpiece) end a word at 。 and at a line break, wherever it stands. A
document where it does not hold has no units, and is counted: byte_bpe has pieces such as 。” that
lie across a border (92 of 400 documents of ten genres); in cpm two ways to cut `1.2` may score
alike, and sentencepiece's sums round by where they stand (1 of 400); wordpiece had none in 400.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_pipeline.pseudo_summary import Unit, pick_batch
from data_pipeline.sidefile import GapUnit


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    def encode_batch(self, texts: Sequence[str], /) -> list[np.ndarray]:
        """The ids of each text."""
        ...


def gap_units(
    texts: Sequence[str], ids: Sequence[np.ndarray], words: Encoder, criterion: str = "lcs"
) -> list[list[GapUnit] | None]:
    """The units of each text with their picks, in tokens of `ids`, the text as `words` encodes it.

    None for a text that has units, but whose tokens lie across the borders of its sentences.
    """
    found = pick_batch(texts, criterion)
    parts = [_parts(text, units) if units else [] for text, units in zip(texts, found, strict=True)]
    flat = [part for cut in parts for part in cut if part]
    encoded = iter(words.encode_batch(flat))
    out: list[list[GapUnit] | None] = []
    for units, cut, whole in zip(found, parts, ids, strict=True):
        pieces = [next(encoded) if part else whole[:0] for part in cut]
        if not units:
            out.append([])
        elif np.array_equal(np.concatenate(pieces), whole):
            out.append(_in_tokens(units, [len(piece) for piece in pieces]))
        else:
            out.append(None)
    return out


def _parts(text: str, units: Sequence[Unit]) -> list[str]:
    """The text cut into: blanks, sentence, blanks, sentence, ..., what is left."""
    parts: list[str] = []
    at = 0
    for unit in units:
        for sentence in unit.segments:
            start = text.find(sentence, at)  # only blanks were stripped between
            assert start >= 0 and not text[at:start].strip()
            parts += [text[at:start], sentence]
            at = start + len(sentence)
    return [*parts, text[at:]]


def _in_tokens(units: Sequence[Unit], sizes: Sequence[int]) -> list[GapUnit]:
    ends = np.cumsum(sizes)
    stops, starts = ends[1:-1:2], ends[0:-2:2]
    out, at = [], 0
    for unit in units:
        rows = slice(at, at + len(unit.segments))
        picked = np.zeros(len(unit.segments), np.bool_)
        picked[unit.picks] = True
        out.append(GapUnit(starts[rows], stops[rows], picked))
        at += len(unit.segments)
    return out
