"""What a run costs, before a GPU is asked for: parameters, FLOPs, memory, days, disk. No torch.

    config + table of tensors --> parameters --> FLOPs per token --> step time, days
                                      |
                                      +--> bytes per device by ZeRO stage: weights, gradients,
                                           masters, moments; activations by recompute, logits

How FLOPs and activations are counted: pretrain/costs.py. FLOPs of CPM are 6 N + 12 L H Q T a token:
N the parameters that take part in a matrix product (a tied embedding once, learned positions not),
L layers, H heads, Q head_dim, T seq_len; attention counted in full, so that figures compare. The
causal count, without what the mask throws away, stands beside it; recomputed work counts nothing.
"""

import argparse
import difflib
import json
import re
import unicodedata
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import configs
from configs.load import load, to_dict
from configs.model import ModelConfig, T5PegasusConfig, local_shape, parameter_count
from configs.model import tensors as table_of
from configs.objectives import Masked
from configs.optimizers import moment_bytes
from configs.recompute import Recompute
from configs.run import (
    RunConfig,
    at_stage,
    stage_model,
    stage_samples,
    stages,
    step_samples,
    world_problems,
)
from pretrain import disk, manifests, staged
from pretrain.costs import WIDTH, Row, flops_per_token, parameters_by_part
from pretrain.kept import Kept, kept_of
from pretrain.transient import logits_bytes, message_bytes

MFU = 0.40
"""Assumed share of the peak; plain decoders on one node reach 0.35 to 0.52."""
CONTEXT_BYTES = 1.5 * 2**30
"""CUDA context, workspaces of the libraries, NCCL."""


class PlanError(ValueError):
    """Something that cannot be planned; the message says what must be."""


@dataclass(frozen=True)
class Card:
    """A GPU: dense peaks in TFLOP/s, and its memory."""

    fp32: float
    """Without TF32."""
    memory_gib: float
    """What CUDA reports, in GiB."""
    bandwidth_gb_s: float
    """Memory bandwidth in GB/s."""
    source: str
    """Where the figures come from."""
    bf16: float | None = None
    """null where the card has none."""
    fp16: float | None = None
    """With float32 accumulation."""


@dataclass(frozen=True)
class Cards:
    """configs/gpus.yaml."""

    cards: dict[str, Card]
    """Key -> card; the words of the key are looked for in a device's name."""


def card(gpu_name: str) -> tuple[str, Card]:
    """(key, card) for a key of configs/gpus.yaml or for the name that CUDA gives a device."""
    cards = load(Path(configs.__file__).parent / "gpus.yaml", Cards).cards
    words = set(re.split(r"[^a-z0-9]+", gpu_name.lower().replace("rtx4090", "rtx 4090")))
    fitting = [key for key in cards if set(key.split("-")) <= words]
    if not fitting:
        near = difflib.get_close_matches(gpu_name.lower(), cards, 1, cutoff=0.3)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise PlanError(
            f"--gpu: '{gpu_name}' is not in configs/gpus.yaml, which knows "
            f"{', '.join(cards)}{hint} (未知的显卡)"
        )
    key = max(fitting, key=lambda k: len(k.split("-")))
    return key, cards[key]


def peak_flops(gpu_name: str, precision: str) -> float:
    """Dense peak of one device in FLOP/s. PlanError for an unknown card or a precision it lacks."""
    return device_peak(gpu_name, precision)[0]


def device_peak(gpu_name: str, precision: str) -> tuple[float, str]:
    """(dense peak of one device in FLOP/s, words for it: "H200 989 TFLOP/s dense bf16")."""
    key, found = card(gpu_name)
    peak = getattr(found, precision)
    if peak is None:
        raise PlanError(f"precision: is {precision}, a {key} has none; use fp16 or fp32 (不支持)")
    return peak * 1e12, f"{key.upper()} {peak:,.0f} TFLOP/s dense {precision}"


def row_of(config: RunConfig) -> Row:
    """What a row of the run is made of."""
    share = config.objective.ratio if isinstance(config.objective, Masked) else 1.0
    return Row(config.data.seq_len, config.data.target_len, share)


