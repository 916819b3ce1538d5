"""Methods of reaching farther, side by side on real text: a CPM taken to longer rows.

    CORPUS --train, rows of KNOWN tokens--> base --extend, each method--> loss by position (before)
                                                 --train, rows of TIMES x KNOWN--> the same (after)

    python -m benchmarks.extension CORPUS OUT [--seed 1] [--base-steps 600] [--steps 80] ...

Every method starts from the same weights and moments, reads the same rows in the same order, and is
measured on the same documents of the valid split. Prints a table, writes OUT/result.json and a plot
of each; what stands in OUT already is not done again. One process.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29611")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

METHODS = ("interpolated", "hierarchical", "hierarchical_rows", "repeat", "last", "random")


def page(words: argparse.Namespace, vocab: int, run: Path, **more: Any) -> dict[str, Any]:
    """The run of the base model; `more` are its other sections."""
    model = {
        "family": "cpm", "vocab": vocab, "hidden": words.hidden, "layers": words.layers,
        "heads": words.hidden // 32, "head_dim": 32, "ffn": 4 * words.hidden,
        "positions": words.known, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return {
        "model": model,
        "data": {"train": [{"corpus": str(words.corpus)}], "seq_len": words.known},
        "batch": {"samples": words.tokens // words.known, "micro": words.tokens // words.known},
        "optimizer": {"lr": words.lr, "beta2": 0.98},
        "schedule": {"name": "constant", "warmup_steps": 30},
        "precision": "fp32",
        "run": {"out": str(run), "steps": words.base_steps, "seed": words.seed, "threads": 1},
    } | more


def trained(data: dict[str, Any]) -> Path:
    """The last checkpoint of a run, trained here if it is not there."""
    from configs.load import from_dict
    from configs.run import RunConfig
    from pretrain import engine
    from pretrain.train import train

    try:
        return Path(train(from_dict(RunConfig, data))["checkpoint"])
    finally:
        engine.reset()


def measured(checkpoint: Path, words: argparse.Namespace, length: int) -> dict[str, Any]:
    """Loss by position over rows of `length` tokens, 2 buckets to the known length."""
    from pretrain import lengths

    buckets = 2 * length // words.known
    found = lengths.lengths(checkpoint, words.corpus, [length], words.samples, buckets)
    return dict(found["lengths"][0])


def compared(words: argparse.Namespace) -> dict[str, Any]:
    """Every method, before and after."""
    from configs.extended import Extend
    from data_pipeline import tokenizer as tokenizers
    from launch.extend import extend
    from pretrain import checkpoint

    vocab = tokenizers.load(words.corpus / "tokenizer").vocab_size
    words.out.mkdir(parents=True, exist_ok=True)
    base = trained(page(words, vocab, words.out / "base"))
    found = {"base": measured(base, words, words.known)}
    long = words.known * words.times
    for method in words.methods:
        place, run = words.out / f"{method}-extended", words.out / method
        if not place.exists():
            extend(base, long, Extend(method), place, words.seed)
        model = checkpoint.read(place).record["model"]
        rows = words.tokens // long
        more = page(words, vocab, run)
        more |= {"model": model, "init": {"from": str(place), "what": "all"}}
        more["data"] |= {"seq_len": long}
        more["batch"] = {"samples": rows, "micro": rows}
        more["run"] |= {"steps": words.base_steps + words.steps}
        before = measured(place, words, long)
        found[method] = {"before": before, "after": measured(trained(more), words, long)}
        (words.out / "result.json").write_text(json.dumps(found, indent=1), "utf-8")
        print(method, f"{before['loss']:.4f} -> {found[method]['after']['loss']:.4f}", flush=True)
    return found


def main() -> None:
    """Compare, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--known", type=int, default=128)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=64, help="documents that are measured")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    words = parser.parse_args()
    found = compared(words)
    show(found, words)


def show(found: dict[str, Any], words: argparse.Namespace) -> None:
    """The table (known positions | new ones, before -> after) and the plots."""
    from pretrain.lengths import plot

    known = words.known
    base = found["base"]["loss"]
    print(
        f"loss, nats a token; base at its {known} positions: {base:.4f}; after {words.steps} steps"
    )
    print(f"{'':20}{'up to ' + str(known):>20}{'beyond':>20}{'the last bucket':>20}")
    for method in words.methods:
        cells = []
        for first, last in ((0, 2), (2, None), (-1, None)):
            sides = []
            for when in ("before", "after"):
                parts = found[method][when]["buckets"][first:last]
                sides.append(sum(p["loss"] for p in parts) / len(parts))
            cells.append(f"{sides[0]:.3f} -> {sides[1]:.3f}")
        print(f"{method:20}" + "".join(f"{cell:>20}" for cell in cells))
    for when in ("before", "after"):
        series = {
            method: [((p["from"] + p["to"]) / 2, p["loss"]) for p in found[method][when]["buckets"]]
            for method in words.methods
        }
        (words.out / f"{when}.svg").write_text(plot(series, "position", f"loss {when}"), "utf-8")


if __name__ == "__main__":
    main()
