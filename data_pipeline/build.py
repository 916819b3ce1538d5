"""The story of a corpus: from raw text to tokens on the disk.

    sources            (or the documents of another corpus: again.py)          ingest.py
       |  read
       v
    documents --clean--> rejects/too_short, few_han ...                        clean.py
       |
       +--lines of many documents--> taken out, if asked                       lines.py
       +--hash--> duplicates: of equal documents the first one stays           dedup.py
       +--13 letters in a row--> contaminated: holds text of evaluation sets   decontaminate.py
       +--MinHash, Jaccard--> near duplicates: of a cluster the first stays    near.py
       v
    divide  --> rejects/duplicate, contaminated:NAME, near_duplicate
       |  by a hash of the document
       +--> valid
       +--> train --sample--> tokenizer/                                       tokenizer.py
               |                 |
               +------ encode ---+   every shard: ids, borders, fields         encode.py
                         +--gaps--> sentences and pseudo-summaries, if asked   gaps.py
                         +--tally--> lengths, sources, tokens in use           tally.py
                         |
                         v
    OUT/ manifest.json  tokenizer/  train.bin .idx .marks (.gaps .fields)      publish.py
         documents/  rejects/  stages/  report.html                            report.py

Each arrow is a stage (blocks.py) on one of datatrove's executors (executors.py) in a folder that is
named by everything it depends on. A build that was killed goes on where it stood and makes the same
bytes; a build that is complete is recognised and left alone (standing.py, which also keeps what is
not ours and, unless told, corpora of another config); a changed config repeats what depends on the
change. The old corpus stays until the new one is ready; there is no manifest while its files are
being replaced.
"""

import fcntl
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from configs.corpus import CorpusConfig
from data_pipeline import (
    again,
    decontaminate,
    dedup,
    encode,
    executors,
    fields,
    hanzi,
    ingest,
    lines,
    repeated_ids,
    report,
)
from data_pipeline.blocks import (
    SPLITS,
    Block,
    Stage,
    code_of,
    fingerprint_of,
    run,
)
from data_pipeline.dedup import Divide, FindDuplicates
from data_pipeline.encode import Beside
from data_pipeline.index import IndexFault
from data_pipeline.intake import Clean, Read, Store
from data_pipeline.losses import Losses, what_goes
from data_pipeline.progress import Progress
from data_pipeline.publish import publish, rejects
from data_pipeline.shards import CorpusError, aside, sweep
from data_pipeline.standing import (
    FORMAT,
    finished,
    folder_of,
    no_file,
    not_another,
    not_others,
    remember,
    with_its_stage,
)
from data_pipeline.tally import Tally, together
from data_pipeline.to_tokens import to_tokens
from data_pipeline.unreadable import unread

CODE = sorted(
    str(path.relative_to(Path(__file__).parent).with_suffix(""))
    for folder in (".", "sources")
    for path in (Path(__file__).parent / folder).glob("*.py")
)


def build(config: CorpusConfig, replacing: bool = False) -> dict[str, Any]:
    """Build or finish the corpus in config.data.out; returns its manifest. `replacing`: also over a
    corpus of another page.

    Raises CorpusError or another ValueError, one sentence: what cannot be read or written, which
    key to change. What was done until then is kept.
    """
    out = folder_of(config)
    try:
        no_file(config, out)
        not_others(config, out)
        out.mkdir(parents=True, exist_ok=True)
        with only_builder(out), executors.crew(config.data) as crew:
            return _build(config, out, crew, replacing)
    except (CorpusError, IndexFault) as error:
        raise CorpusError(with_its_stage(str(error), out)) from None
    except OSError as error:
        raise CorpusError(
            f"reading or writing failed: {error.strerror or error} ({error.filename or out}); make "
            "room or change data.out, then build again: what is done is kept (读写失败)"
        ) from None


