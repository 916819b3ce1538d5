"""The rows of a split of a corpus, for an objective.

    objective --needs() of manifests.py--> .marks | .gaps | .fields --opened--> Rows (rows.py,
                                                              masking.py, pairs.py, labelled.py)

A corpus that has not what an objective reads is refused with the key that says what it reads.
"""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from configs.load import ConfigError
from configs.objectives import (
    Causal,
    Labels,
    Masked,
    Objective,
    Pairs,
    Prefix,
    PseudoSummary,
    SpanCorruption,
    packing_of,
)
from configs.run import Data
from data_pipeline import index as corpus_index
from data_pipeline import sidefile
from pretrain.batches import Rows
from pretrain.contents import Corrupted, Prefixed, Spans, longest_row, noise_of
from pretrain.labelled import LabelRows
from pretrain.manifests import FIELDS, GAPS, needs
from pretrain.masking import Controls, MaskedRows
from pretrain.pairs import PairRows, frame_of
from pretrain.permutation import Ints
from pretrain.rows import CausalRows, Layout


def open_rows(prefix: Path, data: Data, objective: Objective, tokenizer: Any, vocab: int) -> Rows:
    """The rows of the split at PREFIX. ConfigError for what does not make a row."""
    try:
        return _rows(prefix, data, objective, tokenizer, vocab)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}: {error}") from None


def _rows(prefix: Path, data: Data, objective: Objective, tokenizer: Any, vocab: int) -> Rows:
    index = corpus_index.Index(prefix)
    packing = packing_of(objective, data.packing)
    if isinstance(objective, Causal):
        return CausalRows(
            index,
            data.seq_len,
            tokenizer.eod_id,
            tokenizer.pad_id,
            objective.document_boundaries,
            packing,
        )
    controls = _controls(tokenizer, objective)
    if isinstance(objective, Masked):
        marked = needs(objective, data)
        return MaskedRows(
            index,
            data.seq_len,
            controls,
            _marks(prefix, index) if marked else None,
            masking=objective.masking,
            ratio=objective.ratio,
            mask_special=objective.mask_special,
            document_boundaries=objective.document_boundaries,
            packing=packing,
        )
    if isinstance(objective, Labels):
        return _labelled(prefix, index, data, objective, controls)
    target_len = _given(data.target_len)
    rooms = data.seq_len - frame_of(controls), target_len - 1
    contents: Any
    if isinstance(objective, PseudoSummary | Pairs):
        rooms = objective.source_tokens - frame_of(controls), objective.target_tokens - 2
        _, tables = (GAPS if isinstance(objective, PseudoSummary) else FIELDS).layout.open(prefix)
    if isinstance(objective, PseudoSummary):
        contents = Spans.of_gaps(index, tables, *rooms)
    elif isinstance(objective, Pairs):
        names = sidefile.Fields(prefix).names
        _check_names(prefix, objective, names)
        contents = Spans.of_fields(index, tables, names, objective.source, objective.target, *rooms)
    elif isinstance(objective, SpanCorruption):
        contents = _corrupted(index, data, objective, tokenizer, vocab, rooms)
    else:
        assert isinstance(objective, Prefix)
        room = _room(min(rooms) + 1, data)
        contents = Prefixed(index, Layout(index, packing, room, end_tokens=1))
    return PairRows(index, contents, data.seq_len, target_len, controls, packing)


def _labelled(
    prefix: Path, index: Any, data: Data, objective: Labels, controls: Controls
) -> LabelRows:
    fields, (_, tables) = sidefile.Fields(prefix), FIELDS.layout.open(prefix)
    if not fields.labels:
        raise ConfigError(
            f"data.train: {prefix} has no labels; name the field that holds them as label_field of "
            "a source (语料没有标签)"
        )
    unknown = [name for name in objective.fields if name not in fields.names]
    if unknown or (not objective.fields and len(fields.names) > 2):
        raise ConfigError(
            f"objective.fields: is {', '.join(objective.fields) or 'empty'}, {prefix} has the "
            f"fields {', '.join(fields.names) or 'none'}; name one or two of them (没有该字段)"
        )
    if controls.bos is None:
        raise ConfigError(
            "objective.name: is labels, the corpus' vocabulary has no [CLS] to read them from; "
            "encode it by a tokenizer that has one (词表缺少 [CLS])"
        )
    packing = packing_of(objective, data.packing)
    about = (fields.names, fields.labels, objective.fields)
    return LabelRows(index, tables, *about, data.seq_len, controls, packing)


