"""The development corpus, where it is at hand: a few documents of each genre."""

from __future__ import annotations

import io
import json
import os
import random
from collections import defaultdict
from pathlib import Path

import pytest
import zstandard

RARE = ('"dialogue"', '"encyclopedia"', '"textbook"', '"how-to"', '"tech-encyclopedia"')


def folder() -> Path:
    """The folder named by BAJIE_DEV_DATA; skips the test without it."""
    name = os.environ.get("BAJIE_DEV_DATA")
    if not name:
        pytest.skip("BAJIE_DEV_DATA is not set: the development corpus is not at hand")
    return Path(name)


def documents(per_genre: int, longest: int, seed: int) -> dict[str, list[str]]:
    """Genre -> `per_genre` texts of at most `longest` characters, drawn from the whole corpus."""
    drawn: dict[str, list[str]] = defaultdict(list)
    draw = random.Random(seed)
    with (folder() / "data" / "dev-open.jsonl.zst").open("rb") as packed:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(packed)
        for seen, line in enumerate(io.TextIOWrapper(reader, encoding="utf-8")):
            if seen % 5 and not any(genre in line[:300] for genre in RARE):
                continue
            document = json.loads(line)
            at = draw.randrange(max(1, len(document["text"]) - longest))
            text, texts = document["text"][at : at + longest], drawn[document["genre"]]
            if len(texts) < per_genre:
                texts.append(text)
            elif draw.random() < 0.05:
                texts[draw.randrange(per_genre)] = text
    return drawn
