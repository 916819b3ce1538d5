"""A step that goes wrong leaves no trace: not in the weights, not in a replay, on any devices."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.faults import Faults
from pretrain import checkpoint
from pretrain.faults import Spikes
from pretrain.monitor import SKIPPED_IN_ROW, Monitor, NotFinite, Speed, Terminal
from pretrain.step import StepResult
from tests.run_jobs import digests, losses, metrics, page
from tests.worlds import World

GO, POISONED = "tests.run_jobs:go", "tests.fault_jobs:go_poisoned"
SPIKES: dict[str, Any] = {
    "run__save_every_steps": 8,
    "faults__spike_z": 40.0,
    "faults__window_steps": 32,
}


def _record(run: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint.found_in(run)[0] / "state.json").read_text("utf-8")))


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_nan_ends_the_run_and_the_state_before_it_is_saved(
    tmp_path: Path, tiny_corpus: Path, world2: World, zero: int
) -> None:
    """Step 13 is poisoned; every 5 steps are read. The state is that of a run stopped at 12."""
    changes = {"parallel__zero": zero}
    config = page(tmp_path / "run", tiny_corpus, **changes)
    ends = world2.run(POISONED, config=config, first=12 * 8 + 3, count=1, factor=math.nan)
    assert ends[0]["sentence"] == ends[1]["sentence"]
    assert "\n" not in ends[0]["sentence"] and "step 13: the loss is nan" in ends[0]["sentence"]
    assert len(metrics(tmp_path / "run")) <= 15 and metrics(tmp_path / "run")[12]["loss"] is None
    [kept] = checkpoint.found_in(tmp_path / "run")
    assert _record(tmp_path / "run")["step"] == _record(tmp_path / "run")["updates"] == 12
    clean = page(tmp_path / "clean", tiny_corpus, run__stop_at_step=12, **changes)
    stopped = world2.run(GO, config=clean)[0]
    assert digests(kept) == digests(stopped["checkpoint"])
    told = json.loads((tmp_path / "run/faults/step-00000013.json").read_text("utf-8"))
    assert [s["sample"] for s in told["samples"]] == list(range(96, 104))
    assert all(len(s["text"]) > 5 for s in told["samples"])


@pytest.fixture(scope="module")
def rewound(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world2: World
) -> tuple[Path, list[dict[str, Any]]]:
    """A run of 2 processes that met a spike at step 21, saved every 8 steps."""
    run = tmp_path_factory.mktemp("rewound") / "run"
    config = page(run, tiny_corpus, **SPIKES)
    ends = world2.run(POISONED, config=config, first=20 * 8 + 5, count=1, factor=40.0)
    return run, ends


def test_a_spike_is_passed_over_and_on_record(rewound: tuple[Path, list[dict[str, Any]]]) -> None:
    run, ends = rewound
    assert [end["stopped"] for end in ends] == ["finished", "finished"]
    assert sum(end["met"] for end in ends) == 1, "the sample came again after the rewind"
    record = _record(run)
    assert record["skips"] == [[160, 168]] and record["step"] == 30
    assert [r["step"] for r in record["rewinds"]] == [21]
    assert "robust deviations" in record["rewinds"][0]["what"]
    assert [line["step"] for line in metrics(run)] == list(range(1, 31))
    told = json.loads((run / "faults/step-00000021.json").read_text("utf-8"))
    assert [s["place"] for s in told["samples"]] == list(range(160, 168))


def test_a_replay_does_the_same_on_any_devices(
    tmp_path: Path,
    tiny_corpus: Path,
    world1: World,
    world2: World,
    rewound: tuple[Path, list[dict[str, Any]]],
) -> None:
    """On the same layout to the bit, on one process to 1e-5 (the order of summation)."""
    run, _ = rewound
    skips = {"data__skips": _record(run)["skips"]}
    same = page(tmp_path / "same", tiny_corpus, **skips)
    end = world2.run(POISONED, config=same, first=20 * 8 + 5, count=1, factor=40.0)[0]
    assert end["met"] == 0
    assert losses(tmp_path / "same") == losses(run)
    assert digests(end["checkpoint"]) == digests(checkpoint.found_in(run)[0])
    world1.run(GO, config=page(tmp_path / "one", tiny_corpus, **skips))
    assert losses(tmp_path / "one") == pytest.approx(losses(run), rel=1e-5)
    # negative control: without the skip the stream is another one from step 21 on
    world1.run(GO, config=page(tmp_path / "other", tiny_corpus))
    other = zip(losses(tmp_path / "other"), losses(run), strict=True)
    apart = [a != pytest.approx(b, rel=1e-5) for a, b in other]
    assert not any(apart[:20]) and any(apart[20:])


def test_resumed_after_the_rewind_it_still_passes_over(
    tmp_path: Path, tiny_corpus: Path, world2: World, rewound: tuple[Path, list[dict[str, Any]]]
) -> None:
    run = tmp_path / "run"
    for stop in (26, 0):
        config = page(run, tiny_corpus, **SPIKES, run__stop_at_step=stop)
        ends = world2.run(POISONED, config=config, first=20 * 8 + 5, count=1, factor=40.0)
    assert ends[0]["stopped"] == "finished" and ends[0]["met"] == 0
    assert losses(run) == losses(rewound[0])


def test_nan_is_passed_over_where_spikes_are(
    tmp_path: Path, tiny_corpus: Path, world2: World
) -> None:
    config = page(tmp_path, tiny_corpus, **SPIKES)
    ends = world2.run(POISONED, config=config, first=100, count=1, factor=math.nan)
    assert ends[0]["stopped"] == "finished" and sum(end["met"] for end in ends) == 1
    assert _record(tmp_path)["skips"] == [[96, 104]]
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path))


def test_a_stage_is_judged_by_its_own_steps(tmp_path: Path) -> None:
    """A growth moves the level for good: no spike, before a resume and behind one. Within a stage
    the same jump is one."""
    section = Faults(spike_z=8.0, window_steps=32)

    def line(step: int, stage: int, loss: float) -> dict[str, Any]:
        return {"step": step, "stage": stage, "loss": loss + 0.01 * (step % 3), "grad_norm": 1.0}

    small = [line(step, 0, 3.0) for step in range(1, 41)]
    large = [line(step, 1, 4.0) for step in range(41, 81)]
    spikes = Spikes(section, tmp_path, 0)
    assert spikes.judge(small) is None and spikes.judge(large) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in small))
    assert Spikes(section, tmp_path, 40).judge(large) is None
    fault = Spikes(section, tmp_path, 40).judge([x | {"stage": 0} for x in large])
    assert fault is not None and fault.step == 41
    late = spikes.judge([line(81, 1, 5.0)])
    assert late is not None and late.step == 81  # the new stage has a window of its own


def test_too_many_rewinds_are_a_sentence(tmp_path: Path, tiny_corpus: Path, world1: World) -> None:
    changes = SPIKES | {"faults__most_rewinds": 0}
    config = page(tmp_path, tiny_corpus, **changes)
    end = world1.run(POISONED, config=config, first=100, count=1, factor=math.nan)[0]
    assert "has rewound 0 times already (faults.most_rewinds)" in end["sentence"]


def test_a_spike_that_is_only_reported_changes_nothing(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    job = {"first": 165, "count": 1, "factor": 40.0}
    world1.run(POISONED, config=page(tmp_path / "off", tiny_corpus), **job)
    changes = SPIKES | {"faults__do": "report"}
    world1.run(POISONED, config=page(tmp_path / "on", tiny_corpus, **changes), **job)
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert (tmp_path / "on/faults/step-00000021.json").exists()
    assert not (tmp_path / "off/faults").exists()


def test_skips_of_what_was_trained_on_are_refused(
    tmp_path: Path, tiny_corpus: Path, world1: World
) -> None:
    world1.run(GO, config=page(tmp_path, tiny_corpus, run__stop_at_step=4))
    config = page(tmp_path, tiny_corpus, data__skips=[[8, 16]])
    with pytest.raises(ValueError, match=r"data\.skips: .* trained on already"):
        world1.run(GO, config=config)


def test_a_loss_scale_that_finds_no_end_is_a_sentence(tmp_path: Path) -> None:
    speed = Speed(1.0, "a test")
    monitor = Monitor(tmp_path, Terminal(enabled=False), writes=False, total_steps=99, speed=speed)
    one, none = torch.ones((), dtype=torch.int64), torch.zeros(2, 0)
    skipped = StepResult(torch.ones(()), one, math.inf, True, none)
    step = {"lr": 1.0, "tokens": 1, "samples": 1, "stage": 0, "step_tokens": 1}
    for number in range(1, SKIPPED_IN_ROW):
        monitor.record(step | {"step": number}, skipped)
    monitor.flush()
    monitor.record(step | {"step": SKIPPED_IN_ROW}, skipped)
    with pytest.raises(NotFinite, match="the last 64 updates were skipped, no loss scale"):
        monitor.flush()
