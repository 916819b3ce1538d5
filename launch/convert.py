"""Checkpoints of other houses, in and out: `convert SRC DST --to FORMAT`.

    SRC --what is it?--> state --rules of the format--> DST --read back--> proof.json

SRC is a checkpoint or a run of ours, a folder of Hugging Face's (GPT2, MT5, RoFormer, BERT),
CPM-1's mp_rank files, megatron-core's, or the TensorFlow files of bert4keras and of Google's BERT.
The proof reads what was written: every tensor must come back to the last bit, and where
transformers has the model and is installed, its logits must be ours. `--set positions=null` makes a
RoFormer of a BERT or WoBERT, as RoFormer began: the table of positions is left out. DST gets its
name once the proof holds; what does not hold stands aside in .DST.writing.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from configs.load import to_dict
from configs.model import (
    CPMConfig,
    ModelConfig,
    RoFormerConfig,
    T5PegasusConfig,
    parameter_count,
    shape,
)
from configs.model import tensors as tensors_of
from data_pipeline import tokenizer as corpus_tokenizer
from pretrain import checkpoint, growth, proof
from pretrain.averaged import called, unmarked
from pretrain.convert import bert4keras, bundle, cpm1, hf, hf_config, megatron
from pretrain.convert.rules import ConversionError, Rule, check, exported, imported
from pretrain.flags import check_read
from pretrain.labelled import label_names
from pretrain.state import State

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = ("native", "hf", "cpm1", "megatron", "bert4keras")
READ_BY = {"ranks": ("cpm1", "megatron")}
"""Flags that only some formats read."""
FLOAT64_BYTES = 12
"""Of a parameter, while transformers loads a model in float64: it, and the file's float32."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read."""

    format: str
    state: State
    tokenizer: Path | None
    """A frozen tokenizer/, where there is one."""
    notes: tuple[str, ...] = ()
    """What was left behind."""
    at: str = ""
    """The folder that was read: of a run the checkpoint that was taken."""


