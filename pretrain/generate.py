"""Letting a model write: greedy, top-k, top-p, temperature, beams, in batches, with a cache.

    prompts -> token ids, padded on the left -> one forward over all of them
        -> logits of the last position -> temperature -> top-k -> top-p (the end kept) -> token
        -> a forward of one token a row on the cache of keys and values -> ... -> text

Padding is a document of its own and positions begin behind it, so a row of a batch is what it would
be alone. Random numbers belong to (seed, prompt): neither the batch around a prompt nor the device
count changes what it draws, and the generator of training (dropout) is left alone.

An incomplete decoding (top-k, top-p) can put the end of a document at probability 0 for ever (Su,
kexue.fm/archives/7500; Welleck et al. 2020): the end token stays in every truncated set. Beam
search has a room of its own (beam.py), and so have the outputs that are allowed (allowed.py).

Legend: B rows, T tokens of the longest prompt, V vocabulary.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from configs.load import from_dict
from configs.model import CPMConfig, ModelConfig, T5PegasusConfig
from pretrain import checkpoint, models
from pretrain.allowed import AllowedOutputs, Node, read_lines
from pretrain.averaged import called
from pretrain.beam import Ahead, BranchingCache, nothing_left, search
from pretrain.decoding import Decoding, Written, add_flags, check_fills, from_flags
from pretrain.device import place
from pretrain.state import State

PADDING = -1
"""Document id of padding, as in pretrain/batches.py."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer (data_pipeline.tokenizer.Tokenizer)."""

    vocab_size: int
    eod_id: int
    pad_id: int
    bos_id: int | None
    """[CLS], where there is one."""
    mask_id: int | None
    """[MASK], where there is one."""
    unknown_id: int
    """What stands for a text that the vocabulary lacks."""

    def encode_prompt(self, text: str) -> Any:
        """Token ids of a text from outside the corpus, without an end of document."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of token ids."""
        ...


