"""Where two models first differ: the place in the larger one whose residual stream is another.

norms that read the stream, in order --> float64 streams of both --> the first that differ
"""

import re
from collections.abc import Callable

import torch
from torch import nn

from configs.grown import said, times
from configs.model import ModelConfig, RoFormerConfig, tensors
from pretrain.by_module import distance, model_of, run
from pretrain.growth import model_config
from pretrain.growth.depth import source
from pretrain.state import State

FLOAT64_TOLERANCE = 1e-12
ROUNDED_TOLERANCE = 1e-5
"""Share of the stream's deviation, where weights that were rounded to float32 are looked at."""


def differs_at(before: State, after: State, tokens_BT: torch.Tensor) -> str:
    """The first place where the residual stream of two states differs, in words.

    Looked at: what enters each norm that reads the stream (float64), old places mapped to new ones,
    in a wider stream the old dimensions. A new one behind a post-norm has no counterpart.
    """
    old, old_BTV, scale = _streams(before, tokens_BT)
    new, new_BTV, _ = _streams(after, tokens_BT)
    was, now = model_config(before), model_config(after)
    exact = all(entry.dtype == "float64" for entry in after.entries.values())
    tolerance = FLOAT64_TOLERANCE if exact or _unscaled(was, now) else ROUNDED_TOLERANCE
    of_eps = of_norm_eps(was, now)
    earlier = "the embeddings"
    for name, stream_BTD in new.items():
        expected = _counterpart(name, was, now)
        if expected is None:
            continue
        if expected not in old:
            return f"{earlier} (the stream that enters {name} has no counterpart before)"
        old_BTD = old[expected]
        seen_BTD = stream_BTD[..., : old_BTD.shape[-1]] / _stretch(was, now)
        far = distance(seen_BTD, old_BTD)
        if not far <= tolerance * scale + of_eps * float(old_BTD.abs().max()):
            return f"{earlier} (the stream that enters {name} differs by {far:.2e})"
        earlier = _inside(name, was, now)
    far = distance(new_BTV[..., : said(was)], old_BTV[..., : said(was)])
    return f"{earlier} or the head (the logits differ by {far:.2e})"


def of_norm_eps(was: ModelConfig, now: ModelConfig) -> float:
    """The share of a logit, and of the stream, that new layers behind post-norms may change.

    A sum y of mean square m leaves a norm as h = y / sqrt(m + eps), whose mean square is 1 - eps/m:
    a norm behind it makes h (1 + (1/m - 1) eps / 2) of it, and further ones change no more than
    eps^2. So each old layer with new ones behind it rescales the stream once, by less than eps / 2
    where m > 1/2. What follows reads that: twice as much is granted, for each such layer.
    """
    if not isinstance(was, RoFormerConfig):
        return 0.0
    places = (source(number, was.layers, now.layers) for number in range(now.layers))
    return len({old for old, is_new in places if is_new}) * was.norm_eps


def _unscaled(was: ModelConfig, now: ModelConfig) -> bool:
    return was.hidden == now.hidden and was.head_dim == now.head_dim


def _stretch(was: ModelConfig, now: ModelConfig) -> float:
    """What the old dimensions of the stream were multiplied by."""
    gainless = isinstance(was, RoFormerConfig) and was.version == 2
    padded = times(was.hidden, now.hidden) is None
    return float((now.hidden / was.hidden) ** 0.5) if gainless and padded else 1.0


def _counterpart(name: str, was: ModelConfig, now: ModelConfig) -> str | None:
    """The norm of the smaller model that must see the same stream as norm `name` of the larger."""
    head, found, rest = name.partition(".layers.")
    if not found:
        return name
    number, _, inner = rest.partition(".")
    old, is_new = source(int(number), was.layers, now.layers)
    if not is_new:
        return f"{head}.layers.{old}.{inner}"
    if isinstance(was, RoFormerConfig):
        return None
    if old + 1 == was.layers:  # a new one behind the last layer sees what leaves the stack
        return f"{head}.final_norm"
    return f"{head}.layers.{old + 1}.{_norms(was, head)[0]}"


def _inside(name: str, was: ModelConfig, now: ModelConfig) -> str:
    """What follows norm `name`, for people: which sub-layer, and where its layer comes from."""
    head, found, rest = name.partition(".layers.")
    if not found:
        return f"{name} or what follows it"
    number, _, inner = rest.partition(".")
    old, is_new = source(int(number), was.layers, now.layers)
    what = "new, behind" if is_new else "was"
    part = inner.removesuffix("_norm")
    return f"{head}.layers.{number}.{part} ({what} layer {old})"


def _norms(config: ModelConfig, head: str) -> list[str]:
    """Names of a layer's norms, in order, from the table."""
    start = f"{head}.layers.0."
    names = [t.name for t in tensors(config) if t.op == "norm" and t.name.startswith(start)]
    return [n.removeprefix(start).removesuffix(".weight") for n in names if n.endswith(".weight")]


def _streams(
    state: State, tokens_BT: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """What enters each norm that reads the stream, the logits, the largest stream's deviation."""
    seen: dict[str, torch.Tensor] = {}
    with model_of(state, torch.float64) as model:
        for name, module in model.named_modules():
            if re.search(r"(^|[._])norm$", name) and not name.startswith("head."):
                module.register_forward_pre_hook(_keeper(seen, name))
        logits_BTV = run(model, tokens_BT)
    return seen, logits_BTV, max(float(x.std()) for x in seen.values())


def _keeper(seen: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen[name] = arguments[0].clone()

    return keep
