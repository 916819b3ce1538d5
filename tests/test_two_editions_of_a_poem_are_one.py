"""A poem that stands in two editions, in other characters and punctuation, is one document: the
Tang poems of the development corpus (`poet.tang` and the imperial edition 御定全唐詩)."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from data_pipeline import clean
from tests import dev_corpus
from tests.test_corpus_near_duplicates import find

TANG, IMPERIAL = "/全唐诗/poet.tang", "/御定全唐詩/"


def documents() -> Iterator[tuple[str, clean.Page]]:
    """(path, page) of the poems of both editions."""
    with (dev_corpus.folder() / "data" / "dev-open.jsonl.zst").open("rb") as packed:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
        for line in io.TextIOWrapper(reader, encoding="utf-8"):
            document = json.loads(line)
            if TANG in document["path"] or IMPERIAL in document["path"]:
                yield document["path"], clean.normalise(document["text"])


def body(page: clean.Page) -> bytes | None:
    """A poem without its title and author; None for a fragment."""
    text = "".join(page.text.split("\n")[2:])
    return clean.digest(clean.normalise(text)) if len(text) >= 10 else None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tang_poems_of_two_editions_are_found(tmp_path: Path) -> None:
    """Those that are equal but for script and punctuation all; of those with the same verses under
    another title or author, which may be half of a short poem, nine of ten."""
    poems = list(documents())
    tang = [page for path, page in poems if TANG in path]
    imperial = [page for path, page in poems if TANG not in path]
    known = {clean.digest(page) for page in tang}
    equal = sum(clean.digest(page) in known for page in imperial)
    texts = {page.text for page in tang}
    as_written = sum(page.text in texts for page in imperial)
    rest = [page for page in imperial if clean.digest(page) not in known]
    joined = find(tmp_path, [[page.text for page in tang], [page.text for page in rest]])
    near = {two - len(tang) for one, two in joined if one < len(tang) <= two}
    verses = {body(page) for page in tang} - {None}
    same = [row for row, page in enumerate(rest) if body(page) in verses]
    found = sum(row in near for row in same) / len(same)
    print(
        f"\n{len(tang)} and {len(imperial)} poems: {equal} equal ({as_written} as written), "
        f"{len(near)} more nearly; of {len(same)} with the same verses under another title "
        f"or author {found:.3f}"
    )
    assert equal > 18_900 > 5 * as_written, "the editions differ in script and punctuation"
    assert found > 0.9
