"""How fast a corpus is built, and in how much memory: MB/s of one core and peak RSS of each block.

    python benchmarks/corpus.py TEXT.jsonl.zst --workers 2 --kind cpm --vocab 30000 [--json]
    python benchmarks/corpus.py TEXT.jsonl.zst --ratio 2      one worker against two, stage by stage

A MB is 10^6 bytes of UTF-8 text; a core second is processor time of the workers. The memory is that
of the largest process of a block. The corpus is built in a temporary folder, or in --out.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs.corpus import CorpusConfig
from configs.load import from_dict
from data_pipeline import blocks, build, report


def measure(config: CorpusConfig) -> dict[str, Any]:
    """Build, and gather what blocks.run() returned for each stage."""
    counted: dict[str, Counter[str]] = {}
    walls: dict[str, tuple[int, float]] = {}
    run = build.run

    def listening(out: Path, name: str, *rest: Any) -> blocks.Stage:
        began = time.perf_counter()
        stage = run(out, name, *rest)
        walls[name] = stage.tasks, time.perf_counter() - began
        counted[name] = stage.counts
        return stage

    build.run = listening  # type: ignore[assignment]
    started = time.perf_counter()
    manifest = build.build(config)
    elapsed = time.perf_counter() - started
    build.run = run
    text_mb = manifest["read"]["bytes"] / 1e6
    cpu = sum(counts["cpu_s"] for counts in counted.values())
    return {
        "text_mb": text_mb,
        "documents": manifest["read"]["documents"],
        "workers": config.data.workers,
        "elapsed_s": elapsed,
        "mb_per_s": text_mb / elapsed,
        "core_s": cpu,
        "mb_per_core_s": text_mb / cpu,
        "peak_rss_mb": max(counts["peak_rss_mb"] for counts in counted.values()),
        "blocks": report.figures(counted),
        "walls": walls,
    }


def compare(pages: list[CorpusConfig]) -> list[tuple[str, ...]]:
    """Wall times of one worker and of several, of each stage and of all; and how many times faster
    the several could be at best (Amdahl): stages of one task and what is done between the stages,
    which the driver does alone, take as long with any number of them."""
    one, more = (measure(page) for page in pages)
    workers = pages[1].data.workers
    rows = [
        ("stage", "tasks", "1 worker, s", f"{workers} workers, s", "times", "core s, 1 and more")
    ]
    alone = shared = 0.0
    for name, (tasks, wall) in one["walls"].items():
        other = more["walls"][name][1]
        cores = f"{one['blocks'][name]['core_s']:.1f} {more['blocks'][name]['core_s']:.1f}"
        rows.append((name, str(tasks), f"{wall:.2f}", f"{other:.2f}", f"{wall / other:.2f}", cores))
        # The fullest worker does this many of the tasks; they are of about the same size.
        core = one["blocks"][name]["core_s"]  # the machine's other work is not in it
        alone, shared = alone + core, shared + core * -(-tasks // workers) / tasks
    rest = [
        run["elapsed_s"] - sum(wall for _, wall in run["walls"].values()) for run in (one, more)
    ]
    rows.append(("between", "", f"{rest[0]:.2f}", f"{rest[1]:.2f}", f"{rest[0] / rest[1]:.2f}", ""))
    both = one["elapsed_s"], more["elapsed_s"]
    rows.append(("all", "", f"{both[0]:.2f}", f"{both[1]:.2f}", f"{both[0] / both[1]:.2f}", ""))
    at_best = (alone + rest[1]) / (shared + rest[1])
    rows.append(("at best", "", "", "", f"{at_best:.2f}", ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", help="a jsonl file, plain, .gz or .zst")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ratio", type=int, help="so many workers against one")
    parser.add_argument("--task-mb", type=int, default=64)
    parser.add_argument("--kind", default="cpm", choices=["cpm", "byte_bpe"])
    parser.add_argument("--vocab", type=int, default=30_000)
    parser.add_argument("--sample-bytes", type=int, default=20_000_000)
    parser.add_argument("--out", help="keep the corpus in this folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data: dict[str, Any] = {
            "data": {
                "out": args.out or f"{folder}/corpus",
                "sources": [{"kind": "jsonl", "name": "text", "path": args.text}],
                "workers": args.workers,
                "task_mb": args.task_mb,
            },
            "split": {"valid_documents": 1000},
            "tokenizer": {
                "kind": args.kind,
                "vocab_size": args.vocab,
                "sample_bytes": args.sample_bytes,
            },
        }
        if args.ratio:
            pages = []
            for workers in (1, args.ratio):
                part = {"out": f"{args.out or folder}/{workers}", "workers": workers}
                pages.append(from_dict(CorpusConfig, {**data, "data": data["data"] | part}))
            print(report.aligned(compare(pages)))
            return
        result = measure(from_dict(CorpusConfig, data))
    if args.json:
        print(json.dumps(result, indent=1))
        return
    rows = [("block", "MB", "MB/s per core", "core s", "peak RSS MB")]
    for name, block in [*result["blocks"].items(), ("all", {**result, "mb": result["text_mb"]})]:
        rows.append(
            (
                name,
                f"{block['mb']:.1f}",
                f"{block['mb_per_core_s']:.1f}" if block["mb"] else "",
                f"{block['core_s']:.1f}",
                f"{block['peak_rss_mb']:.0f}",
            )
        )
    print(report.aligned(rows))
    print(
        f"{result['documents']:,} documents, {result['text_mb']:.1f} MB, {args.workers} workers: "
        f"{result['elapsed_s']:.1f} s, {result['mb_per_s']:.1f} MB/s"
    )


if __name__ == "__main__":
    main()
