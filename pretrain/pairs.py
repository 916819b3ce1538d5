"""Rows of an encoder and a decoder: pairs of a source and a target, one or several in a row.

    what a pair is (contents.py)        source tokens           target tokens
    encoder's row  [S]   [CLS] source [SEP] [CLS] source [SEP] ..       documents 0 0 0 1 1 1 -1
    decoder's row  [T]   [CLS] target       [CLS] target       ..       documents 0 0   1 1    1
    its targets          target [SEP]       target [SEP]                every one counts

What is longer than its room is cut off in front of [SEP], as bert4keras does. A position sees its
own pair only, on both sides; positions begin anew with each. Padding of the encoder is document -1;
padding of the decoder belongs to the row's last pair, so that every position of the decoder has
something in the encoder to look at (a softmax over nothing is NaN): nobody sees it, as it stands
behind the pair. A tokenizer without [CLS] leaves the source without one, and the decoder begins
with padding, as mT5's does.

Legend: R rows, P pairs, B rows of the batch, S and T tokens of an encoder's and a decoder's row.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.batches import Batch, Canvas, read_rows
from pretrain.compiled import compiled
from pretrain.masking import Controls
from pretrain.packing import Plan, best_fit_pairs, one_each
from pretrain.permutation import Ints, Keys
from pretrain.rows import Packing, Tokens

Sizes = NDArray[np.int32]


class Contents(Protocol):
    """The pairs of one index, for one objective (contents.py)."""

    source_room: int
    """Tokens of the longest source, its frame left out."""
    target_room: int
    """Tokens of the longest target, its frame left out."""

    def __len__(self) -> int:
        """Pairs that there are; some may be empty."""
        ...

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Tokens of every source and target, cut to their rooms; 0, 0: there is no such pair."""
        ...

    def write(
        self, items: Ints, keys: Keys, source_PX: Ints, target_PX: Ints
    ) -> tuple[Sizes, Sizes]:
        """Write the pairs and say how many tokens each source and target has."""
        ...


class PairRows:
    """The rows of pairs of one index. ValueError if it has none."""

    def __init__(
        self,
        index: Tokens,
        contents: Contents,
        seq_len: int,
        target_len: int,
        controls: Controls,
        packing: Packing,
    ) -> None:
        self.index, self.contents, self.controls = index, contents, controls
        self.seq_len, self.target_len, self.pad_id = seq_len, target_len, controls.pad
        self.packing = packing
        self.plan: Plan | None = None
        self._rows = len(contents)
        source, target = contents.sizes() if packing != "windows" else (None, None)
        if source is not None and target is not None:
            items = np.flatnonzero((source > 0) & (target > 0))
            frame = frame_of(controls)
            source, target = source[items] + np.int32(frame), target[items] + np.int32(1)
            self.plan = one_each(items)
            if packing == "best_fit":
                plan = best_fit_pairs(source, target, seq_len, target_len)
                self.plan = Plan(plan.first_R1, items[plan.item_P])
            self._rows = self.plan.rows
            self._filled = int(source.sum()) + int(target.sum())
        if self._rows < 1:
            raise ValueError(
                f"data: the index of {index.tokens} tokens has no pair of a source and a target; "
                "add text, or choose another objective (没有可用的源和目标)"
            )

    def __len__(self) -> int:
        return self._rows

    def about(self) -> dict[str, int | float | str]:
        """What a run says of its rows: pairs, and how full the rows are."""
        if self.plan is None:
            return {"packing": self.packing, "rows": self._rows, "pairs": self._rows}
        total = self._rows * (self.seq_len + self.target_len)
        pairs = len(self.plan.item_P)
        return {
            "packing": self.packing,
            "rows": self._rows,
            "pairs": pairs,
            "filled": self._filled / total,
        }

    def canvas(self, rows: int) -> Canvas:
        """Room for so many rows."""
        return Canvas.of(rows, self.target_len, True, self.seq_len)

    def fill(self, rows: Ints, keys: Keys, at: Ints, canvas: Canvas) -> None:
        """Write the rows into rows `at` of the canvas, each drawn by its key."""
        first, items = self.plan.of(rows) if self.plan else (np.arange(len(rows) + 1), rows)
        keys = np.repeat(keys, np.diff(first))
        source = np.empty((len(items), self.contents.source_room), np.int64)
        target = np.empty((len(items), self.contents.target_room), np.int64)
        sizes = self.contents.write(items, keys, source, target)
        ids = self.controls
        _place(
            first, source, target, *sizes, at,
            -1 if ids.bos is None else ids.bos, ids.eod, ids.pad,
            canvas.tokens_BT, canvas.targets_BT, canvas.counts_BT, canvas.positions_BT,
            canvas.documents_BT, canvas.encoder_tokens_BS, canvas.encoder_positions_BS,
            canvas.encoder_documents_BS,
        )  # fmt: skip

    def batch(self, rows: Ints, keys: Keys | None = None) -> Batch:
        """The rows as one batch; no rows give the empty batch."""
        return read_rows([self], np.zeros(len(rows), np.int32), rows, keys)


def frame_of(controls: Controls) -> int:
    """Tokens around a source: the end, and [CLS] where there is one."""
    return 1 + (controls.bos is not None)


@compiled
def _place(  # type: ignore[no-untyped-def]
    first_R1, source_PX, target_PX, source_P, target_P, at_R, bos, eod, pad,
    tokens_BT, targets_BT, counts_BT, positions_BT, documents_BT,
    encoder_tokens_BS, encoder_positions_BS, encoder_documents_BS,
):  # fmt: skip
    for r in range(len(at_R)):
        b, s, t = at_R[r], 0, 0
        tokens_S, positions_S = encoder_tokens_BS[b], encoder_positions_BS[b]
        documents_S = encoder_documents_BS[b]
        tokens_T, targets_T, positions_T = tokens_BT[b], targets_BT[b], positions_BT[b]
        documents_T, counts_T = documents_BT[b], counts_BT[b]
        document = 0
        for p in range(first_R1[r], first_R1[r + 1]):
            document = p - first_R1[r]
            begin = s
            if bos >= 0:
                tokens_S[s] = bos
                s += 1
            for i in range(source_P[p]):
                tokens_S[s + i] = source_PX[p, i]
            s += source_P[p]
            tokens_S[s] = eod
            s += 1
            for i in range(begin, s):
                positions_S[i], documents_S[i] = i - begin, document
            begin = t
            tokens_T[t] = bos if bos >= 0 else pad
            for i in range(target_P[p]):
                tokens_T[t + 1 + i] = target_PX[p, i]
                targets_T[t + i] = target_PX[p, i]
            t += target_P[p] + 1
            targets_T[t - 1] = eod
            for i in range(begin, t):
                positions_T[i], documents_T[i], counts_T[i] = i - begin, document, True
        for i in range(s, len(tokens_S)):
            tokens_S[i], positions_S[i], documents_S[i] = pad, i, -1
        for i in range(t, len(tokens_T)):
            tokens_T[i], targets_T[i], positions_T[i] = pad, pad, i
            documents_T[i], counts_T[i] = document, False
