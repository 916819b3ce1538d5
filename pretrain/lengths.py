"""How far a checkpoint reads: loss by position, perplexity by length, passkeys in Chinese filler.

    valid split --documents of L tokens and more, their first L--> rows --> loss of each position
        --> mean by bucket of positions, and over the row, for each length  --> table, JSON, SVG
    filler + 密码是 48213 + filler + 密码是 --> is 48213 said?  by length and by depth of the key

An encoder's rows have 15 % of their tokens masked, always the same ones; its loss is that of the
masked tokens. A T5 reads the whole row once for each bucket, with 15 % of that bucket's tokens cut
out as spans, so that it never meets more sentinels at a longer length. The rows of a shorter length
are the beginnings of the same documents, so that the figures of two lengths compare. Passkeys:
Mohtashami and Jaggi 2023, here in Chinese. Texts stand between [CLS] and [SEP] where the family
learns them so.

Legend: B rows, T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.grown import said
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig, longest_row
from pretrain.answer import framed
from pretrain.averaged import called
from pretrain.checkpoint import read, resolve
from pretrain.corpora import check_learnt
from pretrain.device import place
from pretrain.generate import load_model
from pretrain.objectives.losses import token_losses_plain
from pretrain.reading import sentinels_of
from pretrain.tasks import check_says_words

FILLER = "草是绿的，天是蓝的，太阳是黄的。我们走吧，走过去又走回来。"
KEY = "密码是{key}。请记住，{key}就是密码。"
ASKED = "密码是"
DIGITS = 5
MASKED = 0.15
"""Share of an encoder's tokens whose loss is measured."""
SPAN = 3
"""Tokens of a span that is cut out of a T5's source."""
TOKENS_AT_ONCE = 4096


class LengthError(ValueError):
    """Lengths, or a corpus, that cannot be measured."""


# ---------------------------------------------------------------- loss by position


def lengths(
    checkpoint: str | Path,
    corpus: str | Path,
    wanted: Sequence[int],
    samples: int = 64,
    buckets: int = 8,
    gpu: bool = False,
) -> dict[str, Any]:
    """Loss (nats a token) by bucket of positions for each length, over the same documents; `error`
    is the standard error over the documents, whose own losses stand beside it.

    Raises LengthError for lengths that the model cannot read or the corpus does not have.
    """
    from data_pipeline import tokenizer as tokenizers

    folder = resolve(checkpoint)
    state = read(folder)
    check_says_words(state.record["model"], "--task length")
    words = tokenizers.load(Path(corpus) / "tokenizer")
    check_learnt(state.record, corpus, words.fingerprint)
    model: Any = load_model(state, *place(gpu))
    _check(model.config, words, wanted)
    rows = _documents(Path(corpus) / "valid", max(wanted) + 1, samples)
    found = []
    for length in sorted(wanted):
        edges = np.linspace(0, length, min(buckets, length) + 1).round().astype(int)
        if isinstance(model.config, T5PegasusConfig):
            losses_BT, counted_BT = by_span(model, rows[:, :length], edges.tolist(), words)
        else:
            decoder = isinstance(model.config, CPMConfig)
            mask, frame = (None, None) if decoder else (words.mask_id, (words.bos_id, words.eod_id))
            losses_BT, counted_BT = by_position(model, rows[:, : length + 1], mask, frame)
        parts = [
            {"from": int(a), "to": int(b), "loss": _mean(losses_BT[:, a:b], counted_BT[:, a:b])}
            for a, b in pairwise(edges)
        ]
        loss = _mean(losses_BT, counted_BT)
        each = [_mean(*row) for row in zip(losses_BT, counted_BT, strict=True)]
        found.append(
            {
                "length": length,
                "loss": loss,
                "error": float(np.std(each, ddof=1) / len(each) ** 0.5) if len(each) > 1 else None,
                "documents": each,
                "perplexity": math.exp(min(loss, 700.0)),
                "tokens": int(counted_BT.sum()),
                "buckets": parts,
            }
        )
    return {"checkpoint": called(folder), "rows": len(rows), "lengths": found}


def _check(config: ModelConfig, words: Any, wanted: Sequence[int]) -> None:
    room = longest_row(config)
    if isinstance(config, RoFormerConfig) and words.mask_id is None:
        raise LengthError(
            "--task length, passkey: ask an encoder for masked tokens, the tokenizer has no mask; "
            "take a checkpoint whose tokenizer has one (分词器没有 [MASK])"
        )
    if not wanted or min(wanted) < 2:
        raise LengthError(f"--lengths: are {list(wanted)}, each must be at least 2 (长度不合法)")
    if room is not None and max(wanted) > room:
        raise LengthError(
            f"--lengths: {max(wanted)} is more than the model's {room} positions; extend it first: "
            "python -m launch extend (请先扩展)"
        )


