"""From sources to kept documents: read -> clean -> store; the refused go to rejects/REASON/."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from configs.cleaning import Cleaning
from configs.sources import Source
from data_pipeline import clean, fields, hanzi, ingest, names, repeated_ids, scores, unreadable
from data_pipeline.blocks import Block, Document, Documents
from data_pipeline.shards import PASSING_LEVEL, Record, save_table, shard

BATCH_CHARACTERS = 10_000
LEAST_SIZE = 100
"""What a document counts as beside its characters: a million empty ones are no single batch."""
COLUMNS = "columns of scores"
"""What Clean hands to Store in a document's fields: a name that no field of a source has."""


class Read(Block):
    """The documents of a task's parts of the sources."""

    name = "read"
    modules: ClassVar = (*ingest.MODULES, "fields", "intake", "repeated_ids", "unreadable")

    def __init__(self, sources: tuple[Source, ...], tasks: list[tuple[ingest.Part, ...]]) -> None:
        guests = {"versions": of} if (of := ingest.versions(sources)) else {}
        where = [[_where(part) for part in task] for task in tasks]
        super().__init__(sources=sources, tasks=where, **guests)
        self.sources, self.tasks = sources, tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield documents; what cannot be read goes to rejects/unreadable:KIND/, or stops."""
        done, ids = 0.0, repeated_ids.Ids()
        with Rejects(self.folder / "data" / "rejects", rank) as rejects:
            for part in self.tasks[rank]:
                source, meter = self.sources[part.source], ingest.Meter()
                faults = unreadable.faults_of(source, self.counts, rejects.add)
                for document in ingest.read(source, part, meter, faults):
                    self.counts[f"read/{source.name}"] += 1
                    self.counts["read_documents"] += 1
                    if document.own_id:
                        ids.add(part.source, document.id)
                    if source.label_field:
                        label = fields.label_text(document.fields["label"])
                        self.counts[f"{fields.FAMILY}/{label}"] += 1
                    self.counts["read_characters"] += len(document.text)
                    size = len(document.text.encode())
                    self.counts["read_bytes"] += size
                    self.counts["worked_bytes"] += size
                    self.tick(done + meter.share * part.weight, rank)
                    yield Document(document.text, document.id, metadata=document.fields)
                for what, number in meter.met.items():
                    self.counts[f"met/{source.name}/{what}"] += number
                done += part.weight
        ids.save(self.folder / "data" / "read_ids" / f"{rank:05d}.npy")
        self.counts["read_ids"] += len(ids)
        self.tick(done, rank, final=True)


def _where(part: ingest.Part) -> list[Any]:
    """A part without its folder: a corpus moved elsewhere is the same corpus."""
    return [part.source, part.name, part.number, part.of]


def _batches(documents: Documents) -> Iterator[list[Document]]:
    """Some documents at a time, a long one alone."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and size + len(document.text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text) + LEAST_SIZE
    if batch:
        yield batch


class Clean(Block):
    """Normalised documents that pass the filters; the others go to rejects/REASON/."""

    name = "clean"
    modules: ClassVar = (*clean.MODULES, "fields", "scores", "intake")

    def __init__(self, rules: Cleaning) -> None:
        super().__init__(rules=rules, characters=hanzi.version())
        self.rules = rules

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield what is kept."""
        with Rejects(self.folder / "data" / "rejects", rank) as rejects:
            for batch in _batches(data):
                yield from self._kept(batch, rejects)

    def _kept(self, batch: list[Document], rejects: "Rejects") -> Documents:
        """What is kept of some documents; all that kernels do is done for them as one."""
        kept: list[tuple[Document, clean.Page]] = []
        for document, prepared in self._prepared(batch):
            if isinstance(prepared, str):
                self._refuse(prepared, document, rejects)
                continue
            page, spans = prepared
            verdict = clean.judge(page, self.rules)
            for what, number in page.changed.items():
                if "/" not in what:
                    self.counts[f"changed/{what}"] += number
                elif verdict is True:  # script/NAME
                    self.counts[what] += number
            if isinstance(verdict, tuple):
                self._refuse(verdict[1], document, rejects)
                continue
            document.text = page.text
            if spans:
                document.metadata["spans"] = spans
            kept.append((document, page))
        pages = [page for _, page in kept]
        rows, digests = scores.table(pages), clean.digests(pages)
        for (document, _), row, digest in zip(kept, rows, digests, strict=True):
            document.metadata["digest"] = digest
            document.metadata[COLUMNS] = row
            if self.rules.scores_in_records:
                document.metadata["scores"] = scores.as_fields(row)
            yield document

    def _prepared(
        self, batch: list[Document]
    ) -> Iterator[tuple[Document, str | tuple[clean.Page, fields.Spans]]]:
        """Each document with its page and spans, or the reason why it has none."""
        # Normalising takes 15 times a text's bytes: no worker should die of a dump.
        most = 2 * self.rules.max_characters
        plain = [d for d in batch if len(d.text) <= most and not d.metadata.get("spans")]
        pages = iter(clean.prepared_all([document.text for document in plain], self.rules))
        for document in batch:
            if len(document.text) > most:
                yield document, "too_long"
            elif spans := document.metadata.get("spans"):
                texts = [document.text[start:stop] for _, start, stop in spans]
                page, spans = fields.joined(spans, clean.prepared_all(texts, self.rules))
                yield document, "empty_field" if page is None else (page, spans)
            else:
                yield document, (next(pages), [])

    def _refuse(self, reason: str, document: Document, rejects: "Rejects") -> None:
        self.counts[f"rejected/{reason}"] += 1
        self.counts[f"rejected_characters/{reason}"] += len(document.text)
        rejects.add(reason, _record(document))


class Store(Block):
    """Documents into the task's shard, their hashes and scores into its tables."""

    name = "store"
    modules: ClassVar = ("intake", "names", "scores")

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield nothing: this is where the documents end."""
        digests, rows, ids = [], [], []
        path = self.folder / "data" / "documents" / f"{rank:05d}.jsonl.zst"
        with shard(path, PASSING_LEVEL) as add:
            for document in data:
                digests.append(document.metadata.pop("digest"))
                rows.append(document.metadata.pop(COLUMNS))
                ids.append(document.id)
                self.counts["documents"] += 1
                self.counts["characters"] += len(document.text)
                self.counts["bytes"] += len(document.text.encode())
                add(_record(document))
        save_table(self.folder / "data" / "hashes" / f"{rank:05d}.npy", digests)
        names.keep(self.folder / "data" / "ids", rank, ids)
        scores.store(self.folder / "data", rank, rows)
        yield from ()


def _record(document: Document) -> Record:
    return {"id": document.id, **document.metadata, "text": document.text}


class Rejects:
    """rejects/REASON/TASK.jsonl.zst, each opened when it is first needed."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.shards: dict[str, Callable[[Record], None]] = {}

    def __enter__(self) -> "Rejects":
        self.stack = contextlib.ExitStack().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def add(self, reason: str, record: Record) -> None:
        """Put a document aside."""
        if reason not in self.shards:
            path = self.folder / reason / f"{self.rank:05d}.jsonl.zst"
            self.shards[reason] = self.stack.enter_context(shard(path))
        self.shards[reason](record)
