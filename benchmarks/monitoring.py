"""What looking at a run costs it: steps by turns with and without, in one process and one run.

    python benchmarks/monitoring.py [--rounds 8] [--hidden 256] [--layers 4] [--rows 4]

The same engine makes blocks of ten steps by turns, of a mixture of two corpora:

    bare       no row says whose it is, nothing is measured, no waits or memory are asked for
    watched    as every run: the loss by corpus, waits, memory, read and written every ten steps
    measured   the same, and every update is measured by part (a run does every 100th)

Processor seconds of all threads, which a busy machine disturbs less than the clock does; the median
over rounds of the ratio to the bare block beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

WAYS, STEPS = ("bare", "watched", "measured"), 10


def measured(config: dict[str, Any], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """In a rank: (wall, processor) seconds of each block of steps, by way."""
    import torch

    from configs.load import from_dict
    from configs.run import RunConfig
    from pretrain import models, objectives, parallel, plan
    from pretrain.corpora import open_corpora
    from pretrain.engine import Engine
    from pretrain.monitor import Monitor, Terminal, speed
    from pretrain.state import fresh

    page = from_dict(RunConfig, config)
    mesh = parallel.make_mesh(1)
    corpora = open_corpora(page.data, page.objective, page.run.seed, page.model.vocab)
    with torch.device("meta"):
        model = models.build(page.model)
    engine = Engine(
        model, page.model, mesh, objective=objectives.build(page.objective),
        optimizer=page.optimizer, precision=page.precision, zero=1, micro_rows=page.batch.micro,
        sources=len(corpora.train),
    )  # fmt: skip
    engine.load(fresh(page.model, 1))
    monitor = Monitor(
        Path(page.run.out), Terminal(enabled=False), writes=True, total_steps=10**6,
        speed=speed(mesh.device, 1, page.precision),
    )  # fmt: skip
    monitor.watch(page.model, plan.row_of(page), corpora.sources)
    monitor.begin(0)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    count, step = page.batch.samples or 1, 0

    def block(way: str) -> tuple[float, float]:
        nonlocal step
        read = [corpora.step(n * count, count, 0, 1, page.batch.micro) for n in range(STEPS)]
        if way == "bare":
            read = [([replace(b, sources_B=None) for b in batches], f) for batches, f in read]
        began = time.perf_counter(), time.process_time()
        for batches, firsts in read:
            done = engine.train_step(
                batches, lr=1e-4, step=step, first_samples=firsts, measure=way == "measured"
            )
            step += 1
            told = {"step": step, "lr": 1e-4, "tokens": step, "samples": step, "stage": 0}
            waits = {} if way == "bare" else {"loader_wait_s": 0.0}
            monitor.record(told | waits | {"step_tokens": 1}, done)
        if way == "bare":
            with (
                mock.patch("pretrain.monitor.memory", lambda device: (0.0, 0.0)),
                mock.patch("pretrain.monitor.worst", lambda values, device: list(values)),
            ):
                monitor.flush()
        else:
            monitor.flush()
        return time.perf_counter() - began[0], time.process_time() - began[1]

    block("bare"), block("measured")
    for turn in range(rounds):
        for way in WAYS if turn % 2 else reversed(WAYS):
            found[way].append(block(way))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rounds", 8), ("hidden", 256), ("layers", 4), ("rows", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    from benchmarks.saving import corpus, page
    from tests.monitor_jobs import swapped
    from tests.worlds import World

    folder = Path(tempfile.mkdtemp(prefix="monitoring-"))
    world = World(1)
    try:
        data = corpus(folder)
        args.tokens = 256
        config = page(folder / "run", data, args, "no saves")
        config["data"]["train"].append({"corpus": str(swapped(data, folder / "other"))})
        config["batch"]["micro"] = args.rows
        [found] = world.run(
            "benchmarks.monitoring:measured", timeout_s=3600, config=config, rounds=args.rounds
        )
    finally:
        world.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{STEPS} steps a block, {args.rounds} rounds by turns; a step, beside a bare one")
    print(f"{'':10} {'ms':>8} {'ratio':>7} {'cpu ms':>8} {'ratio':>7}")
    for way in WAYS:
        rows = list(zip(found[way], found["bare"], strict=True))
        cells = []
        for which in range(2):
            cells.append(1e3 * statistics.median(a[which] for a, _ in rows) / STEPS)
            cells.append(statistics.median(a[which] / b[which] for a, b in rows))
        print(f"{way:10} {cells[0]:8.1f} {cells[1]:7.3f} {cells[2]:8.1f} {cells[3]:7.3f}")


if __name__ == "__main__":
    main()