def main(argv: list[str]) -> int:
    """Convert; 0 if the proof holds, 1 if not; ValueError for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m launch convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="a checkpoint or a run, or a folder of another format")
    parser.add_argument("target", help="the folder to write; must not exist")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--from", dest="kind", choices=FORMATS, help="else it is found out")
    parser.add_argument("--tokenizer", help="a frozen tokenizer/ folder, for a source without one")
    parser.add_argument("--ranks", type=int, help="cpm1, megatron: files to cut it into (2, 1)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the source's files do not say of its model (activation=gelu_erf, heads=32)",
    )
    parser.add_argument("--json", action="store_true", help="print the proof as JSON")
    given = parser.parse_args(argv)
    check_read(given, parser, READ_BY, given.to, "--to")
    target = Path(given.target)
    if target.exists():
        raise ValueError(
            f"{target}: exists already; name another folder (nothing was overwritten; 已存在)"
        )
    source = read(Path(given.source), given.kind, given.set, given.tokenizer)
    found = convert(source, target, given.to, DTYPES[given.dtype], given.ranks)
    found = settled(target, {"verb": "convert", "source": source.at, **found})
    print(json.dumps(found, ensure_ascii=False, indent=1) if given.json else _table(found))
    if not found["kept"]:
        print(
            f"{target}: differs from its source and was not made; what was written stands with its "
            f"proof in {found['at']} (转换有误，未生成)",
            file=sys.stderr,
        )
    return 0 if found["kept"] else 1


# ---- in


def read(folder: Path, kind: str | None, options: list[str], words: str | None) -> Source:
    """A checkpoint of any format as a state of ours."""
    kind = kind or format_of(folder)
    left: list[str] = []
    labels: list[str] = []
    if kind == "native":
        path = checkpoint.resolve(folder)
        state = checkpoint.read(path)
        inside = path / "tokenizer"
        if options:
            config = hf_config.with_options(growth.model_config(state), options)
            state, left = _fitted(State(state.entries, state.record | {"model": to_dict(config)}))
        kept = _tokenizer(words, inside, state.record)
        return Source(kind, state, kept, tuple(left), called(path))
    if kind == "hf":
        page, tensors = hf.read(folder)
        said = hf_config.ours(page)
        config = hf_config.with_options(said, options)
        whole = _with_table(config, said)
        positions = int(page.get("max_position_embeddings", hf_config.ROFORMER_POSITIONS))
        tables = [*hf.rules(whole, positions)]
        entries = imported(_present(tables, tensors), tensors, whole, hf.ignored)
        owned = {name for rule in tables for name in rule.foreign}
        left = hf.dropped(set(tensors) - owned)
        labels = hf_config.label_names(page)
    elif kind == "cpm1":
        ranks, tensors = cpm1.read(folder)
        heads = [text for text in options if re.fullmatch(r"heads=\d+", text)]
        made = cpm1.ours(ranks, tensors, *(int(text[6:]) for text in heads))
        config = hf_config.with_options(made, [text for text in options if text not in heads])
        assert isinstance(config, CPMConfig)
        entries = imported(cpm1.rules(config, ranks), tensors, config)
    elif kind == "bert4keras":
        found, rules, tensors = bert4keras.read(folder)
        config = hf_config.with_options(found, options)
        entries = imported(rules, tensors, _with_table(config, found), bert4keras.ignored)
        left = bert4keras.dropped(tensors)
    else:
        made, ranks, tensors = megatron.read(folder)
        config = hf_config.with_options(made, options)
        assert isinstance(config, CPMConfig)
        entries = imported(megatron.rules(config, ranks), tensors, config, megatron.ignored)
    inside = folder / hf.TOKENIZER
    kept = _tokenizer(words, inside, {})
    record = {"model": to_dict(config)} | ({"labels": labels} if labels else {})
    state, notes = _fitted(State(entries, record))
    notes += [f"left behind: {what} (未转换)" for what in left]
    return Source(kind, state, kept, tuple(notes), str(folder))


def _with_table(config: ModelConfig, found: ModelConfig) -> ModelConfig:
    """`config` with the positions that the files have, where it is to do without them."""
    if isinstance(config, RoFormerConfig) and isinstance(found, RoFormerConfig):
        return dataclasses.replace(config, positions=found.positions)
    return config


def _fitted(state: State) -> tuple[State, list[str]]:
    """The state without the table of positions that its config may do without, and what was left.

    Raises ConversionError if the config asks for other tensors than are there.
    """
    config = growth.model_config(state)
    sizes = {f"weights/{t.name}": shape(config, t) for t in tensors_of(config)}
    has = {key: e.shape for key, e in state.entries.items() if key.startswith("weights/")}
    table = "weights/embed.positions.weight"
    if table in has and table not in sizes and isinstance(config, RoFormerConfig):
        kept = {key: e for key, e in state.entries.items() if not key.endswith(table[7:])}
        return State(kept, state.record), ["left behind: the table of positions (位置表未转换)"]
    for key in sorted(sizes.keys() | has.keys()):
        if sizes.get(key) != has.get(key):
            raise ConversionError(
                f"--set: {key} would be {sizes.get(key, 'none')}, the source has "
                f"{has.get(key, 'none')}; set only what changes no tensor, or positions=null "
                "(张量不符)"
            )
    return state, []


def _present(rules: Iterable[Rule], foreign: Any) -> list[Rule]:
    """Without what follows from the config and older files do not hold."""
    return [r for r in rules if r.native or any(name in foreign for name in r.foreign)]


def format_of(folder: Path) -> str:
    """What a folder holds. ConversionError if nothing that is known."""
    ours = unmarked(folder)[0]  # RUN@ema
    if (ours / "checkpoints").is_dir() or (ours / "state.json").is_file():
        return "native"
    if folder.is_dir() and bert4keras.prefix_in(folder) is not None:
        return "bert4keras"
    if (folder / "config.json").is_file():
        return "hf"
    if folder.is_dir() and cpm1.files_in(folder):
        return "cpm1"
    if folder.is_dir() and megatron.files_in(folder):
        return "megatron"
    raise ConversionError(
        f"{folder}: holds no checkpoint of ours, no config.json, no *.index, no "
        "mp_rank_00_model_states.pt and no mp_rank_00/model_optim_rng.pt; correct the path or give "
        "--from (无法识别的检查点)"
    )


def _tokenizer(words: str | None, inside: Path, record: dict[str, Any]) -> Path | None:
    """The tokenizer beside a source, or the one given for it by option.

    ConversionError for one with another fingerprint than the source's: the rows of its table
    would stand for other tokens without anything saying so.
    """
    own = inside if inside.is_dir() else None
    if words is None:
        return own
    given = corpus_tokenizer.load(words).fingerprint  # says what is wrong with it
    learnt = corpus_tokenizer.load(own).fingerprint if own else record.get("tokenizer")
    if learnt not in (None, given):
        raise ConversionError(
            f"{words}: is the tokenizer {given}, {inside.parent} learnt that of {learnt}; leave it "
            "out, or take the checkpoint to another vocabulary by `launch revocab` (分词器不一致)"
        )
    return Path(words)


# ---- out


def aside_of(target: Path) -> Path:
    """Where a folder is written and proven before it has its name."""
    return target.with_name(f".{target.name}.writing")


def settled(target: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The proof `found`, written beside what it is about; if it holds, that gets its name."""
    aside = aside_of(target)
    found |= {"at": str(target if found["kept"] else aside)}
    proof.write_proof(aside, found)
    if found["kept"]:
        os.rename(aside, target)
    return found


