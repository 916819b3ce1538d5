"""What a corpus or a checkpoint holds: `inspect CORPUS_OR_CHECKPOINT [--text T] [--document N]`.

    corpus      manifest.json -> counts, tokenizer; a document of it, or a text, through tokenizer/
    checkpoint  manifest.json, headers, state.json -> progress, sizes, growth, data; a text likewise
    text        words of the segmenter, tokens (a bar where a word begins), ids, what comes back

Nothing is written and nothing but headers is read of a checkpoint's tensors, no torch for a corpus.
"""

import argparse
import json
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from configs.model import parameter_count


def main(argv: list[str]) -> int:
    """The verb; 0. ValueError for what is neither, or has no such document or no tokenizer."""
    parser = argparse.ArgumentParser("python -m launch inspect", description=__doc__.split("\n")[0])
    parser.add_argument(
        "path", help="a corpus folder, a checkpoint, or a run (its newest good one)"
    )
    parser.add_argument("--text", help="show its words, tokens, ids and what comes back")
    parser.add_argument("--document", type=int, metavar="N", help="a corpus: its Nth, from 0")
    parser.add_argument("--split", default="train", help="of which split --document is (train)")
    parser.add_argument("--json", action="store_true", help="print JSON, and tokens in full")
    args = parser.parse_args(argv)
    folder = Path(args.path)
    found = corpus(folder) if is_corpus(folder) else checkpoint(folder)
    where = Path(found["tokenizer_folder"])
    if args.document is not None:
        if found["is"] != "corpus":
            raise ValueError(
                f"--document: {folder} is a checkpoint; only a corpus has documents "
                "(只有语料才有文档)"
            )
        found["document"] = document(folder, args.split, args.document)
    if args.text is not None:
        found["text"] = tokens_of(where, args.text)
    print(json.dumps(found, ensure_ascii=False, indent=1) if args.json else page(found))
    return 0


def is_corpus(folder: Path) -> bool:
    """Whether a folder is a corpus; a ValueError if it is none that is whole, nor anything else."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder (没有这个文件夹)")
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except FileNotFoundError:
        if (folder / "checkpoints").is_dir():
            return False
        raise ValueError(
            f"{folder}: has no manifest.json, it is no corpus that is whole, no checkpoint and no "
            "run (既非完整语料，也非检查点)"
        ) from None
    except ValueError:
        raise ValueError(f"{folder / 'manifest.json'}: is damaged (文件已损坏)") from None
    return isinstance(manifest, dict) and "splits" in manifest


def corpus(folder: Path) -> dict[str, Any]:
    """Counts, sources and tokenizer of a corpus, out of its manifest."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    return {
        "is": "corpus",
        "path": str(folder),
        "fingerprint": manifest["fingerprint"],
        "tokenizer_folder": str(folder / "tokenizer"),
        **{key: manifest[key] for key in ("splits", "tokenizer", "sources", "rejects")},
    }


def checkpoint(path: Path) -> dict[str, Any]:
    """Progress, sizes, growth and data of a checkpoint, verified first."""
    from pretrain import checkpoint as room
    from pretrain import growth

    folder = room.resolve(path)
    state = room.read(folder)
    record = state.record
    tensors: dict[str, dict[str, int]] = {}
    for key, entry in state.entries.items():
        kind = tensors.setdefault(key.rsplit("/", 1)[0], {"tensors": 0, "values": 0, "bytes": 0})
        values = prod(entry.shape)
        kind["tensors"] += 1
        kind["values"] += values
        kind["bytes"] += values * (8 if entry.dtype == "int64" else 4)
    progress = ("stage", "step", "updates", "samples", "tokens", "border", "processes")
    return {
        "is": "checkpoint",
        "path": str(folder),
        "tokenizer_folder": str(folder / "tokenizer"),
        "progress": {key: record[key] for key in progress if key in record},
        "model": record["model"],
        "parameters": parameter_count(growth.model_config(state)),
        "tensors": tensors,
        "growth": record.get("growth", []),
        "data": record.get("data", []),
        "tokenizer": record.get("tokenizer"),
    }


def document(folder: Path, split: str, number: int) -> dict[str, Any]:
    """The Nth document of a split: its id and text as kept, its ids as they lie in the index."""
    from data_pipeline import tokenizer
    from data_pipeline.index import Index
    from data_pipeline.shards import records

    splits = sorted(path.stem for path in folder.glob("*.idx"))
    if split not in splits:
        raise ValueError(f"--split: is '{split}', {folder} has {', '.join(splits)} (没有这一部分)")
    index = Index(folder / split)
    if not 0 <= number < index.documents:
        raise ValueError(
            f"--document: is {number}, {split} has {index.documents:,} documents, counted from 0"
            " (超出范围)"
        )
    made = tokenizer.load(folder / "tokenizer")
    ids = index.document(number).tolist()
    kept = (
        record
        for path in sorted((folder / "documents").glob(f"{split}-*"))
        for record in records(path)
    )
    record = next(islice(kept, number, None), None)
    shown: dict[str, Any] = {"split": split, "number": number}
    if record is None:  # a corpus whose kept documents were removed
        return shown | {"ids": ids, "tokens": made.pieces(ids), "back": made.decode(ids)}
    text, spans = record["text"], record.get("spans")
    parts = [text] if spans is None else [text[a:b] for _, a, b in spans]  # encoded each alone
    shown |= {"id": record.get("id"), **tokens_of(folder / "tokenizer", *parts)}
    return shown | {"as_in_the_index": ids == [*shown["ids"], made.eod_id]}


