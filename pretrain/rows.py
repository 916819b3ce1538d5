"""Rows cut out of the stream of tokens, and what a causal model is to predict in them.

    windows    |--- row 0 ---|--- row 1 ---|--- row 2 ---|..       the stream, cut every T tokens
    documents  |[doc 0]......|[doc 1, 1st part]|[doc 1, rest]....|  a piece of one document a row
    best_fit   |[doc 7][doc 2][doc 9].|[doc 1, 1st part]|            pieces packed (packing.py)

A causal row of windows is tokens[r*T : r*T + T + 1): T inputs and the T tokens after them.
Neighbours share one token, a target of the first and an input of the second, so every token but the
first is predicted exactly once an epoch. There are (tokens - 1) // T rows; the fewer than T tokens
behind the last one are left out, never padded. In the other layouts a row ends in padding, and a
document longer than a row is cut; its parts are documents of their own, but the last token of a
part still predicts the first of the next.

Legend: R rows, R1 rows and one, P pieces, B rows of the batch, T tokens of a row.
"""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.batches import Batch, Canvas, read_rows
from pretrain.compiled import compiled, fixed
from pretrain.packing import Pieces, Plan, best_fit, cut, one_each
from pretrain.permutation import Ints, Keys

Packing = Literal["windows", "documents", "best_fit"]


