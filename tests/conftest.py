"""Fixtures of every test: the warm worlds of 1, 2 and 4 processes (tests/worlds.py).

launch/test.sh lets several processes of pytest share the files; each has worlds of its own.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import worlds

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see launch/__main__.py


LANE_BYTES = 6e9
"""Seven processes of worlds, the test's own, what it starts."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many run side by side where nothing else was said (-n): as cores and memory allow."""
    import psutil

    free = int(psutil.virtual_memory().available / LANE_BYTES)
    return max(1, min(len(os.sched_getaffinity(0)), free))


def _world(size: int) -> Iterator[worlds.World]:
    world = worlds.World(size)
    yield world
    world.stop()
    shutil.rmtree(world.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def world1() -> Iterator[worlds.World]:
    """One process."""
    yield from _world(1)


@pytest.fixture(scope="module")
def world2() -> Iterator[worlds.World]:
    """Two processes."""
    yield from _world(2)


@pytest.fixture(scope="module")
def world4() -> Iterator[worlds.World]:
    """Four processes."""
    yield from _world(4)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 150 documents of the shipped sample, 320 tokens of byte-level BPE."""
    from configs.corpus import CorpusConfig
    from configs.load import from_dict
    from data_pipeline.build import build

    folder = tmp_path_factory.mktemp("tiny")
    sample = Path(__file__).parent.parent / "data_pipeline" / "sample" / "sample.jsonl"
    lines = sample.read_text("utf-8").splitlines()[::9]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    config = {
        "data": {
            "out": str(folder / "corpus"),
            "sources": [{"kind": "jsonl", "name": "tiny", "path": str(folder / "text.jsonl")}],
            "workers": 1,
        },
        "clean": {"min_characters": 10},
        "split": {"valid_fraction": 0.1},
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 320},
    }
    build(from_dict(CorpusConfig, config))
    return folder / "corpus"
