"""A corpus on one page: what `python -m launch corpus CONFIG` builds.

    data, clean, dedup, split, tokenizer

The order of the sections (each but the plainest in a module of its own) is the order of the work;
data_pipeline/build.py tells the story. Every threshold stands here: nothing about Chinese text is
decided by a default hidden in the code.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from configs.cleaning import Cleaning
from configs.dedup import Dedup, Evaluation
from configs.encoding import Encoding, Tokenizing
from configs.executing import Ray, Slurm
from configs.quality import Quality
from configs.sources import BadLines, Source


@dataclass(frozen=True)
class Data:
    """What goes in, where it comes out, and who works."""

    out: str
    """The corpus folder: manifest.json, tokenizer/, train.bin ... are made in it."""
    sources: tuple[Source, ...] = ()
    """Read in this order; of equal documents the first one stays."""
    documents: str | None = None
    """In place of sources: the folder of a corpus whose kept documents are encoded again, with
    another tokenizer or encoding; nothing is cleaned, the split stays (换分词器重新编码)."""
    workers: int = 0
    """Tasks at a time; 0 is one for each core, on a cluster as many as it has room for. The bytes
    that are made do not depend on it."""
    task_mb: int = 64
    """Bytes (10^6, plain or a quarter of it compressed) that one task reads: the unit of work that
    a killed build repeats. The order of documents depends on it."""
    bad_lines: BadLines = "reject"
    """What becomes of a line, row or page that cannot be read. reject: it is put aside, counted and
    shown, the build goes on; stop: it ends the build. A source may say otherwise."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """Who does the tasks: processes of this machine, Ray, or a Slurm cluster. The bytes that are
    made do not depend on it."""
    ray: Ray = field(default_factory=Ray)
    """With `executor: ray`."""
    slurm: Slurm = field(default_factory=Slurm)
    """With `executor: slurm`."""

    def sources_in_full(self) -> tuple[Source, ...]:
        """The sources, with what they leave to this section."""
        return tuple(
            replace(source, bad_lines=source.bad_lines or self.bad_lines) for source in self.sources
        )

    def content(self) -> "Data":
        """The same without what no byte of the corpus depends on: where it lies, who works."""
        return replace(
            self, out="", documents=None, workers=0, executor="local", ray=Ray(), slurm=Slurm()
        )

    def problems(self) -> list[str]:
        """No sources, one name twice, numbers outside their range."""
        found = (
            [] if self.out.strip() else ["out: is empty, must name the corpus folder (须有目录名)"]
        )
        if not self.sources and self.documents is None:
            found.append("sources: is empty, must list at least one source (至少一个来源)")
        if self.sources and self.documents is not None:
            found.append(
                "sources, documents: both are given; name sources to clean, or the corpus whose"
                " documents are encoded again (二者择一)"
            )
        names = [source.name for source in self.sources]
        found += [
            f"sources: the name '{name}' stands {names.count(name)} times; names must differ (重名)"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        if self.workers < 0:
            found.append(f"workers: is {self.workers}, must be 0 (one for each core) or more")
        if self.task_mb < 1:
            found.append(f"task_mb: is {self.task_mb}, must be at least 1")
        return found


@dataclass(frozen=True)
class Split:
    """Which kept documents are held out for validation: decided by a hash of the document itself,
    so that it does not move when other documents come or go, and equal text falls on one side."""

    valid_fraction: float | None = None
    """Share of the documents, about; 0 holds nothing out."""
    valid_documents: int | None = None
    """The same as a number of documents, exactly (of distinct ones)."""
    seed: int = 0
    """Another seed, another choice."""

    def problems(self) -> list[str]:
        """Exactly one of the two, in its range."""
        found = []
        if (self.valid_fraction is None) == (self.valid_documents is None):
            found.append("valid_fraction, valid_documents: give exactly one of them (二者择一)")
        if self.valid_fraction is not None and not 0 <= self.valid_fraction < 1:
            found.append(f"valid_fraction: is {self.valid_fraction}, must lie in [0, 1)")
        if self.valid_documents is not None and self.valid_documents < 0:
            found.append(f"valid_documents: is {self.valid_documents}, must not be negative")
        if not 0 <= self.seed < 1 << 63:
            found.append(f"seed: is {self.seed}, must lie in [0, 2^63)")
        return found


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus build."""

    data: Data
    """Sources, folder, processes."""
    tokenizer: Tokenizing
    """Words to numbers."""
    split: Split
    """Train and validation."""
    clean: Cleaning = field(default_factory=Cleaning)
    """Filters."""
    quality: Quality = field(default_factory=Quality)
    """Bounds on scores; another bound costs no cleaning."""
    dedup: Dedup = field(default_factory=Dedup)
    """Duplicates."""
    encode: Encoding = field(default_factory=Encoding)
    """Beside the tokens."""
    decontaminate: tuple[Evaluation, ...] = ()
    """Evaluation sets."""

    def problems(self) -> list[str]:
        """One name twice."""
        names = [part.name for part in self.decontaminate]
        return [
            f"decontaminate: the name '{name}' stands {names.count(name)} times; names must differ "
            "(重名)"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