def convert(
    source: Source, target: Path, to: str, dtype: torch.dtype, ranks: int | None
) -> dict[str, Any]:
    """Write `source` in another format, aside; read it back; returns the proof for settled()."""
    config = growth.model_config(source.state)
    if dtype != torch.float32 and to in ("native", "bert4keras"):
        raise ConversionError(
            f"--dtype: --to {to} writes float32; leave it out (half precision of ours: python -m "
            "launch export; 该格式只存 float32)"
        )
    _check_words(source, config)
    partial = aside_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    notes = list(source.notes)
    if to == "native":
        record = _begun(source)
        checkpoint.write_state(partial, State(source.state.entries, record), source.tokenizer)
    else:
        partial.mkdir(parents=True)
        _write(source, config, partial, to, dtype, ranks, notes)
    found = _prove(source.state, partial, to, dtype)
    return {
        "from": source.format,
        "to": to,
        "target": str(target),
        "dtype": str(dtype).removeprefix("torch."),
        "model": source.state.record["model"],
        "parameters": parameter_count(config),
        "notes": notes,
        **found,
    }


def _begun(source: Source) -> dict[str, Any]:
    """state.json of a checkpoint that starts from elsewhere: a run takes its weights."""
    fingerprint = source.state.record.get("tokenizer")
    if source.tokenizer:
        fingerprint = corpus_tokenizer.load(source.tokenizer).fingerprint
    begin = {"step": 0, "stage": 0, "samples": 0, "tokens": 0, "updates": 0, "born": {}}
    begin |= {"seed": 0, "data": [], "scaler": None, "growth": [], "converted": source.format}
    return begin | source.state.record | {"tokenizer": fingerprint}


def _check_words(source: Source, config: ModelConfig) -> None:
    """ConversionError for a tokenizer of more tokens than the model has rows."""
    if source.tokenizer is None:
        return
    tokens = corpus_tokenizer.load(source.tokenizer).vocab_size
    if tokens > config.vocab:
        raise ConversionError(
            f"{source.tokenizer}: has {tokens} tokens, the model {config.vocab} rows; give the "
            "model's own by --tokenizer, or go to this one by `launch revocab` (分词器与模型不符)"
        )


def _write(
    source: Source,
    config: ModelConfig,
    folder: Path,
    to: str,
    dtype: torch.dtype,
    ranks: int | None,
    notes: list[str],
) -> None:
    def weight(name: str) -> torch.Tensor:
        return source.state.read(f"weights/{name}")

    longer = [key for key in ("position_table", "rope") if getattr(config, key, None) is not None]
    if to != "hf" and longer:
        raise ConversionError(
            f"--to {to}: model.{longer[0]} says how rows are read that are longer than "
            "those learnt on, which the format cannot; --to native or hf can (该格式无法表示)"
        )
    if to == "hf":
        words = corpus_tokenizer.load(source.tokenizer) if source.tokenizer else None
        page = hf_config.theirs(config, words, label_names(source.state.record))
        rules = hf.rules(config)
        check(rules, config)
        hf.write(folder, page, exported(rules, weight), dtype)
        notes += hf.write_tokenizer(folder, source.tokenizer)
        return
    if to == "bert4keras":
        rules = bert4keras.rules(config)
        if unsaid := bert4keras.unsayable(config):
            raise ConversionError(f"--to {to}: {'; '.join(unsaid)} (该格式无法表示)")
        check(rules, config)
        text = json.dumps(bert4keras.page_of(config), indent=2)
        (folder / "bert4keras_config.json").write_text(text + "\n", "utf-8")
        bundle.write(folder / "model.ckpt", exported(rules, weight))
        notes += hf.carry_tokenizer(folder, source.tokenizer)
        for vocabulary in folder.glob(f"{hf.TOKENIZER}/vocab.txt"):  # bert4keras asks for one
            shutil.copy(vocabulary, folder)
        return
    if not isinstance(config, CPMConfig):
        raise ConversionError(f"--to {to}: is a format of CPM, not of {config.family} (仅支持 CPM)")
    wrong = cpm1.unsayable(config)
    if wrong:
        raise ConversionError(f"--to {to}: {'; '.join(wrong)} (该格式无法表示)")
    step = int(source.state.record.get("step", 0))
    number = ranks or (2 if to == "cpm1" else 1)
    for axis in ("vocab", "heads", "ffn"):
        if getattr(config, axis) % number and not (axis == "vocab" and to == "megatron"):
            raise ConversionError(
                f"--ranks: is {number}, does not divide {axis}, {getattr(config, axis)} (不能整除)"
            )
    if to == "cpm1":
        rules = cpm1.rules(config, number)
        check(rules, config)
        cpm1.write(folder, lambda: exported(rules, weight), number, dtype, step)
    else:
        rules = megatron.rules(config, number)
        check(rules, config)
        megatron.write(folder, config, lambda: exported(rules, weight), number, dtype, step)
    notes += hf.carry_tokenizer(folder, source.tokenizer)


