"""One HTML page of a run, or of several beside each other: `report RUN [RUN ...] [--out FILE]`.

    RUN/ --record.py--> numbers and events --sections--> data_pipeline/page.py, plots.py --> a page

The page needs nothing else: no script, no network, no TensorBoard. It is made of what lies in the
run folder, at any time: the run may be on its way, killed, resumed on other devices, of any stages.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from configs.load import ConfigError, flat, to_dict
from data_pipeline import page, plots
from data_pipeline.plots import Mark, Series
from launch.record import Record, read

EVENTS, SAMPLES, FAULT_TEXTS, RATE_STEPS, NOTCHES = 60, 4, 4, 200, 100
SOURCES_DRAWN = 8


def main(argv: list[str]) -> int:
    """The verb; 0. ValueError for a folder that is no run or a page that cannot be written."""
    parser = argparse.ArgumentParser("python -m launch report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are compared")
    parser.add_argument("--out", help="the page (report.html in the first run's folder)")
    parser.add_argument("--by", choices=("step", "tokens"), default="step", help="the x axis")
    args = parser.parse_args(argv)
    folders = [Path(run) for run in args.runs]
    records = [read(f, name) for f, name in zip(folders, names(folders), strict=True)]
    out = Path(args.out) if args.out else folders[0] / "report.html"
    out.write_text(html(records, args.by), "utf-8")
    for record in records:
        print(f"{record.folder}: {record.status}, {_stands(record)}")
    print(f"the report: {out} (报告)")
    return 0


def names(folders: Sequence[Path]) -> list[str]:
    """What runs are called beside each other: the ends of their paths, as far as they differ."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def html(records: Sequence[Record], by: str = "step") -> str:
    """The page; the same files give the same page."""
    title = " · ".join(record.name for record in records)
    sections = [f"<h1>{page.text(title)} <span>训练报告</span></h1>"]
    sections += [section for record in records for section in _head(record, len(records) > 1)]
    sections += _curves(records, by)
    if len(records) == 1:
        sections += [*_by_name(records[0], by), *_parts(records[0])]
    else:
        sections += _differences(records)
    for record in records:
        sections += [*_events(record), *_written(record), *_faults(record), *_beside(record)]
    return page.document(f"bajie: {title}", sections)


# ---- what it comes to


def _stands(record: Record) -> str:
    if not record.steps:
        return "no step on record yet"
    last = record.steps[-1]
    return f"step {last['step']}, loss {plots.number(_finite(last.get('loss')))}"


def _finite(value: Any) -> float:
    return math.nan if value is None else float(value)


def _head(record: Record, several: bool) -> Iterator[str]:
    if several:
        yield page.heading(record.name, "")
    starts = record.happened("start")
    told = [str(record.folder), record.status]
    if starts:
        now = starts[-1]
        told.append(
            f"{now.get('processes')} processes, ZeRO {now.get('zero')}, tensor parallel "
            f"{now.get('tensor')}, sequence parallel {now.get('sequence', 1)}, "
            f"{now.get('precision')}"
        )
    yield page.paragraph(" · ".join(told))
    if not record.steps:
        yield page.paragraph("No step is on record yet. (尚无训练步)")
        return
    yield page.cards(_figures(record))


def _figures(record: Record) -> dict[str, float | str]:
    """What stands in large on the page."""
    last, total = record.steps[-1], _total(record)
    recent = record.steps[-RATE_STEPS:]
    figures: dict[str, float | str] = {
        "step 步": f"{last['step']:,}" + (f" / {total:,}" if total else ""),
        "tokens 词元": plots.number(float(last.get("tokens", 0))),
        "loss 损失": plots.number(_finite(last.get("loss"))),
    }
    if valid := [v for _, v in record.series("valid_loss") if math.isfinite(v)]:
        figures["validation loss, last 验证损失"] = plots.number(valid[-1])
        figures["validation loss, best 最低"] = plots.number(min(valid))
    rates = [line["tokens_per_s"] for line in recent if line.get("tokens_per_s")]
    if rates:
        figures["tokens/s, median 吞吐"] = f"{statistics.median(rates):,.0f}"
        figures["MFU, median"] = f"{100 * statistics.median(_of(recent, 'mfu')):.1f} %"
    waits = _of(record.steps[1:], "loader_wait_s")
    if waits:
        figures["loader wait a step, mean 等待数据"] = f"{1e3 * statistics.fmean(waits):,.1f} ms"
    if memory := _of(record.lines, "memory_gb"):
        figures["peak memory of a device 显存峰值"] = f"{max(memory):,.2f} GB"
    if skipped := sum(bool(line.get("skipped")) for line in record.steps):
        figures["updates skipped 跳过的更新"] = skipped
    figures["restarts 重启"] = max(0, len(record.happened("start")) - 1)
    figures["faults 异常"] = len(record.happened("fault"))
    return figures


