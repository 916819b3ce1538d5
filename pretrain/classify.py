"""How often a fine-tuned encoder tells the label: `evaluate --task labels`.

    a corpus       its valid split, the rows of the run          --> logits at [CLS] --> confusion
    text<TAB>label, or a<TAB>b<TAB>label: [CLS] a [SEP] b [SEP]  -->                --> accuracy, F1

A label of a file is the name that it had in the corpus; the checkpoint knows the names.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.objectives import Labels
from pretrain.answer import right_padded
from pretrain.averaged import called
from pretrain.batches import Batch
from pretrain.checkpoint import read, resolve
from pretrain.corpora import open_measured, trained_objective
from pretrain.device import place
from pretrain.generate import load_model
from pretrain.labelled import fit, label_names
from pretrain.objectives.labels import logits_at, places
from pretrain.tasks import TaskError, columns, encoded, row_length


def labels(
    checkpoint: str | Path,
    data: str | Path,
    limit: int | None,
    seq_len: int | None,
    gpu: bool = False,
) -> dict[str, Any]:
    """Accuracy and macro-averaged F1 x 100 over a corpus' valid split (`limit` rows of it) or the
    first `limit` lines of a file.

    Raises TaskError for a checkpoint without labels, a file with unknown ones.
    """
    from data_pipeline import tokenizer as tokenizers

    folder = resolve(checkpoint)
    state = read(folder)
    names = _names(state.record)
    length = row_length(state.record, seq_len)
    if Path(data).is_dir():
        batches = _of_corpus(state.record, data, names, limit, length)
    else:
        tokenizer = tokenizers.load(folder / "tokenizer")
        batches = _of_file(data, tokenizer, names, limit, length)
    model: Any = load_model(state, *place(gpu))
    device = next(model.parameters()).device
    confusion_LL = np.zeros((len(names), len(names)), np.int64)
    with torch.no_grad():
        for rows in batches:
            batch = rows.to(device)
            logits_NL, targets_N = logits_at(model, batch, places(batch))
            both = targets_N.cpu().numpy(), logits_NL.argmax(-1).cpu().numpy()
            np.add.at(confusion_LL, both, 1)
    return {"checkpoint": called(folder), **_told(confusion_LL, names)}


def _names(record: Mapping[str, Any]) -> list[str]:
    if not record["model"].get("labels"):
        raise TaskError(
            "--task labels: the checkpoint has no head over labels; fine-tune it with "
            "objective.name=labels (没有分类头)"
        )
    names = label_names(record)
    if not names:
        raise TaskError(
            "--task labels: the checkpoint does not say what its labels are called; it was not "
            "trained here (标签名未知)"
        )
    return names


def _of_corpus(
    record: Mapping[str, Any],
    corpus: str | Path,
    names: Sequence[str],
    limit: int | None,
    seq_len: int,
) -> Iterator[Any]:
    objective = Labels("labels", tuple(trained_objective(record).get("fields", ())))
    corpora = open_measured(corpus, seq_len, objective, record["model"]["vocab"])
    if record.get("tokenizer") not in (None, corpora.tokenizer.fingerprint):
        raise TaskError(
            f"--data: {corpus} was encoded by another tokenizer than the checkpoint's; encode it "
            "by that one (分词器不一致)"
        )
    if list(corpora.labels) != list(names):
        raise TaskError(
            f"--data: {corpus} has the labels {', '.join(corpora.labels)}, the checkpoint learnt "
            f"{', '.join(names)} (标签不一致)"
        )
    rows = limit or sum(map(len, corpora.valid))
    return corpora.validation(rows, 0, 1, 4)


def _of_file(
    path: str | Path, tokenizer: Any, names: Sequence[str], limit: int | None, seq_len: int
) -> Iterator[Any]:
    lines = columns(path, limit, (2, 3))
    number_of = {name: number for number, name in enumerate(names)}
    for line, row in enumerate(lines, 1):
        if len(row) != len(lines[0]):
            raise TaskError(
                f"--data: {path}, line {line} has {len(row)} columns, line 1 has {len(lines[0])}; "
                "all must be one text and a label, or all two and a label (列数不一)"
            )
        if row[-1] not in number_of:
            raise TaskError(
                f"--data: {path}, line {line}: the label is {row[-1]!r}, the checkpoint knows "
                f"{', '.join(names)} (未知标签)"
            )
    *sides, labels = zip(*lines, strict=True)
    rows = []
    for label, *texts in zip(labels, *(encoded(tokenizer, side) for side in sides), strict=True):
        sizes = np.array([[len(text) for text in [*texts, []][:2]]])
        fit(sizes, seq_len - 1 - len(texts))
        cut = [text[:size] for text, size in zip(texts, sizes[0].tolist(), strict=False)]
        rows.append((cut, number_of[label]))
    rows.sort(key=lambda row: sum(map(len, row[0])))
    for start in range(0, len(rows), 16):
        yield _batch(rows[start : start + 16], tokenizer)


def _batch(rows: Sequence[tuple[list[list[int]], int]], tokenizer: Any) -> Batch:
    tokens: list[list[int]] = []
    kinds: list[list[int]] = []
    for texts, _ in rows:
        tokens.append([tokenizer.bos_id])
        kinds.append([0])
        for side, text in enumerate(texts):
            tokens[-1] += [*text, tokenizer.eod_id]
            kinds[-1] += [side] * (len(text) + 1)
    tokens_BT, positions_BT, documents_BT = right_padded(
        tokens, tokenizer.pad_id, torch.device("cpu")
    )
    T = tokens_BT.shape[1]
    targets_BT = torch.zeros_like(tokens_BT)
    targets_BT[:, 0] = torch.tensor([number for _, number in rows])
    mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    mask_BT[:, 0] = True
    segments_BT = torch.tensor([row + [0] * (T - len(row)) for row in kinds])
    return Batch(
        tokens_BT, targets_BT, mask_BT, positions_BT, documents_BT, segments_BT=segments_BT
    )


def _told(confusion_LL: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    right_L = confusion_LL.diagonal()
    both_L = confusion_LL.sum(0) + confusion_LL.sum(1)
    f1_L = 200 * right_L / np.maximum(both_L, 1)
    total = int(confusion_LL.sum())
    there = both_L > 0  # in the data or among the answers, as scikit-learn averages
    return {
        "samples": total,
        "accuracy": float(100 * right_L.sum() / max(total, 1)),
        "f1_macro": float(f1_L[there].mean()) if there.any() else 0.0,
        "by_label": {
            name: {"samples": int(row.sum()), "right": int(right), "f1": float(f1)}
            for name, row, right, f1 in zip(names, confusion_LL, right_L, f1_L, strict=True)
        },
    }
