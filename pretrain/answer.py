"""What an encoder-decoder writes to a text, and what an encoder puts where a text is masked.

    T5 PEGASUS   [CLS] source [SEP] -> encode once -> decoder: [CLS] -> token -> ... -> [SEP]
    RoFormer     [CLS] 今 天 [MASK] 很 好 [SEP] -> one forward -> the likeliest for each [MASK]

Sources are padded on the right with a document of its own, so a row of a batch is what it would be
alone. The decoder keeps its own keys and values, and the encoder's, which do not change.

Legend: B rows, S tokens of the longest source, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.allowed import AllowedOutputs
from pretrain.beam import BranchingCache
from pretrain.decoding import Decoding, Written
from pretrain.generate import PADDING, spell


def framed(ids: Sequence[int], bos_id: int | None, eod_id: int) -> list[int]:
    """[CLS] ids [SEP], as the rows of training are; without the first where there is none."""
    return [*([] if bos_id is None else [bos_id]), *ids, eod_id]


def right_padded(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens, positions, document ids) [B, S]; no document ids where all rows are of one length.

    Raises ValueError for a row without tokens.
    """
    if min(map(len, rows)) == 0:
        raise ValueError("prompt: is empty; give the model at least one token (提示不能为空)")
    S = max(map(len, rows))
    tokens_BS = torch.tensor([[*row, *[pad_id] * (S - len(row))] for row in rows], device=device)
    places_S = torch.arange(S, device=device)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    documents_BS = torch.where(places_S < lengths_B[:, None], 0, PADDING)
    ragged = min(map(len, rows)) < S
    return tokens_BS, places_S.expand_as(tokens_BS), documents_BS if ragged else None


@torch.no_grad()
def answer(
    model: Any,
    sources: Sequence[Sequence[int]],
    decoding: Decoding,
    start_id: int,
    end_id: int,
    pad_id: int,
    vocab: int | None = None,
    cache: bool = True,
    allowed: AllowedOutputs | None = None,
) -> list[Written]:
    """What the decoder writes to each source of token ids (see framed()), in their order.

    Without `cache` every forward runs over all tokens so far: slower, the same result.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        tokens_BS, *places = right_padded(sources, pad_id, device)
        memory_BSD = model.encode(tokens_BS, *places)
    finally:
        model.train(was_training)
    if allowed is not None:
        allowed.check_room(decoding.max_new_tokens, "max_new_tokens")
    held = BranchingCache(decoding.max_new_tokens) if cache else None
    tokens_BT = torch.full((len(sources), 1), start_id, device=device)
    past = 0

    def ahead(next_B: Tensor | None, kept_B: Tensor | None = None) -> Tensor:
        nonlocal tokens_BT, past, memory_BSD, places
        if kept_B is not None:
            tokens_BT = tokens_BT[kept_B]
            places = [None if part is None else part[kept_B] for part in places]
            if held is not None:
                held.select(kept_B)  # and the memory is in it
            else:
                memory_BSD = memory_BSD[kept_B]
        if next_B is not None:
            past += tokens_BT.shape[1] if cache else 0
            tokens_BT = next_B[:, None] if cache else torch.cat([tokens_BT, next_B[:, None]], 1)
        positions_T = torch.arange(past, past + tokens_BT.shape[1], device=device)
        given = (tokens_BT, positions_T.expand_as(tokens_BT), None)
        hidden_BTD: Tensor = model.decode(*given, memory_BSD, *places, held)
        return hidden_BTD[:, -1]

    rooms = [decoding.max_new_tokens] * len(sources)
    return spell(model, ahead, sources, rooms, decoding, end_id, vocab, allowed)


@dataclass(frozen=True)
class Filled:
    """A row whose masks were filled."""

    ids: list[int]
    """Its tokens, each mask replaced by the likeliest one."""
    choices: list[list[tuple[int, float]]]
    """For each mask the likeliest tokens and their probabilities, the best one first."""


@torch.no_grad()
def fill(
    model: Any,
    rows: Sequence[Sequence[int]],
    mask_id: int,
    pad_id: int,
    vocab: int | None = None,
    best: int = 5,
) -> list[Filled]:
    """Fill every mask of rows of token ids, each as if the others stayed masked."""
    room = getattr(model.config, "positions", None)
    if room is not None and (longest := max(map(len, rows), default=0)) > room:
        raise ValueError(
            f"prompt: has {longest} tokens, [CLS] and [SEP] included, the model has {room} "
            "positions; shorten it (提示过长)"
        )
    device = next(model.parameters()).device
    tokens_BS, *places = right_padded(rows, pad_id, device)
    was_training = model.training
    model.eval()
    try:
        masked_BS = tokens_BS == mask_id
        hidden_ND = model(tokens_BS, *places)[masked_BS]
        logits_NV = model.logits(hidden_ND)[:, :vocab].float()
    finally:
        model.train(was_training)
    found = torch.softmax(logits_NV, -1).topk(min(best, logits_NV.shape[-1]), -1)
    ranked = iter(zip(found.indices.tolist(), found.values.tolist(), strict=True))
    out = []
    for row in rows:
        choices = [list(zip(*next(ranked), strict=True)) for token in row if token == mask_id]
        likeliest = iter(choices)
        ids = [next(likeliest)[0][0] if token == mask_id else token for token in row]
        out.append(Filled(ids, choices))
    return out


def shown(filled: Filled, row: Sequence[int], mask_id: int, tokenizer: Any) -> str:
    """The row with each mask's choices in its place, 今天[天||气||我]很好, as it was published, and
    the unknown token for what the vocabulary lacks."""
    parts: list[str] = []
    run: list[int] = []
    choices = iter(filled.choices)
    for token in [*row, None]:
        if token is None or token in (mask_id, tokenizer.unknown_id):
            parts.append(tokenizer.decode(run))
            run = []
        else:
            run.append(token)
        if token == mask_id:
            words = (tokenizer.pieces([i])[0].removeprefix("##") for i, _ in next(choices))
            parts.append(f"[{'||'.join(words)}]")
        elif token == tokenizer.unknown_id:
            parts += tokenizer.pieces([token])
    return "".join(parts)
