"""Recompute: keep less of the forward, run parts of it again in the backward.

    none       everything is kept
    full       a block keeps its input only
    sublayer   attention and FFN each keep their input only (bert4keras; kexue.fm/archives/7367)
    a mapping  what each block computes again, by its name (pretrain/kept.py chooses by a budget)
    offload    the inputs kept lie in host memory meanwhile

Applied from outside: a block is any module with `self_sublayer` and `ffn_sublayer`. Parameter
names, values and the random numbers of dropout stay, so the loss is the same to the last bit.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SUBLAYERS = ("self_sublayer", "cross_sublayer", "ffn_sublayer")
WAYS = {"none": (), "full": ("forward",), "sublayer": SUBLAYERS}


def apply(
    model: nn.Module, how: str | Mapping[str, tuple[str, ...]], offload: bool = False
) -> nn.Module:
    """Make the blocks of a model recompute `how`; again to change it.

    how: none, full or sublayer for all blocks, or for each block, by its name in the model, the
    methods that it computes again ("forward" is all of it).
    """
    if isinstance(how, str) and how not in WAYS:
        raise ValueError(
            f"recompute: is {how!r}, must be none, full or sublayer; set `recompute` "
            "(重计算方式只能是 none, full 或 sublayer)"
        )
    host = Host() if offload else None
    for place, block in model.named_modules():
        if not all(hasattr(block, name) for name in ("self_sublayer", "ffn_sublayer")):
            continue
        wrapped = WAYS[how] if isinstance(how, str) else how[place]
        for name in ("forward", *SUBLAYERS):
            block.__dict__.pop(name, None)
            if name in wrapped and hasattr(block, name):
                # A partial of the class's function: a deep copy of the model binds to the copy.
                block.__dict__[name] = partial(_again, getattr(type(block), name), block, host)
    return model


def _again(
    function: Callable[..., Any], block: nn.Module, host: "Host | None", *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return function(block, *args, **kwargs)
    if host is None:
        return checkpoint(function, block, *args, use_reentrant=False, **kwargs)
    with host.keeping(args[0]):
        # checkpoint()'s own hooks lie over these while the function runs: what comes here are its
        # arguments, and of those the input alone; an encoder's memory is kept once for all blocks.
        return checkpoint(function, block, *args, use_reentrant=False, **kwargs)


class Host:
    """Inputs of blocks in host memory, from the forward pass to the backward.

    On a GPU copies go out and come back on a stream of their own, from and to pinned memory, and
    when an input is asked for, the one that will be asked for next is sent for.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._last: weakref.ref[_Parcel] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Host":
        return Host()  # a stream has no copy, and between two steps nothing is on its way

    def keeping(self, x: Tensor) -> Any:
        """A context in which x, saved for the backward pass, is saved on the host."""
        place = x.data_ptr()
        return torch.autograd.graph.saved_tensors_hooks(
            lambda saved: self._out(saved) if saved.data_ptr() == place else saved,
            lambda kept: kept.back() if isinstance(kept, _Parcel) else kept,
        )

    def _out(self, x: Tensor) -> "_Parcel":
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        parcel = _Parcel(x.detach(), self._stream, self._last)
        self._last = weakref.ref(parcel)
        return parcel


class _Parcel:
    """One tensor on the host, or on its way; it lives as long as the graph that saved it."""

    def __init__(self, x: Tensor, stream: Any, before: "weakref.ref[_Parcel] | None") -> None:
        self.device, self.stream, self.before = x.device, stream, before
        self.come: Tensor | None = None
        self.asked = False
        if stream is None:
            self.held = x.clone()
            return
        self.held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.held.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not given away before the copy is made

    def send(self) -> None:
        """Begin to bring it back."""
        if self.come is None and not self.asked:
            with torch.cuda.stream(self.stream):
                self.come = self.held.to(self.device, non_blocking=True)

    def back(self) -> Tensor:
        """The tensor, on its device."""
        if self.stream is None:
            return self.held
        self.asked = False
        self.send()
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self.stream)
        assert self.come is not None
        self.come.record_stream(now)
        self.asked = True
        if self.before is not None and (before := self.before()) is not None:
            before.send()
        here, self.come = self.come, None
        return here
