"""A larger model, the same function: `grow RUN_OR_CHECKPOINT --to MODEL_YAML --out DIR`.

    checkpoint --read--> state --growth.grow--> larger --write, read back, prove--> DIR, proof.json

The tensors are computed and written one at a time. The proof reads what was written, not what was
meant, and without it there is no DIR (pretrain/proven.py); a method that does not mean to keep the
function is told by how much it moved it.
`init: {from: DIR, what: all}` in a run's config then trains on, moments and progress included; its
`model:` must have the numbers that growth has changed, which are printed.
"""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.grown import CARRIED, EXACT, FREE, Growing, completed, said
from configs.load import ConfigError, from_dict, load, override, read_yaml, to_dict
from configs.model import ModelConfig, parameter_count
from configs.run import RunConfig, at_stage, schedule_span
from launch import grammar

if TYPE_CHECKING:
    from pretrain.mixing import Mixture
    from pretrain.probes import Recorded

SIZES = ("layers", "hidden", "heads", "head_dim", "ffn", "vocab")


@dataclass(frozen=True)
class _ModelPage:
    model: ModelConfig


def main(argv: list[str]) -> int:
    """Grow a checkpoint; 0 if the proof holds, 1 if not; ValueError for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m launch grow", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="a checkpoint, or a run (its newest good checkpoint)")
    parser.add_argument("--to", required=True, help="a config whose `model:` is the larger one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a size of it"
    )
    parser.add_argument("--out", required=True, help="the folder to write; must not exist")
    parser.add_argument(
        "--tokenizer",
        help="the old tokenizer with more words: those with a new row begin as the mean of their "
        "parts, those in a spare row as it stands",
    )
    parser.add_argument("--seed", type=int, default=1, help="decides the new random rows")
    fields = dataclasses.fields(Growing)
    docs = {row["key"].rpartition(".grow.")[2]: row["doc"] for row in grammar.fields("run")}
    for field in fields:
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            choices=typing.get_args(typing.get_type_hints(Growing)[field.name]) or None,
            default=field.default,
            help=docs[field.name].replace("%", "%%"),
        )
    parser.add_argument("--json", action="store_true", help="print the proof as JSON")
    arguments = parser.parse_args(argv)
    larger, left_open = target(arguments.to, arguments.set)
    how = from_dict(Growing, {f.name: getattr(arguments, f.name) for f in fields})
    out = Path(arguments.out)
    words = Path(arguments.tokenizer) if arguments.tokenizer else None
    proof = grow(Path(arguments.source), larger, out, arguments.seed, how, words, left_open)
    print(json.dumps(proof, ensure_ascii=False, indent=1) if arguments.json else _table(proof))
    from pretrain.proof import holds

    if not holds(proof):
        what = "the function was NOT kept" if proof["means_to_keep"] else "it was NOT written right"
        print(
            f"{arguments.out}: {what} and it was not made; what was written stands with its proof "
            f"in {proof['at']} (未通过证明，未生成检查点)",
            file=sys.stderr,
        )
        return 1
    return 0


def target(path: str, overrides: list[str]) -> tuple[ModelConfig, list[str]]:
    """The `model:` of a size or of a whole run, and those keys of FREE that nothing names.

    Overrides are written with or without `model.`; of them `words_said=null` means all words, as in
    a stage.
    """
    overrides = [o if o.startswith("model.") else f"model.{o}" for o in overrides]
    page = read_yaml(path)
    kind: Any = _ModelPage if set(page) <= {"model"} else RunConfig
    model: ModelConfig = load(path, kind, overrides).model
    changed: dict[str, Any] = {"model": {}}
    for text in overrides:
        override(changed, text)
    if changed["model"].get("words_said", 0) is None:  # left out, it stays as it was
        model = dataclasses.replace(model, words_said=model.vocab)
    return model, [key for key in FREE if key not in {**page["model"], **changed["model"]}]


def grow(
    origin: Path,
    to: ModelConfig,
    out: Path,
    seed: int,
    how: Growing = EXACT,
    more_words: Path | None = None,
    left_open: Collection[str] = (),
) -> dict[str, Any]:
    """Read, grow, write, prove; returns the proof. ValueError for what cannot be done.

    more_words: a tokenizer that has the checkpoint's tokens in their places, and more; left_open:
    keys of FREE that `to` says nothing of, so that they stay as they are.
    """
    from pretrain import allocator, checkpoint, growth, proof, proven
    from pretrain.state import State

    if out.exists():
        raise ValueError(
            f"{out}: exists already; name another --out (nothing was overwritten; 已存在，请换名)"
        )
    allocator.give_back()
    folder = checkpoint.resolve(origin)
    before = checkpoint.read(folder)
    words = folder / "tokenizer"
    tokenizer = words if words.is_dir() else None
    now = growth.model_config(before)
    if type(to) is type(now):
        to = dataclasses.replace(to, **{key: getattr(now, key) for key in left_open})
    free = {key: getattr(now, key) for key in FREE}
    if more_words is None and dataclasses.replace(completed(now, to, how), **free) == now:
        raise ValueError(
            f"--to: has the sizes of {folder}, nothing grows; its `model:`, not its stages, must "
            "be the larger one, or --set names a larger size (尺寸相同，无可放大)"
        )
    probes = proof.probes(tokenizer, now)
    pieces: Mixture | None = None
    made: dict[str, Any] = {}
    if more_words is not None:
        pieces, made = _compounds(tokenizer, more_words, now, to, _spans(before.record))
    grown = growth.grow(before, to, seed, how, pieces=pieces)
    if made:  # what it was trained on is no longer encoded as it would be now
        of = {"tokenizer": made["fingerprint"], "data": []}
        grown = State(grown.entries, grown.record | of)
    batch = _recorded(before.record)
    precision = before.record.get("config", {}).get("precision", "fp32")

    def prove(after: State) -> dict[str, Any]:
        found = {
            "verb": "grow",
            "source": str(folder),
            "operators": after.record["growth"][-1]["operators"],
            "seed": seed,
            "probes_from": "fixed sentences" if tokenizer else "random ids (no tokenizer)",
            "how": to_dict(how),
            "remarks": [*growth.remarks(before, grown, how), *_fallen(before.record)],
            **proof.prove(before, after, probes, batch=batch, precision=precision, pieces=pieces),
            "init": "all" if before.names("optim") else "weights",
        }
        page = to_dict(to)
        found["numbers"] = {k: v for k, v in found["to"].items() if k in CARRIED and page[k] != v}
        if made:
            found["new_words"] = made
        return found

    found = proven.written(out, grown, more_words or tokenizer, prove, proof.holds)
    at = out if proof.holds(found) else proven.aside_of(out)
    return {**found, "out": str(out), "at": str(at)}


def _spans(record: dict[str, Any]) -> bool:
    """Whether any stage of the run cut out spans, so that it has learnt sentinels."""
    page = record.get("config", {})
    sections = [page, *page.get("stages", [])]
    return any(s.get("objective", {}).get("name") == "span_corruption" for s in sections)


def _compounds(
    old: Path | None, new: Path, now: ModelConfig, to: ModelConfig, spans: bool
) -> "tuple[Mixture, dict[str, Any]]":
    """What the new rows are made of, and the numbers of that; spans: it has learnt sentinels."""
    from data_pipeline import tokenizer as tokenizers
    from launch.revocab import of
    from pretrain.convert.vocabulary import plan
    from pretrain.mixing import Mixture
    from pretrain.reading import sentinels_of

    if old is None:
        raise ValueError(
            "--tokenizer: the checkpoint has none of its own to cut new words by (检查点没有分词器)"
        )
    was, words = tokenizers.load(old), tokenizers.load(new)
    tokens, more = of(was).tokens, of(words).tokens
    if more[: len(tokens)] != tokens:
        pairs = zip(tokens, more, strict=False)
        at = next((n for n, (one, other) in enumerate(pairs) if one != other), len(more))
        raise ValueError(
            f"--tokenizer: {new} differs from the checkpoint's at id {at}; growing keeps every "
            "token in its place, another vocabulary is `revocab`'s (词表须以原词表开头)"
        )
    if len(more) > to.vocab:
        raise ValueError(
            f"--tokenizer: {new} has {len(more)} tokens, model.vocab is {to.vocab}; "
            f"--set vocab={len(more)} or more (词表过小)"
        )
    taken = range(len(tokens), min(len(more), now.vocab))
    if spans and taken and sentinels_of(was, now.vocab)[0] == taken.start:
        raise ValueError(
            f"--tokenizer: {len(taken)} of its new words have the rows from {taken.start} on, "
            "which span corruption has learnt as sentinels; a vocabulary with new sentinels is "
            f"`revocab --vocab {len(more) + now.vocab - len(tokens)}`'s (新词会占用哨兵符的行)"
        )
    made = plan(of(was), of(words))
    rows, weights = made.rows[now.vocab :], made.weights[now.vocab :]
    return Mixture(rows, weights), {
        "fingerprint": words.fingerprint,
        "means": sum(len(one) > 1 for one in rows),
        "copies": sum(len(one) == 1 for one in rows),
        "spare_rows_taken": len(taken),
    }


def _recorded(record: dict[str, Any]) -> "Recorded | str":
    """A batch of the data that the model was trained on; or none, and why."""
    if "config" not in record:
        return "the checkpoint does not say what it was trained on"
    from pretrain import objectives, proof
    from pretrain.corpora import open_corpora

    try:
        page = at_stage(from_dict(RunConfig, record["config"]), record.get("stage", 0))
        corpora = open_corpora(page.data, page.objective, page.run.seed, said(page.model))
    except ConfigError as error:
        return f"its page is refused today: {str(error).splitlines()[0]}"
    except (OSError, ValueError) as error:
        return f"the training data is not here: {str(error).splitlines()[0]}"
    return proof.recorded(corpora, objectives.build(page.objective), page.batch.micro)


def _fallen(record: dict[str, Any]) -> list[str]:
    """Said of a checkpoint behind its peak rate, to which a run from it would jump back."""
    from pretrain.schedules import schedule

    try:
        page, stage = from_dict(RunConfig, record["config"]), int(record["stage"])
    except (KeyError, ConfigError):
        return []  # not a run's, or of a page that is refused today
    rate, (begin, span) = at_stage(page, stage).schedule, schedule_span(page, stage)
    done = int(record["step"]) - begin
    if rate.name not in ("wsd", "cosine") or done <= rate.warmup_steps:
        return []
    share, before = schedule(done - 1, rate, 1.0, span), begin + span - rate.decay_steps
    where = f"of step {before} or before" if rate.name == "wsd" else "of a run under wsd"
    fallen = f"schedule: the rate has fallen to {share:.2g} of its peak, to which it jumps back"
    return [f"{fallen}; grow from a checkpoint {where} (学习率将跳回峰值)"] if share < 1 else []


def _table(proof: dict[str, Any]) -> str:
    from pretrain.proof import holds, verdict

    def size(model: dict[str, Any]) -> str:
        config = _typed(model)
        sizes = ", ".join(f"{k} {model[k]}" for k in SIZES)
        return f"{sizes}: {parameter_count(config):,} parameters"

    def compared(part: dict[str, Any]) -> str:
        relation = "<=" if part["within"] else "ABOVE"
        return f"{part['max_difference']:.2e} {relation} {part['tolerance']:.2e}"

    follow = "; ".join(f"model.{key}: {json.dumps(v)}" for key, v in proof["numbers"].items())
    batch = proof["batch"]
    losses = batch.get("none") or (
        "{float64[before]:.6f} -> {float64[after]:.6f} ({rows} {of})".format(**batch)
    )
    lines = [
        ("from", f"{proof['source']} ({size(proof['from'])})"),
        ("to", f"{proof['out']} ({size(proof['to'])})"),
        ("operators", "; ".join(proof["operators"]) or "none, the sizes are the same"),
        *(("note", sentence) for sentence in proof["remarks"]),
        ("numbers changed", follow or "none; the page of the larger size is the model's"),
        ("logits, float64", compared(proof["float64"])),
        ("logits, float32", compared(proof["float32"])),
        ("old words", _words(proof)),
        ("loss on probes", f"{proof['loss']['before']:.6f} -> {proof['loss']['after']:.6f}"),
        ("loss on data", losses),
        ("function", verdict(proof)),
        ("proof", f"{proof['at']}/proof.json"),
    ]
    if holds(proof):
        on = f"init: {{from: {proof['out']}, what: {proof['init']}}}"
        lines.append(("to train on", f"{on} (接着训练)"))
    return "\n".join(f"{name:<16} {value}" for name, value in lines)


def _words(proof: dict[str, Any]) -> str:
    """What new words take of the old ones' probability."""
    small, large = (said(_typed(proof[side])) for side in ("from", "to"))
    made = proof.get("new_words")
    of = ", {means} made of several old ones, {copies} of one".format(**made) if made else ""
    if made and (spare := made["spare_rows_taken"]):
        of += f", {spare} new ones have rows that were spare, as they stand (占用备用行)"
    if small == large:
        return f"{small:,} are said, as before{of}"
    fall = f"log p of an old one falls by at most {proof['old_words_fall_by']:.2g} on the probes"
    return f"{small:,} -> {large:,} are said{of}: {fall} (概率略降)"


def _typed(model: dict[str, Any]) -> ModelConfig:
    return from_dict(_ModelPage, {"model": model}).model
