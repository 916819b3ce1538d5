"""The corpus folder: results put in their places under a manifest.

    stages of a build --merge, link--> train.*  valid.*  tokenizer/  documents/  rejects/
                                       manifest.json (first away, last back)

The manifest holds no date and no path: the same text and config give the same bytes anywhere.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import xxhash

from configs.corpus import CorpusConfig
from data_pipeline import decontaminate, index, near, sidefile, tokenizer, unreadable
from data_pipeline.blocks import SPLITS, Stage
from data_pipeline.losses import Losses
from data_pipeline.shards import aside
from data_pipeline.standing import FORMAT, note_page


def publish(
    config: CorpusConfig,
    out: Path,
    stages: Sequence[Stage],
    losses: Losses,
    origin: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put the results in their places; the manifest goes first and comes last. `origin` is the
    manifest of the corpus whose documents these are, if there is one."""
    cleaned, _, divided, made, encoded, *gaps = stages
    (out / "manifest.json").unlink(missing_ok=True)
    note_page(config, out)
    for split in SPLITS:
        for layout in sidefile.LAYOUTS:
            layout.path(out / split).unlink(missing_ok=True)
        index.merge(_shards(encoded, split), out / split)
        for layout in sidefile.LAYOUTS:
            for stage in (encoded, *gaps):
                if layout.path(_shards(stage, split)[0]).exists():
                    layout.merge(_shards(stage, split), out / split)
    replace_folder([made.data / "tokenizer"], out / "tokenizer")
    replace_folder([divided.data / "documents"], out / "documents")
    replace_folder([cleaned.data / "rejects", divided.data / "rejects"], out / "rejects")
    shutil.rmtree(out / "contamination", ignore_errors=True)
    manifest = describe(config, out, stages)
    if origin is not None:
        made_here = ("format", "fingerprint", "tokenizer", "splits")
        manifest = {name: manifest[name] for name in made_here} | {
            name: said for name, said in origin.items() if name not in made_here
        }
        manifest["documents_of"] = origin["fingerprint"]
    for stage in losses.stages:
        if stage.name == "contaminated":
            replace_folder([stage.data / "hits"], out / "contamination")
            manifest["contamination"] = decontaminate.said(config.decontaminate, stage.counts)
        if stage.name == "clusters":
            manifest["near"] = near.said(losses.counts())
    with aside(out / "manifest.json") as file:
        file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    return manifest


def _shards(stage: Stage, split: str) -> list[Path]:
    """The prefixes of a split's token files, in the order of the tasks."""
    return [stage.data / f"{split}-{rank:05d}" for rank in range(stage.tasks)]


def describe(config: CorpusConfig, out: Path, stages: Sequence[Stage]) -> dict[str, Any]:
    """The manifest: what the corpus is, and fingerprints of its contents. It holds no date and no
    path, so that the same text and config give the same bytes anywhere."""
    cleaned, found, divided, _, encoded = (stage.counts for stage in stages[:5])
    words = tokenizer.load(out / "tokenizer")
    splits: dict[str, dict[str, Any]] = {
        split: {
            "documents": divided[f"{split}_documents"],
            "tokens": encoded[f"{split}_tokens"],
            "characters": divided[f"{split}_characters"],
            "bytes": divided[f"{split}_bytes"],
            "fingerprint": index.fingerprint(out / split),
        }
        for split in SPLITS
    }
    counts = sum((stage.counts for stage in stages[4:]), Counter())
    contents = [words.fingerprint, *(split["fingerprint"] for split in splits.values())]
    for split, known in splits.items():
        beside = beside_of(out / split, split, counts, config.encode.criterion)
        known.update(beside)
        contents += [part["fingerprint"] for part in beside.values()]
    refused = cleaned + divided
    lost = rejects(refused, "rejected_characters")
    return {
        "format": FORMAT,
        "fingerprint": f"xxh3-128:{xxhash.xxh3_128_hexdigest(orjson.dumps(contents))}",
        "tokenizer": {
            "kind": words.kind,
            "fingerprint": words.fingerprint,
            "vocab_size": words.vocab_size,
            "eod_id": words.eod_id,
        },
        "splits": splits,
        "sources": [
            {"name": s.name, "kind": s.kind, "documents": cleaned[f"read/{s.name}"]}
            | unreadable.told(cleaned, s.name)
            | ({"repeated_ids": n} if (n := found[f"repeated_ids/{s.name}"]) else {})
            for s in config.data.sources
        ],
        "read": {name: cleaned[f"read_{name}"] for name in ("documents", "characters", "bytes")},
        "rejects": {
            reason: {"documents": n, "characters": lost.get(reason, 0)}
            for reason, n in rejects(refused).items()
        },
        "changed": rejects(cleaned, "changed"),
        "scripts": rejects(cleaned, "script"),
        "lines": rejects(cleaned, "lines"),
    }


def beside_of(
    prefix: Path, split: str, counts: "Counter[str]", criterion: str | None
) -> dict[str, dict[str, Any]]:
    """What lies beside the index of a split: numbers, fingerprints, how gaps were picked."""
    said: dict[str, dict[str, Any]] = {}
    for layout, key, names in (
        (sidefile.MARKS, "boundaries", ("words", "sentences", "no_sentences")),
        (sidefile.GAPS, "gaps", ("units", "sentences", "gap_sentences", "no_borders")),
        (sidefile.FIELDS, "fields", ("spans", "labelled")),
    ):
        if layout.path(prefix).exists():
            known = {name: counts[f"{split}_{key}_{name}"] for name in names}
            said[key] = known | {"fingerprint": layout.fingerprint(prefix)}
    if criterion is not None:
        said["gaps"]["criterion"] = criterion
    if "fields" in said:
        fields = sidefile.Fields(prefix)
        said["fields"] |= {"names": list(fields.names), "labels": fields.documents_of_labels()}
    return said


def replace_folder(sources: Sequence[Path], target: Path) -> None:
    """Make `target` hold what the sources hold: by hard links, or copies where there are none."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for source in sources:
        if source.exists():
            shutil.copytree(source, partial, copy_function=_link, dirs_exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def rejects(counts: "Counter[str]", what: str = "rejected") -> dict[str, int]:
    """Counts by reason, or by another family of keys such as changed/."""
    return {key.partition("/")[2]: n for key, n in counts.items() if key.startswith(f"{what}/")}