def _of(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if line.get(key) is not None] or []


def _total(record: Record) -> int:
    from configs.run import total_steps

    return 0 if record.config is None else total_steps(record.config)


# ---- curves

TOGETHER = (
    ("training loss 训练损失", "loss", False, ""),
    ("validation loss 验证损失", "valid_loss", False, ""),
    ("validation, bits a character 比特/字", "valid_bits_per_character", False, ""),
    ("validation accuracy 准确率", "valid_accuracy", False, ""),
    ("learning rate 学习率", "lr", False, ""),
    ("gradient norm before clipping 梯度范数", "grad_norm", True, ""),
    ("tokens/s 吞吐", "tokens_per_s", False, ""),
    ("model FLOPs utilisation (MFU)", "mfu", False, ""),
    ("peak memory of the fullest device 显存峰值", "memory_gb", False, " GB"),
    ("memory of the largest process now 进程内存", "host_memory_gb", False, " GB"),
    ("loader wait of the slowest rank 等待数据", "loader_wait_s", False, " s"),
)
"""(caption, key of metrics.jsonl, whether logarithmic, unit): what several runs share axes for."""


def _curves(records: Sequence[Record], by: str) -> Iterator[str]:
    if not any(record.steps for record in records):
        return
    yield page.heading("Curves", "曲线")
    several = len(records) > 1
    yield page.paragraph(
        f"Over {by}s. " * (by == "step")
        + "Over tokens. " * (by == "tokens")
        + "A line is a mean of neighbouring steps, the pale band goes from least to most. Upright "
        "lines: borders of stages, growth and extension (dashed), starts (dotted, amber), faults "
        "and rewinds (red); notches: checkpoints; rest the pointer on one. "
        "(竖线：阶段边界、重启、异常；刻痕：检查点)"
    )
    marks = [m for record in records for m in _marks(record, by, f"{record.name}: " * several)]
    figures, across = [], _across(records, by)
    for caption, key, log, unit in TOGETHER:
        curves = []
        for number, record in enumerate(records):
            points = record.series(key, by)
            points = points[1:] if key == "loader_wait_s" else points  # the first is the start
            few = key.startswith("valid_")
            name = record.name if several else "training" if key == "loss" else key
            curves.append(Series(name, points, number, dots=few))
        figures.append(plots.figure(caption, curves, marks, log=log, unit=unit, across=across))
    yield page.charts(figures, wide=True)
    yield page.paragraph(_formula(records[0]))


def _across(records: Sequence[Record], by: str) -> tuple[float, float]:
    """The x axis that all curves share, so that what happened stands at one place in all."""
    ends = (float(line.get(by, 0)) for record in records for line in record.lines)
    return 0.0, max(ends, default=0.0)


def _formula(record: Record) -> str:
    peaks = [str(e["peak"]) for e in record.happened("start") if "peak" in e]
    over = peaks[-1] if peaks else "the peak of the devices"
    return (
        "MFU = tokens/s x FLOPs a token / peak; FLOPs a token = 6 N + 12 L H Q T (of an "
        "encoder-decoder side by side), forward and backward, attention counted in full; peak: "
        f"{over}. Validation and saving are left out of tokens/s. (MFU 公式)"
    )


