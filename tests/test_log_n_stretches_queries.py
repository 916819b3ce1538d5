"""Promise: `log_n` multiplies a token's scores by log n / log base, n the keys that it sees (at
least 16), in all three families, and attention takes the same fast path as without it.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.model import CPMConfig, RoFormerConfig, T5PegasusConfig
from pretrain.models import build
from pretrain.models.cpm import CPM
from pretrain.models.layers import KeyValueCache, Visibility, attention_matmul
from tests.test_cpm_equals_gpt2 import random_weights
from tests.test_t5_pegasus_equals_mt5 import side

OFF = {"dropout": 0.0, "attention_dropout": 0.0}
FAMILIES = {
    "cpm": CPMConfig("cpm", 61, 32, 1, 4, 8, 64, 64, **OFF),
    "t5_pegasus": T5PegasusConfig("t5_pegasus", 61, 32, 1, 4, 8, 64, **OFF),
    "roformer": RoFormerConfig("roformer", 1, 61, 32, 1, 4, 8, 64, **OFF),
    "roformer v2": RoFormerConfig("roformer", 2, 61, 32, 1, 4, 8, 64, **OFF),
}
LENGTHS = [[20, 18, -2], [40]]
TARGETS = [[9, 10, -1], [20]]

Call = tuple[Tensor, Visibility]


def calls(family: str, log_n: int, documents: bool = True) -> list[Call]:
    """Queries, stretched, and visibility of every call of attention."""
    model: Any = build(replace(FAMILIES[family], log_n=log_n)).double().eval()
    random_weights(model, 0)
    seen: list[Call] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, see: Visibility, *rest: Any) -> Tensor:
        seen.append((see.stretched(q), see))
        return attention_matmul(q, k, v, see, *rest)

    for module in model.modules():
        if hasattr(module, "attention"):
            module.attention = attention
    row = side(LENGTHS, 61, 5)
    given = row if documents else (row[0], torch.arange(40).expand(2, 40), None)
    if family != "t5_pegasus":
        model(*given)
        return seen
    target = side(TARGETS, 61, 6)
    model(*(target if documents else (target[0], torch.arange(20).expand(2, 20), None)), *given)
    return seen


def keys_seen(
    queries: list[list[int]], keys: list[list[int]], causal: bool
) -> list[list[int | None]]:
    """By hand: how many keys each token sees; None for padding."""
    found: list[list[int | None]] = []
    for row, source in zip(queries, keys, strict=True):
        found.append([])
        for length, other in zip(row, source, strict=True):
            for place in range(abs(length)):
                n = place + 1 if causal else other
                found[-1].append(None if length < 0 else n)
    return found


EXPECTED = {
    "cpm": [keys_seen(LENGTHS, LENGTHS, True)],
    "t5_pegasus": [
        keys_seen(LENGTHS, LENGTHS, False),
        keys_seen(TARGETS, TARGETS, True),
        keys_seen(TARGETS, LENGTHS, False),
    ],
    "roformer": [keys_seen(LENGTHS, LENGTHS, False)],
    "roformer v2": [keys_seen(LENGTHS, LENGTHS, False)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_stretched_by_the_logarithm(family: str) -> None:
    plain, stretched = calls(family, 0), calls(family, 512)
    assert len(plain) == len(stretched) == len(EXPECTED[family])
    # Only the first call of a stack has the same input; the later ones of T5 see other streams.
    for (before, _), (after, see), counts in zip(plain, stretched, EXPECTED[family], strict=True):
        assert see.stretch is not None
        factor = see.stretch.expand(2, after.shape[1], 1, 1)[:, :, 0, 0]
        for row, line in enumerate(counts):
            for at, n in enumerate(line):
                if n is not None:
                    wanted = math.log(max(n, 16)) / math.log(512)
                    assert factor[row, at].item() == pytest.approx(wanted, rel=1e-6)
        if before is plain[0][0]:
            assert torch.allclose(after, before * factor[:, :, None, None], rtol=1e-6)


def test_without_documents_a_decoder_stays_plainly_causal() -> None:
    """No mask is built: the fused causal kernel stays open."""
    ((_, see),) = calls("cpm", 512, documents=False)
    assert see.causal and see.visible is None and see.bias is None and see.stretch is not None
    assert see.stretch.flatten()[-1].item() == pytest.approx(math.log(40) / math.log(512))
    ((_, see),) = calls("roformer", 512, documents=False)
    assert not see.causal and see.visible is None and see.stretch is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_something(family: str) -> None:
    def hidden(log_n: int) -> Tensor:
        model: nn.Module = build(replace(FAMILIES[family], log_n=log_n)).double().eval()
        random_weights(model, 0)
        row = side(LENGTHS, 61, 5)
        return model(*(row * 2 if family == "t5_pegasus" else row))

    assert (hidden(512) - hidden(0)).abs().max() > 1e-3


def test_a_cache_counts_the_keys_behind() -> None:
    model = CPM(replace(FAMILIES["cpm"], log_n=64)).double().eval()
    random_weights(model, 0)
    tokens, positions, documents = side([[30], [-5, 25]], 61, 5)
    whole = model(tokens, positions, documents)
    cache = KeyValueCache(30)
    parts = [
        model(tokens[:, at], positions[:, at], documents[:, at], cache)
        for at in (slice(0, 21), slice(21, 22), slice(22, 30))
    ]
    real = documents >= 0
    assert (torch.cat(parts, 1) - whole)[real].abs().max() < 1e-12