def _build(
    config: CorpusConfig, out: Path, crew: executors.Crew, replacing: bool
) -> dict[str, Any]:
    """The story of a build. Long because it is told in one go, as `train()` is."""
    say = Progress()
    if config.data.documents is not None:
        return again.build_again(config, out, crew, say, code_of(CODE), replacing)

    # What is asked for: if it stands there already, nothing is done.
    not_within_a_source(config, out)
    tasks, files = ingest.plan(config.data)
    not_of_itself(config, out, tasks)
    models = [
        xxhash.xxh3_128_hexdigest(f.read_bytes()) for f in encode.model_files(config.tokenizer)
    ]
    exams = [xxhash.xxh3_128_hexdigest(f.read_bytes()) for f in decontaminate.files(config)]
    content = replace(config, data=config.data.content())
    asked = fingerprint_of(
        [FORMAT, content, files, models, exams, encode.versions(), hanzi.version(), code_of(CODE)]
    )
    if (manifest := finished(out, asked)) is not None:
        say.line(f"{out}: complete, nothing to do (语料已建好)")
        return manifest
    not_another(config, out, replacing)
    sweep(out, executors.still_at_work(out, config.data.executor))
    encode.refuse(config.tokenizer)  # late in the story, and yet no reason to clean first
    decontaminate.refuse(config)

    def stage(name: str, blocks: list[Block], tasks: int, inputs: list[Any], size: int) -> Stage:
        return run(out, name, blocks, tasks, crew, inputs, say.watch(name, size))

    # Read, normalise, filter; what is kept goes to shards, its hashes to tables.
    size = sum(part.weight for task in tasks for part in task)
    blocks = [Read(config.data.sources_in_full(), tasks), Clean(config.clean), Store()]
    cleaned = stage("clean", blocks, len(tasks), files, size)
    unchanged_sources(config, files, cleaned)
    if lost := unread(config.data.sources, cleaned):
        say.line(lost)
    read_ids = [cleaned.data / "read_ids" / f"{rank:05d}.npy" for rank in range(len(tasks))]
    cleaned, before = lines.trimmed(config, stage, cleaned)
    something_left(cleaned.counts)

    # Compare the hashes; divide what is distinct into train and valid.
    tables = [cleaned.data / "hashes" / f"{rank:05d}.npy" for rank in range(len(tasks))]
    buckets = dedup.buckets(max(cleaned.counts["documents"], cleaned.counts["read_ids"]))
    named = [source.name for source in config.data.sources]
    lowest = config.split.valid_documents or 0
    search = FindDuplicates(tables, config.split.seed, lowest, read_ids, named)
    found = stage("duplicates", [search], buckets, [cleaned.key], 0)
    if twice := repeated_ids.said(named, cleaned.counts + found.counts):
        say.line(twice)
    sizes = dedup.sizes_of(cleaned)
    losses = what_goes(config, stage, cleaned, found, sizes, exams)
    below = limit_of_lots(config, found, tables, losses)
    divide = Divide(
        cleaned.data, sizes, losses.gone, losses.why, losses.kept, config.split.seed, below
    )
    size = cleaned.counts["bytes"]
    divided = stage("divide", [divide], len(tasks), [cleaned.key, found.key, *losses.keys], size)
    both_splits(config, divided.counts)

    # A tokenizer, learnt from the train split alone or published; every shard through it.
    documents = divided.data / "documents"
    beside = beside_the_ids(config, cleaned.counts)
    made, encoded, *gaps = to_tokens(config, stage, divided, models, beside)

    # One index a split, a manifest over all: the corpus.
    stages = [cleaned, found, divided, made, encoded, *gaps]
    size = divided.counts["train_bytes"] + divided.counts["valid_bytes"]
    count: list[Block] = [Tally(documents, encoded.data, made.data / "tokenizer")]
    tallied = stage("tally", count, len(tasks), [divided.key, encoded.key], size)
    manifest = publish(config, out, stages, losses)
    counted = together(tallied.data, len(tasks))
    scores = sorted((cleaned.data / "scores").glob("*.npy"))
    with aside(out / "report.html") as file:
        limits = {name: bounds for name, bounds in vars(config.quality).items() if bounds}
        file.write(report.html(report.Facts(manifest, counted, out, scores, limits)).encode())
    remember(out, asked, [*stages[:4], tallied, *losses.stages, *before])
    say.line(report.flow(manifest))
    stages[2:2] = losses.stages
    stages[:0] = before
    say.line(report.speed({stage.name: stage.counts for stage in stages}))
    return manifest


