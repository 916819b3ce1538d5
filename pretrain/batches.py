"""Rows of token indexes -> batches.

    order.locate(samples)     Rows: causal, masked (rows.py), pairs (pairs.py) ...
        |  dataset, row           |  fill(): compiled, from the mapped files into the Canvas
        v                         v
    read_rows ----------------> Canvas, arrays of [B, T] --------------> Batch, the same as tensors

One thread makes batches ahead of the training step. The kernels let the interpreter's lock go, and
one thread is faster than the bars ask of the loader (benchmarks/loader.py), so there are no
workers, nothing is forked, and nothing waits for a process.

Legend: B rows, T tokens of a row, S tokens of an encoder's row, N positions whose loss counts.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.compiled import compiled
from pretrain.permutation import Ints, Keys

PADDING = -1
"""Document id of padding: it sees, and is seen by, padding only."""


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
    segments_BT: torch.Tensor | None = None
    """int64: which text of a pair; None: all are the first."""
    sources_B: torch.Tensor | None = None
    """int64: which corpus of the mixture each row is of; None where nobody asks."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.tokens_BT.shape[0]

    @property
    def counted(self) -> int | None:
        """Positions whose loss counts, where that is known without looking at the mask."""
        return None if self.loss_at_N is None else self.loss_at_N.shape[0]

    def part(self, number: int, of: int) -> Batch:
        """Slice `number` of `of` equal ones of the tokens of each row (pretrain/sequence.py).

        Positions and document ids stay those of whole rows: attention asks for them.
        """
        if of == 1:
            return self
        names = ("tokens_BT", "targets_BT", "loss_mask_BT", "segments_BT", "encoder_tokens_BT")
        whole = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        assert not any(t.shape[1] % of for t in whole.values()), f"rows cannot be cut into {of}"
        parts: dict[str, Any] = {n: t.chunk(of, 1)[number].contiguous() for n, t in whole.items()}
        if (at_N := self.loss_at_N) is not None:
            length = self.tokens_BT.shape[1]
            row_N, place_N = at_N // length, at_N % length - number * (length // of)
            here = (place_N >= 0) & (place_N < length // of)
            parts["loss_at_N"] = (row_N * (length // of) + place_N)[here]
        return replace(self, **parts)

    def unmasked(self) -> Batch:
        """The same without document ids where each row is one document: attention then needs no
        mask of [T, T]. Looked at on a CPU only, where a batch is made."""
        ids_BT = self.document_ids_BT
        if (
            ids_BT is None
            or self.encoder_document_ids_BT is not None
            or ids_BT.device.type != "cpu"
        ):
            return self
        one = bool((ids_BT == ids_BT[:, :1]).all())
        return replace(self, document_ids_BT=None) if one else self

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


@dataclass(frozen=True)
class Canvas:
    """The arrays of a batch while rows are written into them, each row whole, its padding too."""

    tokens_BT: Ints
    targets_BT: Ints
    counts_BT: NDArray[np.bool_]
    """Positions whose loss counts."""
    positions_BT: Ints
    documents_BT: Ints | None
    encoder_tokens_BS: Ints | None = None
    encoder_positions_BS: Ints | None = None
    encoder_documents_BS: Ints | None = None
    segments_BT: Ints | None = None

    @classmethod
    def of(
        cls,
        rows: int,
        seq_len: int,
        documents: bool,
        encoder_len: int = 0,
        segments: bool = False,
    ) -> Canvas:
        """Arrays that hold nothing yet; `encoder_len` 0: without an encoder's side."""

        def some(length: int) -> Ints:
            return np.empty((rows, length), np.int64)

        decoder = some(seq_len), some(seq_len), np.empty((rows, seq_len), np.bool_), some(seq_len)
        encoder = [some(encoder_len) for _ in range(3)] if encoder_len else [None] * 3
        kinds = some(seq_len) if segments else None
        made = cls(*decoder, some(seq_len) if documents else None, *encoder)
        return replace(made, segments_BT=kinds)

    def clear(self, pad_id: int) -> None:
        """Make every row padding."""
        self.counts_BT[:] = False
        if self.segments_BT is not None:
            self.segments_BT[:] = 0
        for name in ("tokens_BT", "targets_BT", "encoder_tokens_BS"):
            if (array := getattr(self, name)) is not None:
                array[:] = pad_id
        for name in ("positions_BT", "encoder_positions_BS"):
            if (array := getattr(self, name)) is not None:
                array[:] = np.arange(array.shape[1])
        for name in ("documents_BT", "encoder_documents_BS"):
            if (array := getattr(self, name)) is not None:
                array[:] = PADDING

    def batch(self) -> Batch:
        """The same memory as tensors."""

        def tensor(array: NDArray | None) -> torch.Tensor | None:
            return None if array is None else torch.from_numpy(array)

        at_N = np.empty(self.counts_BT.size, np.int64)
        return Batch(
            tokens_BT=torch.from_numpy(self.tokens_BT),
            targets_BT=torch.from_numpy(self.targets_BT),
            loss_mask_BT=torch.from_numpy(self.counts_BT),
            positions_BT=torch.from_numpy(self.positions_BT),
            document_ids_BT=tensor(self.documents_BT),
            loss_at_N=torch.from_numpy(at_N[: _where(self.counts_BT.reshape(-1), at_N)]),
            encoder_tokens_BT=tensor(self.encoder_tokens_BS),
            encoder_positions_BT=tensor(self.encoder_positions_BS),
            encoder_document_ids_BT=tensor(self.encoder_documents_BS),
            segments_BT=tensor(self.segments_BT),
        )


@compiled
def _where(true_M, at_M):  # type: ignore[no-untyped-def]
    """Write where true_M is true to the head of at_M; how many there are."""
    number = 0
    for m in range(len(true_M)):
        at_M[number] = m
        number += true_M[m]
    return number


class Rows(Protocol):
    """The rows of one split of one corpus, for one objective."""

    index: Any
    """The tokens (data_pipeline.index.Index)."""
    pad_id: int
    """What padding is."""

    def __len__(self) -> int:
        """Rows of an epoch."""
        ...

    def canvas(self, rows: int) -> Canvas:
        """Room for so many rows."""
        ...

    def fill(self, rows: Ints, keys: Keys, at: Ints, canvas: Canvas) -> None:
        """Write rows [R] into rows at [R] of the canvas; keys [R] seed what is drawn in each."""
        ...

    def about(self) -> dict[str, int | float | str]:
        """What a run says of its rows: packing, rows, and where they are packed how full."""
        ...

    def batch(self, rows: Ints) -> Batch:
        """The rows as one batch, drawn as if their keys were 0."""
        ...


def read_rows(
    sources: Sequence[Rows],
    dataset: NDArray[np.integer],
    rows: Ints,
    keys: Keys | None = None,
) -> Batch:
    """Rows of several datasets, as `Order.locate` names them, as one batch.

    `keys` seed what is drawn at random in each row; none: as if all were 0. No rows give a batch of
    one row of padding whose loss does not count: what a rank runs when its step has nothing left.
    IndexError for a row that is not there.
    """
    canvas = sources[0].canvas(max(len(rows), 1))
    if not len(rows):
        canvas.clear(sources[0].pad_id)
    drawn = np.zeros(len(rows), np.uint64) if keys is None else keys
    for number in np.unique(dataset).tolist():
        source, at = sources[number], np.flatnonzero(dataset == number)
        mine = np.asarray(rows, np.int64)[at]
        if int(mine.min()) < 0 or int(mine.max()) >= len(source):
            raise IndexError(f"rows {mine.min()} to {mine.max()} of {len(source)}")
        source.fill(mine, drawn[at], at, canvas)
    return canvas.batch()


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
        self.waited_s = 0.0
        """How long the last item was waited for."""
        self._thread = threading.Thread(
            target=_feed, args=(items, self._queue, self._stop), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._done:
            raise StopIteration
        began = time.perf_counter()
        item = self._queue.get()
        self.waited_s = time.perf_counter() - began
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
