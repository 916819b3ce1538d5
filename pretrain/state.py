"""One logical state: whole tensors by name, whatever device count or ZeRO stage made them.

    weights/NAME   buffers/NAME   optim/SLOT/NAME          record (state.json)

An entry knows its shape and how to read itself, one tensor at a time: a fresh model draws it, a
checkpoint maps it from a file, growth computes it from a smaller one. Whoever consumes a state
(engine, checkpoint writer, proof) therefore never holds more than one tensor more than it needs.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from configs.load import to_dict
from configs.model import ModelConfig, Tensor, init_std, shape, tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


class Record(TypedDict, total=False):
    """What state.json says: all of a run's progress that is no tensor. Plain JSON; a state that is
    no run's (drawn, converted) has the model alone."""

    model: dict[str, Any]
    """The architecture and its sizes, as of the stage."""
    stage: int
    step: int
    """Steps done, over all stages."""
    samples: int
    """Samples trained on: the only state of the data."""
    tokens: int
    updates: int
    """Updates made; steps that were skipped count for none."""
    born: dict[str, int]
    """Updates before a tensor came into being, by name."""
    scales: dict[str, dict[str, float]]
    """Factors on lr, decay and eps, by name; growth sets them."""
    scaler: dict[str, Any] | None
    """The memory of fp16's dynamic loss scaler."""
    growth: list[dict[str, Any]]
    """Every change of the model's size."""
    seed: int
    data: list[dict[str, Any]]
    """The corpora, their fingerprints and what is made of them."""
    skips: list[list[int]]
    """Ranges of the sample stream that are passed over."""
    rewinds: list[dict[str, Any]]
    """Why: the step and what was seen."""
    tokenizer: str
    """Its fingerprint."""
    config: dict[str, Any]
    """The page of the run that wrote this."""
    processes: int
    border: bool
    """At a stage's border: it stays."""
    ephemeral: bool
    """Stays only while nothing is newer."""
    valid_loss: float
    """Where a validation was made."""


@dataclass(frozen=True)
class Entry:
    """A whole logical tensor, read when asked for."""

    shape: tuple[int, ...]
    """Logical shape."""
    dtype: str
    """float32 for weights and moments, int64 where a buffer counts."""
    read: Callable[[], torch.Tensor]
    """The tensor, on the CPU; mapped from its file where it has one."""


@dataclass(frozen=True)
class State:
    """All of a run that is not configuration."""

    entries: dict[str, Entry]
    """Key -> entry."""
    record: dict[str, Any]
    """state.json: what Record names."""
    verify: Mapping[str, Any] = field(default_factory=dict)
    """What an engine that loaded this is compared with: {"sums": of each tensor, "replay": the loss
    of a recorded micro-batch}; empty for a state that no engine has held."""

    def read(self, key: str) -> torch.Tensor:
        """One whole tensor."""
        return self.entries[key].read()

    def names(self, kind: str = "weights") -> list[str]:
        """Tensor names under a prefix such as `weights` or `optim/exp_avg`."""
        return [key[len(kind) + 1 :] for key in self.entries if key.startswith(kind + "/")]

    def weights_only(self) -> "State":
        """The same without optimizer moments."""
        kept = {k: e for k, e in self.entries.items() if not k.startswith("optim/")}
        return State(kept, self.record, self.verify)


def fresh(config: ModelConfig, seed: int) -> State:
    """A model that has learnt nothing: each tensor drawn from a generator of (seed, its name).

    The draw depends on neither order nor device count: every layout starts from the same weights.
    """
    entries = {}
    for tensor in tensors(config):
        size = shape(config, tensor)
        entries[f"weights/{tensor.name}"] = Entry(size, "float32", _drawn(config, tensor, seed))
    return State(entries, {"model": to_dict(config)})


def draw(name: str, seed: int, size: tuple[int, ...], std: float) -> torch.Tensor:
    """Normal numbers, cut at 3 sigma, that belong to (seed, name) and to nothing else."""
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    return torch.nn.init.trunc_normal_(
        torch.empty(size), std=std, a=-3 * std, b=3 * std, generator=generator
    )


def seed_of(*parts: Any) -> int:
    """A 63-bit seed that is a function of its parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _drawn(config: ModelConfig, tensor: Tensor, seed: int) -> Callable[[], torch.Tensor]:
    size = shape(config, tensor)
    if tensor.init == "zeros":
        return lambda: torch.zeros(size)
    if tensor.init == "ones":
        return lambda: torch.ones(size)
    return lambda: draw(tensor.name, seed, size, init_std(config, tensor))
