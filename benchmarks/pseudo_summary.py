"""How fast gap sentences are picked: documents a second of one process.

    python benchmarks/pseudo_summary.py TEXT.jsonl[.gz|.zst] [--characters 800] [--json]

Documents are cut to --characters characters, so that each is about one unit. The rivals do the same
greedy, one document a time, and their picks are compared with ours: pylcs, whose C++ table the
published code called (`pip install pylcs`), rapidfuzz' bits (`pip install rapidfuzz`), each if it
is installed, and the same table compiled here. They see the first --slow documents only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numba  # noqa: E402
import numpy as np  # noqa: E402
from tokenizer import read  # noqa: E402

from data_pipeline.pseudo_summary import pick_batch, segments, units  # noqa: E402

Lcs = Callable[[str, str], int]


@numba.njit
def _table(a, b):  # type: ignore[no-untyped-def]
    row = np.zeros(len(b) + 1, np.int32)
    for i in range(len(a)):
        before = 0
        for j in range(len(b)):
            above = row[j + 1]
            row[j + 1] = before + 1 if a[i] == b[j] else max(above, row[j])
            before = above
    return row[-1]


def by_table(a: str, b: str) -> int:
    """The plain table of subsequences, two rows of it, compiled."""
    return int(_table(*(np.frombuffer(t.encode("utf-32-le"), np.uint32) for t in (a, b))))


def greedy(unit: Sequence[str], lcs: Lcs) -> list[int]:
    """The published loop, with any function for the length of a subsequence."""
    source, target = list(range(len(unit))), list[int]()

    def text(numbers: Sequence[int]) -> str:
        return "".join(unit[i] for i in numbers)

    while True:
        found = [
            lcs(text([j for j in source if j != i]), text(sorted([*target, i]))) for i in source
        ]
        best = source[found.index(max(found))]
        source.remove(best)
        target = sorted([*target, best])
        rest = len(text(source))
        if len(source) == 1 or not rest or len(text(target)) / rest > 0.25:
            return source if rest < len(text(target)) else target


def rivals() -> dict[str, Lcs]:
    """Name -> length of the longest common subsequence, of what is installed."""
    found: dict[str, Lcs] = {"a plain table, compiled": by_table}
    for name, module, function in [
        ("pylcs", "pylcs", "lcs_sequence_length"),
        ("rapidfuzz", "rapidfuzz.distance.LCSseq", "similarity"),
    ]:
        try:
            found[name] = getattr(importlib.import_module(module), function)
        except ImportError:
            print(f"{name} is not installed: left out", file=sys.stderr)
    return found


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("texts", type=Path, help="a jsonl file with a `text` in each line")
    parser.add_argument("--characters", type=int, default=800, help="of a document")
    parser.add_argument("--documents", type=int, default=2000, help="how many we do")
    parser.add_argument("--slow", type=int, default=100, help="how many the rivals do")
    parser.add_argument("--every", type=int, default=1, help="read one document of so many")
    parser.add_argument("--rounds", type=int, default=3, help="turns; the best counts")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    said = parser.parse_args()
    drawn = [
        text[: said.characters]
        for text in read(said.texts, said.documents * said.characters * 3e-6 * 4, said.every)
        if len(text) >= said.characters
    ]
    random.Random(0).shuffle(drawn)
    texts = drawn[: said.documents]
    few = texts[: said.slow]
    if not few:
        sys.exit(f"{said.texts}: no document of {said.characters} characters; lower --characters")
    pick_batch(few), pick_batch(few, "rouge1"), by_table("一", "一")  # compiled before the clock

    ours = {
        "lcs": lambda: pick_batch(texts),
        "rouge1": lambda: pick_batch(texts, "rouge1"),
        "segments and units alone": lambda: [units(segments(text)) for text in texts],
    }
    best = {
        name: min(seconds(work) for _ in range(said.rounds)) / len(texts)
        for name, work in ours.items()
    }
    picked = [[unit.picks for unit in found] for found in pick_batch(few)]
    cut = [units(segments(text)) for text in few]
    for name, lcs in rivals().items():
        theirs: list[list[list[int]]] = []
        best[name] = seconds(
            lambda lcs=lcs, theirs=theirs: theirs.extend(  # type: ignore[misc]
                [[greedy(unit, lcs) for unit in found] for found in cut]
            )
        ) / len(few)
        if theirs != picked:
            sys.exit(f"{name} picks other sentences than we do")
    report = {
        "documents": len(texts),
        "rivals_documents": len(few),
        "characters": sum(map(len, texts)) / len(texts),
        "documents_per_s": {name: 1 / s for name, s in best.items()},
        "times_as_fast_as": {name: best[name] / best["lcs"] for name in rivals_of(best, ours)},
    }
    if said.json:
        print(json.dumps(report))
        return
    print(
        f"{len(texts)} documents of {report['characters']:.0f} characters, the best of "
        f"{said.rounds} rounds; rivals on {len(few)} of them, with the same picks"
    )
    for name, s in best.items():
        ratio = f"   ours is {s / best['lcs']:6.1f} times as fast" if name not in ours else ""
        print(f"{name:28} {1 / s:10.1f} documents/s {s * 1e3:8.3f} ms each{ratio}")


def rivals_of(best: dict[str, float], ours: dict[str, Callable[[], object]]) -> list[str]:
    """The rows that are not ours."""
    return [name for name in best if name not in ours]


if __name__ == "__main__":
    main()
