"""What `grow` holds follows the largest tensor, not the model: peak of resident memory, mapped
files and all, of the whole command (read, grow, write, read back, prove in float64).

A model of 115 MB whose largest tensor has 2.4 MB, grown by one half in its feed-forward layers.
Allowed are 12 of the largest tensor after the growth, 3.5 MB: an old tensor, its float64, the new
one's float64, its random part and the rounded result are 6 at most, and the proof's activations and
the allocator's slack are as much again. The control reads the same files mapped as a whole, whose
pages stay.
"""

import dataclasses
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.model import CPMConfig
from pretrain import checkpoint
from pretrain.state import Entry, State, fresh

ROOT = Path(__file__).resolve().parent.parent
SMALL = CPMConfig(
    "cpm", vocab=512, hidden=384, layers=16, heads=6, head_dim=64, ffn=1536, positions=64
)
LARGE = dataclasses.replace(SMALL, ffn=2304)
LARGEST = LARGE.ffn * LARGE.hidden * 4


def resident(key: str) -> int:
    """VmRSS or VmHWM, its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) * 1024


def peaks(folder: str) -> tuple[int, int]:
    """Above where each began: the growth of folder/small, and reading its files as a whole."""
    from launch.grow import grow

    at, tiny = Path(folder), dataclasses.replace(SMALL, layers=1)
    checkpoint.write_state(at / "tiny", fresh(tiny, 1))
    grow(at / "tiny", dataclasses.replace(tiny, ffn=LARGE.ffn), at / "warm", 1)  # its imports
    start = counted()
    assert grow(at / "small", LARGE, at / "out", 1)["kept"]
    ours, start = resident("VmHWM") - start, counted()
    state = whole(at / "small")
    assert sum(float(state.read(key).sum()) for key in state.entries) != 0
    return ours, resident("VmHWM") - start


def counted() -> int:
    """What is resident; the peak is counted from here (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def whole(folder: Path) -> State:
    """A checkpoint whose files are mapped as a whole."""
    from safetensors import safe_open

    handles = [safe_open(str(path), framework="pt") for path in folder.glob("*.safetensors")]
    state = checkpoint.read(folder)

    def mapped(key: str, entry: Entry) -> Entry:
        name = key.removeprefix("weights/")
        handle: Any = next(h for h in handles if name in h.offset_keys())
        return Entry(entry.shape, entry.dtype, lambda: handle.get_tensor(name))

    return State({k: mapped(k, e) for k, e in state.entries.items()}, state.record)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_follows_the_largest_tensor(tmp_path: Path) -> None:
    """In a process of its own: what others have left in a warm world's heap would be counted."""
    checkpoint.write_state(tmp_path / "small", fresh(SMALL, 1))
    size = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert size > 30 * LARGEST
    code = (
        f"import tests.test_growth_in_bounded_memory as here; print(*here.peaks({str(tmp_path)!r}))"
    )
    words = [sys.executable, "-c", code]
    said = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    ours, control = (int(word) for word in said.split()[-2:])
    assert ours <= 12 * LARGEST, f"{ours / LARGEST:.1f} of the largest tensor"
    assert control > size / 2
