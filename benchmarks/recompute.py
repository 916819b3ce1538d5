"""Recompute: bytes kept for the backward pass and time of a step, by mode and family.

    python -m benchmarks.recompute [--families cpm roformer t5_pegasus] [--rounds 5] [--dropout 0.0]

    forward and backward of one micro-batch through the blocks, the head left out, in one process:
    modes take turns, a round each; the table has each mode's fastest round beside `none`'s, the
    bytes that saved-tensor hooks count at the end of the forward pass, and what `plan` says

8 layers x 512, 2 rows of 512 tokens (T5 PEGASUS: 384 and 128), bf16. On a GPU the attention is
fused, on a CPU it keeps its probabilities, which `plan`, made for GPUs, does not count; and on a
CPU the time is that of the process, so that other work on the machine is not in it.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from configs.recompute import Recompute
from pretrain import models, recompute
from pretrain.costs import Row
from pretrain.kept import Kept, kept_of

ROWS = 2
ROW = Row(512)
ROW_OF_TWO = Row(384, 128)
SIZES = {"vocab": 1000, "hidden": 512, "layers": 8, "head_dim": 64}
FAMILIES = ("cpm", "roformer", "t5_pegasus")
BAR_BYTES, BAR_TIME = 1 / 3, 1.35


def config_of(family: str, dropout: float) -> ModelConfig:
    """8 layers x 512 of a family."""
    given: dict[str, Any] = SIZES | {"dropout": dropout, "attention_dropout": dropout}
    if family == "cpm":
        return CPMConfig("cpm", heads=8, ffn=2048, positions=512, **given)
    if family == "roformer":
        return RoFormerConfig("roformer", 1, heads=8, ffn=2048, **given)
    return T5PegasusConfig("t5_pegasus", heads=6, ffn=1024, **given)


def modes(config: ModelConfig, row: Row) -> dict[str, Kept]:
    """What each mode keeps: the four of the config, a budget at the middle, inputs on the host."""

    def kept(how: Recompute | str) -> Kept:
        return kept_of(config, row, ROWS, "bf16", how)

    most, least = kept("none").device, kept("full").device
    middle = Recompute("budget", (most + least) / 2 / 2**30)
    return {
        "none": kept("none"),
        "budget": kept(middle),
        "sublayer": kept("sublayer"),
        "full": kept("full"),
        "full, offload": kept(Recompute("full", None, True)),
    }


def batch_of(config: ModelConfig, row: Row, device: torch.device) -> list[Tensor]:
    """The arguments of a forward pass: every row one document."""

    def side(length: int) -> list[Tensor]:
        tokens = torch.randint(config.vocab, (ROWS, length), device=device)
        places = torch.arange(length, device=device).expand_as(tokens)
        return [tokens, places, torch.zeros_like(tokens)]

    source = side(row.seq_len)
    return side(row.targets) + source if isinstance(config, T5PegasusConfig) else source


def step(model: nn.Module, given: list[Tensor]) -> tuple[float, int]:
    """(seconds of a forward and backward, bytes that the forward saved on its device)."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(values: Tensor) -> Tensor:
        storage = values.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return values

    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    _wait(given[0])
    clock = time.perf_counter if given[0].is_cuda else time.process_time
    begin = clock()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda values: values):
        hidden = model(*given)
    hidden.float().square().mean().backward()
    _wait(given[0])
    return clock() - begin, sum(n for at, n in saved.items() if at not in own)


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()


def measure(family: str, rounds: int, dropout: float) -> None:
    """Print a family's rows of the table."""
    config, row = config_of(family, dropout), ROW_OF_TWO if family == "t5_pegasus" else ROW
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.build(config).to(device, torch.bfloat16).train()
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.02)
    given, ways = batch_of(config, row, device), modes(config, row)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, int] = {}
    for turn in range(rounds + 1):
        for name, kept in ways.items():
            recompute.apply(model, kept.by_block(), kept.offload)
            taken, found[name] = step(model, given)
            seconds[name] += [taken] * (turn > 0)
    fastest = {name: min(times) for name, times in seconds.items()}
    for name, kept in ways.items():
        share, pace = found[name] / found["none"], fastest[name] / fastest["none"]
        bar = ""
        if name == "full":
            met = share <= BAR_BYTES and pace <= BAR_TIME
            bar = "met" if met else "MISSED"
        print(
            f"| {family} | {name} | {found[name] / 2**20:,.1f} | {share:.2f} | "
            f"{kept.forward / 2**20:,.1f} | {kept.host / 2**20:,.1f} | {fastest[name]:.3f} | "
            f"{pace:.2f} | {bar} |",
            flush=True,
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="bytes and time by mode of recompute")
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.0)
    words = parser.parse_args()
    print(
        "| family | recompute | MiB kept | of none | plan: MiB | on the host | s | x none | bar |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for family in words.families:
        measure(family, words.rounds, words.dropout)


if __name__ == "__main__":
    main()
