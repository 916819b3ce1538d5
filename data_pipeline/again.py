"""Another encoding of a corpus that stands: its kept documents, another tokenizer.

    CORPUS/manifest.json, documents/  --links-->  OUT/stages/documents-KEY/
                                                     |  tokenizer, encode, gaps: to_tokens.py
                                                     v
                                      OUT/ as any corpus; documents_of: fingerprint of CORPUS

No cleaning, no search for duplicates, the same split: the token files are byte for byte those that
the sources would give with that tokenizer. Where hard links work no document is copied, and CORPUS
may change or go afterwards. A CORPUS that lacks some of its documents is refused: its manifest
speaks of all of them.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import xxhash

from configs.corpus import CorpusConfig
from data_pipeline import encode, executors, report
from data_pipeline.blocks import SPLITS, Block, Stage, fingerprint_of, run
from data_pipeline.losses import Losses
from data_pipeline.progress import Progress
from data_pipeline.publish import publish, replace_folder
from data_pipeline.shards import CorpusError, aside, sweep
from data_pipeline.sources.places import first_place
from data_pipeline.standing import FORMAT, finished, not_another, remember
from data_pipeline.tally import Tally, together
from data_pipeline.to_tokens import to_tokens


def build_again(
    config: CorpusConfig,
    out: Path,
    crew: executors.Crew,
    say: Progress,
    code: list[str],
    replacing: bool,
) -> dict[str, Any]:
    """Encode the documents of the corpus in config.data.documents; returns the manifest.

    `code` is the version of the pipeline. CorpusError if there is no whole corpus, or, unless
    `replacing`, one of another page in `out`.
    """
    folder, origin = _origin(config, out)
    models = [
        xxhash.xxh3_128_hexdigest(f.read_bytes()) for f in encode.model_files(config.tokenizer)
    ]
    content = replace(config, data=config.data.content())
    # The origin's fingerprint is of its tokens: texts may differ in what its tokenizer folds.
    whole = [origin["fingerprint"], _shards(folder / "documents")]
    asked = fingerprint_of([FORMAT, content, whole, models, encode.versions(), code])
    if (manifest := finished(out, asked)) is not None:
        say.line(f"{out}: complete, nothing to do (语料已建好)")
        return manifest
    not_another(config, out, replacing)
    sweep(out, executors.still_at_work(out, config.data.executor))

    def stage(name: str, blocks: list[Block], tasks: int, inputs: list[Any], size: int) -> Stage:
        return run(out, name, blocks, tasks, crew, inputs, say.watch(name, size))

    taken = _taken(folder, origin, out)
    named = origin["splits"]["train"].get("fields", {})
    beside = encode.Beside(
        config.encode.boundaries, tuple(named.get("names", ())), tuple(named.get("labels", ()))
    )
    made, encoded, *gaps = to_tokens(config, stage, taken, models, beside)
    count: list[Block] = [Tally(taken.data / "documents", encoded.data, made.data / "tokenizer")]
    size = taken.counts["train_bytes"] + taken.counts["valid_bytes"]
    tallied = stage("tally", count, taken.tasks, [taken.key, encoded.key], size)
    counted = together(tallied.data, taken.tasks)
    _as_many(config, origin, counted)
    stages = [taken, taken, taken, made, encoded, *gaps]
    manifest = publish(config, out, stages, Losses(), origin)
    with aside(out / "report.html") as file:
        facts = report.Facts(manifest, counted, out, [], {})
        file.write(report.html(facts).encode())
    remember(out, asked, [taken, made, tallied])
    say.line(report.speed({stage.name: stage.counts for stage in (made, encoded, *gaps)}))
    return manifest


def _origin(config: CorpusConfig, out: Path) -> tuple[Path, dict[str, Any]]:
    """The corpus folder whose documents are taken, and its manifest."""
    named = config.data.documents
    assert named is not None
    folder = first_place(named)
    try:
        manifest = orjson.loads(((folder or Path(named)) / "manifest.json").read_bytes())
        whole = manifest["format"] == FORMAT
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        whole = False
    if folder is not None and folder.resolve() == out.resolve():
        raise CorpusError(
            f"data.documents: '{named}' is data.out itself, whose tokens and rejects would be lost;"
            " give the new corpus a folder of its own (不能覆盖原语料)"
        )
    if folder is None or not whole:
        raise CorpusError(
            f"data.documents: there is no whole corpus in '{named}' (no manifest.json of format "
            f"{FORMAT}); build it first, or correct the path (找不到已建好的语料)"
        )
    shards = [name for name, *_ in _shards(folder / "documents")]
    if not any(name.startswith("train-") for name in shards):
        raise CorpusError(
            f"data.documents: the corpus in '{named}' has no documents/ any more; remove its "
            "stages/built.json and build it again, or name data.sources (语料缺少文档)"
        )
    for rank in range(max(sum(name.startswith(split) for name in shards) for split in SPLITS)):
        for split in SPLITS:
            if (name := f"{split}-{rank:05d}.jsonl.zst") not in shards:
                raise CorpusError(
                    f"data.documents: the corpus in '{named}' has no documents/{name}, but other "
                    "shards; bring the file back, or remove stages/built.json there and build it "
                    "again (语料的文档不全)"
                )
    return folder, manifest


def _shards(documents: Path) -> list[list[Any]]:
    """Name, bytes, and the checksum that zstd put at its end, of each shard of documents."""
    found: list[list[Any]] = []
    for path in sorted(documents.glob("*.jsonl.zst")):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 4, 0))
            found.append([path.name, size, file.read(4).hex()])
    return found


def _taken(folder: Path, origin: dict[str, Any], out: Path) -> Stage:
    """The documents, linked into a folder of stages as if they had been divided here."""
    here = _shards(folder / "documents")
    key = fingerprint_of(origin["fingerprint"])
    before = out / "stages" / f"documents-{key}" / "data" / "documents"
    if before.exists() and _shards(before) != here:  # of the same tokens, and yet others
        key = fingerprint_of([origin["fingerprint"], here])
    place = out / "stages" / f"documents-{key}"
    if not (place / "data" / "documents").exists():
        (place / "data").mkdir(parents=True, exist_ok=True)
        replace_folder([folder / "documents"], place / "data" / "documents")
    tasks = len(list((place / "data" / "documents").glob("train-*.jsonl.zst")))
    counts: Counter[str] = Counter()
    for split in SPLITS:
        for name in ("documents", "characters", "bytes"):
            counts[f"{split}_{name}"] = origin["splits"][split][name]
    return Stage("documents", place, key, tasks, counts)


def _as_many(config: CorpusConfig, origin: dict[str, Any], counted: dict[str, Any]) -> None:
    """Refuse a corpus whose documents are fewer, or more, than its manifest says."""
    for split in SPLITS:
        said = origin["splits"][split]["documents"]
        there = sum(counts.get(f"{split}_documents", 0) for counts in counted["sources"].values())
        if there != said:
            raise CorpusError(
                f"data.documents: the corpus in '{config.data.documents}' has {there} {split} "
                f"documents in documents/, its manifest says {said}; bring the missing shards "
                "back, or remove stages/built.json there and build it again (语料的文档不全)"
            )