def beside_the_ids(config: CorpusConfig, counts: "Counter[str]") -> Beside:
    """What is stored beside the token ids, given what was read."""
    sources = config.data.sources
    named, classes = fields.names_of(sources), fields.labels_of(sources, counts)
    return Beside(config.encode.boundaries, named, classes)


# ---- what a build must not do


@contextmanager
def only_builder(out: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it however this process ends."""
    with (out / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"another build is at work in {out}; wait for it or change data.out "
                "(另一个进程正在建此语料)"
            ) from None
        yield


def not_within_a_source(config: CorpusConfig, out: Path) -> None:
    """Refuse a corpus whose own files would be read as text."""
    for source in config.data.sources:
        if ingest.reaches(source, out):
            raise CorpusError(
                f"data.out '{config.data.out}' lies within source '{source.name}', which would read"
                " the corpus as its text; change data.out or the source's path (输出目录在来源之内)"
            )


def not_of_itself(config: CorpusConfig, out: Path, tasks: Sequence[Sequence[ingest.Part]]) -> None:
    """Refuse to read what the corpus puts in its folder, and would replace by less."""
    place = out.resolve()
    for number, folder in {(p.source, Path(p.path).parent) for task in tasks for p in task}:
        source = config.data.sources[number]
        if source.kind != "datasets" and folder.resolve().is_relative_to(place):
            raise CorpusError(
                f"source '{source.name}' reads files of data.out itself ({folder}), which the build"
                " would replace; give the new corpus a folder of its own (不能以语料自身为来源)"
            )


def unchanged_sources(config: CorpusConfig, files: list[list[Any]], cleaned: Stage) -> None:
    """Refuse what was read of sources that changed meanwhile: parts may overlap, or miss."""
    if ingest.plan(config.data)[1] != files:
        shutil.rmtree(cleaned.folder)
        raise CorpusError(
            "a file of data.sources changed while it was read; build again when nothing writes to "
            "it (来源在读取时被改动)"
        )


def something_left(counts: "Counter[str]") -> None:
    """Refuse an empty corpus, with the reasons that emptied it."""
    if counts["documents"]:
        return
    if not counts["read_documents"]:
        raise CorpusError("the sources hold no document; correct data.sources (来源中没有文档)")
    reasons = ", ".join(f"{n} {reason}" for reason, n in rejects(counts).items())
    raise CorpusError(
        f"no document is left of {counts['read_documents']}: {reasons}; loosen clean or correct "
        "data.sources (过滤后没有文档)"
    )


def both_splits(config: CorpusConfig, counts: "Counter[str]") -> None:
    """Refuse a split without documents."""
    asked = config.split.valid_fraction or config.split.valid_documents
    for split, needed in (("train", True), ("valid", bool(asked))):
        if needed and not counts[f"{split}_documents"]:
            others = sum(counts[f"{other}_documents"] for other in SPLITS)
            raise CorpusError(
                f"the {split} split is empty: all {others} documents fell on the other side; change"
                " split.valid_fraction or split.valid_documents (划分为空)"
            )


def limit_of_lots(
    config: CorpusConfig, found: Stage, tables: Sequence[Path], losses: Losses
) -> int:
    """The lot below which a document is held out, in [0, 2^64]."""
    wanted = config.split.valid_documents
    if wanted is None:
        return int((config.split.valid_fraction or 0.0) * (1 << 64))
    if losses.stages:
        gone = [path for paths in losses.gone.values() for path in paths]
        limit, distinct = dedup.limit_of_the_rest(tables, gone, config.split.seed, wanted)
    else:
        distinct = found.counts["distinct_documents"]
        drawn = [np.load(path) for path in sorted((found.data / "lots").glob("*.npy"))]
        limit = int(np.sort(np.concatenate(drawn))[:wanted][-1]) + 1 if wanted else 0
    if wanted >= distinct:
        raise CorpusError(
            f"split.valid_documents is {wanted}, but there are only {distinct} distinct documents; "
            "hold out fewer (验证集过大)"
        )
    return limit