def load_model(
    state: State, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model of a state, in eval mode; read one tensor at a time."""
    config = from_dict(cast(Any, ModelConfig), state.record["model"], "model")
    with torch.device("meta"):
        model = models.build(config)
    for name, parameter in list(model.named_parameters()):
        value = state.read(f"weights/{name}")
        assert value.shape == parameter.shape, f"{name}: {value.shape} for {parameter.shape}"
        at, _, leaf = name.rpartition(".")
        # A copy: the state's tensor may be mapped from a file that will be rotated away.
        owned = value.to(device=device, dtype=dtype, copy=True)
        if owned.ndim == 2 and owned.device.type == "cpu" and dtype == torch.float32:
            # Laid out by columns: a product with one row a forward is 1.5 to 2 times as fast (MKL).
            owned = owned.t().contiguous().t()
        setattr(model.get_submodule(at), leaf, nn.Parameter(owned, requires_grad=False))
    if set_progress := getattr(model, "set_progress", None):  # RoFormer's ramp
        set_progress(int(state.record.get("step", 0)))
    return model.eval()


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    eod_id: int,
    pad_id: int,
    vocab: int | None = None,
    cache: bool = True,
    allowed: AllowedOutputs | None = None,
) -> list[Written]:
    """Continue prompts of token ids; one `Written` each, in their order.

    model: forward(tokens, positions, document_ids, cache) and logits(); its whole vocabulary here.
    vocab: tokens that exist, where the model's table has more rows. Without `cache` every forward
    runs over all tokens so far: slower, the same result.
    """
    device = next(model.parameters()).device
    lengths, capacity = [len(prompt) for prompt in prompts], int(model.config.positions)
    if min(lengths) == 0:
        raise ValueError("prompt: is empty; give the model at least one token (提示不能为空)")
    if max(lengths) > capacity:
        raise ValueError(
            f"prompt: has {max(lengths)} tokens, the model has {capacity} positions; it must not "
            "be longer (提示过长)"
        )
    rooms = [min(decoding.max_new_tokens, room_behind(length, capacity)) for length in lengths]
    if allowed is not None:
        allowed.check_room(min(rooms), "max_new_tokens, or the model's positions,")
    held = BranchingCache(max(lengths) + max(rooms)) if cache else None
    given = _padded(prompts, pad_id, device)

    def ahead(next_B: Tensor | None, kept_B: Tensor | None = None) -> Tensor:
        nonlocal given
        if kept_B is not None:
            tokens_BT, positions_BT, documents_BT = given
            if documents_BT is not None:
                documents_BT = documents_BT[kept_B]
            given = (tokens_BT[kept_B], positions_BT[kept_B], documents_BT)
            if held is not None:
                held.select(kept_B)
        if next_B is not None:
            given = _grown(given, next_B, capacity, cache)
        hidden_BTD: Tensor = model(*given, held)
        return hidden_BTD[:, -1]

    return spell(model, ahead, prompts, rooms, decoding, eod_id, vocab, allowed)


def room_behind(length: int, positions: int) -> int:
    """Tokens that can be written behind a prompt: the last is never read, so it needs no
    position."""
    return positions - length + 1


@torch.no_grad()
def spell(
    model: Any,
    ahead: Ahead,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    decoding: Decoding,
    eod_id: int,
    vocab: int | None,
    allowed: AllowedOutputs | None = None,
) -> list[Written]:
    """Token after token behind prompts, each row at most as many as its room; or a beam search."""
    if decoding.beams:
        return search(model, ahead, rooms, decoding, eod_id, vocab, allowed)
    device, steps = next(model.parameters()).device, max(rooms)
    rooms_B = torch.tensor(rooms, device=device)
    draws = None if decoding.greedy else _uniform(prompts, steps, decoding.seed).to(device)
    written: list[Tensor] = []
    nodes: list[Node] = [] if allowed is None else [allowed.root] * len(prompts)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    try:
        for step in range(steps):
            logits_BV = model.logits(ahead(written[-1] if written else None))[:, :vocab]
            logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
            if allowed is not None:
                logits_BV = allowed.only(logits_BV, nodes)
            if step < decoding.min_new_tokens:
                logits_BV[:, eod_id] = logits_BV[:, eod_id].where(ended_B, -torch.inf)
                if allowed is not None and bool(logits_BV.isneginf().all(1).any()):
                    raise nothing_left()
            next_B = choose(logits_BV, decoding, eod_id, None if draws is None else draws[:, step])
            next_B = next_B.where(~ended_B, eod_id)  # a row that ended goes on unread
            written.append(next_B)
            if allowed is not None:
                told = zip(nodes, next_B.tolist(), strict=True)
                nodes = [node.get(token, {}) for node, token in told]
            ended_B = ended_B | (next_B == eod_id) | (rooms_B <= step + 1)
            if ended_B.all():
                break
    finally:
        model.train(was_training)
    rows = torch.stack(written, 1).tolist()
    return [_cut(row[:room], eod_id) for row, room in zip(rows, rooms, strict=True)]


def _padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens, positions, document ids) [B, T] of prompts padded on the left."""
    T = max(map(len, prompts))
    tokens_BT = np.full((len(prompts), T), pad_id, np.int64)
    documents_BT = np.full((len(prompts), T), PADDING, np.int64)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, T - len(prompt) :] = prompt
        documents_BT[row, T - len(prompt) :] = 0
    pads_B = (documents_BT == PADDING).sum(1, keepdims=True)
    positions_BT = np.maximum(np.arange(T) - pads_B, 0)
    tensors = [torch.from_numpy(a).to(device) for a in (tokens_BT, positions_BT, documents_BT)]
    # Prompts of one length need no documents, and attention no mask.
    return tensors[0], tensors[1], tensors[2] if pads_B.any() else None


