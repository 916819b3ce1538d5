"""What a checkpoint can do: the tasks of `evaluate` that need its model.

    mlm      rows of a corpus' valid split, masked as in pretraining --> which are guessed right
    csl      title<TAB>content --> content to the model, its output beside the title: ROUGE, BLEU
    ape210k  problems in words --> their equations, whose values are compared with the answers
    lcqmc    sentence<TAB>sentence<TAB>0|1 --> vectors --> rank correlation of cosine and label

A model writes titles and equations if it was trained to: see the objective `pairs`. Vectors are the
mean over a sentence's tokens of what leaves the first block and the last, averaged
(kexue.fm/archives/8069), as they are and whitened.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from configs.load import from_dict
from configs.model import CPMConfig, T5PegasusConfig, longest_row
from configs.objectives import Masked
from pretrain import scores
from pretrain.answer import answer, framed, right_padded
from pretrain.averaged import called
from pretrain.checkpoint import read, resolve
from pretrain.corpora import check_learnt, open_measured, trained_length, trained_objective
from pretrain.decoding import Decoding, Written
from pretrain.device import place
from pretrain.generate import load_model, write
from pretrain.objectives.losses import token_losses_plain
from pretrain.word_problems import Problem, cleaned

SOURCE_TOKENS = {"csl": 256, "ape210k": 192}
"""The longest source, as published (of ape210k: of question and equation together)."""
TARGET_TOKENS = {"csl": 32, "ape210k": 64}


class TaskError(ValueError):
    """A checkpoint or a file that does not fit the task."""


def opened(checkpoint: str | Path, gpu: bool = False) -> tuple[nn.Module, Any]:
    """The model of a checkpoint or a run, and its tokenizer."""
    return loaded(resolve(checkpoint), gpu)


def loaded(folder: Path, gpu: bool = False) -> tuple[nn.Module, Any]:
    """opened() of a checkpoint that was resolved."""
    from data_pipeline import tokenizer as tokenizers

    if not (folder / "tokenizer").is_dir():
        raise TaskError(f"{folder}: has no tokenizer/, texts cannot be read for it (缺少分词器)")
    return load_model(read(folder), *place(gpu)), tokenizers.load(folder / "tokenizer")


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of a file's texts, each as a corpus has it: folded, no blanks around it."""
    folded = tokenizer.encode_folded([text.strip() for text in texts])
    return [[int(i) for i in ids] for ids in folded]


def row_length(record: Mapping[str, Any], asked: int | None, untold: int = 128) -> int:
    """Tokens of a measured row: as asked, as trained, or `untold`. TaskError out of range."""
    room = record["model"].get("positions")
    length = trained_length(record) or min(untold, room or untold) if asked is None else asked
    if length < 1 or (room is not None and length > room):
        most = "" if room is None else f" and at most {room}, the model's positions"
        raise TaskError(f"--seq-len: is {length}, must be at least 1{most} (行长不合法)")
    return length


# ---------------------------------------------------------------- masked tokens


def check_says_words(model: Mapping[str, Any], asked: str) -> None:
    """TaskError for a model whose head is over labels."""
    if labels := model.get("labels"):
        raise TaskError(
            f"{asked}: needs a head over words, the checkpoint has one over {labels} labels; take "
            "evaluate --task labels (分类模型没有词表输出)"
        )


@torch.no_grad()
def masked(
    checkpoint: str | Path,
    corpus: str | Path,
    masking: str | None,
    samples: int,
    seq_len: int | None,
    gpu: bool = False,
) -> dict[str, Any]:
    """How many of the masked tokens of a corpus' valid split a RoFormer guesses right.

    masking: token, word or word_token; None: as the run was trained, or word.
    """
    folder = resolve(checkpoint)
    state = read(folder)
    if state.record["model"]["family"] != "roformer":
        raise TaskError(
            "--task mlm: needs a RoFormer, the checkpoint is of another family (仅编码器)"
        )
    check_says_words(state.record["model"], "--task mlm")
    trained = trained_objective(state.record)
    section = trained if trained.get("name") == "masked" else {"name": "masked"}
    if masking is not None:
        section["masking"] = masking
    objective = from_dict(Masked, section, "objective")
    sizes = state.record["model"]
    length = row_length(state.record, seq_len)
    corpora = open_measured(corpus, length, objective, sizes.get("words_said") or sizes["vocab"])
    check_learnt(state.record, corpus, corpora.tokenizer.fingerprint)
    model: Any = load_model(state, *place(gpu))
    device = next(model.parameters()).device
    names = ("masked", "kept", "replaced")
    right, number = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    nats, five = 0.0, 0
    for row in corpora.validation(samples, 0, 1, 4):
        batch = row.to(device)
        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.document_ids_BT)
        mask_BT = batch.loss_mask_BT
        targets_N, shown_N = batch.targets_BT[mask_BT], batch.tokens_BT[mask_BT]
        if not len(targets_N):
            continue
        hidden_ND = hidden_BTD[mask_BT]
        logits_NV = model.logits(hidden_ND)[:, : corpora.tokenizer.vocab_size]
        best = logits_NV.topk(5, -1).indices == targets_N[:, None]
        kinds = (shown_N == corpora.tokenizer.mask_id, shown_N == targets_N)
        groups = (kinds[0], kinds[1], ~(kinds[0] | kinds[1]))
        for name, group in zip(names, groups, strict=True):
            right[name] += int(best[group, 0].sum())
            number[name] += int(group.sum())
        five += int(best.sum())
        nats += float(token_losses_plain(model.logits, hidden_ND, targets_N).sum())
    total = max(sum(number.values()), 1)
    return {
        "checkpoint": called(folder),
        "rows": len(corpora.measured(samples)[0]),
        "masking": objective.masking,
        "tokens": total,
        "accuracy": sum(right.values()) / total,
        "among_best_5": five / total,
        "nats_per_token": nats / total,
        "by_kind": {
            n: {"tokens": number[n], "accuracy": right[n] / max(number[n], 1)} for n in names
        },
    }


