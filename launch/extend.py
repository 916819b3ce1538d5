"""A checkpoint that reads longer rows: `extend CHECKPOINT --seq-len N [--method M] --out DIR`.

    checkpoint --read--> state --growth.positions.extend--> state --write--> DIR --> proof.json

Methods, and what each promises: docs/extension.md. `init: {from: DIR, what: all}` in a run's config
trains on, moments and progress included; its `model:` must have the numbers that are printed here
and its data.seq_len is N.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, get_args

from configs.extended import Extend, Method, extended, resolved
from configs.load import from_dict
from configs.model import longest_row


def main(argv: list[str]) -> int:
    """Extend a checkpoint; 0 if the proof holds, 1 if not; ValueError for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m launch extend", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="a checkpoint, or a run (its newest good checkpoint)")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens of a row (新的行长)")
    parser.add_argument("--method", choices=get_args(Method), default="auto", help="how (方法)")
    parser.add_argument("--out", required=True, help="the folder to write; must not exist")
    parser.add_argument("--alpha", type=float, default=0.0, help="of hierarchical: 0.4, never 0.5")
    parser.add_argument("--static", action="store_true", help="the same for all lengths")
    parser.add_argument("--window", type=int, default=0, help="of ReRoPE: half of --known")
    parser.add_argument("--leak", type=float, default=0.0, help="of leaky_rerope: 16")
    parser.add_argument(
        "--log-n", action=argparse.BooleanOptionalAction, help="scores x max(1, log n / log known)"
    )
    parser.add_argument("--known", type=int, help="the length it was trained on, if not on record")
    parser.add_argument("--seed", type=int, default=1, help="decides random rows")
    parser.add_argument("--json", action="store_true", help="print the proof as JSON")
    words = parser.parse_args(argv)
    keys = ("method", "alpha", "window", "leak", "log_n", "known")
    given = {key: getattr(words, key) for key in keys}
    how = from_dict(Extend, given | {"dynamic": False if words.static else None})
    found = extend(Path(words.source), words.seq_len, how, Path(words.out), words.seed)
    print(json.dumps(found, ensure_ascii=False, indent=1) if words.json else _table(found))
    if not found["kept"]:
        print(
            f"{words.out}: is NOT what was promised and was not made; what was written stands with "
            f"its proof in {found['at']} (未通过证明，未生成检查点)",
            file=sys.stderr,
        )
    return 0 if found["kept"] else 1


def extend(origin: Path, seq_len: int, how: Extend, out: Path, seed: int) -> dict[str, Any]:
    """Read, extend, write, prove; returns the proof. ValueError for what cannot be done."""
    from pretrain import allocator, checkpoint, proof_of_length, proven
    from pretrain.corpora import trained_length
    from pretrain.growth import model_config, positions
    from pretrain.state import State

    if out.exists():
        raise ValueError(
            f"{out}: exists already; name another --out (nothing was overwritten; 已存在，请换名)"
        )
    allocator.give_back()
    folder = checkpoint.resolve(origin)
    before = checkpoint.read(folder)
    now, rows = model_config(before), trained_length(before.record)
    to = extended(now, seq_len, how, rows)
    if to == now:
        raise ValueError(
            f"--seq-len: is {seq_len}, {origin} reads such rows as it is; name more (无需扩展)"
        )
    if (room := longest_row(now)) and how.known not in (None, room) and not how.log_n:
        raise ValueError(
            f"--known: is {how.known}, the model has {room} positions and reads no other length "
            "without --log-n; leave it out (不读此项)"
        )
    known = how.known or rows
    how = dataclasses.replace(resolved(now, how), known=known)
    words = folder / "tokenizer"
    tokenizer = words if words.is_dir() else None
    state = positions.extend(before, to, how, seq_len, seed)

    def prove(after: State) -> dict[str, Any]:
        return {
            "verb": "extend",
            "source": str(folder),
            "seed": seed,
            "probes_from": "fixed sentences" if tokenizer else "random ids (no tokenizer)",
            **proof_of_length.prove(before, after, tokenizer),
        }

    found = proven.written(
        out, positions.unbound(state), tokenizer, prove, lambda f: bool(f["kept"])
    )
    at = out if found["kept"] else proven.aside_of(out)
    return {**found, "out": str(out), "at": str(at)}


def changed(now: dict[str, Any], to: dict[str, Any]) -> dict[str, Any]:
    """The keys of `model:` that a page must have now, of a table those that its method reads."""
    found = {key: value for key, value in to.items() if now.get(key) != value}
    if table := found.get("position_table"):
        unread = "dynamic" if table["method"] == "hierarchical" else "alpha"
        found["position_table"] = {key: v for key, v in table.items() if key != unread}
    return found


def _table(found: dict[str, Any]) -> str:
    now, to = found["from"], found["to"]
    follow = "; ".join(f"model.{k}: {json.dumps(v)}" for k, v in changed(now, to).items())
    lines = [
        ("from", found["source"]),
        ("to", f"{found['out']}: rows of {found['seq_len']} tokens by {found['method']}"),
        ("numbers changed", follow or "none"),
        ("unchanged up to", f"{found['promised']} tokens" if found["promised"] else "no length"),
    ]
    for part in found["lengths"]:
        for digits in ("float64", "float32"):
            one = part[digits]
            relation = "<=" if one["within"] else ("above" if not found["promised"] else "ABOVE")
            said = f"{one['max_difference']:.2e} {relation} {one['tolerance']:.2e}"
            lines.append((f"{part['tokens']} tokens", f"{digits}: logits differ by {said}"))
    lines.append(("proof", f"{found['at']}/proof.json: {'kept' if found['kept'] else 'NOT KEPT'}"))
    return "\n".join(f"{name:<16} {value}" for name, value in lines)