def tokens_of(folder: Path, *texts: str) -> dict[str, Any]:
    """The words, tokens, ids of texts one behind the other (a document's fields), which of them
    begin a word, and what comes back of them."""
    from data_pipeline import tokenizer

    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no tokenizer beside it (没有分词器)")
    made = tokenizer.load(folder)
    each = made.encode_marked(list(texts))
    ids = [number for encoded, _ in each for number in encoded.tolist()]
    text = "\n".join(texts)
    back = "\n".join(made.decode(encoded.tolist()) for encoded, _ in each)
    return {
        "text": text,
        "words": [word for part in texts for word in made.words(part)],
        "tokens": made.pieces(ids),
        "ids": ids,
        "begins_word": [begins for _, starts in each for begins in starts.tolist()],
        "unknown_rate": round(ids.count(made.unknown_id) / max(1, len(ids)), 4),
        "user_dictionary": made.user_dictionary is not None,
        "back": back,
        "round_trip": back == text,
        "characters_per_token": round(len(text) / max(1, len(ids)), 3),
    }


def page(found: dict[str, Any]) -> str:
    """What was found, for a person; long lists are cut and say how long they are."""
    lines = _corpus_lines(found) if found["is"] == "corpus" else _checkpoint_lines(found)
    if shown := found.get("document"):
        lines += [f"document {shown['number']} of {shown['split']}  {shown.get('id') or ''}"]
        lines += _token_lines(shown)
        if "as_in_the_index" in shown:
            same = "are these (一致)" if shown["as_in_the_index"] else "DIFFER (不一致)"
            lines.append(f"  its ids in the index {same}")
    if "text" in found:
        lines += ["text (文本)", *_token_lines(found["text"])]
    return "\n".join(lines)


def _corpus_lines(found: dict[str, Any]) -> list[str]:
    tokenizer = found["tokenizer"]
    lines = [f"corpus {found['path']} (语料)"]
    for name, split in found["splits"].items():
        ratio = split["characters"] / max(1, split["tokens"])
        lines.append(
            f"  {name:<10}{split['documents']:>12,} documents  {split['tokens']:>15,} tokens"
            f"  {split['characters']:>15,} characters  {ratio:.2f} characters a token"
        )
    lines += [f"  source    {s['documents']:>12,} documents  {s['name']}" for s in found["sources"]]
    for reason, lost in found["rejects"].items():
        lines.append(f"  rejected  {lost['documents']:>12,} documents  {reason}")
    lines.append(f"  tokenizer {tokenizer['kind']}, {tokenizer['vocab_size']:,} entries")
    return [
        *lines,
        f"            {tokenizer['fingerprint']}",
        f"  contents  {found['fingerprint']}",
    ]


def _checkpoint_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"checkpoint {found['path']} (检查点)"]
    told = "  ".join(f"{key} {value}" for key, value in found["progress"].items())
    lines.append(f"  progress  {told}")
    sizes = "  ".join(f"{key} {value}" for key, value in found["model"].items())
    lines.append(f"  model     {sizes}")
    lines.append(f"  sizes     {found['parameters']:,} parameters")
    for kind, size in found["tensors"].items():
        lines.append(
            f"  {kind:<18}{size['tensors']:>6,} tensors  {size['values']:>16,} values"
            f"  {size['bytes'] / 1e6:>12,.1f} MB"
        )
    lines += [f"  growth    {_line(step)}" for step in found["growth"]] or ["  growth    none"]
    lines += [f"  data      {_line(entry)}" for entry in found["data"]]
    return [*lines, f"  tokenizer {found['tokenizer']}"]


def _line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _token_lines(shown: dict[str, Any]) -> list[str]:
    lines = []
    if "text" in shown:
        lines.append(f"  text      {_cut(shown['text'])!r}")
    if shown.get("words") is not None:
        lines.append(f"  words     {_listed(shown['words'])}")
    tokens = [str(token).replace(" ", "\u2581") for token in shown["tokens"]]
    if "begins_word" in shown:  # a bar where a word of the segmenter begins
        marks = shown["begins_word"]
        tokens = ["|" * begins + token for token, begins in zip(tokens, marks, strict=True)]
    lines.append(f"  tokens    {_listed(tokens)}")
    lines.append(f"  ids       {_listed(shown['ids'])}")
    lines.append(f"  back      {_cut(shown['back'])!r}")
    if "round_trip" in shown:
        verdict = "the same (一致)" if shown["round_trip"] else "not the same (有损)"
        ratio = shown["characters_per_token"]
        told = f"{ratio} characters a token; {shown['unknown_rate']:.2%} unknown (未登录)"
        lines.append(f"  round trip: {verdict}; {told}")
        if shown["user_dictionary"]:
            lines.append("  words are cut with a user's dictionary (用户词典)")
    return lines


_SHOWN = 60  # of a list


def _listed(items: list[Any]) -> str:
    more = f" ... {len(items):,} in all" if len(items) > _SHOWN else ""
    return " ".join(str(item).replace("\n", "\\n") for item in items[:_SHOWN]) + more


def _cut(text: str) -> str:
    return text if len(text) <= 3 * _SHOWN else text[: 3 * _SHOWN] + "…"
