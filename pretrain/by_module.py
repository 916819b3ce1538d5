"""The model of a state, one module at a time: any size, in the memory of its largest matrix.

The model stands on the meta device; a module's tensors are read just before it runs and dropped
just after.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from configs.model import T5PegasusConfig
from pretrain.growth import model_config
from pretrain.models import build
from pretrain.state import State


@contextmanager
def model_of(state: State, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The model of a state, in `dtype`, its tensors read as its modules run."""
    config = model_config(state)
    with torch.device("meta"):
        model = build(config)
    model.to(dtype).eval()
    model.requires_grad_(False)
    if dtype == torch.float16 and (keep_in_range := getattr(model, "keep_in_range", None)):
        keep_in_range()  # as the engine does: T5 overflows without it
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(_fetcher(state, name, dtype))
            module.register_forward_hook(_dropper)
    with torch.inference_mode():
        yield model


def _fetcher(state: State, at: str, dtype: torch.dtype) -> Callable[..., None]:
    def fetch(module: nn.Module, arguments: Any) -> None:
        for name in [n for n, p in module._parameters.items() if p is not None]:
            whole = state.read(f"weights/{at}.{name}").to(dtype)
            module._parameters[name] = nn.Parameter(whole, requires_grad=False)

    return fetch


def _dropper(module: nn.Module, arguments: Any, output: Any) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def run(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Logits; an encoder-decoder reads the probes on both sides."""
    rows, length = tokens_BT.shape
    positions_BT = torch.arange(length).expand(rows, length)
    sides = (tokens_BT, positions_BT, None)
    twice = isinstance(model.config, T5PegasusConfig)
    hidden_BTD = model(*sides, *sides) if twice else model(*sides)
    logits_NV: torch.Tensor = model.logits(hidden_BTD.flatten(0, 1))  # type: ignore[operator]
    return logits_NV.view(rows, length, -1)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference; a NaN anywhere is a NaN."""
    return float((one.double() - other.double()).abs().max())
