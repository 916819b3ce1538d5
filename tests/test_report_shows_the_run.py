"""Promise: one page shows what a run has on record, needs nothing else, and trusts no text."""

import json
import math
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import plots
from data_pipeline.plots import Mark, Series
from launch import cli, record, report
from tests.run_jobs import metrics, page
from tests.test_report_shows_the_corpus import Checked
from tests.worlds import World

HOSTILE = "<img src=x onerror=alert(1)> & 'run'"
STAGES: list[dict[str, Any]] = [{"steps": 24}, {"steps": 12, "data": {"seq_len": 16}}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, world1: World) -> Path:
    """A spike at step 19, gone back to 16; stopped in the second stage, started again; the names
    of the run, of its corpus and its prompt are markup."""
    folder = tmp_path_factory.mktemp("reported")
    corpus = folder / "<b>corpus"
    shutil.copytree(tiny_corpus, corpus)
    changes: dict[str, Any] = {
        "stages": STAGES,
        "run__steps": None,
        "run__save_every_steps": 8,
        "run__validate_every_steps": 12,
        "run__prompt": "<script>x</script>",
        "schedule": {},
        "faults__spike_z": 40.0,
        "faults__window_steps": 16,
        "monitor__parts_every_steps": 6,
    }
    for stop in (28, 0):
        config = page(folder / HOSTILE, corpus, **changes, run__stop_at_step=stop)
        poison = {"first": 18 * 8 + 3, "count": 1, "factor": 60.0}
        world1.run("tests.fault_jobs:go_poisoned", config=config, **poison)
    return folder / HOSTILE


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    """The page, through the verb."""
    assert cli.main(["report", str(run)]) == 0
    return (run / "report.html").read_text("utf-8")


def test_the_page_is_whole_and_stands_alone(html: str) -> None:
    checked = Checked(html)
    assert checked.open == [] and checked.references == []
    assert "script" not in checked.tags and "img" not in checked.tags and "svg" in checked.tags
    assert "http" not in html and "url(" not in html and "@import" not in html
    with pytest.raises(AssertionError):  # the check can fail
        Checked(html.replace("<h1>", "<h1 onclick=alert(1)>"))


def test_text_of_a_run_is_never_markup(html: str) -> None:
    assert "<img" not in html and "<script" not in html and "<b>corpus" not in html
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &#x27;run&#x27;" in html  # the run's name
    assert "&lt;b&gt;corpus" in html and "&lt;script&gt;x" in html  # its config, what it wrote


def test_the_page_shows_what_happened(run: Path, html: str) -> None:
    text = Checked(html).text
    assert "fault, step 19: " in text and "robust deviations" in text
    assert "rewind, step 16: back to this step" in text
    assert "started again after step 28, 1 processes" in text
    assert "stage 1 begins after step 24" in text
    assert text.count("fault, step 19: ") == html.count('class="mark fault"') / 2  # and the rewind
    assert "sample 144 · " in text and "finished (完成)" in text
    assert "1 processes, ZeRO 1, tensor parallel 1, sequence parallel 1, fp32" in text
    assert "36 / 36" in text and "plan --gpus 1 --gpu h200" in text
    for caption in ("training loss", "validation loss", "learning rate", "gradient norm", "MFU",
                    "tokens/s", "peak memory", "loader wait", "by kind of part"):  # fmt: skip
        assert caption in text, caption
    assert "decoder.layers.1.ffn" in text
    last = metrics(run)[-1]
    assert f"training {plots.number(last['loss'])}" in re.sub(r"\s+", " ", text)


def test_a_run_without_faults_shows_none(
    tmp_path: Path, tiny_corpus: Path, world1: World, run: Path
) -> None:
    """Negative control; and both beside each other, with what differs in their pages."""
    config = page(tmp_path / "calm", tiny_corpus, run__steps=8, schedule={}, optimizer__lr=1e-3)
    world1.run("tests.run_jobs:go", config=config)
    calm = report.html([record.read(tmp_path / "calm")])
    assert set(re.findall(r'class="mark (\w+)"', calm)) == {"checkpoint"}
    assert "fault, step" not in calm
    out = tmp_path / "both.html"
    words = ["report", str(run), str(tmp_path / "calm"), "--out", str(out), "--by", "tokens"]
    assert cli.main(words) == 0
    both = Checked(out.read_text("utf-8"))
    assert both.open == [] and "img" not in both.tags
    assert "What differs in the pages" in both.text and "optimizer.lr" in both.text
    assert f"{HOSTILE}: fault, step 19: " in both.text
    assert '<i class="s1"></i>calm' in out.read_text("utf-8")


