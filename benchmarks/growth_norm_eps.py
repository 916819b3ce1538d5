"""What new layers behind post-norms change of a trained model's logits, by the eps of the norms.

    python -m benchmarks.growth_norm_eps RUN [RUN ...] [--layers 2 ...]

RUN: a run of RoFormer, or a checkpoint. Layers are added to its newest checkpoint in memory, with
the norms' eps of the page and with smaller ones: a difference that falls as eps does is eps, one
that stays is a fault.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from pretrain import checkpoint, growth, proof
from pretrain.state import State


def main() -> None:
    """A line for each checkpoint, depth and eps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2, 10], help="how many more")
    parser.add_argument("--eps", nargs="+", type=float, default=[1e-12, 1e-13, 1e-14])
    words = parser.parse_args()
    print("| run | layers | norm_eps | peak | difference | of eps x peak | kept |")
    print("|---|---|---|---|---|---|---|")
    for run in words.runs:
        folder = checkpoint.resolve(run)
        state = checkpoint.read(folder)
        for more in words.layers:
            for eps in words.eps:
                model = {**state.record["model"], "norm_eps": eps}
                before = State(state.entries, {**state.record, "model": model})
                now = growth.model_config(before)
                probes = proof.probes(folder / "tokenizer", now)
                to = dataclasses.replace(now, layers=now.layers + more)
                found = proof.prove(before, growth.grow(before, to, 1), probes)
                std, far = (found["float64"][key] for key in ("std", "max_difference"))
                peak = float(proof.logits(before, probes, torch.float64).abs().max())
                print(
                    f"| {run} | {now.layers} -> {to.layers} | {eps:g} | {peak / std:.1f} "
                    f"| {far / std:.1e} | {far / (eps * peak):.2f} | {found['kept']} |"
                )


if __name__ == "__main__":
    main()
