"""Rows for masked language modelling: whole words or tokens hidden, kept or replaced at random.

    stream      今 天 | 天 气 | 很 | 好        | begins a word (.marks)
    row   [CLS] 今 天   天 气   很   好 [SEP]
    draw                 r                    one number a word or a token, out of (seed, g, place)
    input [CLS] 今 天   [M][M]  很   好 [SEP]   r < .8 x ratio: hidden; < .9: as it is; < 1: another
    counts               *  *

A row has its layout as in rows.py; each of its pieces stands between [CLS] and the end of a
document ([SEP]), where the tokenizer has them, as the published rows did. What is drawn is a
function of the run's seed and the sample's place in the stream alone, so every epoch hides others.

Sources: `token` WoBERT's and RoFormer's train.py; `word` RoFormerV2's train_mlm.py; `word_token`
bert4keras' pretraining/ (RoBERTa).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.batches import Batch, Canvas, read_rows
from pretrain.compiled import compiled, fixed
from pretrain.permutation import Ints, Keys
from pretrain.rows import NO_DOCUMENTS, Layout, Packing, Tokens, check_rows, stream_of

WORD = np.uint8(1)
"""The mark of a token that begins a word (data_pipeline/sidefile.py)."""
NO_MARKS = np.empty(0, np.uint8)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S11, _S27, _S30, _S31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)
_DRAWS = 3
"""Numbers set aside for a place: its word's fate, its own, another token."""


@dataclass(frozen=True)
class Controls:
    """The ids that are no text."""

    eod: int
    """Ends a document; [SEP]."""
    pad: int
    """Padding."""
    mask: int
    """Stands for what is hidden."""
    bos: int | None
    """Begins a piece; [CLS]; None: the tokenizer has none."""
    vocab: int
    """Ids of the tokenizer: replacements are drawn below."""


class MaskedRows:
    """The rows of one index for a masked language model.

    `marks` of the tokens decide what a word is; masking="token" in windows needs none. ValueError
    for too little text.
    """

    def __init__(
        self,
        index: Tokens,
        seq_len: int,
        controls: Controls,
        marks: NDArray[np.uint8] | None = None,
        *,
        masking: Literal["token", "word", "word_token"] = "word",
        ratio: float = 0.15,
        mask_special: bool = False,
        document_boundaries: bool = True,
        packing: Packing = "windows",
    ) -> None:
        assert document_boundaries or packing == "windows"  # the config says so
        assert marks is not None or masking == "token"
        self.index, self.seq_len, self.controls = index, seq_len, controls
        self.pad_id, self.document_boundaries = controls.pad, document_boundaries
        self.words, self.ratio, self.mask_special = masking != "token", ratio, mask_special
        self.own_draws = masking == "word_token"
        frame = 1 + (controls.bos is not None)
        self.layout = Layout(
            index, packing, max(seq_len - frame, 1), end_tokens=1, frame=frame, marks=marks
        )
        self._stream = stream_of(index)
        self._marks = fixed(NO_MARKS if marks is None or not self.words else marks)
        check_rows(self.layout.rows if seq_len > frame else 0, index, seq_len, frame + 1)

    def __len__(self) -> int:
        return self.layout.rows

    def canvas(self, rows: int) -> Canvas:
        """Room for so many rows."""
        return Canvas.of(rows, self.seq_len, self.document_boundaries)

    def fill(self, rows: Ints, keys: Keys, at: Ints, canvas: Canvas) -> None:
        """Write the rows into rows `at` of the canvas, each drawn by its key."""
        documents, ids = canvas.documents_BT, self.controls
        _framed(
            self._stream, self._marks, *self.layout.of(rows), at,
            ids.eod, ids.pad, -1 if ids.bos is None else ids.bos, documents is not None,
            canvas.tokens_BT, canvas.positions_BT,
            NO_DOCUMENTS if documents is None else documents,
            begins := np.empty((len(rows), self.seq_len), np.uint8),
        )  # fmt: skip
        _hide(
            keys, at, begins, self.ratio, self.own_draws, self.mask_special,
            ids.mask, 0 if self.own_draws else 1, ids.vocab,
            canvas.tokens_BT, canvas.targets_BT, canvas.counts_BT,
        )  # fmt: skip

    def about(self) -> dict[str, int | float | str]:
        """What a run says of its rows."""
        return self.layout.about()

    def batch(self, rows: Ints, keys: Keys | None = None) -> Batch:
        """The rows as one batch; no rows give the empty batch."""
        return read_rows([self], np.zeros(len(rows), np.int32), rows, keys)


