"""Another vocabulary for a checkpoint: `revocab SOURCE --tokenizer FOLDER --out DIR`.

    SOURCE --read (any format of `convert`)--> state + its tokenizer ┐
    FOLDER: the new tokenizer -----------------------------------------> plan -> state -> DIR
    DIR --read back--> kept tokens through both models: the same logits for them? -> proof.json

Tokens that both vocabularies have keep their rows, new ones begin as means of what the old one
makes of their text; the optimizer's moments are dropped. `--recipe t5-pegasus` goes from mT5 to a
Chinese vocab.txt as T5 PEGASUS was begun, and puts the tokens in its order. `--vocab` adds spare
rows, which are the mean of all: for sentinels, or so that tensor parallelism divides them.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from configs.model import ModelConfig, longest_row, parameter_count
from data_pipeline import tokenizer as tokenizers
from data_pipeline import wordpiece
from data_pipeline.pieces import Pieces
from launch import convert
from pretrain import growth, proof
from pretrain.convert import vocabulary
from pretrain.convert.vocabulary import Plan, Vocabulary
from pretrain.state import State


def main(argv: list[str]) -> int:
    """Change the vocabulary; 0 if the proof holds, 1 if not; ValueError for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m launch revocab", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="a checkpoint or a run, or a folder of another format")
    parser.add_argument("--tokenizer", required=True, help="the new tokenizer: a frozen folder")
    parser.add_argument("--out", required=True, help="the folder to write; must not exist")
    parser.add_argument("--from-tokenizer", help="the old one, for a source without it")
    parser.add_argument("--from-pieces", help="the old one as a model of sentencepiece (mT5's)")
    parser.add_argument(
        "--rows", help="JSON list: the source's row of each piece of a pruned --from-pieces"
    )
    parser.add_argument(
        "--vocab", type=int, help="rows of the new table; those beyond its tokens are spare"
    )
    parser.add_argument("--recipe", choices=["plain", "t5-pegasus"], default="plain")
    parser.add_argument(
        "--weigh", choices=["pieces", "characters"], default="pieces", help="what of a mean weighs"
    )
    parser.add_argument("--json", action="store_true", help="print the proof as JSON")
    given = parser.parse_args(argv)
    found = revocab(given)
    print(json.dumps(found, ensure_ascii=False, indent=1) if given.json else _table(found))
    if not found["kept"]:
        print(
            f"{given.out}: differs and was not made; what was written stands with its proof in "
            f"{found['at']} (函数未保持，未生成)",
            file=sys.stderr,
        )
    return 0 if found["kept"] else 1


def revocab(given: argparse.Namespace) -> dict[str, Any]:
    """Read, plan, write, prove; returns the proof. ValueError for what cannot be done."""
    out = Path(given.out)
    if out.exists():
        raise ValueError(
            f"{out}: exists already; name another --out (nothing was overwritten; 已存在，请换名)"
        )
    new_tokenizer = tokenizers.load(given.tokenizer)
    source = convert.read(Path(given.source), None, [], given.from_tokenizer)
    config = growth.model_config(source.state)
    old = _old(given, source)
    folder, aside = Path(given.tokenizer), None
    if given.recipe == "t5-pegasus":
        if given.from_pieces is None or not isinstance(new_tokenizer, wordpiece.WordPiece):
            raise ValueError(
                "--recipe t5-pegasus: goes from --from-pieces, mT5's sentencepiece, to a tokenizer "
                "of kind wordpiece; give both (参数不足)"
            )
        order, made = vocabulary.published(old, _spelt(new_tokenizer))
        aside = folder = Path(tempfile.mkdtemp(prefix="revocab"))
        text = "".join(f"{token}\n" for token in order).encode()
        again = text, new_tokenizer.word, new_tokenizer.user_dictionary
        new_tokenizer = wordpiece.WordPiece(*again)
        new_tokenizer.save(folder)
    else:
        made = vocabulary.plan(old, of(new_tokenizer), given.weigh == "characters")
    if given.rows is not None:
        made = vocabulary.through(made, _rows(given.rows, len(old.tokens)))
    try:
        state = vocabulary.applied(source.state, config, made)
        state = _with_spare_rows(state, given.vocab)
        written = convert.convert(
            convert.Source("revocab", state, folder), out, "native", torch.float32, None
        )
    finally:
        if aside is not None:
            shutil.rmtree(aside)
    after = convert.read(convert.aside_of(out), "native", [], None).state
    same = _same(source.state, after, made, new_tokenizer)
    found = {
        "verb": "revocab",
        "source": source.at,
        "out": str(out),
        "recipe": given.recipe,
        "kept": written["kept"] and same["within"],
        "from_tokens": len(old.tokens),
        **made.said(),
        "logits_of_kept_tokens": same,
        "parameters": [parameter_count(_config(s)) for s in (source.state, after)],
        "round_trip": written["round_trip"],
    }
    return convert.settled(out, found)


def _with_spare_rows(state: State, rows: int | None) -> State:
    """Rows of no token yet, each the mean of all: sentinels, a number that ranks divide."""
    config = _config(state)
    if rows is None or rows == config.vocab:
        return state
    if rows < config.vocab:
        raise ValueError(
            f"--vocab: is {rows}, the new tokenizer has {config.vocab} tokens; it must be at least "
            "that (行数不足)"
        )
    return growth.grow(state, dataclasses.replace(config, vocab=rows), 0)


