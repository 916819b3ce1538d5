"""Methods of reaching farther, side by side on real text: a model taken to longer rows.

    CORPUS --train, rows of KNOWN tokens--> base --extend, each method--> loss by position (before)
                                                 --train, rows of TIMES x KNOWN--> the same (after)

    python -m benchmarks.extension CORPUS OUT [--family roformer] [--seeds 1 2] [--steps 300] ...

Every method starts from the same weights and moments, reads the same rows in the same order, and is
measured on the same documents of the valid split. Prints tables, writes OUT/result.json and a plot
of each; what stands in OUT already is not done again. One process.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29611")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# by family: the name that the table shows, and what `extend` is told
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "cpm": {
        name: {"method": name}
        for name in (
            "interpolated",
            "hierarchical",
            "hierarchical_rows",
            "repeat",
            "last",
            "random",
        )
    },
    "roformer": {
        "as_it_is": {"method": "as_it_is", "log_n": False},
        "log_n": {"method": "as_it_is", "log_n": True},
        **{name: {"method": name} for name in ("linear", "ntk", "ntk_mixed", "by_parts", "yarn")},
        "rerope, no log_n": {"method": "rerope", "log_n": False},
        "rerope": {"method": "rerope"},
        "leaky_rerope": {"method": "leaky_rerope"},
    },
    "t5_pegasus": {
        "as_it_is": {"method": "as_it_is", "log_n": False},
        "log_n": {"method": "as_it_is", "log_n": True},
        "buckets": {"method": "buckets"},
        "buckets, log_n": {"method": "buckets", "log_n": True},
    },
}
SENTINELS = 32
"""Rows of a T5's vocabulary beyond the tokenizer's."""


def model_of(words: argparse.Namespace, vocab: int) -> dict[str, Any]:
    """The base model."""
    model = {
        "family": words.family, "vocab": vocab, "hidden": words.hidden, "layers": words.layers,
        "heads": words.hidden // 32, "head_dim": 32, "ffn": 4 * words.hidden, "dropout": 0.0,
        "attention_dropout": 0.0,
    }  # fmt: skip
    if words.family == "cpm":
        return model | {"positions": words.known}
    if words.family == "roformer":
        return model | {"version": 1}
    return model | {"vocab": vocab + SENTINELS, "ffn": 2 * words.hidden}


def page(
    words: argparse.Namespace, model: dict[str, Any], run: Path, length: int, seed: int
) -> dict[str, Any]:
    """A run of rows of `length` tokens."""
    objective: dict[str, Any] = {"name": "causal"}
    data: dict[str, Any] = {"train": [{"corpus": str(words.corpus)}], "seq_len": length}
    if words.family == "roformer":
        objective = {"name": "masked", "masking": "token"}
    if words.family == "t5_pegasus":
        objective = {"name": "span_corruption"}
        data["target_len"] = length // 4
    rows = words.tokens // length
    optimizer: dict[str, Any] = {"lr": words.lr, "beta2": 0.98}
    if words.family == "t5_pegasus":  # drawn as T5 is: docs/learning.md, 1c
        optimizer |= {"name": "rms_adamw", "lr": 10 * words.lr}
    return {
        "model": model,
        "objective": objective,
        "data": data,
        "batch": {"samples": rows, "micro": rows},
        "optimizer": optimizer,
        "schedule": {"name": "constant", "warmup_steps": 30},
        "precision": words.precision,
        "run": {"out": str(run), "steps": words.base_steps, "seed": seed, "threads": 1},
    }


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


def compared(words: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Every method, before and after, from the base model of a seed."""
    from configs.extended import Extend
    from data_pipeline import tokenizer as tokenizers
    from launch.extend import extend
    from pretrain import checkpoint

    vocab = tokenizers.load(words.corpus / "tokenizer").vocab_size
    out = words.out / f"seed-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    base = trained(page(words, model_of(words, vocab), out / "base", words.known, seed))
    found = {"base": measured(base, words, words.known)}
    long = words.known * words.times
    for name in words.methods:
        folder = name.replace(", ", "-").replace(" ", "-")
        place, run = out / f"{folder}-extended", out / folder
        how = Extend(known=words.known, **METHODS[words.family][name])
        if not place.exists():
            extend(base, long, how, place, seed)
        more = page(words, checkpoint.read(place).record["model"], run, long, seed)
        more |= {"init": {"from": str(place), "what": "all"}}
        more["run"] |= {"steps": words.base_steps + words.steps}
        before, last = measured(place, words, long), trained(more)
        found[name] = {"before": before, "after": measured(last, words, long)}
        found[name]["short"] = measured(last, words, words.known)
        print(
            f"seed {seed} {name}: {before['loss']:.4f} -> {found[name]['after']['loss']:.4f}",
            flush=True,
        )
    return found


