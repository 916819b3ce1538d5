"""Which of the cleaned documents go, and why: each search leaves out what went before it.

cleaned --> stood before --> evaluation sets --> a score out of its bounds --> nearly stood before
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from configs.corpus import CorpusConfig
from data_pipeline import decontaminate, near, quality
from data_pipeline.blocks import Stage, fingerprint_of


@dataclass
class Losses:
    """Which documents of the cleaned ones go, and why."""

    gone: dict[str, list[Path]] = field(default_factory=dict)
    """Reason -> files with the numbers of documents."""
    why: list[tuple[Path, Path]] = field(default_factory=list)
    """Such a file, and for each of its documents the one that stays (dedup.WHY)."""
    kept: Path | None = None
    """The documents that stand for near duplicates, with how many."""
    stages: list[Stage] = field(default_factory=list)
    """What was run beside the search for equal documents."""

    @property
    def keys(self) -> list[str]:
        """What the division depends on."""
        return [stage.key for stage in self.stages]

    def counts(self) -> "Counter[str]":
        """The sum over those stages."""
        return sum((stage.counts for stage in self.stages), Counter())


def what_goes(
    config: CorpusConfig,
    stage: Callable[..., Stage],
    cleaned: Stage,
    found: Stage,
    sizes: list[int],
    exams: list[str],
) -> Losses:
    """Documents that stood before, that hold text of evaluation sets, that nearly stood before:
    each search leaves out what went before it."""
    losses = Losses()
    if config.dedup.exact:
        losses.gone["duplicate"] = sorted((found.data / "duplicates").glob("*.npy"))
        losses.why += _pairs(found.data, losses.gone["duplicate"])
    if config.decontaminate:
        look = decontaminate.FindMatches(
            cleaned.data / "documents", sizes, config.decontaminate, exams
        )
        size = cleaned.counts["bytes"]
        matched = stage("matches", [look], len(sizes), [cleaned.key, exams], size)
        copies = losses.gone.get("duplicate", [])
        spare = decontaminate.SpareCommon(matched, config.decontaminate, exams, copies)
        # Where copies stay, each counts: no duplicates are read, and the key is another one.
        reads = [matched.key, found.key] if config.dedup.exact else [matched.key]
        hit = stage("contaminated", [spare], 1, reads, 0)
        for part in config.decontaminate:
            numbers = hit.data / "numbers" / part.name
            losses.gone[f"contaminated:{part.name}"] = sorted(numbers.glob("*.npy"))
        losses.stages += [matched, hit]
    if rules := config.quality.rules():
        look = quality.FindPoor(cleaned.data, sizes, config.quality)
        losses.stages.append(stage("quality", [look], len(sizes), [cleaned.key], 0))
        for name in rules:
            numbers = losses.stages[-1].data / "numbers" / name
            losses.gone[f"quality:{name}"] = sorted(numbers.glob("*.npy"))
    if config.dedup.near is not None:
        gone = [path for paths in losses.gone.values() for path in paths]
        # Keyed by the numbers: another seed of the split finds the same duplicates.
        key = fingerprint_of([xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in gone])
        losses.stages += near.search(stage, cleaned, sizes, gone, key, config.dedup.near)
        clustered = losses.stages[-1].data
        losses.gone["near_duplicate"] = [clustered / "dropped" / "00000.npy"]
        losses.why += _pairs(clustered, losses.gone["near_duplicate"])
        losses.kept = clustered / "kept" / "00000.npy"
    return losses


def _pairs(data: Path, files: list[Path]) -> list[tuple[Path, Path]]:
    """Files of numbers, each with the file in why/ that has its name."""
    return [(path, data / "why" / path.name) for path in files]