def _marks(record: Record, by: str, lead: str = "") -> list[Mark]:
    found, stage, started = [], None, False
    for event in record.events:
        kind, step = event["event"], event["step"]
        x = record.place(step, by)
        if kind == "stage" and event.get("stage") != stage:
            if stage is not None or not started:
                words = f"{lead}stage {event.get('stage')} begins after step {step}"
                found.append(Mark(x, words))
            stage = event.get("stage")
        elif kind in ("growth", "extension"):
            found.append(Mark(x, f"{lead}{kind} after step {step}: {event.get('says', '')}"))
        elif kind in ("fault", "rewind"):
            said = event.get("what", "back to this step")
            found.append(Mark(x, f"{lead}{kind}, step {step}: {said}", "fault"))
        elif kind == "start":
            if started:
                words = f"{lead}started again after step {step}, {event.get('processes')} processes"
                found.append(Mark(x, words, "start"))
            started = True
    saved = [] if lead else record.happened("checkpoint")[-NOTCHES:]
    notches = {event["step"]: str(event.get("name", "checkpoint")) for event in saved}
    return found + [Mark(record.place(s, by), words, "checkpoint") for s, words in notches.items()]


def _by_name(record: Record, by: str) -> Iterator[str]:
    """Losses by corpus; norms and ratios by kind of part."""
    marks, across, figures = _marks(record, by), _across([record], by), []
    for caption, key in (
        ("training loss by corpus 各语料训练损失", "loss_by_source"),
        ("validation loss by corpus 各语料验证损失", "valid_loss_by_source"),
    ):
        told = record.series_by(key, by)
        found = list(zip(names([Path(name) for name in told]), told.values(), strict=True))
        figures += [
            plots.figure(
                caption,
                [Series(name, pts, n, dots=key.startswith("valid")) for n, (name, pts) in some],
                marks,
                across=across,
            )
            for at in range(0, len(found), SOURCES_DRAWN)
            if (some := list(enumerate(found))[at : at + SOURCES_DRAWN])
        ]
    for caption, key in (
        ("gradient norm by kind of part 各部位梯度范数", "grad_norm_by_part"),
        ("update beside weight by kind of part 各部位更新与权重之比", "update_ratio_by_part"),
    ):
        kinds = _kinds(record, key, by)
        curves = [Series(name, pts, n, dots=True) for n, (name, pts) in enumerate(kinds.items())]
        figures.append(plots.figure(caption, curves, marks, log=True, across=across))
    if any(figures):
        yield page.heading("Told apart", "分项", 3)
        yield page.charts(figures, wide=True)


