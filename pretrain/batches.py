"""Rows of token indexes -> batches.

    order.locate(samples)         Index.slice (a memmap view)
        |  dataset, row               |
        v                             v
    windows [B, T+1] --- causal_batch: positions, documents, what counts ---> Batch of [B, T]

A causal row r of an index is the window tokens[r*T : r*T + T + 1): T inputs and the T tokens after
them. Neighbours share one token, which is a target of the first and an input of the second, so
every token but the first is predicted exactly once an epoch. There are (tokens - 1) // T rows; the
fewer than T tokens behind the last one are left out, never padded.

Legend: B rows, T tokens of a row, N positions whose loss counts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.order import Ints

PADDING = -1
"""Document id of padding: it sees, and is seen by, padding only."""


class Tokens(Protocol):
    """What is asked of an index (data_pipeline.index.Index)."""

    @property
    def tokens(self) -> int:
        """Tokens in all documents together."""
        ...

    def slice(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens [start, stop) of the stream of all documents."""
        ...


@dataclass(frozen=True)
class Batch:
    """Rows for one forward; what an objective does not use is None."""

    tokens_BT: torch.Tensor
    """int64: inputs."""
    targets_BT: torch.Tensor
    """int64: what is to be predicted at each position."""
    loss_mask_BT: torch.Tensor
    """bool: positions whose loss counts."""
    positions_BT: torch.Tensor
    """int64: place in the document (or in the row, without document boundaries)."""
    document_ids_BT: torch.Tensor | None = None
    """int64: a position sees its own document only; -1 is padding; None: a row is one document."""
    loss_at_N: torch.Tensor | None = None
    """int64: the flat positions where loss_mask is true, known here so that no GPU is asked."""
    encoder_tokens_BT: torch.Tensor | None = None
    """int64: the same for an encoder's side."""
    encoder_positions_BT: torch.Tensor | None = None
    """int64: the same for an encoder's side."""
    encoder_document_ids_BT: torch.Tensor | None = None
    """int64: the same for an encoder's side."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.tokens_BT.shape[0]

    @property
    def counted(self) -> int | None:
        """Positions whose loss counts, where that is known without looking at the mask."""
        return None if self.loss_at_N is None else self.loss_at_N.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; to a GPU through pinned memory, without waiting for it."""
        target = torch.device(device)
        moved: dict[str, Any] = {
            f.name: _moved(getattr(self, f.name), target) for f in fields(self)
        }
        return Batch(**moved)


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    if tensor is None or tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def causal_batch(windows_BU: Ints, eod_id: int, document_boundaries: bool) -> Batch:
    """Windows [B, T+1] -> the batch that predicts each next token.

    With document boundaries a document begins behind every end-of-document token: positions restart
    there, attention does not look across, and the first token of a document is not predicted (the
    end before it says nothing about it); the end itself is predicted. Without them a row is one
    stream, every target counts, and attention is plainly causal (document_ids None).
    """
    tokens_BT, targets_BT = windows_BU[:, :-1], windows_BU[:, 1:]
    across = np.arange(tokens_BT.shape[1])
    if not document_boundaries:
        return _batch(tokens_BT, targets_BT, np.ones(tokens_BT.shape, bool), across[None], None)
    ends_BT = tokens_BT == eod_id
    begins_BT = np.zeros_like(ends_BT)
    begins_BT[:, 1:] = ends_BT[:, :-1]
    first_BT = np.maximum.accumulate(np.where(begins_BT, across, 0), axis=1)
    return _batch(tokens_BT, targets_BT, ~ends_BT, across - first_BT, begins_BT.cumsum(axis=1))


def _batch(
    tokens_BT: Ints,
    targets_BT: Ints,
    counts_BT: NDArray[np.bool_],
    positions_BT: Ints,
    documents_BT: Ints | None,
) -> Batch:
    def tensor(values: NDArray) -> torch.Tensor:
        return torch.from_numpy(np.array(np.broadcast_to(values, tokens_BT.shape)))

    return Batch(
        tokens_BT=tensor(tokens_BT),
        targets_BT=tensor(targets_BT),
        loss_mask_BT=tensor(counts_BT),
        positions_BT=tensor(positions_BT),
        document_ids_BT=None if documents_BT is None else tensor(documents_BT),
        loss_at_N=torch.from_numpy(np.flatnonzero(counts_BT)),
    )


