"""What cannot be read: put aside, counted, and shown; or the end of the build.

    fault --bad_lines: stop--> one sentence, with file, line and byte
          --bad_lines: reject--> rejects/unreadable:KIND, counted like any refused document
                |  the first 1,000 records of a part have none of the fields that are asked for, or
                |  nothing of a source can be read: the config is wrong, and the build stops
                v
          the next record is read

`reject` is what a build does unless it is told otherwise: of a terabyte some lines are broken, and
a day of work must not end at one of them; nor is anything lost in silence, since each fault is a
line of the report and lies there to be looked at. What is no fault of the data stops a build in
either case: a file that is gone, a disk that fails.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.sources import Source
from data_pipeline import ingest
from data_pipeline.blocks import Stage
from data_pipeline.ingest import Fault, Faults
from data_pipeline.shards import CorpusError, Record, records

WITHOUT_FIELDS = ("no_text", "no_label", "broken_row")
RECORDS_WITHOUT_FIELDS = 1000
NAMED = 3  # kinds of faults in a sentence


def faults_of(
    source: Source, counts: "Counter[str]", put_aside: Callable[[str, Record], None]
) -> Faults:
    """What the faults of one part are handed to; `put_aside` takes a reason and a record."""
    if source.bad_lines == "stop":
        return ingest.stop
    first: list[Fault] = []
    faults = 0

    def aside(fault: Fault) -> None:
        nonlocal faults
        faults += 1
        first.append(fault) if not first else None
        name = Path(fault.path).name  # no path: a corpus moved elsewhere is the same corpus
        reason = f"unreadable:{fault.kind}"
        record = {
            "id": f"{source.name}/{name}, {fault.place}",
            "source": source.name,
            "why": fault.sentence.replace(fault.path, name),
            "text": fault.excerpt,
        }
        counts[f"read/{source.name}"] += fault.records
        counts["read_documents"] += fault.records
        counts["read_characters"] += len(fault.excerpt)
        counts[f"unread/{source.name}"] += fault.records
        counts[f"unreadable/{source.name}/{fault.kind}"] += fault.records
        counts[f"rejected/{reason}"] += fault.records
        counts[f"rejected_characters/{reason}"] += len(fault.excerpt)
        put_aside(reason, record)
        many = faults == RECORDS_WITHOUT_FIELDS
        if many and fault.kind in WITHOUT_FIELDS and _all(counts, source):
            raise CorpusError(
                f"{first[0].sentence}; nor can one of the {faults - 1} records after it be used: "
                "this is no damage, correct the fields of the source (来源的字段名有误)"
            )

    return aside


def _all(counts: "Counter[str]", source: Source) -> bool:
    return counts[f"unread/{source.name}"] == counts[f"read/{source.name}"]


def unread(sources: Sequence[Source], cleaned: Stage) -> str:
    """For the terminal: what could not be read, or nothing. CorpusError, with its first fault, for
    a source of which nothing could be read."""
    counts, lines = cleaned.counts, []
    for source in sources:
        kinds = of_source(counts, source.name)
        if kinds and _all(counts, source):
            first = _first(cleaned.folder / "data" / "rejects", kinds, source.name)
            raise CorpusError(
                f"source '{source.name}': nothing of it could be read, "
                f"{', '.join(f'{n:,} {kind}' for kind, n in kinds.items())}; the first: {first}; "
                "mend it or take it out of data.sources (来源无法读取)"
            )
        if kinds:
            shown = [f"{n:,} {kind}" for kind, n in list(kinds.items())[:NAMED]]
            shown += ["..."] if len(kinds) > NAMED else []
            lines.append(
                f"source '{source.name}': {sum(kinds.values()):,} of "
                f"{counts[f'read/{source.name}']:,} records could not be read ("
                f"{', '.join(shown)}), see rejects/unreadable:* (无法读取的记录)"
            )
        if met := _family(counts, f"met/{source.name}/"):
            shown = [f"{n:,} {what}" for what, n in met.items()]
            lines.append(f"source '{source.name}': {', '.join(shown)} (已转换或略去)")
    return "\n".join(lines)


def told(counts: "Counter[str]", name: str) -> dict[str, dict[str, int]]:
    """For the manifest: faults of a source by kind; what it met on its way, such as records in
    gb18030. Nothing for a source that had none."""
    found = {"unreadable": of_source(counts, name), "met": _family(counts, f"met/{name}/")}
    return {what: numbers for what, numbers in found.items() if numbers}


def _first(rejects: Path, kinds: dict[str, int], name: str) -> str:
    for kind in kinds:
        for path in sorted((rejects / f"unreadable:{kind}").glob("*.jsonl.zst")):
            for record in records(path):
                if record["source"] == name:
                    return str(record["why"])
    return "it is not known"


def of_source(counts: "Counter[str]", name: str) -> dict[str, int]:
    """Faults of a source by kind, the most frequent first."""
    return _family(counts, f"unreadable/{name}/")


def _leads(lead: str, key: str) -> bool:
    return key.rpartition("/")[0] + "/" == lead


def _family(counts: "Counter[str]", lead: str) -> dict[str, int]:
    # A source may be called a/b: only the last part of a key is the kind.
    found = {key.rpartition("/")[2]: n for key, n in counts.items() if n and _leads(lead, key)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