_INSIDE, _BEGINS, _SPECIAL, _NOTHING = 0, 1, 2, 3
"""What a place is to the draws: inside a word, its beginning, a control token, padding."""


@compiled
def _framed(  # type: ignore[no-untyped-def]
    stream, marks, first_R1, start_P, length_P, at_R, eod, pad, bos, boundaries,
    tokens_BT, positions_BT, documents_BT, begins_RT,
):  # fmt: skip
    """The rows as they are before anything is hidden, and what each place is to the draws."""
    words = len(marks) > 0
    for r in range(len(at_R)):
        b, t, document = at_R[r], 0, -1
        tokens_T, positions_T, begins_T = tokens_BT[b], positions_BT[b], begins_RT[r]
        for p in range(first_R1[r], first_R1[r + 1]):
            begin, length = t, np.int64(length_P[p])
            document += 1
            if bos >= 0:
                tokens_T[t], begins_T[t] = bos, _SPECIAL
                t += 1
            source = start_P[p]
            ended = True  # the first token of a piece begins a word, if only what is left of it
            for i in range(length):
                token = np.int64(stream[source + i])
                tokens_T[t + i] = token
                if token == eod:
                    begins_T[t + i], ended = _SPECIAL, True
                elif ended or not words or marks[source + i] & WORD:
                    begins_T[t + i], ended = _BEGINS, False
                else:
                    begins_T[t + i] = _INSIDE
            t += length
            tokens_T[t], begins_T[t] = eod, _SPECIAL
            t += 1
            if boundaries:
                place = 0
                for i in range(begin, t):
                    positions_T[i], documents_BT[b, i] = place, document
                    place += 1
                    if tokens_T[i] == eod and i < t - 2:  # the frame's own [SEP] stays with it
                        document, place = document + 1, 0
            else:
                for i in range(begin, t):
                    positions_T[i] = i
        for i in range(t, len(tokens_T)):
            tokens_T[i], positions_T[i], begins_T[i] = pad, i, _NOTHING
            if boundaries:
                documents_BT[b, i] = -1


@compiled
def _draw(key, number):  # type: ignore[no-untyped-def]
    """The `number`-th 64 random bits of a key (splitmix64)."""
    x = key + _GOLDEN * np.uint64(number + 1)
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


@compiled
def _share(key, number):  # type: ignore[no-untyped-def]
    """The same as a number in [0, 1)."""
    return np.float64(_draw(key, number) >> _S11) * 2.0**-53


@compiled
def _hide(  # type: ignore[no-untyped-def]
    key_R, at_R, begins_RT, ratio, own_draws, special, mask, lowest, vocab,
    tokens_BT, targets_BT, counts_BT,
):  # fmt: skip
    for r in range(len(at_R)):
        key, begins_T = key_R[r], begins_RT[r]
        tokens_T, targets_T = tokens_BT[at_R[r]], targets_BT[at_R[r]]
        counts_T = counts_BT[at_R[r]]
        fate = 1.0
        for t in range(len(tokens_T)):
            targets_T[t] = tokens_T[t]
            kind = begins_T[t]
            if kind == _BEGINS or (kind == _SPECIAL and special):
                fate = _share(key, _DRAWS * t) / ratio
            elif kind != _INSIDE:
                fate = 1.0
            counts_T[t] = fate < 1.0
            if fate < 1.0:
                own = _share(key, _DRAWS * t + 1) if own_draws else fate
                if own < 0.8:
                    tokens_T[t] = mask
                elif own >= 0.9:
                    other = _share(key, _DRAWS * t + 2) * (vocab - lowest)
                    tokens_T[t] = lowest + np.int64(other)
