"""What a checkpoint every 20 steps costs the training, beside the same run without one.

    python benchmarks/saving.py [--rounds 3] [--hidden 384] [--layers 6] [--rows 8] [--tokens 256]

Two processes train the same model by turns with and without saves, in one warm world. Two numbers:
the wall time of a step (from the first to the last, saves between them) and the processor seconds
of all threads, which a busy machine disturbs less: where training keeps every core busy, what the
writing thread takes is what the training loses. The peer is ourselves without saves: a number that
nobody else's framework can flatter. `at once` waits for every write, as most frameworks do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EVERY, STEPS = 20, 62
WAYS = ("no saves", "behind", "at once")


def corpus(folder: Path) -> Path:
    """A small corpus out of the shipped sample."""
    from configs.corpus import CorpusConfig
    from configs.load import from_dict
    from data_pipeline.build import build

    sample = ROOT / "data_pipeline" / "sample" / "sample.jsonl"
    config = {
        "data": {
            "out": str(folder / "corpus"),
            "sources": [{"kind": "jsonl", "name": "sample", "path": str(sample)}],
            "workers": 1,
        },
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 2000},
    }
    build(from_dict(CorpusConfig, config))
    return folder / "corpus"


def page(run: Path, data: Path, args: argparse.Namespace, way: str) -> dict[str, Any]:
    """The run's page."""
    model = {
        "family": "cpm",
        "vocab": 8000,
        "hidden": args.hidden,
        "layers": args.layers,
        "heads": args.hidden // 64,
        "head_dim": 64,
        "ffn": 4 * args.hidden,
        "positions": args.tokens,
    }
    return {
        "model": model,
        "data": {"train": [{"corpus": str(data)}], "seq_len": args.tokens},
        "batch": {"samples": args.rows, "micro": args.rows // 2},
        "optimizer": {"lr": 1e-4},
        "precision": "bf16",
        "run": {
            "out": str(run),
            "steps": STEPS,
            "log_every_steps": STEPS,
            "validate_samples": 2,
            "save_every_steps": 0 if way == "no saves" else EVERY,
            "keep_checkpoints": 1,
        },
    }


def measured(config: dict[str, Any], at_once: bool) -> tuple[float, float]:
    """In a rank: (wall, processor) seconds of a step between the first step and the last."""
    from unittest import mock

    from configs.load import from_dict
    from configs.run import RunConfig
    from pretrain.checkpoint import Saver
    from pretrain.engine import Engine
    from pretrain.train import train

    honest, save, at = Engine.train_step, Saver.save, []

    def step(self: Engine, *arguments: Any, **keywords: Any) -> Any:
        at.append((time.perf_counter(), time.process_time()))
        return honest(self, *arguments, **keywords)

    def saved(self: Saver, *arguments: Any, **keywords: Any) -> Any:
        path = save(self, *arguments, **keywords)
        if at_once:
            self.wait()
        return path

    with mock.patch.object(Engine, "train_step", step), mock.patch.object(Saver, "save", saved):
        train(from_dict(RunConfig, config))
    first, last = at[1], at[-1]
    return (last[0] - first[0]) / (len(at) - 2), (last[1] - first[1]) / (len(at) - 2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rounds", 3), ("hidden", 384), ("layers", 6), ("rows", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    from tests.worlds import World

    folder = Path(tempfile.mkdtemp(prefix="saving-"))
    world = World(2)
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    size = 0
    try:
        data = corpus(folder)
        for _ in range(args.rounds):
            for way in WAYS:
                run = folder / "run"
                config = page(run, data, args, way)
                ranks = world.run(
                    "benchmarks.saving:measured",
                    timeout_s=3600,
                    config=config,
                    at_once=way == "at once",
                )
                wall[way].append(max(w for w, _ in ranks))
                cpu[way].append(sum(c for _, c in ranks))
                size = sum(p.stat().st_size for p in run.glob("checkpoints/*/*.safetensors"))
                shutil.rmtree(run)
    finally:
        world.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"a checkpoint of {size / 1e6:,.0f} MB every {EVERY} steps, minimum of {args.rounds}")
    print(f"{'':10} {'ms a step':>10} {'ratio':>7} {'cpu ms':>8} {'ratio':>7}")
    base, work = min(wall["no saves"]), min(cpu["no saves"])
    for way in WAYS:
        w, c = min(wall[way]), min(cpu[way])
        print(f"{way:10} {1e3 * w:10,.1f} {w / base:7.3f} {1e3 * c:8,.1f} {c / work:7.3f}")


if __name__ == "__main__":
    main()