def _changed(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints"))
    return to


def test_a_run_on_its_way_or_killed_is_shown(run: Path, tmp_path: Path) -> None:
    here = _changed(run, tmp_path / "killed")
    events = (here / "events.jsonl").read_text("utf-8").splitlines(keepends=True)
    (here / "events.jsonl").write_text("".join(events[:-1]) + '{"event": "che', "utf-8")
    with open(here / "metrics.jsonl", "a", encoding="utf-8") as out:
        out.write('{"step": 37, "loss": null}\n{"step": 38, "lo')  # written when it was killed
    assert record.read(here).status == "has no end on record (未记录结束)"
    entry = {"state": "running", "host": os.uname().nodename, "pid": os.getpid()}
    (here / "logs").mkdir(exist_ok=True)
    for changes, words in (
        ({}, "is at work"),
        ({"pid": 2**22 + 1}, "was killed"),
        ({"host": "elsewhere"}, "was at work on elsewhere"),
        ({"state": "NotFinite: <i>"}, "ended with: NotFinite: <i>"),
    ):
        (here / "logs" / "rank-0000.json").write_text(json.dumps(entry | changes), "utf-8")
        found = record.read(here)
        assert found.status.startswith(words) and found.steps[-1]["step"] == 37
        shown = Checked(report.html([found]))
        assert shown.open == [] and "i" in shown.tags and words in shown.text
    assert "NotFinite: <i>" not in report.html([found])


def test_the_run_of_another_user_is_at_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system does not let a signal through, which says that there is somebody."""

    def refused(pid: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    here = _changed(run, tmp_path / "theirs")
    (here / "events.jsonl").write_text('{"event": "start", "step": 0}\n', "utf-8")
    entry = {"state": "running", "host": os.uname().nodename, "pid": 1}
    (here / "logs").mkdir(exist_ok=True)
    (here / "logs" / "rank-0000.json").write_text(json.dumps(entry), "utf-8")
    monkeypatch.setattr(os, "kill", refused)
    assert record.read(here).status.startswith("is at work")


def test_an_older_run_is_shown_by_what_its_files_tell(run: Path, tmp_path: Path) -> None:
    """No events, a page that this version cannot read, lines without the newer numbers."""
    here = _changed(run, tmp_path / "old")
    (here / "events.jsonl").unlink()
    (here / "config.yaml").write_text("model: {family: gone}\n", "utf-8")
    old = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "tokens_per_s", "mfu", "stage")
    rows = [{key: line[key] for key in old} for line in metrics(run)]
    (here / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    text = Checked(report.html([record.read(here)])).text
    assert "stage 1 begins after step 24" in text and "fault, step 19: " in text
    assert "family: gone" in text and "plan --gpus" not in text


def test_a_long_run_is_thinned_and_keeps_what_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spike, a loss that is none, validations and the last step stay; the memory is bounded."""
    monkeypatch.setattr(record, "MOST_LINES", 100)
    lines = [{"step": step, "loss": 2.0 + step % 7 / 10, "tokens": step} for step in range(1, 5001)]
    lines[2500]["loss"], lines[3100]["loss"], lines[1234]["valid_loss"] = 9.0, None, 2.5
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5001, "lo'
    (tmp_path / "metrics.jsonl").write_text(text, "utf-8")
    found = record.read(tmp_path).lines
    steps = [line["step"] for line in found]
    assert len(found) < 150 and steps == sorted(set(steps))
    assert {1235, 2501, 3101, 5000} <= {*steps}
    assert max(b - a for a, b in pairwise(steps)) < 5000 / 20
    short = record.read(_shortened(tmp_path, 90)).lines
    assert short == lines[:90]


def _shortened(folder: Path, count: int) -> Path:
    """A run of the first lines alone."""
    to = folder / "short"
    to.mkdir()
    rows = (folder / "metrics.jsonl").read_text("utf-8").splitlines(True)[:count]
    (to / "metrics.jsonl").write_text("".join(rows), "utf-8")
    return to


def test_what_is_no_run_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has neither metrics.jsonl nor config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("")  # begun, nothing on record
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "No step is on record yet" in (tmp_path / "report.html").read_text("utf-8")


def test_a_spike_among_many_points_stays_visible() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[5000] = 5000.0, 9.0
    rows = plots.thin(points)
    assert len(rows) <= plots.COLUMNS and max(most for *_, most in rows) == 9.0
    assert sum(most > 1.0 for *_, most in rows) == 1
    gap = [(0.0, 1.0), (1.0, math.nan), (2.0, 1.0), (3.0, 2.0)]
    drawn = plots.figure("c", [Series("s", gap)])
    assert drawn.count("<polyline") == 2  # a number that is none breaks the line
    assert plots.figure("c", [Series("s", [(0.0, math.nan)])]) == ""
    assert plots.figure("c", [Series("s", [(0.0, 0.0)])], log=True) == ""


def test_axes_bear_round_numbers() -> None:
    assert plots.ticks(0.0, 10.0) == [0, 5, 10] and plots.ticks(3.0, 3.0) == [3.0]
    assert plots.ticks(0.13, 0.41) == pytest.approx([0.2, 0.3, 0.4])
    assert [plots.number(x) for x in (0.0, 1234.5, 2.5e6, 3e-5, 0.25, math.nan)] == [
        "0", "1,234", "2.5M", "3.0e-05", "0.25", "—"
    ]  # fmt: skip


def test_words_of_a_plot_are_never_markup() -> None:
    points = [(0.0, 1.0), (1.0, 2.0)]
    drawn = plots.figure(
        "<b>", [Series('"<i>', points)], [Mark(0.5, "</title><script>", '"><script>')]
    )
    assert "<script" not in drawn and "<b></" not in drawn and "<i>" not in drawn
    assert Checked(drawn).open == []