def of(tokenizer: Any) -> Vocabulary:
    """A frozen tokenizer as a plan needs it."""
    roles = {"unknown": tokenizer.unknown_id, "pad": tokenizer.pad_id, "eod": tokenizer.eod_id}
    roles |= {"mask": tokenizer.mask_id, "bos": tokenizer.bos_id}
    return Vocabulary(
        "##" if tokenizer.kind == "wordpiece" else "\u2581",
        tuple(_spelt(tokenizer)),
        {role: number for role, number in roles.items() if number is not None},
        tokenizer.control_ids(),
        lambda number: tokenizer.decode([number]).strip(),
        tokenizer.encode_batch,
    )


def _spelt(tokenizer: Any) -> list[str]:
    return list(tokenizer.pieces(range(tokenizer.vocab_size)))


def _old(given: argparse.Namespace, source: convert.Source) -> Vocabulary:
    if given.from_pieces is not None:
        pieces = Pieces(given.from_pieces)
        ids = {token: number for number, token in enumerate(pieces.tokens)}
        controls: dict[str, int] = {
            name: ids[name] for name in ("<pad>", "</s>", "<unk>", "<s>") if name in ids
        }
        names = {"pad": "<pad>", "eod": "</s>", "bos": "<s>"}
        roles = {role: ids[name] for role, name in names.items() if name in ids}
        return Vocabulary(
            "\u2581",
            pieces.tokens,
            roles | {"unknown": pieces.unknown_id},
            controls,
            lambda number: pieces.tokens[number].replace("\u2581", " ").strip(),
            pieces.encode_batch,
        )
    if source.tokenizer is None:
        raise ValueError(
            f"{given.source}: has no tokenizer beside it; give --from-tokenizer, a frozen folder, "
            "or --from-pieces, a model of sentencepiece (缺少原分词器)"
        )
    return of(tokenizers.load(source.tokenizer))


def _rows(path: str, tokens: int) -> list[int]:
    try:
        rows = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"--rows: {path} is not JSON: {error} (不是 JSON)") from None
    if not isinstance(rows, list) or len(rows) < tokens or not all(type(i) is int for i in rows):
        raise ValueError(
            f"--rows: {path} must list at least {tokens} rows, one for each piece (行号不足)"
        )
    return rows


def _config(state: State) -> ModelConfig:
    return growth.model_config(state)


def _same(before: State, after: State, made: Plan, tokenizer: Any) -> dict[str, Any]:
    """Logits of kept tokens behind texts of kept tokens, through both models, in float64."""
    if getattr(_config(before), "labels", 0):
        return {"within": True, "probe_tokens": 0, "note": "not compared: a head over labels"}
    kept = [number for number, was in enumerate(made.kept) if was]
    texts = tokenizer.encode_batch(list(proof.SENTENCES))
    is_kept = set(kept)
    stream = [int(i) for ids in texts for i in ids if int(i) in is_kept] or kept
    if not stream:
        return {"within": True, "probe_tokens": 0, "note": "no token is in both vocabularies"}
    rows = proof.PROBE_ROWS
    length = min(proof.PROBE_TOKENS, longest_row(_config(before)) or proof.PROBE_TOKENS)
    ids = torch.tensor((stream * (rows * length // len(stream) + 1))[: rows * length])
    row_of = torch.tensor([one[0] for one in made.rows])
    old = proof.logits(before, row_of[ids].view(rows, length), torch.float64)[..., row_of[kept]]
    new = proof.logits(after, ids.view(rows, length), torch.float64)[..., kept]
    far, std = float((old - new).abs().max()), float(old.std())
    return {
        "within": far <= proof.FLOAT64_TOLERANCE * std,
        "max_difference": far,
        "tolerance": proof.FLOAT64_TOLERANCE * std,
        "std": std,
        "probe_tokens": len(stream),
        "share_of_sentences_kept": round(len(stream) / max(sum(map(len, texts)), 1), 4),
    }


def _table(found: dict[str, Any]) -> str:
    same = found["logits_of_kept_tokens"]
    limit = same.get("note") or (
        f"differ by {same['max_difference']:.2e} "
        f"{'<=' if same['within'] else 'ABOVE'} {same['tolerance']:.2e} in float64"
    )
    small, large = found["parameters"]
    share = same.get("share_of_sentences_kept", 0)
    lines = [
        ("from", f"{found['source']} ({found['from_tokens']:,} tokens, {small:,} parameters)"),
        ("to", f"{found['out']} ({found['tokens']:,} tokens, {large:,} parameters)"),
        ("kept", f"{found['kept_tokens']:,} tokens, {share:.1%} of the sentences probed"),
        ("means of pieces", f"{found['means']:,}"),
        ("copies", f"{found['copies_of_another']:,} of a piece or of the unknown token"),
        ("kept logits", limit),
        ("proof", f"{found['at']}/proof.json"),
    ]
    return "\n".join(f"{name:<16} {value}" for name, value in lines)
