"""Documents with named fields and labels, between their source and their tokens.

    {"a": "北京 ", "b": "首都", "label": 1}
       |  ingest: text "北京 \\n首都", spans [["a", 0, 3], ["b", 4, 6]], label 1
       |  Read: counts label/1
       |  Clean: each field on its own, "北京\\n首都", spans [["a", 0, 2], ["b", 3, 5]]
       v  Encode: .fields: a is tokens [0, 1), b is [1, 2); label 1 of the table ("0", "1")

The table of labels is that of all documents that were read, so that every shard and both splits
have the same one, whoever reads which shard.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from configs.sources import Source
from data_pipeline import clean
from data_pipeline.shards import CorpusError

FAMILY = "label"  # of the keys of counts
MOST_LABELS, MOST_NAMES = 10_000, 256

Spans = list[list[Any]]
"""[[name, start, stop], ...] in characters of the text."""


def joined(spans: Spans, pages: Sequence[clean.Page]) -> tuple[clean.Page | None, Spans]:
    """The normalised fields as one normalised page, and where they lie in it.

    An empty member of a group (several fields of one name) goes; None if nothing is left of a name.
    """
    names = [name for name, _, _ in spans]
    kept = [(name, page.text) for name, page in zip(names, pages, strict=True) if page.text]
    if {*names} != {name for name, _ in kept}:
        return None, []
    found: Spans = []
    start = 0
    for name, text in kept:
        found.append([name, start, start + len(text)])
        start += len(text) + 1
    whole = clean.normalise("\n".join(text for _, text in kept))
    assert len(whole.text) == start - 1, "what is normalised twice stays as it is"
    return whole._replace(changed=sum((page.changed for page in pages), Counter())), found


def names_of(sources: Sequence[Source]) -> tuple[str, ...]:
    """The names of the fields of all sources, in their order. CorpusError if there are too many."""
    names = tuple(dict.fromkeys(name for source in sources for name, _ in source.columns))
    if len(names) > MOST_NAMES:
        raise CorpusError(
            f"the sources have {len(names)} names of fields, at most {MOST_NAMES} can be stored; "
            "shorten data.sources.fields (字段名过多)"
        )
    return names


def label_text(label: Any) -> str:
    """How a label is written down: 1, 0.5, true, or the text itself."""
    return label if isinstance(label, str) else orjson.dumps(label).decode()


def labels_of(sources: Sequence[Source], counts: "Counter[str]") -> tuple[str, ...]:
    """The table of the labels in `counts`, none without a label_field. CorpusError if they are no
    classes."""
    if not any(source.label_field for source in sources):
        return ()
    found = [key.partition("/")[2] for key in counts if key.startswith(f"{FAMILY}/")]
    if len(found) > MOST_LABELS:
        raise CorpusError(
            f"the documents have {len(found)} different labels, at most {MOST_LABELS} can be "
            "classes; correct label_field of the sources (标签种类过多)"
        )
    return table(found)


def table(found: Iterable[str]) -> tuple[str, ...]:
    """Labels in the order of their numbers: whole numbers first, by value; the others by text."""
    labels = {*found}
    whole = {text for text in labels if text.removeprefix("-").isdecimal()}
    return (*sorted(whole, key=lambda text: (int(text), text)), *sorted(labels - whole))