def _corrupted(
    index: Any,
    data: Data,
    objective: SpanCorruption,
    tokenizer: Any,
    vocab: int,
    rooms: tuple[int, int],
) -> Corrupted:
    ratio, span = objective.ratio, objective.span
    room = _room(longest_row(*rooms, ratio, span), data)
    sentinels = sentinels_of(tokenizer, vocab)
    spans = noise_of(room, ratio, span)[1]
    if spans > len(sentinels) and len(sentinels) and sentinels[0] < tokenizer.vocab_size:
        raise ConfigError(
            f"data.seq_len, data.target_len: rows of {room} tokens need {spans} sentinels, the "
            f"vocabulary has {len(sentinels)} of [unused1] ...; shorten them, or raise "
            f"objective.span above {span} (哨兵符不足)"
        )
    if spans > len(sentinels):
        raise ConfigError(
            f"model.vocab: is {vocab}, rows of {room} tokens need {spans} sentinels and the "
            f"vocabulary of {tokenizer.vocab_size} has {len(sentinels)}; raise model.vocab to "
            f"{tokenizer.vocab_size + spans} or more, or shorten data.seq_len (哨兵符不足)"
        )
    packing = packing_of(objective, data.packing)
    return Corrupted(
        index, Layout(index, packing, room, end_tokens=1), ratio, span, sentinels, tokenizer.eod_id
    )


def sentinels_of(tokenizer: Any, vocab: int) -> Ints:
    """The ids that stand for spans cut out: [unused1], [unused2] ... of a BERT vocabulary, else the
    ids of the model above the tokenizer's own, which stay what they are when it gets more."""
    if tokenizer.kind == "wordpiece":
        pieces = tokenizer.pieces(range(tokenizer.vocab_size))
        unused = {piece: number for number, piece in enumerate(pieces) if piece[:7] == "[unused"}
        names = [f"[unused{number}]" for number in range(1, len(unused) + 1)]
        if found := [unused[name] for name in names if name in unused]:
            return np.asarray(found, np.int64)
    return np.arange(tokenizer.vocab_size, vocab)


def _controls(tokenizer: Any, objective: Objective) -> Controls:
    if isinstance(objective, Masked) and tokenizer.mask_id is None:
        raise ConfigError(
            f"objective.name: is {objective.name}, the corpus' vocabulary has no [MASK]; encode "
            "it by a tokenizer that has one (词表缺少 [MASK])"
        )
    mask = tokenizer.pad_id if tokenizer.mask_id is None else tokenizer.mask_id
    size = tokenizer.vocab_size
    return Controls(tokenizer.eod_id, tokenizer.pad_id, mask, tokenizer.bos_id, size)


def _marks(prefix: Path, index: Any) -> np.ndarray:
    marks = sidefile.Marks(prefix)
    if marks.tokens != index.tokens:
        raise ConfigError(
            f"{prefix}.marks: speaks of {marks.tokens} tokens, the index has {index.tokens}; "
            "build the corpus again (附属文件与索引不符)"
        )
    return marks.slice(0, marks.tokens)


def _check_names(prefix: Path, objective: Pairs, names: tuple[str, ...]) -> None:
    for side in ("source", "target"):
        if unknown := [name for name in getattr(objective, side) if name not in names]:
            raise ConfigError(
                f"objective.{side}: names {', '.join(unknown)}, {prefix} has the fields "
                f"{', '.join(names) or 'none'} (没有该字段)"
            )


def _room(room: int, data: Data) -> int:
    if room < 2:
        raise ConfigError(
            f"data.seq_len, data.target_len: are {data.seq_len} and {data.target_len}, too short "
            "for a row of two tokens; raise them (行长过短)"
        )
    return room


Given = TypeVar("Given")


def _given(value: Given | None) -> Given:
    assert value is not None  # RunConfig.problems() says so
    return value