def kept(
    config: RunConfig, model: ModelConfig, recompute: Recompute | None = None, micro: int = 0
) -> Kept:
    """What a micro-batch keeps for its backward pass, and what is computed again, on every rank.

    ConfigError for a budget that nothing fits.
    """
    return kept_of(
        model,
        row_of(config),
        micro or config.batch.micro,
        config.precision,
        recompute or config.recompute,
        config.parallel.tensor,
        config.objective.document_boundaries,
        config.parallel.sequence,
    )


def memory(
    config: RunConfig,
    model: ModelConfig,
    zero: int,
    data: int,
    recompute: Recompute | None = None,
    micro: int = 0,
) -> dict[str, float]:
    """Bytes on one device by part, for `data` ranks among which ZeRO stage `zero` partitions.

    recompute and micro are the run's own unless given.
    """
    tensor, sequence = config.parallel.tensor, config.parallel.sequence
    precision, micro = config.precision, micro or config.batch.micro
    if zero == 0 and precision != "fp32":
        zero = 1  # as the engine runs it
    sizes = [prod(local_shape(model, t, tensor)) for t in table_of(model)]
    values, width, row = sum(sizes), WIDTH[precision], row_of(config)
    spread, whole = moment_bytes(config.optimizer, model, tensor)
    a_row = row.targets if isinstance(model, T5PegasusConfig) else row.seq_len
    tokens = micro * a_row * row.predicted / sequence
    parts = {
        # under ZeRO 3 the largest matrix is whole while it is used, and as much is fetched ahead
        "weights": width * (values / data + min(2 * max(sizes), values) if zero == 3 else values),
        "gradients (fp32)": 4 * values / (data if zero >= 2 else 1),
        "masters (fp32)": 4 * values / data if zero else 0.0,
        "moments (fp32)": spread / (data if zero else 1) + whole,
        "activations": kept(config, model, recompute, micro).device,
        "logits": logits_bytes(tokens * model.vocab / tensor, precision, tensor),
        "messages": message_bytes(sizes, zero, config.parallel.overlap),
        "context": CONTEXT_BYTES,
    }
    return {**parts, "total": sum(parts.values())}


def plan(config: RunConfig, gpus: int, gpu: str, mfu: float = MFU) -> dict[str, Any]:
    """Everything about a run, as plain data. PlanError for what cannot run on `gpus` devices."""
    if problems := world_problems(config, gpus):
        raise PlanError("\n".join(problems))
    (key, found), (peak, peak_note) = card(gpu), device_peak(gpu, config.precision)
    pages = [at_stage(config, number) for number in range(len(stages(config)))]
    models = [stage_model(config, number) for number in range(len(pages))]
    last, data, readers = models[-1], gpus // config.parallel.tensor, _readers(config, gpus)
    samples, micro = step_samples(pages[-1]), pages[-1].batch.micro
    tokens, budget = samples * pages[-1].data.seq_len, found.memory_gib * 2**30
    rate = gpus * peak * mfu
    each = [_stage(config, n, model, pages[n], rate, gpus) for n, model in enumerate(models)]
    with_model = [
        [_stage(config, n, model, page, rate, gpus)["flops"] for n, page in enumerate(pages)]
        for model in (models[0], last)
    ]
    needs = [
        [memory(page, model, zero, data) for zero in range(4)]
        for page, model in zip(pages, models, strict=True)
    ]
    zero = config.parallel.zero
    most = max(range(len(pages)), key=lambda number: needs[number][zero]["total"])
    return {
        "model": to_dict(last),
        "parameters": {"total": parameter_count(last), **parameters_by_part(last)},
        "stages": each,
        "batch": {
            "samples": samples,
            "tokens": tokens,
            "data_parallel": readers,
            "tensor_parallel": config.parallel.tensor,
            "sequence_parallel": config.parallel.sequence,
            "samples_per_rank": ceil(samples / readers),
            "micro": micro,
            "accumulation": ceil(ceil(samples / readers) / micro),
        },
        "memory": {
            "zero": config.parallel.zero,
            "recompute": _recomputed(pages[most], models[most]),
            "device_bytes": budget,
            "stage": most,
            "by_zero_stage": [{**m, "fits": m["total"] <= budget} for m in needs[most]],
            "advice": _advice(pages[most], models[most], data, budget),
        },
        "time": {
            "gpus": gpus,
            "gpu": key,
            "peak": peak_note,
            "peak_source": found.source,
            "assumed_mfu": mfu,
            "tokens_per_s": tokens / each[-1]["step_s"],
            "days": sum(s["days"] for s in each),
            "flops": sum(s["flops"] for s in each),
            "left": staged.left(config, each),
        },
        "growth": staged.beside_scratch(each, models, pages[-1].schedule, *with_model),
        "disk": disk.taken(config, models),
        "data": _shares(pages, [stage["tokens"] for stage in each]),
    }