# ---------------------------------------------------------------- what a model writes


def lines_of(path: str | Path, limit: int | None) -> list[str]:
    """The first lines of a UTF-8 file that have text."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"--data: {path} is not UTF-8: {error} (编码错误)") from None
    found = [line for line in text.split("\n") if line.strip()][:limit]
    if not found:
        raise TaskError(f"--data: {path} has no line with text (文件没有内容)")
    return found


def columns(path: str | Path, limit: int | None, counts: tuple[int, ...]) -> list[list[str]]:
    """Lines of a file at their tabs."""
    rows = [line.rstrip("\r").split("\t") for line in lines_of(path, limit)]
    for number, row in enumerate(rows, 1):
        if len(row) not in counts:
            wanted = " or ".join(map(str, counts))
            raise TaskError(
                f"--data: {path}, line {number} has {len(row)} columns, there must be {wanted} "
                "(列数不符)"
            )
    return rows


def written(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    beams: int,
    task: str,
    batch: int = 8,
) -> list[str]:
    """What the model writes to each source, by a beam search as published, of 1 beam: greedily.

    Sources of like length go together; each is cut to its task's length, its [SEP] kept.
    """
    if not isinstance(model.config, CPMConfig | T5PegasusConfig):
        raise TaskError(
            f"--task {task}: needs a model that writes, not an encoder (编码器不能生成)"
        )
    longest, ids = SOURCE_TOKENS[task], encoded(tokenizer, sources)
    decoding = Decoding(TARGET_TOKENS[task], beams=beams)
    known = {"pad_id": tokenizer.pad_id, "vocab": tokenizer.vocab_size}
    out = [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        rows = [ids[at] for at in places]
        found: list[Written]
        if isinstance(model.config, CPMConfig):
            room = min(longest, model.config.positions - decoding.max_new_tokens)
            rows = [row[:room] or [tokenizer.eod_id] for row in rows]
            found = write(model, rows, decoding, tokenizer.eod_id, **known)
        else:
            frame = 1 + (tokenizer.bos_id is not None)
            rows = [
                framed(row[: longest - frame], tokenizer.bos_id, tokenizer.eod_id) for row in rows
            ]
            first = tokenizer.pad_id if tokenizer.bos_id is None else tokenizer.bos_id
            found = answer(model, rows, decoding, first, tokenizer.eod_id, **known)
        for at, one in zip(places, found, strict=True):
            out[at] = tokenizer.decode(one.ids)
    return out


Writes = Callable[[Sequence[str]], list[str]]
"""Sources -> outputs."""


def titles(path: str | Path, limit: int | None, writes: Writes) -> dict[str, Any]:
    """CSL: mean scores of titles, 0 to 100. Lines are title<TAB>content, or CLUE's `to title`,
    content, title."""
    rows = columns(path, limit, (2, 3))
    pairs = [(row[0], row[1]) if len(row) == 2 else (row[2], row[1]) for row in rows]
    outputs = writes([content for _, content in pairs])
    every = [
        scores.title_scores(output, title)
        for output, (title, _) in zip(outputs, pairs, strict=True)
    ]
    mean = {name: 100 * sum(one[name] for one in every) / len(every) for name in every[0]}
    return {"samples": len(every), **mean, "outputs": outputs}


def problems_of(path: str | Path, limit: int | None) -> tuple[list[Problem], int]:
    """The problems of a file of ape210k's that are kept, and of how many."""
    kept: list[Problem] = []
    lines = lines_of(path, limit)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            problem = cleaned(row["original_text"], row["equation"], row["ans"])
        except (ValueError, KeyError, TypeError) as error:
            raise TaskError(
                f"--data: {path}, line {number} is no problem with original_text, equation and "
                f"ans: {error} (格式不符)"
            ) from None
        kept += [problem] if problem else []
    return kept, len(lines)