class Tokens(Protocol):
    """What is asked of an index (data_pipeline.index.Index)."""

    @property
    def tokens(self) -> int:
        """Tokens in all documents together."""
        ...

    @property
    def offsets(self) -> NDArray[np.integer]:
        """[documents + 1]: where each document starts in the stream, and the end."""
        ...

    def slice(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens [start, stop) of the stream of all documents."""
        ...


class Layout:
    """Where the tokens of each row lie: pieces of the stream, as the head of this file draws them.

    Args:
        index: the tokens.
        room: tokens of a row that come from the stream.
        beyond: tokens behind a window that its targets need.
        end_tokens: tokens at the end of each document that are left out of pieces.
        frame: tokens that each piece takes beside its own.
        marks: of the tokens; pieces are then cut where sentences begin.
    """

    def __init__(
        self,
        index: Tokens,
        packing: Packing,
        room: int,
        *,
        beyond: int = 0,
        end_tokens: int = 0,
        frame: int = 0,
        marks: NDArray[np.uint8] | None = None,
    ) -> None:
        self.packing, self.room, self.frame = packing, room, frame
        self.pieces: Pieces | None = None
        self.plan: Plan | None = None
        if packing == "windows":
            self.rows = max(int(index.tokens) - beyond, 0) // room
        else:
            offsets = np.asarray(index.offsets)
            sizes = np.diff(offsets) - end_tokens
            self.documents, self.documents_cut = int((sizes > 0).sum()), int((sizes > room).sum())
            self.pieces = cut(offsets, room, end_tokens, marks)
            lengths = self.pieces.length_P
            packed = packing == "best_fit"
            self.plan = (
                best_fit(lengths + np.int32(frame), room + frame)
                if packed
                else one_each(np.arange(len(lengths)))
            )
            self.rows = self.plan.rows

    def of(self, rows: Ints) -> tuple[Ints, Ints, NDArray[np.int32]]:
        """(first [R + 1] into the other two, start [P], length [P]) of the pieces of some rows."""
        if self.pieces is None or self.plan is None:
            lengths = np.full(len(rows), self.room, np.int32)
            return np.arange(len(rows) + 1), rows * self.room, lengths
        first, item = self.plan.of(rows)
        return first, self.pieces.start_P[item], self.pieces.length_P[item]

    def about(self) -> dict[str, int | float | str]:
        """What a run says of its rows: how full they are, how many documents had to be cut."""
        said: dict[str, int | float | str] = {"packing": self.packing, "rows": self.rows}
        if self.pieces is None:
            return said
        lengths = self.pieces.length_P.astype(np.int64)
        filled = int(lengths.sum()) + self.frame * len(lengths)
        total = max(self.rows * (self.room + self.frame), 1)
        return said | {
            "pieces": len(lengths),
            "documents": self.documents,
            "documents_cut": self.documents_cut,
            "filled": filled / total,
        }


class CausalRows:
    """The causal rows of one index; see the head of this file for what a row is.

    `eod_id` ends every document of the index; `pad_id` is padding. With document boundaries a
    document begins behind every end: positions restart there, attention does not look across, and
    its first token is not predicted (the end before it says nothing about it); the end itself is.
    Without them a row is one stream, every target counts, attention is plainly causal (document_ids
    None); that needs windows. ValueError for too little text.
    """

    def __init__(
        self,
        index: Tokens,
        seq_len: int,
        eod_id: int,
        pad_id: int,
        document_boundaries: bool = True,
        packing: Packing = "windows",
    ) -> None:
        assert document_boundaries or packing == "windows"  # the config says so
        self.index, self.seq_len = index, seq_len
        self.eod_id, self.pad_id = eod_id, pad_id
        self.document_boundaries = document_boundaries
        self.layout = Layout(index, packing, seq_len, beyond=1)
        self._stream = stream_of(index)
        check_rows(self.layout.rows, index, seq_len, seq_len + 1)

    def __len__(self) -> int:
        return self.layout.rows

    def canvas(self, rows: int) -> Canvas:
        """Room for so many rows."""
        return Canvas.of(rows, self.seq_len, self.document_boundaries)

    def fill(self, rows: Ints, keys: Keys, at: Ints, canvas: Canvas) -> None:
        """Write the rows into rows `at` of the canvas; nothing is drawn, `keys` are not used."""
        documents = canvas.documents_BT
        _causal(
            self._stream, *self.layout.of(rows), at,
            self.eod_id, self.pad_id, documents is not None,
            canvas.tokens_BT, canvas.targets_BT, canvas.counts_BT, canvas.positions_BT,
            NO_DOCUMENTS if documents is None else documents,
        )  # fmt: skip

    def about(self) -> dict[str, int | float | str]:
        """What a run says of its rows."""
        return self.layout.about()

    def batch(self, rows: Ints) -> Batch:
        """The rows as one batch; no rows give the empty batch."""
        return read_rows([self], np.zeros(len(rows), np.int32), rows)


NO_DOCUMENTS = np.empty((0, 0), np.int64)


def stream_of(index: Tokens) -> NDArray[np.integer]:
    """All tokens of an index as a kernel takes them; a mapped file stays one."""
    return fixed(index.slice(0, int(index.tokens)))


def check_rows(rows: int, index: Tokens, seq_len: int, needed: int) -> None:
    """ValueError for an index that does not fill one row."""
    if rows < 1:
        raise ValueError(
            f"data: the index has {index.tokens} tokens, a row of data.seq_len={seq_len} "
            f"needs {needed}; add text or lower data.seq_len "
            "(语料不足一行, 请增加语料或减小 seq_len)"
        )


@compiled
def _causal(  # type: ignore[no-untyped-def]
    stream, first_R1, start_P, length_P, at_R, eod, pad, boundaries,
    tokens_BT, targets_BT, counts_BT, positions_BT, documents_BT,
):  # fmt: skip
    # Slices, not sums of indexes: so numba sees that none is negative, and vectorises.
    last = len(stream) - 1
    for r in range(len(at_R)):
        b, t, document = at_R[r], 0, -1
        for p in range(first_R1[r], first_R1[r + 1]):
            length = np.int64(length_P[p])
            source_L = stream[start_P[p] : start_P[p] + length]
            token_L, target_L = tokens_BT[b, t : t + length], targets_BT[b, t : t + length]
            count_L, position_L = counts_BT[b, t : t + length], positions_BT[b, t : t + length]
            for i in range(length):
                token_L[i] = source_L[i]
            target_L[: length - 1] = token_L[1:]
            target_L[length - 1] = stream[min(start_P[p] + length, last)]
            if boundaries:
                document_L = documents_BT[b, t : t + length]
                document = _documents(source_L, eod, document, count_L, position_L, document_L)
            else:
                count_L[:] = True
                for i in range(length):
                    position_L[i] = t + i
            t += length
        tokens_BT[b, t:] = pad
        targets_BT[b, t:] = pad
        counts_BT[b, t:] = False
        for i in range(t, tokens_BT.shape[1]):
            positions_BT[b, i] = i
            documents_BT[b, i] = -1  # boundaries: windows without them have no padding


@compiled
def _documents(token_L, eod, document, count_L, position_L, document_L):  # type: ignore[no-untyped-def]
    """What is counted, positions and documents of a piece; `document` was the last one's number."""
    begin = 0
    while begin < len(token_L):
        stop = begin
        while stop < len(token_L) and token_L[stop] != eod:
            stop += 1
        document += 1
        count_L[begin:stop] = True
        if stop < len(token_L):
            count_L[stop] = False
            stop += 1
        document_L[begin:stop] = document
        place_L = position_L[begin:stop]
        for i in range(len(place_L)):
            place_L[i] = i
        begin = stop
    return document