def main() -> None:
    """Compare, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", default="cpm", choices=METHODS)
    parser.add_argument("--known", type=int, default=64)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--samples", type=int, default=64, help="documents that are measured")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--methods", nargs="+", help="some of the family's (all)")
    words = parser.parse_args()
    words.methods = words.methods or list(METHODS[words.family])
    found = {}
    for seed in words.seeds:
        found[seed] = compared(words, seed)
        (words.out / "result.json").write_text(json.dumps(found, indent=1), "utf-8")
    show(found, words)


def show(found: dict[int, dict[str, Any]], words: argparse.Namespace) -> None:
    """Losses before -> after by bucket, and the distance to the best method; the plots."""
    from pretrain.lengths import plot

    methods, edges = words.methods, range(0, words.times * words.known, words.known)
    base = " ".join(f"{one['base']['loss']:.4f}" for one in found.values())
    print(f"nats a token, base at its {words.known} positions: {base}; {words.steps} steps after")

    def beyond(name: str, when: str) -> Any:
        """The losses at new positions, [seeds, buckets]."""
        parts = [one[name][when]["buckets"][2:] for one in found.values()]
        return np.array([[p["loss"] for p in part] for part in parts])

    for when in ("before", "after"):
        best = min(methods, key=lambda name: beyond(name, when).mean())
        print(
            f"\n{when:20}" + "".join(f"{f'{a}-{a + words.known - 1}':>12}" for a in edges), end=""
        )
        print(f"{f'beyond {words.known}':>12}  whole rows, above {best}: of each seed")
        for name in sorted(methods, key=lambda name: beyond(name, when).mean()):
            both = [one[name][when]["buckets"] for one in found.values()]
            losses = np.array([[p["loss"] for p in one] for one in both]).mean(0)
            pairs = losses.reshape(-1, 2).mean(1)
            print(f"{name:20}" + "".join(f"{loss:>12.3f}" for loss in pairs), end="")
            print(f"{pairs[1:].mean():>12.3f}  ", end="")
            for one in found.values():
                mine, other = (np.array(one[n][when]["documents"]) for n in (name, best))
                apart = mine - other
                print(f"{apart.mean():>8.3f} ± {apart.std(ddof=1) / len(apart) ** 0.5:.3f}", end="")
            print()
        first = next(iter(found.values()))
        middles = [(p["from"] + p["to"]) / 2 for p in first[methods[0]][when]["buckets"]]
        series = {}
        for name in methods:
            both = [[p["loss"] for p in one[name][when]["buckets"]] for one in found.values()]
            series[name] = list(zip(middles, np.mean(both, 0).tolist(), strict=True))
        (words.out / f"{when}.svg").write_text(plot(series, "position", f"loss {when}"), "utf-8")
    print(
        f"\nrows of {words.known} tokens after training at {words.times * words.known}, each seed"
    )
    for name in methods:
        short = " ".join(f"{one[name]['short']['loss']:>8.3f}" for one in found.values())
        print(f"{name:20}{short}")


if __name__ == "__main__":
    main()