def _kinds(record: Record, key: str, by: str) -> dict[str, list[tuple[float, float]]]:
    """Parts by kind, blocks together: norms as the root of the sum of squares, ratios as the
    median."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in record.lines:
        gathered: dict[str, list[float]] = {}
        for name, value in (line.get(key) or {}).items():
            gathered.setdefault(_kind(name), []).append(_finite(value))
        for kind, values in gathered.items():
            root = math.sqrt(sum(v * v for v in values))
            value = statistics.median(values) if "ratio" in key else root
            found.setdefault(kind, []).append((float(line.get(by, 0)), value))
    return found


def _kind(part: str) -> str:
    """decoder.layers.3.self -> decoder.self"""
    at, *rest = part.split(".")
    return f"{at}.{rest[2]}" if rest and rest[0] == "layers" and len(rest) > 2 else part


def _parts(record: Record) -> Iterator[str]:
    """The last measured step, block by block."""
    measured = [line for line in record.steps if line.get("grad_norm_by_part")]
    if not measured:
        return
    last = measured[-1]
    ratios = last.get("update_ratio_by_part", {})
    rows = [
        (name, plots.number(_finite(norm)), plots.number(_finite(ratios.get(name))))
        for name, norm in last["grad_norm_by_part"].items()
    ]
    columns = ("part 部位", "gradient norm 梯度范数", "|update| / |weight| 更新比")
    title = f"By part of the model at step {last['step']} (各部位)"
    yield page.folded(title, page.listing(columns, rows))


# ---- words


def _differences(records: Sequence[Record]) -> Iterator[str]:
    """Keys of the pages that are not the same in all runs."""
    pages = [flat(to_dict(r.config)) if r.config else {} for r in records]
    keys = list(dict.fromkeys(key for one in pages for key in one))
    rows = [
        (key, *(_shown(one.get(key)) for one in pages))
        for key in keys
        if len({_shown(one.get(key)) for one in pages}) > 1
    ]
    if rows:
        yield page.heading("What differs in the pages", "配置差异")
        yield page.listing(("key", *(r.name for r in records)), rows)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _events(record: Record) -> Iterator[str]:
    rows = [
        (_when(event), f"{event['step']:,}", event["event"], _said(event))
        for event in record.events
        if event["event"] != "checkpoint"
    ]
    yield page.heading("What happened", f"{record.name} 事件")
    if rows:
        cut = len(rows) - EVENTS
        if cut > 0:
            yield page.paragraph(f"The last {EVENTS} of {len(rows)}.")
        columns = ("when 时间", "after step 步", "event 事件", "")
        yield page.listing(columns, rows[-EVENTS:])
    saved = record.happened("checkpoint")
    if saved:
        there = {path.name for path in (record.folder / "checkpoints").glob("stage-*")}
        held = [float(e["held_up_s"]) for e in saved if "held_up_s" in e]
        kept = [str(e["name"]) for e in saved if e.get("name") in there]
        words = f"{len(saved)} checkpoints were begun"
        words += f", training held up {statistics.fmean(held):.2f} s by each" if held else ""
        words += f"; there now: {', '.join(kept) or 'none'} (检查点)"
        yield page.paragraph(words)


def _when(event: dict[str, Any]) -> str:
    if not isinstance(event.get("time"), int | float):
        return ""
    return datetime.fromtimestamp(event["time"]).strftime("%Y-%m-%d %H:%M:%S")


def _said(event: dict[str, Any]) -> str:
    for key in ("what", "says", "why"):
        if key in event:
            return str(event[key])
    hidden = ("event", "step", "time")
    return ", ".join(f"{k} {v}" for k, v in event.items() if k not in hidden)


def _written(record: Record) -> Iterator[str]:
    """Passages that the model wrote at its validations."""
    found = [line for line in record.lines if line.get("sample")]
    if found:
        every = max(1, -(-len(found) // SAMPLES))
        some = [*found[: len(found) - 1 : every], found[-1]]
        yield page.heading("What the model wrote", "生成样例", 3)
        yield page.side_by_side(
            page.excerpt(f"step {line['step']}", str(line["sample"])) for line in some
        )


def _faults(record: Record) -> Iterator[str]:
    for fault in record.faults:
        samples = [s for s in fault.get("samples", []) if isinstance(s, dict)]
        texts = [
            page.excerpt(f"sample {s.get('sample')} · {s.get('corpus')}", str(s.get("text", "")))
            for s in samples[:FAULT_TEXTS]
        ]
        title = f"fault at step {fault['step']}: {fault['what']}, {len(samples)} samples (异常样本)"
        yield page.folded(title, page.side_by_side(texts))


def _beside(record: Record) -> Iterator[str]:
    """Profiles, the plan and the page."""
    for steps, table in record.profiles:
        yield page.folded(f"profile, {steps}, rank 0 (性能剖析)", page.plain(table))
    if planned := _plan(record):
        yield page.folded(*planned)
    if record.page:
        yield page.folded("config.yaml (配置)", page.plain(record.page))


def _plan(record: Record) -> tuple[str, str] | None:
    """The plan for what the run was last started on; on a CPU as if on an H200."""
    if record.config is None:
        return None
    from pretrain import plan

    starts = record.happened("start")
    number = int(starts[-1].get("processes", 1)) if starts else 1
    peak = str(starts[-1].get("peak", "")) if starts else ""
    try:
        (name, _), as_if = plan.card(peak.split(" ")[0]), ""
    except ValueError:
        name, as_if = "h200", ", as if it were one"
    try:
        words = plan.text(plan.plan(record.config, number, name))
    except (ConfigError, ValueError):
        return None
    return f"plan --gpus {number} --gpu {name}{as_if} (训练预算)", page.plain(words)
