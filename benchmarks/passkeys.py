"""Models that find a passkey in their own rows, taken to longer ones by each method.

    filler + 密码是48213 + filler + 密码是 -> 48213   20,000 texts of up to KNOWN tokens
  --corpus, train--> base, asked at KNOWN --extend, each method--> asked at 2 and 4 times KNOWN

    python -m benchmarks.passkeys OUT [--families cpm roformer t5_pegasus] [--steps 1500] ...

Nothing is trained after the extension: the question is what a method does to the finding of a place
that the model can find. A CPM writes the key, a RoFormer fills it in, a T5 answers it. Prints
a table by length and by depth, writes OUT/result.json; what stands in OUT is not done again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.extension import METHODS, trained
from pretrain.lengths import ASKED, DIGITS, FILLER, KEY

TEXTS = 20_000
INIT_STD = 0.06
"""Of CPM and RoFormer: their 0.02 is meant for widths of 768 and up; with it copying has not begun
after 1,500 steps at 128."""
FRAME = 2
"""[CLS] and [SEP] around a text: those of KNOWN tokens fill a row with them."""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def texts(out: Path, known: int) -> None:
    """OUT/texts.jsonl, a question and an answer a line; OUT/vocab.txt, a token a character."""
    digits = [str(digit) for digit in range(10)]
    characters = sorted(set(FILLER + KEY.format(key="") + ASKED))
    pieces = [*SPECIAL, *digits, *(f"##{digit}" for digit in digits), *characters]
    (out / "vocab.txt").write_text("\n".join(pieces) + "\n", "utf-8")
    rng = np.random.default_rng(0)
    shortest = len(KEY.format(key="0" * DIGITS)) + len(ASKED)
    with (out / "texts.jsonl").open("w", encoding="utf-8") as file:
        for number in range(TEXTS):
            key = f"{rng.integers(10**DIGITS):0{DIGITS}d}"
            needle = KEY.format(key=key)
            rest = known - FRAME - DIGITS - shortest
            if number % 2:  # half as long as can be, so that the last positions learn too
                rest = int(rng.integers(rest))
            before = int(rng.integers(rest + 1))
            many = FILLER * (rest // len(FILLER) + 2)
            text = many[:before] + needle + many[before % len(FILLER) :][: rest - before] + ASKED
            record = {"id": str(number), "question": text, "answer": key}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def corpus(out: Path, known: int) -> Path:
    """The texts as a corpus, built by the command that builds every corpus."""
    from launch.cli import main as launch

    built = out / "corpus"
    if not (built / "manifest.json").is_file():
        texts(out, known)
        source = {
            "kind": "jsonl", "name": "passkeys", "path": str(out / "texts.jsonl"),
            "fields": ["question=question", "answer=answer"],
        }  # fmt: skip
        page = {
            "data": {"out": str(built), "sources": [source]},
            "clean": {"min_characters": 1, "min_han_ratio": 0.0},
            "dedup": {"exact": False},
            "split": {"valid_documents": 200},
            "tokenizer": {"kind": "wordpiece", "word": False, "model": str(out / "vocab.txt")},
        }
        (out / "corpus.json").write_text(json.dumps(page), "utf-8")
        if launch(["corpus", str(out / "corpus.json")]):
            raise SystemExit(1)
    return built


def page(words: argparse.Namespace, family: str, text: Path, seed: int) -> dict[str, Any]:
    """The run of a family's base model."""
    from data_pipeline import tokenizer as tokenizers

    model: dict[str, Any] = {
        "family": family, "vocab": tokenizers.load(text / "tokenizer").vocab_size,
        "hidden": words.hidden, "layers": words.layers, "heads": words.hidden // 32,
        "head_dim": 32, "ffn": 4 * words.hidden, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    if family != "t5_pegasus":
        model["init_std"] = INIT_STD
    objective: dict[str, Any] = {"name": "causal"}
    data: dict[str, Any] = {
        "train": [{"corpus": str(text)}], "seq_len": words.known, "packing": "documents",
    }  # fmt: skip
    optimizer: dict[str, Any] = {"lr": words.lr, "beta2": 0.98}
    if family == "cpm":
        model["positions"] = words.known
    if family == "roformer":
        model["version"] = 1
        objective = {"name": "masked", "masking": "word", "ratio": 0.4}  # a key is 3 words of 75
    if family == "t5_pegasus":
        model["ffn"] = 2 * words.hidden
        objective = {"name": "pairs", "source": ["question"], "target": ["answer"]}
        objective |= {"source_tokens": words.known, "target_tokens": DIGITS + 2}
        data["target_len"] = 4 * (DIGITS + 2)
        optimizer |= {"name": "rms_adamw", "lr": 5 * words.lr}
    run = words.out / f"{family}-{seed}"
    steps = words.steps
    return {
        "model": model, "objective": objective, "data": data, "optimizer": optimizer,
        "batch": {"samples": words.rows, "micro": words.rows},
        "schedule": {"name": "wsd", "warmup_steps": steps // 15, "decay_steps": steps // 4},
        "precision": "bf16",
        "run": {"out": str(run), "steps": steps, "seed": seed, "threads": 1},
    }  # fmt: skip


def asked(words: argparse.Namespace, family: str, text: Path, seed: int) -> dict[str, Any]:
    """Shares of keys said by the base at its length, and by every extended one beyond it."""
    from configs.extended import Extend
    from launch.extend import extend
    from pretrain.lengths import passkeys

    base = trained(page(words, family, text, seed))
    apart = FRAME if family == "cpm" else 0  # a CPM's row is the text, the others' has the frame
    found: dict[str, Any] = {"base": passkeys(base, [words.known - apart], samples=words.samples)}
    print(f"{family}, seed {seed}: {found['base']['lengths'][0]['mean']:.0%} at {words.known}")
    lengths = [times * words.known - apart for times in (1, 2, 4)]
    for name, method in METHODS[family].items():
        folder = name.replace(", ", "-").replace(" ", "-")
        place = words.out / f"{family}-{seed}-{folder}"
        if not place.exists():
            extend(base, 4 * words.known, Extend(known=words.known, **method), place, seed)
        found[name] = passkeys(place, lengths, samples=words.samples)
        shares = " ".join(f"{one['mean']:.0%}" for one in found[name]["lengths"])
        print(f"  {name}: {shares}", flush=True)
    return found


def show(found: dict[str, dict[str, Any]]) -> None:
    """A row a method: by length the mean, at the longest the depths; the seeds' mean."""
    for family, seeds in found.items():
        first = next(iter(seeds.values()))
        at, depths = first["base"]["lengths"][0]["length"], first["base"]["depths"]
        own = " ".join(f"{one['base']['lengths'][0]['mean']:.0%}" for one in seeds.values())
        print(f"\n{family}: {own} at its own {at} tokens (each seed)")
        names = [name for name in first if name != "base"]
        sizes = [one["length"] for one in first[names[0]]["lengths"]]
        head = "".join(f"{size:>8}" for size in sizes)
        print(f"{'':20}{head}   at {sizes[-1]}, by depth:" + "".join(f"{d:>7.0%}" for d in depths))
        for name in names:
            table = [one[name]["lengths"] for one in seeds.values()]
            means = np.mean([[line["mean"] for line in one] for one in table], 0)
            deep = np.mean([one[-1]["accuracy"] for one in table], 0)
            cells = "".join(f"{mean:>8.0%}" for mean in means)
            print(f"{name:20}{cells}{'':22}" + "".join(f"{share:>7.0%}" for share in deep))


def main() -> None:
    """Build, train, extend, ask."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path)
    parser.add_argument("--families", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--known", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--samples", type=int, default=20, help="keys at each length and depth")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    text, found = corpus(words.out, words.known), {}
    for family in words.families:
        found[family] = {seed: asked(words, family, text, seed) for seed in words.seeds}
        (words.out / "result.json").write_text(json.dumps(found, indent=1), "utf-8")
    show(found)


if __name__ == "__main__":
    main()