def _readers(config: RunConfig, gpus: int) -> int:
    """Ranks, or groups of them, that read rows of their own."""
    return gpus // config.parallel.tensor // config.parallel.sequence


def _idle(samples: int, readers: int) -> list[str]:
    """What a step leaves undone by the devices."""
    if samples >= readers:
        return []
    why = f"{readers - samples} of {readers} ranks have no row of a step's {samples}"
    return [f"batch: {why}; fewer devices are as fast (部分设备空闲)"]


def _stage(
    config: RunConfig, number: int, model: ModelConfig, page: RunConfig, rate: float, gpus: int
) -> dict[str, Any]:
    """One stage at `rate` FLOP/s of all devices together."""
    full, causal = flops_per_token(model, row_of(page))
    tokens = stage_samples(config, number) * page.data.seq_len
    samples, readers = step_samples(page), _readers(config, gpus)
    waits = readers * ceil(samples / readers) / samples  # the rank with the most rows decides
    return {
        "steps": stages(config)[number].steps,
        "seq_len": page.data.seq_len,
        "samples": step_samples(page),
        "ramp": [list(part) for part in page.batch.ramp],
        "parameters": parameter_count(model),
        "tokens": tokens,
        "flops_per_token": {"full": full, "causal": causal},
        "flops": tokens * full,
        "step_s": samples * page.data.seq_len * full * waits / rate,
        "days": tokens * full * waits / rate / 86400,
        "remarks": [*staged.idle_options(config, number), *_idle(samples, readers)],
    }