# ---- proof


def _prove(state: State, target: Path, to: str, dtype: torch.dtype) -> dict[str, Any]:
    """Read back what was written; compare every tensor, and the outputs with transformers'."""
    back = read(target, to, _unsaid(state, to), None).state
    different: list[dict[str, Any]] = []
    for key in back.entries:
        was, now = state.read(key), back.read(key)
        if not torch.equal(was.to(dtype).float(), now.to(dtype).float()):
            share = float((was - now).abs().max() / was.abs().max().clamp(min=1e-30))
            different.append({"tensor": key, "relative": share})
    rounding = torch.finfo(dtype).eps
    kept = all(entry["relative"] <= rounding for entry in different)
    found: dict[str, Any] = {"round_trip": {"tensors": len(back.entries), "different": different}}
    if to == "hf":
        found["transformers"] = seen = _against_transformers(state, target, dtype)
        kept = kept and seen.get("same", True)
    return {"kept": kept, **found}


def _unsaid(state: State, to: str) -> list[str]:
    """What the format does not say of our model, and reading it back must be told."""
    config = growth.model_config(state)
    if to == "cpm1" and isinstance(config, CPMConfig):
        return [f"heads={config.heads}"]
    if to == "hf" and isinstance(config, T5PegasusConfig):
        return [f"logit_scale={'null' if config.logit_scale is None else config.logit_scale}"]
    return []


def _against_transformers(state: State, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    if importlib.util.find_spec("transformers") is None:
        return {"note": "not compared: transformers is not installed (./launch/setup.sh hf)"}
    if dtype != torch.float32:
        return {"note": f"not compared: written in {dtype}, the source is in float32"}
    config = growth.model_config(state)
    needs = FLOAT64_BYTES * parameter_count(config)
    if needs > (free := psutil.virtual_memory().available):
        return {
            "note": f"not compared: its model in float64 takes {needs / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB of memory are free; every tensor was read back (内存不足，未比较)"
        }
    # Its MT5 norm and its RoFormer positions are float32 in every precision.
    exact = isinstance(config, CPMConfig) or getattr(config, "positions", None) is not None
    # A decomposition that was written out is rounded to float32.
    exact = exact and getattr(config, "position_table", None) is None
    tolerance = proof.FLOAT64_TOLERANCE if exact else 2e-6

    def other(tokens_BT: torch.Tensor, at: torch.dtype) -> dict[str, torch.Tensor]:
        return hf.outputs(folder, tokens_BT, at)

    probes = proof.probes(None, config)
    return {
        "version": importlib.metadata.version("transformers"),
        **proof.against(state, other, probes, tolerance),
    }


def _table(found: dict[str, Any]) -> str:
    trip = found["round_trip"]
    bits = "every bit" if not trip["different"] else f"{len(trip['different'])} rounded"
    lines = [
        ("from", f"{found['source']} ({found['from']}, {found['parameters']:,} parameters)"),
        ("to", f"{found['target']} ({found['to']}, {found['dtype']})"),
        ("read back", f"{trip['tensors']} tensors, {bits}"),
    ]
    seen: dict[str, Any] = found.get("transformers", {})
    if "float64" in seen:
        part = seen["float64"]
        relation = "<=" if part["within"] else "ABOVE"
        limit = f"{part['max_difference']:.2e} {relation} {part['tolerance']:.2e} in float64"
        lines.append(("transformers", f"logits differ by {limit}"))
        if not seen["same"]:
            lines.append(("differs at", str(seen["differs_at"])))
    elif seen:
        lines.append(("transformers", seen["note"]))
    lines += [("note", note) for note in found["notes"]]
    lines.append(("proof", f"{found['at']}/proof.json"))
    return "\n".join(f"{name:<14} {value}" for name, value in lines)