def _documents(prefix: Path, tokens: int, samples: int) -> np.ndarray:
    """The first `tokens` of documents that have so many, int64 [rows, tokens], spread evenly."""
    from data_pipeline.index import Index

    index = Index(prefix)
    long = np.flatnonzero(np.asarray(index.lengths) >= tokens)
    if not len(long):
        longest = int(np.asarray(index.lengths).max(initial=0))
        raise LengthError(
            f"--lengths: {prefix} has no document of {tokens} tokens, its longest has {longest}; "
            "ask for less, or measure on a corpus of longer documents (没有足够长的文档)"
        )
    chosen = long[np.linspace(0, len(long) - 1, min(samples, len(long))).round().astype(int)]
    begins = np.asarray(index.offsets)[chosen]
    return np.stack([np.asarray(index.slice(int(b), int(b) + tokens), np.int64) for b in begins])


@torch.no_grad()
def by_position(
    model: Any,
    rows_BT: np.ndarray,
    mask_id: int | None = None,
    frame: tuple[int | None, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and which of them count, at each position of each row [B, T - 1], float64 and bool.

    rows_BT: token ids, one more a row than positions. A decoder predicts the next token at each; an
    encoder (mask_id given) the tokens that are masked there, between [CLS] and [SEP] (`frame`) in
    place of a row's last two.
    """
    B, T = rows_BT.shape[0], rows_BT.shape[1] - 1
    device = next(model.parameters()).device
    found_BT, counted_BT = np.zeros((B, T)), np.zeros((B, T), bool)
    # drawn position by position, so that the same ones are hidden in rows of every length
    hidden_BT = np.random.default_rng(0).random((T, B)).T < MASKED
    if frame is not None and frame[0] is not None:
        ends = [np.full((B, 1), token, rows_BT.dtype) for token in frame]
        rows_BT = np.concatenate([ends[0], rows_BT[:, : T - 2], ends[1], rows_BT[:, T:]], 1)
        hidden_BT[:, [0, -1]] = False
    at_once = max(1, TOKENS_AT_ONCE // T)
    for first in range(0, B, at_once):
        part = torch.from_numpy(rows_BT[first : first + at_once]).to(device)
        tokens_BT, targets_BT = part[:, :-1], part[:, 1:]
        chosen_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        if mask_id is not None:
            chosen_BT = torch.from_numpy(hidden_BT[first : first + at_once]).to(device)
            targets_BT, tokens_BT = tokens_BT, tokens_BT.masked_fill(chosen_BT, mask_id)
        positions_BT = torch.arange(T, device=device).expand_as(tokens_BT)
        states_ND = model(tokens_BT, positions_BT)[chosen_BT]
        losses_BT = torch.zeros_like(tokens_BT, dtype=torch.float64)
        if len(states_ND):
            losses_N = token_losses_plain(model.logits, states_ND, targets_BT[chosen_BT])
            losses_BT[chosen_BT] = losses_N.double()
        found_BT[first : first + at_once] = losses_BT.cpu().numpy()
        counted_BT[first : first + at_once] = chosen_BT.cpu().numpy()
    return found_BT, counted_BT


@torch.no_grad()
def by_span(
    model: Any, rows_BT: np.ndarray, edges: Sequence[int], words: Any
) -> tuple[np.ndarray, np.ndarray]:
    """As by_position, for a T5: the losses of tokens that were cut out of the source as spans.

    rows_BT: token ids of the sources; edges: borders of the buckets, each cut out by itself; words:
    the tokenizer, for [CLS], [SEP], padding and sentinels.
    """
    sentinels = sentinels_of(words, said(model.config))  # those that it learns by
    found_BT, counted_BT = np.zeros(rows_BT.shape), np.zeros(rows_BT.shape, bool)
    for begin, end in pairwise(edges):
        spans = _spans(begin, end)
        if len(spans) > len(sentinels):
            raise LengthError(
                f"--task length: a bucket of {end - begin} positions needs {len(spans)} sentinels, "
                f"the vocabulary of {said(model.config)} has {len(sentinels)}; ask for shorter "
                "lengths or a larger model.vocab (哨兵符不足)"
            )
        cut_X = np.concatenate([np.arange(a, b) for a, b in spans])
        source_BS, target_BX = _cut_out(rows_BT, spans, sentinels)
        said_X = np.concatenate([[-1, *range(a, b)] for a, b in spans])
        losses_BX = _losses_of(model, words, source_BS, target_BX)
        found_BT[:, cut_X], counted_BT[:, cut_X] = losses_BX[:, said_X >= 0], True
    return found_BT, counted_BT


def _spans(begin: int, end: int) -> list[tuple[int, int]]:
    """Spans that take MASKED of the positions between two, spread evenly, a token or more apart."""
    size = min(SPAN, max(1, (end - begin) // 2))
    count = max(1, round(MASKED * (end - begin) / size))
    firsts = (begin + (np.arange(count) + 0.5) * (end - begin) / count - size / 2).astype(int)
    return [(int(a), min(int(a) + size, end)) for a in np.maximum(firsts, begin)]


def _cut_out(
    rows_BT: np.ndarray, spans: list[tuple[int, int]], sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(a b <1> f g <2>, <1> c d e <2> h i) of each row."""
    B, at = len(rows_BT), 0
    source, target = [], []
    for number, (begin, end) in enumerate(spans):
        sentinel_B1 = np.full((B, 1), sentinels[number])
        source += [rows_BT[:, at:begin], sentinel_B1]
        target += [sentinel_B1, rows_BT[:, begin:end]]
        at = end
    return np.concatenate([*source, rows_BT[:, at:]], 1), np.concatenate(target, 1)


def _losses_of(
    model: Any, words: Any, source_BS: np.ndarray, target_BX: np.ndarray
) -> NDArray[np.float64]:
    """Losses [B, X] of a T5's targets."""
    found, device = [], next(model.parameters()).device
    at_once = max(1, TOKENS_AT_ONCE // source_BS.shape[1])
    for first in range(0, len(source_BS), at_once):
        source, target = (
            torch.from_numpy(x[first : first + at_once]).to(device) for x in (source_BS, target_BX)
        )
        start = target.new_full((len(target), 1), _start(words))
        ends = [target.new_full((len(target), 1), words.eod_id)]
        if words.bos_id is not None:
            source = torch.cat([start, source], 1)
        sides = [torch.cat([start, target[:, :-1]], 1), torch.cat([source, *ends], 1)]
        asked: list[Any] = []
        for side in sides:
            asked += [side, torch.arange(side.shape[1], device=device).expand_as(side), None]
        losses_N = token_losses_plain(model.logits, model(*asked).flatten(0, 1), target.flatten())
        found.append(losses_N.view_as(target).double().cpu().numpy())
    return np.concatenate(found)


def _start(words: Any) -> int:
    """What a decoder of pairs begins with."""
    return int(words.pad_id if words.bos_id is None else words.bos_id)


def _mean(losses: np.ndarray, counted: np.ndarray) -> float:
    return float(losses.sum() / max(counted.sum(), 1))


# ---------------------------------------------------------------- passkeys


def passkeys(
    checkpoint: str | Path,
    wanted: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 10,
    seed: int = 0,
    gpu: bool = False,
) -> dict[str, Any]:
    """Share of passkeys that are said whole, by length of the text and depth of the key in it."""
    from data_pipeline import tokenizer as tokenizers

    folder = resolve(checkpoint)
    if not (folder / "tokenizer").is_dir():
        raise LengthError(f"{folder}: has no tokenizer/, texts cannot be read for it (缺少分词器)")
    state = read(folder)
    check_says_words(state.record["model"], "--task passkey")
    words, model = tokenizers.load(folder / "tokenizer"), load_model(state, *place(gpu))
    config: Any = model.config
    _check(config, words, wanted)
    frame = 0 if isinstance(config, CPMConfig) else len(framed([], words.bos_id, words.eod_id))
    table = []
    for length in sorted(wanted):
        right = []
        for depth in depths:
            made = [passkey(words, length, depth, seed + n, frame) for n in range(samples)]
            said = sum(_says(model, words, text, key) for text, key in made)
            right.append(said / samples)
        table.append({"length": length, "accuracy": right, "mean": sum(right) / len(right)})
    head = {"checkpoint": called(folder), "depths": list(depths), "samples": samples}
    return head | {"lengths": table}


def passkey(
    words: Any, length: int, depth: float, seed: int, frame: int = 0
) -> tuple[list[int], list[int]]:
    """(text up to the question, the key's tokens); depth 0 is the start. Together `length` tokens
    with the `frame` of [CLS] and [SEP] that goes around them.

    Raises LengthError for a length that the key and the question do not leave room in.
    """
    number = np.random.default_rng([seed, length, round(1000 * depth)]).integers(10**DIGITS)
    key = f"{number:0{DIGITS}d}"
    filler, needle, asked, answered = (
        [int(i) for i in words.encode(text)]
        for text in (FILLER, KEY.format(key=key), ASKED, ASKED + key)
    )
    if answered[: len(asked)] == asked:
        answer = answered[len(asked) :]
    else:  # a token that reaches over the border: the key alone
        answer = [int(i) for i in words.encode(key)]
    rest = length - frame - len(needle) - len(asked) - len(answer)
    if rest < 0:
        raise LengthError(
            f"--lengths: {length} tokens are too few for a key and its question, at least "
            f"{length - rest} (长度不足)"
        )
    before = round(depth * rest)
    many = filler * (rest // len(filler) + 2)
    text = many[:before] + needle + many[before % len(filler) :][: rest - before] + asked
    return text, answer


@torch.no_grad()
def _says(model: Any, words: Any, text: list[int], key: list[int]) -> bool:
    """Whether the likeliest tokens behind the text, or in its masks, are the key."""
    device = next(model.parameters()).device
    count, answer = len(key), torch.tensor(key, device=device)

    def row(ids: list[int]) -> tuple[Tensor, Tensor, None]:
        tokens_BT = torch.tensor([ids], device=device)
        return tokens_BT, torch.arange(len(ids), device=device)[None], None

    if isinstance(model.config, CPMConfig):  # right token by token is what greedy would write
        hidden_BTD = model(*row([*text, *key]))[:, -count - 1 : -1]
    elif isinstance(model.config, T5PegasusConfig):
        source = framed(text, words.bos_id, words.eod_id)
        hidden_BTD = model(*row([_start(words), *key]), *row(source))[:, :count]
    else:
        asked = framed([*text, *[words.mask_id] * count], words.bos_id, words.eod_id)
        hidden_BTD = model(*row(asked))[:, -count - 1 : -1]
    best_T = model.logits(hidden_BTD[0])[:, : words.vocab_size].argmax(-1)
    return bool((best_T == answer).all())


# ---------------------------------------------------------------- for people


def table(found: dict[str, Any]) -> list[str]:
    """The lines that a person reads."""
    if "depths" in found:
        lines = [f"passkeys said, of {found['samples']} each; by depth of the key (按深度)"]
        lines.append(
            "  length" + "".join(f"{depth:>8.0%}" for depth in found["depths"]) + "    mean"
        )
        for one in found["lengths"]:
            cells = "".join(f"{share:>8.0%}" for share in one["accuracy"])
            lines.append(f"{one['length']:>8}{cells}{one['mean']:>8.0%}")
        return lines
    lines = [f"{found['rows']} documents; nats a token by positions (按位置的损失)"]
    for one in found["lengths"]:
        cells = "".join(f"  {part['to']}: {part['loss']:.3f}" for part in one["buckets"])
        error = "" if one["error"] is None else f" ± {one['error']:.4f}"
        head = f"{one['length']:>8} tokens  loss {one['loss']:.4f}{error}  perplexity"
        lines += [f"{head} {one['perplexity']:.2f}", f"{'up to':>15}{cells}"]
    return lines


WIDTH, HEIGHT, MARGIN, LEGEND = 760, 320, 48, 140
COLOURS = (
    "#1b7f5c",
    "#c8781e",
    "#33608f",
    "#a33b4b",
    "#6a4c93",
    "#555555",
    "#8a8a00",
    "#008a8a",
    "#d16ba5",
    "#000000",
)


def plot(series: dict[str, list[tuple[float, float]]], axis: str, title: str) -> str:
    """Curves of (x, y) by name as an SVG."""
    points = [point for line in series.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    wide, tall = WIDTH - MARGIN - LEGEND, HEIGHT - 2 * MARGIN

    def at(x: float, y: float) -> str:
        across = MARGIN + wide * (x - left) / max(right - left, 1e-9)
        return f"{across:.1f},{MARGIN + tall * (high - y) / max(high - low, 1e-9):.1f}"

    font = 'font-family="sans-serif" font-size="11"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-size="13">{title}</text>',
        f'<text x="{WIDTH - LEGEND}" y="{HEIGHT - 10}" text-anchor="end">{axis}</text>',
        f'<text x="4" y="{MARGIN}">{high:.2f}</text>',
        f'<text x="4" y="{HEIGHT - MARGIN}">{low:.2f}</text>',
        f'<text x="{MARGIN}" y="{HEIGHT - MARGIN + 16}">{left:g}</text>',
        f'<text x="{WIDTH - LEGEND}" y="{HEIGHT - MARGIN + 16}" text-anchor="end">{right:g}</text>',
    ]
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(at(x, y) for x, y in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        down = MARGIN + 14 * number
        out.append(f'<text x="{WIDTH - LEGEND + 12}" y="{down}" fill="{colour}">{name}</text>')
    return "\n".join([*out, "</svg>", ""])


def drawn(found: dict[str, Any]) -> str:
    """The curves of what lengths() or passkeys() found."""
    if "depths" in found:
        series = {
            f"{one['length']} tokens": list(zip(found["depths"], one["accuracy"], strict=True))
            for one in found["lengths"]
        }
        return plot(series, "depth of the key", "passkeys said")
    series = {
        f"{one['length']} tokens": [((p["from"] + p["to"]) / 2, p["loss"]) for p in one["buckets"]]
        for one in found["lengths"]
    }
    return plot(series, "position", "loss, nats a token")