def write_problems(path: str | Path, target: str | Path, limit: int | None) -> dict[str, Any]:
    """Write ape210k cleaned as published, a JSON object a line: question, equation, answer.

    A corpus reads it as a jsonl source with fields: ["source=question", "target=equation"].
    """
    if Path(target).exists():
        raise TaskError(f"--cleaned: {target} exists already; name another file (文件已存在)")
    kept, read_lines = problems_of(path, limit)
    text = "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in kept)
    partial = Path(target).with_name(f".{Path(target).name}.writing")
    partial.write_text(text, "utf-8")
    os.replace(partial, target)
    return {"task": "ape210k", "data": str(path), "read": read_lines, "kept": len(kept)}


def problems(path: str | Path, limit: int | None, writes: Writes) -> dict[str, Any]:
    """ape210k: the share of problems whose written equation has the value of the answer."""
    kept, _ = problems_of(path, limit)
    outputs = [
        "".join(text.split()).removeprefix("x=") for text in writes([p.question for p in kept])
    ]
    told = list(zip(outputs, kept, strict=True))
    right = sum(scores.same_value(output, problem.answer) for output, problem in told)
    same = sum(output == problem.equation for output, problem in told)
    return {
        "samples": len(kept),
        "accuracy": 100 * right / max(len(kept), 1),
        "same_equation": 100 * same / max(len(kept), 1),
        "outputs": outputs,
    }


# ---------------------------------------------------------------- similarity


@torch.no_grad()
def vectors(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 16) -> np.ndarray:
    """A vector for each text, float64 [P, D]: first and last block averaged, mean of the tokens,
    [CLS] and [SEP] included."""
    seen: list[torch.Tensor] = []
    stack = model.encoder if hasattr(model, "encoder") else model.decoder
    blocks = {stack.layers[0], stack.layers[len(stack.layers) - 1]}
    hooks = [b.register_forward_hook(lambda _m, _i, out: seen.append(out)) for b in blocks]
    config, device = model.config, next(model.parameters()).device
    bos = None if isinstance(config, CPMConfig) else tokenizer.bos_id
    longest = min(512, longest_row(config) or 512) - 2
    rows = [framed(ids[:longest], bos, tokenizer.eod_id) for ids in encoded(tokenizer, texts)]
    out = np.zeros((len(rows), config.hidden))
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    forward = model.encode if isinstance(config, T5PegasusConfig) else model
    try:
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            seen.clear()
            given = right_padded([rows[at] for at in places], tokenizer.pad_id, device)
            forward(*given)
            both_BTD = torch.stack(seen).double().mean(0)
            real_BT = torch.ones_like(given[0]) if given[2] is None else given[2] >= 0
            real_BT1 = real_BT.double()[..., None]
            out[places] = ((both_BTD * real_BT1).sum(1) / real_BT1.sum(1)).cpu().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return out


def similarity(
    model: Any, tokenizer: Any, path: str | Path, limit: int | None, kept: int = 256
) -> dict[str, Any]:
    """LCQMC and its like: Spearman's correlation x 100 of cosines with labels, plain and whitened
    (all directions, and the `kept` largest)."""
    rows = columns(path, limit, (3,))
    try:
        labels = [float(label) for _, _, label in rows]
    except ValueError as error:
        raise TaskError(f"--data: {path}: the third column is a number: {error} (标签)") from None
    for line, label in enumerate(labels, 1):
        if not math.isfinite(label):
            raise TaskError(
                f"--data: {path}, line {line}: the label is {label}, must be finite (标签须有限)"
            )
    both = vectors(model, tokenizer, [row[0] for row in rows] + [row[1] for row in rows])

    def correlation(x_PD: np.ndarray) -> float:
        return 100 * scores.spearman(scores.cosine(x_PD[: len(rows)], x_PD[len(rows) :]), labels)

    found = {
        "samples": len(rows),
        "first_last_average": correlation(both),
        "whitened": correlation(scores.whitened(both)),
    }
    if kept < both.shape[1]:
        found[f"whitened_{kept}"] = correlation(scores.whitened(both, kept))
    return found


def table(found: dict[str, Any]) -> Iterable[str]:
    """The lines that a person sees."""
    for name, figure in found.items():
        if isinstance(figure, float):
            yield f"{name.replace('_', ' '):24}{figure:12.4f}"
        elif isinstance(figure, int):
            yield f"{name.replace('_', ' '):24}{figure:12,}"
        elif name == "by_label":
            for label, one in figure.items():
                share = 100 * one["right"] / max(one["samples"], 1)
                yield f"  of {label:21}{share:12.4f}   of {one['samples']:,}, F1 {one['f1']:.4f}"
        elif name == "by_kind":
            for kind, one in figure.items():
                yield f"  of those {kind:13}{one['accuracy']:12.4f}   of {one['tokens']:,}"
