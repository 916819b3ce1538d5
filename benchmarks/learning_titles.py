"""Titles of papers: what fine-tuned runs write, beside what needs no model.

    python -m benchmarks.learning_titles TITLES.tsv RUN [RUN ...] [--samples 500]

Each run is measured as `launch evaluate RUN --task csl --data TITLES.tsv` does, greedily. Beside
them: the head of the abstract, as many characters as a title has on average, and its first clause.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain import tasks

TITLE_CHARACTERS = 18


def head(sources: Sequence[str]) -> list[str]:
    """The first characters of each abstract."""
    return [source[:TITLE_CHARACTERS] for source in sources]


def clause(sources: Sequence[str]) -> list[str]:
    """Each abstract up to its first punctuation."""
    return [re.split(r"[,.;:，。；：]", source, maxsplit=1)[0] for source in sources]


def writer(run: Path) -> Callable[[Sequence[str]], list[str]]:
    """What the newest checkpoint of a run writes."""
    model, tokenizer = tasks.opened(run)
    return lambda sources: tasks.written(model, tokenizer, sources, 1, "csl")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("titles", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--samples", type=int, help="papers; default: all")
    parser.add_argument("--json", type=Path, help="write the table there too")
    words = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    plain: dict[str, Callable[[Sequence[str]], list[str]]]
    plain = {"head of the abstract": head, "first clause": clause}
    for name in [*plain, *map(str, words.runs)]:
        writes = plain[name] if name in plain else writer(Path(name))
        found[name] = tasks.titles(words.titles, words.samples, writes)
        outputs = found[name].pop("outputs")
        if len(found) == 1:
            print(f"{'':28}" + " ".join(f"{key:>10}" for key in found[name]))
        cells = (f"{v:10.2f}" if isinstance(v, float) else f"{v:10}" for v in found[name].values())
        print(f"{name:28}" + " ".join(cells) + f"   {outputs[0]!r}", flush=True)
    if words.json:
        words.json.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
