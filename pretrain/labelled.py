"""Rows of labelled texts: a document or a pair of its fields, the label where its [CLS] stands.

    .fields   document: a = tokens [0, 5), b = tokens [6, 9), label 1
    row       [CLS] a a a a a [SEP] b b b [SEP]  [CLS] a a [SEP] b b [SEP]  pad pad
    segments    0   0 0 0 0 0   0   1 1 1   1      0   0 0   0   1 1   1
    documents   0   0 0 0 0 0   0   0 0 0   0      1   1 1   1   1 1   1     -1  -1
    targets     1                                  0                         (counts at [CLS])

What is too long loses tokens of the longer text until the rest fits, as bert4keras does it. Several
documents stand in a row (best_fit) or one with padding (documents); a position sees its own only,
so both give the same sums. A document without a label is left out.

Legend: D documents, P documents of rows, T tokens of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.batches import PADDING, Batch, Canvas, read_rows
from pretrain.masking import Controls
from pretrain.packing import Plan, best_fit, one_each
from pretrain.permutation import Ints, Keys
from pretrain.rows import Packing, Tokens, stream_of

Tables = Mapping[str, NDArray]


def label_names(record: Mapping[str, Any]) -> list[str]:
    """What the labels of a checkpoint are called, by number; empty where its record does not say:
    those of the corpus that it learnt last, or those of the file that it came from."""
    known = [entry.get("objective", {}).get("labels") for entry in record.get("data", [])]
    return list((known[-1] if known else None) or record.get("labels", []))


class LabelRows:
    """The rows of labelled documents of one index. ValueError if it has none.

    Args:
        tables: those of PREFIX.fields.
        known: the names of its fields.
        labels: the names of its labels, in the order of their numbers.
        fields: which fields are read; none: all of `known`, which may be none.
    """

    def __init__(
        self,
        index: Tokens,
        tables: Tables,
        known: Sequence[str],
        labels: Sequence[str],
        fields: Sequence[str],
        seq_len: int,
        controls: Controls,
        packing: Packing,
    ) -> None:
        self.index, self.controls, self.pad_id = index, controls, controls.pad
        self.seq_len, self.packing, self.labels = seq_len, packing, tuple(labels)
        self._stream, self._label_D = stream_of(index), np.asarray(tables["labels"])
        offsets = np.asarray(index.offsets, np.int64)
        if len(self._label_D) != len(offsets) - 1:
            raise ValueError(
                f"data: the side file speaks of {len(self._label_D)} documents, the index has "
                f"{len(offsets) - 1}; build the corpus again (附属文件与索引不符)"
            )
        names = list(fields or known)
        self._base_D, self.segments = offsets[:-1], max(len(names), 1)
        self._start_D2, self._size_D2 = _sides(tables, known, names, np.diff(offsets))
        self.cut = fit(self._size_D2, seq_len - 1 - self.segments)
        there = (self._size_D2[:, : self.segments] > 0).all(1) & (self._label_D >= 0)
        items = np.flatnonzero(there)
        if not len(items) or seq_len < 2 + 2 * self.segments:
            raise ValueError(
                f"data: the index of {len(offsets) - 1} documents has none with a label and "
                f"{' and '.join(names) or 'text'} that goes into data.seq_len={seq_len}; name the "
                "fields in objective.fields, or raise data.seq_len (没有带标签的文本)"
            )
        sizes = (self._size_D2[items].sum(1) + 1 + self.segments).astype(np.int32)
        self.plan, self._filled = one_each(items), int(sizes.sum())
        if packing == "best_fit":
            packed = best_fit(sizes, seq_len)
            self.plan = Plan(packed.first_R1, items[packed.item_P])

    def __len__(self) -> int:
        return self.plan.rows

    def about(self) -> dict[str, int | float | str]:
        """What a run says of its rows: how full, how many documents were cut."""
        return {
            "packing": self.packing,
            "rows": len(self),
            "documents": len(self.plan.item_P),
            "documents_cut": int(self.cut[self.plan.item_P].sum()),
            "filled": self._filled / (len(self) * self.seq_len),
        }

    def canvas(self, rows: int) -> Canvas:
        """Room for so many rows."""
        return Canvas.of(rows, self.seq_len, True, segments=True)

    def fill(self, rows: Ints, keys: Keys, at: Ints, canvas: Canvas) -> None:
        """Write the rows into rows `at` of the canvas; nothing is drawn."""
        assert canvas.documents_BT is not None and canvas.segments_BT is not None
        first_R1, items = self.plan.of(rows)
        bos, eod = self.controls.bos, self.controls.eod
        for r, b in enumerate(at.tolist()):
            tokens_T, positions_T = canvas.tokens_BT[b], canvas.positions_BT[b]
            documents_T, segments_T = canvas.documents_BT[b], canvas.segments_BT[b]
            canvas.targets_BT[b], canvas.counts_BT[b], t = self.pad_id, False, 0
            for number, item in enumerate(items[first_R1[r] : first_R1[r + 1]].tolist()):
                begin, tokens_T[t] = t, bos
                canvas.targets_BT[b, t], canvas.counts_BT[b, t] = self._label_D[item], True
                segments_T[t] = 0
                t += 1
                for side in range(self.segments):
                    size = int(self._size_D2[item, side])
                    source = int(self._base_D[item] + self._start_D2[item, side])
                    tokens_T[t : t + size] = self._stream[source : source + size]
                    tokens_T[t + size] = eod
                    segments_T[t : t + size + 1] = side
                    t += size + 1
                positions_T[begin:t], documents_T[begin:t] = np.arange(t - begin), number
            tokens_T[t:], documents_T[t:], segments_T[t:] = self.pad_id, PADDING, 0
            positions_T[t:] = np.arange(t, self.seq_len)

    def batch(self, rows: Ints, keys: Keys | None = None) -> Batch:
        """The rows as one batch; no rows give the empty batch."""
        return read_rows([self], np.zeros(len(rows), np.int32), rows, keys)


def _sides(
    tables: Tables, known: Sequence[str], names: Sequence[str], length_D: Ints
) -> tuple[Ints, Ints]:
    """[D, 2] first tokens, from the document's start, and sizes of what is read of each document;
    of several spans of one name the first; size 0: it is not there."""
    start, size = np.zeros((2, len(length_D), 2), np.int64)
    if not names:
        size[:, 0] = np.maximum(length_D - 1, 0)  # the end of the document apart
        return start, size
    document_S = np.repeat(np.arange(len(length_D)), np.asarray(tables["spans"], np.int64))
    for side, name in enumerate(names):
        mine = np.flatnonzero(np.asarray(tables["names"]) == list(known).index(name))
        documents, first = np.unique(document_S[mine], return_index=True)
        spans = mine[first]
        start[documents, side] = tables["starts"][spans]
        size[documents, side] = (
            np.asarray(tables["stops"], np.int64)[spans] - start[documents, side]
        )
    return start, size


def fit(size_D2: Ints, room: int) -> NDArray[np.bool_]:
    """Cut in place what does not go into `room`: tokens of the longer text, of the first where they
    are alike, one by one; which documents were cut."""
    a_D, b_D = size_D2[:, 0].copy(), size_D2[:, 1].copy()
    cut_D = a_D + b_D > room
    b_D = np.where(cut_D, np.minimum(b_D, np.maximum(room - a_D, -(-room // 2))), b_D)
    size_D2[:, 1] = b_D
    size_D2[:, 0] = np.minimum(a_D, np.maximum(room - b_D, 0))
    return cut_D