class CausalRows:
    """The causal rows of one index; see the head of this file for what a row is.

    `eod_id` ends every document of the index; `pad_id` fills the row of an empty batch only.
    """

    def __init__(
        self,
        index: Tokens,
        seq_len: int,
        eod_id: int,
        pad_id: int,
        document_boundaries: bool = True,
    ) -> None:
        self.index, self.seq_len = index, seq_len
        self.eod_id, self.pad_id = eod_id, pad_id
        self.document_boundaries = document_boundaries
        self._rows = (int(index.tokens) - 1) // seq_len
        if self._rows < 1:
            raise ValueError(
                f"data: the index has {index.tokens} tokens, a row of data.seq_len={seq_len} "
                f"needs {seq_len + 1}; add text or lower data.seq_len "
                "(语料不足一行, 请增加语料或减小 seq_len)"
            )

    def __len__(self) -> int:
        return self._rows

    def fill(self, rows: Ints, windows_BU: Ints) -> None:
        """Write the windows [len(rows), seq_len + 1] of the rows."""
        for row, window_U in zip(rows.tolist(), windows_BU, strict=True):
            if not 0 <= row < self._rows:
                raise IndexError(f"row {row} of an index of {self._rows} rows")
            start = row * self.seq_len
            window_U[:] = self.index.slice(start, start + self.seq_len + 1)

    def batch(self, rows: Ints) -> Batch:
        """The rows as one batch; no rows give the empty batch."""
        return read_rows([self], np.zeros(len(rows), np.int32), rows)


def read_rows(sources: Sequence[CausalRows], dataset: NDArray[np.integer], rows: Ints) -> Batch:
    """Rows of several datasets, as `Order.locate` names them, as one batch.

    No rows give a batch of one row of padding whose loss does not count: what a rank runs when its
    step has nothing left for it.
    """
    like = sources[0]
    if not len(rows):
        return empty_batch(like.seq_len, like.pad_id, like.document_boundaries)
    windows_BU = np.empty((len(rows), like.seq_len + 1), np.int64)
    for number in np.unique(dataset):
        mine = np.flatnonzero(dataset == number)
        part = windows_BU if len(mine) == len(rows) else np.empty_like(windows_BU[: len(mine)])
        sources[number].fill(rows[mine], part)
        if part is not windows_BU:
            windows_BU[mine] = part
    return causal_batch(windows_BU, like.eod_id, like.document_boundaries)


def empty_batch(seq_len: int, pad_id: int, document_boundaries: bool) -> Batch:
    """One row of padding whose loss does not count."""
    pad_BT = np.full((1, seq_len), pad_id, np.int64)
    none_BT = np.zeros((1, seq_len), bool)
    documents_BT = np.full((1, seq_len), PADDING, np.int64) if document_boundaries else None
    return _batch(pad_BT, pad_BT, none_BT, np.arange(seq_len)[None], documents_BT)


def step_samples(first: int, count: int, data_rank: int, data_size: int, micro: int) -> list[Ints]:
    """Sample numbers of a rank's micro-batches of a step of samples [first, first + count).

    Ranks hold neighbouring runs of the step, as even as can be; all have the same number of
    micro-batches of at most `micro` samples, the last ones shorter or empty where samples run out.
    """
    share, rest = divmod(count, data_size)
    start = first + data_rank * share + min(data_rank, rest)
    mine = np.arange(start, start + share + (data_rank < rest), dtype=np.int64)
    number = -(-(share + (rest > 0)) // micro)
    return [mine[i * micro : (i + 1) * micro] for i in range(number)]


Item = TypeVar("Item")
_END = object()


class Prefetcher(Generic[Item]):
    """Runs an iterable in one background thread, at most `depth` items ahead.

    An exception of the iterable is raised where its item would have come. Leaving the `with` block,
    or `close()`, stops the thread; a generator is closed in its own thread.
    """

    def __init__(self, items: Iterable[Item], depth: int = 2) -> None:
        self._queue: queue.Queue[object] = queue.Queue(maxsize=max(1, depth))
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(
            target=_feed, args=(items, self._queue, self._stop), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._done:
            raise StopIteration
        item = self._queue.get()
        if item is _END:
            self._done = True
            raise StopIteration
        if isinstance(item, _Raised):
            self._done = True
            raise item.error
        return item  # type: ignore[return-value]

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()  # the thread of an abandoned prefetcher ends by itself

    def close(self) -> None:
        """Stop the thread and wait for it; a second call does nothing."""
        self._stop.set()
        self._done = True
        self._thread.join()


@dataclass(frozen=True)
class _Raised:
    error: BaseException


def _feed(items: Iterable[object], out: queue.Queue[object], stop: threading.Event) -> None:
    """The thread's work; holds no reference to the Prefetcher, so that nothing keeps it alive."""

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                out.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    source = iter(items)
    try:
        for item in source:
            if not put(item):
                return
        put(_END)
    except BaseException as error:  # it belongs to whoever asks for the next item
        put(_Raised(error))
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()
