"""Peak memory of `grow` at real sizes: the whole process, mapped files and all (ru_maxrss).

    python -m benchmarks.growth_memory FOLDER [--only 0.33B 1.3B 2.6B]

    fresh weights, constant moments --write--> FOLDER/small --`launch grow`, a process--> larger
                                                            its peak, its time, its proof

FOLDER needs 25 GB; what was written is removed. `first` is the same command on a model in
miniature: Python, torch and the libraries.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.model import ModelConfig, parameter_count
from launch.grow import target
from pretrain import checkpoint
from pretrain.state import MOMENTS, Entry, State, fresh

SIZES = "configs/sizes/cpm/{}.yaml"


@dataclass(frozen=True)
class Pair:
    """A growth that is measured."""

    small: str
    large: str
    sizes: tuple[str, ...]
    """What the larger page has otherwise."""
    moments: bool
    words: tuple[str, ...] = ()


PAIRS = {
    "first": Pair("tiny", "tiny", ("layers=5",), True),
    "0.33B": Pair("small", "medium", (), True),
    "1.3B": Pair(
        "medium", "medium", ("hidden=2048", "heads=32", "ffn=8192"), True, ("--added", "copied")
    ),
    "2.6B": Pair("medium", "large", (), False),
}


def written(folder: Path, config: ModelConfig, moments: bool) -> None:
    """A checkpoint of fresh weights, as if it had been trained for a step."""
    state = fresh(config, 1)
    entries = dict(state.entries)
    for slot in MOMENTS if moments else ():
        for name in state.names():
            size = entries[f"weights/{name}"].shape
            entries[f"optim/{slot}/{name}"] = Entry(size, "float32", _constant(size))
    record = {**state.record, "step": 1, "updates": 1, "samples": 1}
    born = {"born": dict.fromkeys(state.names(), 0), "tokenizer": "sha256:none"}
    checkpoint.write_state(folder, State(entries, record | born))


def _constant(size: tuple[int, ...]) -> Any:
    return lambda: torch.full(size, 1e-4)


def measured(folder: Path, pair: Pair) -> dict[str, Any]:
    """One growth in a process of its own."""
    small = target(SIZES.format(pair.small), [])[0]
    sets = [word for size in pair.sizes for word in ("--set", size)]
    written(folder / "small", small, pair.moments)
    words = ["grow", str(folder / "small"), "--to", SIZES.format(pair.large), *sets]
    words += ["--out", str(folder / "large"), "--json", *pair.words]
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *words], stdout=(folder / "said").open("wb")
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"grow ended with {status}, see {folder / 'said'}"
    proof = json.loads((folder / "large" / "proof.json").read_text("utf-8"))
    assert proof["kept"]
    grown = checkpoint.read(folder / "large")
    largest = max(torch.Size(e.shape).numel() for e in grown.entries.values())
    sizes = (sum(p.stat().st_size for p in at.rglob("*.safetensors")) for at in folder.iterdir())
    return {
        "parameters": [
            parameter_count(small),
            parameter_count(target(SIZES.format(pair.large), list(pair.sizes))[0]),
        ],
        "files_gb": round(sum(sizes) / 1e9, 2),
        "largest_tensor_mb": round(4 * largest / 1e6, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "elapsed_s": round(time.monotonic() - began),
        "float64": proof["float64"]["max_difference"] / proof["float64"]["std"],
    }


def main() -> None:
    """A line of JSON for each pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    given = parser.parse_args()
    for name in given.only:
        folder = given.folder / name
        folder.mkdir(parents=True)
        try:
            print(json.dumps({"growth": name, **measured(folder, PAIRS[name])}), flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