def _grown(
    given: tuple[Tensor, Tensor, Tensor | None], next_B: Tensor, capacity: int, cache: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the next forward is given: with a cache one token a row, without it all of them."""
    tokens_BT, positions_BT, documents_BT = given
    # A row out of positions has ended; what is still computed for it is not read.
    new = (next_B[:, None], (positions_BT[:, -1:] + 1).clamp(max=capacity - 1))
    real_B1 = None if documents_BT is None else torch.zeros_like(next_B[:, None])
    if cache:
        return (*new, real_B1)
    return (
        torch.cat([tokens_BT, new[0]], 1),
        torch.cat([positions_BT, new[1]], 1),
        None if real_B1 is None else torch.cat([cast(Tensor, documents_BT), real_B1], 1),
    )


def _cut(row: list[int], eod_id: int) -> Written:
    ended = eod_id in row
    return Written(row[: row.index(eod_id)] if ended else row, ended)


def _uniform(prompts: Sequence[Sequence[int]], steps: int, seed: int) -> Tensor:
    """Numbers in [0, 1), float64 [B, steps]: a stream for each (seed, prompt, copy of it)."""
    copies: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in prompts:
        key = tuple(prompt)
        generator = np.random.default_rng([seed % 2**63, copies[key], *key])
        copies[key] += 1
        rows.append(generator.random(steps))
    return torch.from_numpy(np.stack(rows))


def choose(
    logits_BV: Tensor, decoding: Decoding, eod_id: int, draw_B: Tensor | None = None
) -> Tensor:
    """The next token of each row [B]; sampling turns a number in [0, 1) a row into a token."""
    if decoding.greedy or draw_B is None:
        return logits_BV.argmax(-1)
    kept_BV = truncated(logits_BV / decoding.temperature, decoding.top_k, decoding.top_p, eod_id)
    cumulative_BV = torch.softmax(kept_BV.double(), -1).cumsum(-1)
    reached = draw_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
    # The first token whose cumulative probability lies above the draw has a probability above 0.
    return torch.searchsorted(cumulative_BV, reached, right=True)[:, 0].clamp(
        max=logits_BV.shape[-1] - 1
    )


def truncated(logits_BV: Tensor, top_k: int, top_p: float, eod_id: int) -> Tensor:
    """Logits with -inf outside the top k and then the top p; the end token always stays."""
    kept_BV = logits_BV
    if 0 < top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k, -1).values[:, -1:]
        kept_BV = kept_BV.masked_fill(logits_BV < least, -torch.inf)
    if top_p < 1.0:
        ordered_BV, at_BV = kept_BV.sort(-1, descending=True)
        share_BV = torch.softmax(ordered_BV.float(), -1)
        before_BV = share_BV.cumsum(-1) - share_BV
        # Whatever stands behind tokens that already reach p goes.
        gone_BV = torch.zeros_like(kept_BV, dtype=torch.bool)
        gone_BV.scatter_(-1, at_BV, before_BV >= top_p)
        kept_BV = kept_BV.masked_fill(gone_BV, -torch.inf)
    if kept_BV is not logits_BV:
        kept_BV[:, eod_id] = logits_BV[:, eod_id]
    return kept_BV


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    allowed: str | Path | None = None,
    **decoding: Any,
) -> list[str]:
    """What the model makes of each prompt, without the prompt; see `Decoding`.

    A decoder goes on with it, an encoder-decoder answers it, an encoder fills its masks (the middle
    token, where none is masked) and gives the whole text, 今天[天||气||我]很好. `allowed` is a
    file of the lines that may be written.
    """
    return [text for text, _ in texts(model, tokenizer, prompts, Decoding(**decoding), allowed)]


def texts(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    decoding: Decoding,
    allowed: str | Path | None = None,
) -> list[tuple[str, Written]]:
    """generate(), and the tokens that were written."""
    from pretrain import answer

    rows = [[int(i) for i in tokenizer.encode_prompt(prompt)] for prompt in prompts]
    known: dict[str, Any] = {"pad_id": tokenizer.pad_id, "vocab": tokenizer.vocab_size}
    if isinstance(model.config, CPMConfig | T5PegasusConfig):
        lines: dict[tuple[int, ...], str] = {}
        if allowed is not None:
            known["allowed"], lines = read_lines(allowed, tokenizer)
        if isinstance(model.config, CPMConfig):
            written = write(model, rows, decoding, tokenizer.eod_id, **known)
        else:
            start = tokenizer.pad_id if tokenizer.bos_id is None else tokenizer.bos_id
            framed = [answer.framed(row, tokenizer.bos_id, tokenizer.eod_id) for row in rows]
            written = answer.answer(model, framed, decoding, start, tokenizer.eod_id, **known)
        return [(lines.get(tuple(w.ids)) or tokenizer.decode(w.ids), w) for w in written]
    if decoding.beams or allowed is not None:
        raise ValueError(
            "beams, allowed: are for models that write; an encoder fills masks, each with the "
            "likeliest tokens (编码器只填空)"
        )
    return _filled(model, tokenizer, rows)


def _filled(
    model: Any, tokenizer: Tokenizer, rows: Sequence[list[int]]
) -> list[tuple[str, Written]]:
    """Rows of an encoder with their masks filled."""
    from pretrain import answer

    if labels := getattr(model.config, "labels", 0):
        raise ValueError(
            f"checkpoint: has a head over {labels} labels, not over words; it tells labels: "
            "evaluate --task labels (分类模型不能填空)"
        )
    mask = tokenizer.mask_id
    if mask is None:
        raise ValueError("prompt: this tokenizer has no mask to fill (分词器没有 [MASK])")
    framed = [answer.framed(row, tokenizer.bos_id, tokenizer.eod_id) for row in rows]
    framed = [
        [*row[: len(row) // 2], mask, *row[len(row) // 2 + 1 :]] if mask not in row else row
        for row in framed
    ]
    filled = answer.fill(model, framed, mask, tokenizer.pad_id, tokenizer.vocab_size)
    return [
        (answer.shown(f, row, mask, tokenizer), Written([c[0][0] for c in f.choices], True))
        for f, row in zip(filled, framed, strict=True)
    ]


def main(argv: Sequence[str]) -> int:
    """The command `python -m launch generate`."""
    parser = argparse.ArgumentParser(
        prog="python -m launch generate",
        description="Let a checkpoint continue texts (续写文本)",
    )
    parser.add_argument("checkpoint", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("--prompt", action="append", required=True, help="again for a batch")
    add_flags(parser)
    parser.add_argument(
        "--allowed", metavar="FILE", help="the lines that may be written (限定输出)"
    )
    parser.add_argument("--gpu", action="store_true", help="on an NVIDIA GPU, in bf16")
    parser.add_argument("--json", action="store_true", help="print JSON")
    words = parser.parse_args(argv)
    decoding = from_flags(words, parser)
    where = place(words.gpu)

    from data_pipeline import tokenizer as corpus_tokenizer

    folder = checkpoint.resolve(words.checkpoint)
    tokenizer = corpus_tokenizer.load(folder / "tokenizer")
    model: Any = load_model(checkpoint.read(folder), *where)
    goes_on = isinstance(model.config, CPMConfig)
    if not isinstance(model.config, CPMConfig | T5PegasusConfig):
        check_fills(words, parser)
    rooms = _rooms(tokenizer, words.prompt, decoding, model.config.positions) if goes_on else []
    start = time.perf_counter()
    found = texts(model, tokenizer, words.prompt, decoding, words.allowed)
    elapsed_s = time.perf_counter() - start
    full = {r for r, (_, w) in zip(rooms, found, strict=False) if len(w.ids) == r and not w.ended}
    if cut := sorted(full - {decoding.max_new_tokens}):
        print(
            f"--max-new-tokens: is {decoding.max_new_tokens}, {', '.join(map(str, cut))} fit "
            f"behind the prompt in the model's {model.config.positions} positions, where the text "
            "was cut; `launch extend` makes room (位置用完，文本已截断)",
            file=sys.stderr,
        )
    _show(words, called(folder), found, elapsed_s, "" if goes_on else " => ")
    return 0


def _rooms(
    tokenizer: Tokenizer, prompts: Sequence[str], decoding: Decoding, positions: int
) -> list[int]:
    """Tokens that will be written behind each prompt at most; ValueError if the least that was
    asked for does not fit."""
    lengths = [len(tokenizer.encode_prompt(prompt)) for prompt in prompts]
    fit = room_behind(max(lengths), positions)
    if 0 < fit < decoding.min_new_tokens:  # a prompt that itself is too long is told by write()
        raise ValueError(
            f"--min-new-tokens: is {decoding.min_new_tokens}, {fit} fit behind the prompt of "
            f"{max(lengths)} tokens in the model's {positions} positions; lower it, or make room "
            "by `launch extend` (位置不足)"
        )
    return [min(decoding.max_new_tokens, room_behind(length, positions)) for length in lengths]


def _show(
    words: argparse.Namespace,
    folder: str,
    found: list[tuple[str, Written]],
    elapsed_s: float,
    between: str,
) -> None:
    if not words.json:
        for prompt, (text, _) in zip(words.prompt, found, strict=True):
            print(prompt + between + text)
        return
    rows = [
        {"prompt": prompt, "text": text, "tokens": len(w.ids), "ended": w.ended}
        | ({} if w.score is None else {"score": w.score})
        for prompt, (text, w) in zip(words.prompt, found, strict=True)
    ]
    speed = sum(len(w.ids) + w.ended for _, w in found) / elapsed_s
    said = {"checkpoint": folder, "generated": rows, "tokens_per_s": round(speed, 1)}
    json.dump(said, sys.stdout, ensure_ascii=False)
    print()
