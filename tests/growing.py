"""What the growth tests share: a tiny CPM that looks trained, with moments."""

import torch

from configs.model import CPMConfig, ModelConfig
from pretrain.state import MOMENTS, Entry, State, fresh

TINY = CPMConfig(
    "cpm", vocab=97, hidden=32, layers=3, heads=4, head_dim=8, ffn=64, positions=48, init_std=0.1
)
UPDATES = 7


def trained(config: ModelConfig = TINY, seed: int = 3) -> State:
    """A state without a single zero: biases, norms and moments are as if it had been trained."""
    start = fresh(config, seed)
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for key, entry in start.entries.items():
        noise = 0.1 * torch.randn(entry.shape, generator=generator)
        entries[key] = held(entry.read() + noise)
    for slot in MOMENTS:
        for name in start.names():
            size = start.entries[f"weights/{name}"].shape
            entries[f"optim/{slot}/{name}"] = held(0.01 + torch.rand(size, generator=generator))
    record = {
        **start.record,
        "step": 9,
        "updates": UPDATES,
        "samples": 72,
        "born": dict.fromkeys(start.names(), 0),
        "tokenizer": "sha256:none",
    }
    return State(entries, record)


def held(values: torch.Tensor) -> Entry:
    """An entry that hands out what it holds."""
    return Entry(tuple(values.shape), "float32", lambda: values)


def changed(state: State, **values: torch.Tensor) -> State:
    """The state with some weights replaced; `__` stands for a dot."""
    entries = dict(state.entries)
    for name, tensor in values.items():
        entries[f"weights/{name.replace('__', '.')}"] = held(tensor)
    return State(entries, state.record)