def _recomputed(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """What is computed again in a stage, what that costs, and what lies on the host for it."""
    found = kept(config, model)
    row = row_of(config)
    return {
        **to_dict(config.recompute),
        "blocks": found.words(),
        "flops_again": found.flops / (flops_per_token(model, row)[0] * row.seq_len),
        "host_bytes": found.host,
    }


def _advice(config: RunConfig, model: ModelConfig, data: int, budget: float) -> str | None:
    """The smallest change that fits, or None if the run fits as it is."""
    zero, now, micro = config.parallel.zero, config.recompute, config.batch.micro
    kinds = ("none", "sublayer", "full")
    more = kinds[kinds.index(now.how) + 1 :] if now.how in kinds else ("full",)
    key = "recompute.how" if now.offload else "recompute"
    ways = [now, *(Recompute(how, None, now.offload) for how in more)]  # type: ignore[arg-type]
    for rows in (micro >> halved for halved in range(micro.bit_length())):
        for way in ways:
            for stage in range(zero, 4):
                if memory(config, model, stage, data, way, rows)["total"] > budget:
                    continue
                changes = [f"parallel.zero={stage}"] * (stage != zero)
                changes += [f"{key}={way.how}"] * (way != now)
                return " ".join(changes + [f"batch.micro={rows}"] * (rows != micro)) or None
    return "more or larger devices, or a larger parallel.tensor or parallel.sequence"


def _shares(pages: list[RunConfig], tokens: list[int]) -> list[dict[str, Any]]:
    """Each corpus of the stages' mixtures: its share of the run, and how often the run reads it."""
    seen: dict[str, float] = {}
    for page, read in zip(pages, tokens, strict=True):
        whole = sum(share.weight for share in page.data.train)
        for share in page.data.train:
            seen[share.corpus] = seen.get(share.corpus, 0.0) + read * share.weight / whole
    return [_share(corpus, count, count / sum(tokens)) for corpus, count in seen.items()]


def _share(corpus: str, seen: float, weight: float) -> dict[str, Any]:
    found = {"corpus": corpus, "weight": weight, "tokens_seen": seen, "tokens": None}
    try:
        manifest = json.loads((Path(corpus) / "manifest.json").read_text("utf-8"))
        train, vocab = manifest["splits"]["train"], manifest["tokenizer"]["vocab_size"]
        found |= {"tokens": train["tokens"], "documents": train["documents"], "vocab": vocab}
        found["epochs"] = seen / max(1, train["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not built yet, or being built: the table says so
    return found


def main(argv: list[str]) -> int:
    """`python -m launch plan CONFIG [key=value ...] --gpus N --gpu NAME [--json]`."""
    parser = argparse.ArgumentParser(prog="python -m launch plan", description="what a run costs")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--gpus", "--devices", type=int, default=1, help="how many (1)")
    parser.add_argument("--gpu", default="h200", help="a card of configs/gpus.yaml (h200)")
    parser.add_argument("--mfu", type=float, default=MFU, help=f"share of the peak ({MFU})")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    words = parser.parse_intermixed_args(argv)
    if words.gpus < 1 or not 0 < words.mfu <= 1:
        wrong = f"--gpus, --mfu: are {words.gpus}, {words.mfu}; must be >= 1, in (0, 1]"
        raise PlanError(f"{wrong} (超出取值范围)")
    config = manifests.checked(load(words.config, RunConfig, words.overrides))
    found = plan(config, words.gpus, words.gpu, words.mfu)
    print(json.dumps(found, ensure_ascii=False, indent=1) if words.json else text(found))
    return 0


def text(found: dict[str, Any]) -> str:
    """The plan for people: plain text, aligned, at most 110 columns."""
    blocks = [_model_rows, _batch_rows, _memory_rows, _time_rows, _data_rows]
    parts = [block(found) for block in blocks]
    if found["growth"]:
        parts.insert(-1, staged.rows(found["growth"]))
    return "\n\n".join(table(*part) for part in parts)


def table(title: str, rows: list[list[str]]) -> str:
    """A title and rows of cells; the first column is aligned left, the others right."""
    full = [row for row in rows if len(row) > 1]  # a sentence alone in its row widens no column
    widths = [max(_columns(r[c]) for r in full if c < len(r)) for c in range(max(map(len, full)))]
    lines = [title]
    for row in rows:
        spaces = [" " * (w - _columns(cell)) for w, cell in zip(widths, row, strict=False)]
        cells = [s + cell for s, cell in zip(spaces, row, strict=True)]
        cells[0] = row[0] + spaces[0]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _columns(cell: str) -> int:
    """Terminal columns of a text: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in cell)


def _model_rows(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    total = found["parameters"]["total"]
    rows = [
        [name, f"{count:,}", f"{count / total:.1%}"] for name, count in found["parameters"].items()
    ]
    flops = found["stages"][-1]["flops_per_token"]
    what = {"cpm": ", 6N+12LHQT", "t5_pegasus": " of the encoder, the decoder's work with it"}
    label = f"FLOPs per token{what.get(found['model']['family'], '')}"
    rows.append([label, f"{flops['full'] / 1e6:,.1f} M"])
    if flops["causal"] != flops["full"]:
        rows.append(["  the causal half counted", f"{flops['causal'] / 1e6:,.1f} M"])
    return "parameters (参数)", rows


def _batch_rows(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    b = found["batch"]
    kinds = ("data", "sequence", "tensor") if b["sequence_parallel"] > 1 else ("data", "tensor")
    ranks = [f"{b[f'{kind}_parallel']} {kind}" for kind in kinds]
    return "batch (批次)", [
        ["samples of a step", f"{b['samples']:,} = {b['tokens']:,} tokens"],
        ["ranks", " x ".join(ranks)],
        ["a rank's samples", f"{b['samples_per_rank']:,}, {b['micro']} at a time"],
        ["accumulation", f"{b['accumulation']} micro-batches"],
    ]


def _memory_rows(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    memory = found["memory"]
    stages, chosen = memory["by_zero_stage"], memory["zero"]
    head = [f"ZeRO {n}{' *' if n == chosen else ''}" for n in range(4)]
    rows = [["GiB", *head]]
    for part in (key for key in stages[0] if key != "fits"):
        rows.append([part, *(f"{s[part] / 2**30:.2f}" for s in stages)])
    rows.append(["fits (放得下)", *("yes" if s["fits"] else "NO" for s in stages)])
    if memory["advice"]:
        rows.append([f"this run does not fit; it would with: {memory['advice']}"])
    again = memory["recompute"]
    if again["how"] != "none":
        cost = f"{again['flops_again']:.1%} more FLOPs"
        rows.append([f"computed again: {again['blocks']}; {cost} (重计算)"])
    if again["host_bytes"]:
        rows.append([f"on the host of each rank: {again['host_bytes'] / 2**30:.2f} GiB (内存)"])
    device = f"{memory['device_bytes'] / 2**30:.1f} GiB"
    stage = f", stage {memory['stage']}" if len(found["stages"]) > 1 else ""
    title = f"memory of a device of {device}{stage}, recompute {again['how']} (显存; * chosen)"
    return title, rows


def _time_rows(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    t, held = found["time"], found["disk"]
    rows = []
    for number, s in enumerate(found["stages"]):
        size, tokens = f"{s['parameters'] / 1e6:,.1f} M", f"{s['tokens'] / 1e9:,.2f} B tokens"
        pace, days = f"{s['step_s']:.3g} s a step", f"{s['days']:.3g} days"
        rows_of = f"of {s['samples']:,} x {s['seq_len']:,}"
        steps = f"{s['steps']:,} steps"
        rows.append([f"stage {number}: {size}", steps, rows_of, tokens, pace, days])
        if s["ramp"]:
            unit = ", ".join(f"{size:,} for {steps:,} steps" for steps, size in s["ramp"])
            rows.append([f"  the batch ramps (爬坡): {unit}, then whole"])
        rows += [[f"  {sentence}"] for sentence in s["remarks"]]
    rows.append(["all", "", "", f"{t['flops']:.2e} FLOP", "", f"{t['days']:.3g} days"])
    if (left := t["left"]) and left["step"] is None:
        rows.append([f"  init.from: {left['from']} cannot be read here: its steps count too"])
    elif left:
        name, steps = f"left from step {left['step']:,} on", f"{left['steps']:,} steps"
        days = f"{left['days']:.3g} days"
        rows.append([name, steps, "", f"{left['flops']:.2e} FLOP", "", days])
    rows.append(["checkpoint", f"{held['checkpoint_bytes'] / 1e9:,.2f} GB"])
    kept = f"{held['checkpoints_kept']} kept, 1 being written"
    rows.append(["run folder", f"{held['run_bytes'] / 1e9:,.2f} GB", kept])
    speed = f"{t['gpus']} x {t['peak']}, MFU {t['assumed_mfu']:.0%} ASSUMED"
    return f"time and disk: {speed} (时间与磁盘)", rows


def _data_rows(found: dict[str, Any]) -> tuple[str, list[list[str]]]:
    rows = [["corpus", "weight", "tokens", "seen", "epochs"]]
    for number, share in enumerate(found["data"]):
        branch = "└─" if number + 1 == len(found["data"]) else "├─"
        known = share["tokens"] is not None
        tokens = f"{share['tokens'] / 1e6:,.2f} M" if known else "not built"
        epochs = f"{share['epochs']:.2f}" if known else "?"
        seen = f"{share['tokens_seen'] / 1e6:,.2f} M"
        rows.append([f"{branch} {share['corpus']}", f"{share['weight']:.1%}", tokens, seen, epochs])
    return "mixture (语料配比)", rows
