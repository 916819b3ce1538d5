"""How fast a corpus is built, and in how much memory: MB/s of one core and peak RSS of each block.

    python benchmarks/corpus.py TEXT.jsonl.zst --workers 2 --kind cpm --vocab 30000 [--json]

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
    run = build.run

    def listening(out: Path, name: str, *rest: Any) -> blocks.Stage:
        stage = run(out, name, *rest)
        counted[name] = stage.counts
        return stage

    build.run = listening  # type: ignore[assignment]
    started = time.perf_counter()
    manifest = build.build(config)
    elapsed = time.perf_counter() - started
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
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", help="a jsonl file, plain, .gz or .zst")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kind", default="cpm", choices=["cpm", "byte_bpe"])
    parser.add_argument("--vocab", type=int, default=30_000)
    parser.add_argument("--sample-bytes", type=int, default=20_000_000)
    parser.add_argument("--out", help="keep the corpus in this folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = {
            "data": {
                "out": args.out or f"{folder}/corpus",
                "sources": [{"kind": "jsonl", "name": "text", "path": args.text}],
                "workers": args.workers,
            },
            "split": {"valid_documents": 1000},
            "tokenizer": {
                "kind": args.kind,
                "vocab_size": args.vocab,
                "sample_bytes": args.sample_bytes,
            },
        }
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
