"""The plan: exact where it counts, close where it estimates, right words where it refuses.

Long because every family, GPU and schedule is planned here.
"""

import dataclasses
import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from configs.load import load
from configs.model import (
    CPMConfig,
    ModelConfig,
    RoFormerConfig,
    T5PegasusConfig,
    parameter_count,
)
from configs.positions import Rope
from configs.run import RunConfig
from launch import cli
from pretrain import models, parallel, plan, transient
from pretrain.costs import Row
from pretrain.kept import kept_of
from pretrain.models.cpm import CPM
from pretrain.models.layers import attention_sdpa
from tests.saved_bytes import fused, rows_of, saved_bytes

ROOT = Path(__file__).resolve().parent.parent
RUNS = sorted(ROOT.glob("configs/runs/*.yaml"))
SIZES = sorted(ROOT.glob("configs/sizes/*/*.yaml"))
SMALL = ROOT / "configs/runs/cpm-small-1gpu.yaml"
TOY = CPMConfig(
    "cpm", vocab=500, hidden=128, layers=3, heads=4, head_dim=32, ffn=512, positions=256
)


OFF = {"dropout": 0.0, "attention_dropout": 0.0}
T5 = T5PegasusConfig("t5_pegasus", 500, 128, 3, 4, 32, 192, **OFF)
ROFORMER = RoFormerConfig("roformer", 1, 500, 128, 3, 4, 32, 512, **OFF)
FAMILIES = {"t5": T5, "roformer": ROFORMER, "roformer v2": dataclasses.replace(ROFORMER, version=2)}
PAGES = {
    "cpm": SMALL,
    "t5_pegasus": ROOT / "configs/runs/t5-pegasus-tiny-cpu.yaml",
    "roformer": ROOT / "configs/runs/roformer-tiny-cpu.yaml",
}


def page(path: Path = SMALL, *overrides: str) -> RunConfig:
    return load(path, RunConfig, overrides)


# ---- counting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SIZES, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_parts_add_up_to_the_model(path: Path) -> None:
    """To the table's count and to that of the model built on the meta device."""
    model = sized(path).model
    parts = plan.parameters_by_part(model)
    with torch.device("meta"):
        built = models.build(model)
    assert sum(parts.values()) == parameter_count(model)
    assert sum(parts.values()) == sum(p.numel() for p in built.parameters())
    expected = {
        "cpm": {"embed.tokens", "embed.positions", "norms"},
        "t5_pegasus": {
            "embed.tokens", "encoder.position_bias", "decoder.position_bias", "head", "norms",
            "cross-attention",
        },
        "roformer": {"embed.tokens", "embed.segments"},
    }[model.family]  # fmt: skip
    if isinstance(model, RoFormerConfig) and model.version == 1:
        expected = expected | {"head", "head.dense", "norms"}
        expected |= {"embed.positions"} if model.positions is not None else set()
    assert set(parts) == expected | {"attention", "feed-forward"}
    said = path.read_text("utf-8").splitlines()[0]
    n = parameter_count(model)
    assert f"{n:,} parameters" in said or f"{n / 1e6:.1f} M parameters" in said


def sized(path: Path) -> RunConfig:
    """A run of a shipped size, on the page of its family."""
    from configs.load import read_yaml

    model = read_yaml(path)["model"]
    return page(PAGES[model["family"]], *(f"model.{key}={value}" for key, value in model.items()))


def test_flops_are_those_that_torch_counts() -> None:
    config = dataclasses.replace(TOY, dropout=0.0, attention_dropout=0.0)
    model = CPM(config)
    tokens = torch.randint(config.vocab, (2, 256))
    with FlopCounterMode(display=False) as counter:
        positions = torch.arange(256).expand_as(tokens)
        model.logits(model(tokens, positions)).sum().backward()
    full, causal = plan.flops_per_token(config, 256)
    # torch counts matrix products; 6 N counts biases and norms as well, less than 1 %
    assert full * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert causal == full - 12 * 3 * 4 * 32 * 256 * (1 - 257 / 512)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", [Row(96, 40, 1.0), Row(96, 40, 0.25), Row(60)])
def test_flops_of_every_family_are_the_products_that_run(family: str, row: Row) -> None:
    """To the last product: forward and backward of a whole row, the head on a share of it."""
    config = FAMILIES[family]
    model = models.build(config)
    for p in model.parameters():
        p.data.normal_(0, 0.02)
    with FlopCounterMode(display=False) as counter:
        hidden = model(*rows_of(config, row, 2)).flatten(0, 1)
        model.logits(hidden[: int(len(hidden) * row.predicted)]).sum().backward()
    full, _ = plan.flops_per_token(config, row)
    assert full * row.seq_len * 2 == pytest.approx(counter.get_total_flops(), rel=1e-12)
    # Negative control: a row that is one longer costs more.
    longer = dataclasses.replace(row, seq_len=row.seq_len + 1)
    assert plan.flops_per_token(config, longer)[0] * (row.seq_len + 1) > full * row.seq_len * 1.005


def test_flops_of_t5_pegasus_by_hand() -> None:
    """A row of 3 and 2 tokens, one layer: every product of the forward written out, times 3."""
    config = T5PegasusConfig("t5_pegasus", 11, 4, 1, 2, 3, 5)
    S, T, D, inner, F, V = 3, 2, 4, 6, 5, 11
    encoder = S * (4 * D * inner + 3 * D * F) + 2 * S * S * inner
    own = T * (4 * D * inner + 3 * D * F) + 2 * T * T * inner
    across = T * 2 * D * inner + S * 2 * D * inner + 2 * T * S * inner
    forward = 2 * (encoder + own + across + T * D * V)
    assert plan.flops_per_token(config, Row(S, T))[0] == pytest.approx(3 * forward / S)
    full, causal = plan.flops_per_token(config, Row(S, T))
    assert (full - causal) * S == pytest.approx(12 * (T * T - T * (T + 1) / 2) * inner)


def test_flops_of_record() -> None:
    """GPT-2's formula by hand for CPM Small: N without the 786,432 of the positions."""
    full, _ = plan.flops_per_token(page().model, 1024)
    assert full == 6 * (108_882_432 - 786_432) + 12 * 12 * 12 * 64 * 1024


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_that_autograd_keeps(precision: str, masked: bool) -> None:
    """Without dropout, whose mask is a byte on a GPU and a float on a CPU."""
    config = dataclasses.replace(TOY, dropout=0.0, attention_dropout=0.0)
    model = CPM(config, attention_sdpa).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    tokens = torch.randint(config.vocab, (2, 256))
    positions = torch.arange(256).expand_as(tokens)
    documents = torch.zeros_like(tokens) if masked else None
    counted = saved_bytes(model, lambda: model.logits(model(tokens, positions, documents)))
    estimate = kept_of(config, 256, 2, precision, "none", masked=masked).device
    # small things (ids, statistics of norms) differ between devices
    assert counted == pytest.approx(estimate, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["t5", "roformer"])
def test_activations_of_the_families(family: str, precision: str) -> None:
    """As above; T5's bias and its gradient have the size of one [heads, T, S] a stack and row."""
    config, row, rows = FAMILIES[family], Row(192, 64), 2
    model, biases = fused(config, torch.float32 if precision == "fp32" else torch.bfloat16)
    given = rows_of(config, row, rows)
    counted = saved_bytes(model, lambda: model(*given))
    counted += sum(b.untyped_storage().nbytes() for b in biases.values())  # their gradients
    estimate = kept_of(config, row, rows, precision, "none").device
    assert counted == pytest.approx(estimate, rel=0.05)


@pytest.mark.parametrize("config", [page().model, *FAMILIES.values()], ids=["cpm", *FAMILIES])
def test_recompute_keeps_less(config: ModelConfig) -> None:
    config = dataclasses.replace(config, layers=24)
    none, sub, full = (
        kept_of(config, 256, 16, "bf16", how, masked=False).device
        for how in ("none", "sublayer", "full")
    )
    assert full < sub < none and full < none / 2


def test_zero_stages_divide_what_they_say() -> None:
    config = page(SMALL, "precision=bf16")
    n = parameter_count(config.model)
    stages = [plan.memory(config, config.model, zero, 4) for zero in range(4)]
    one, two, three = stages[1:]
    assert one["weights"] == two["weights"] == 2 * n
    assert one["gradients (fp32)"] == 4 * n and two["gradients (fp32)"] == n
    assert one["masters (fp32)"] == n and one["moments (fp32)"] == 2 * n
    assert three["weights"] == 2 * (n / 4 + 2 * 30000 * 768)  # in use, and fetched ahead
    plain = plan.memory(page(SMALL, "precision=fp32"), config.model, 0, 4)
    assert plain["weights"] == 4 * n and plain["masters (fp32)"] == 0
    assert plain["moments (fp32)"] == 8 * n
    assert all(s["total"] == sum(v for k, v in s.items() if k != "total") for s in stages)


@pytest.mark.parametrize("family", ["t5_pegasus", "roformer"])
def test_logits_are_those_of_the_positions_that_are_predicted(family: str) -> None:
    config = page(PAGES[family], "precision=fp32")
    tokens = {"t5_pegasus": 4 * 128, "roformer": 16 * 128 * 0.15}[family]
    found = plan.memory(config, config.model, 1, 2)
    assert found["logits"] == pytest.approx(tokens * 8000 * 8)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_what_their_loss_allocates(
    precision: str, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of the trainer's own loss, in one go and in turns: the same numbers
    that planning reads decide what is there at a time. Within 2 %: ids, losses, weights."""
    rows, vocab, dtype = 768, 2000, torch.float32 if precision == "fp32" else torch.bfloat16
    monkeypatch.setitem(transient.LOGITS_AT_ONCE, "cpu", rows * vocab // turns)
    monkeypatch.setitem(transient.SOFTMAX_AT_ONCE, "cpu", 16 * vocab)
    mesh = parallel.Mesh(0, 1, 1, 0, 1, 0, torch.device("cpu"))
    losses = parallel.token_losses(mesh, vocab)
    hidden = torch.randn(rows, 2, dtype=dtype, requires_grad=True)
    head = torch.randn(vocab, 2, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (rows,))
    # oneDNN packs matrices aside on a CPU with bf16 instructions, and on no other.
    with torch.backends.mkldnn.flags(enabled=False), profile(profile_memory=True) as profiler:
        losses(lambda x: x @ head.T, hidden, targets).sum().backward()
    found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(accumulate(e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())))
    planned = transient.logits_bytes(rows * vocab, precision, device="cpu")
    assert peak == pytest.approx(planned, rel=0.02)
    assert planned < 2 * transient.WIDTH[precision] * rows * vocab / turns


def test_a_gpu_is_planned_by_its_own_turns() -> None:
    """CPM Small, 16 rows: 492 M logits of bf16, and of their softmax the part that CUDA makes."""
    found = plan.memory(page(), page().model, 1, 1)
    assert found["logits"] == 2 * 16 * 1024 * 30000 + 8 * 2**26


def test_messages_have_two_buffers_wherever_gradients_travel_during_the_backward_pass() -> None:
    """Left out, ZeRO 3 does so as if asked to; its bucket holds the largest matrix at most."""
    left, asked = (
        [plan.memory(config, page().model, zero, 4)["messages"] for zero in range(4)]
        for said in ("null", "true")
        for config in [page(SMALL, f"parallel.overlap={said}", "parallel.zero=2")]
    )
    assert left[3] == asked[3] == 2 * 4 * 30000 * 768
    assert asked[:3] == [2 * size for size in left[:3]] == [2 * 4 * 108_882_432] * 3


REROPE = RoFormerConfig(
    "roformer", 1, 96, 64, 3, 4, 16, 128, dropout=0.0, attention_dropout=0.0,
    rope=Rope("rerope", 128, window=64),
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rerope_keeps_a_matrix_for_every_head(precision: str) -> None:
    """It goes by products on a GPU too. Beside the scores are three kinds of queries and keys."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model, given = models.build(REROPE).to(dtype), rows_of(REROPE, Row(512), 2)
    counted = saved_bytes(model, lambda: model(*given))
    estimate = kept_of(REROPE, 512, 2, precision, "none").device
    assert counted == pytest.approx(estimate, rel=0.1)
    plain = dataclasses.replace(REROPE, rope=Rope("linear", 128, 4.0))
    assert kept_of(plain, 512, 2, precision, "none").device < 0.5 * estimate


@pytest.mark.parametrize(("dropout", "each"), [(0.0, 2), (0.1, 5)])
def test_its_scores_are_shared_by_heads(dropout: float, each: int) -> None:
    """bf16: the softmax, what dropout leaves of it, a byte of mask; half the heads on each of two
    devices that share a row."""
    config = dataclasses.replace(REROPE, attention_dropout=dropout)
    plain = dataclasses.replace(config, rope=Rope("linear", 128, 4.0))
    for sequence in (1, 2):
        windowed, fused_ = (
            kept_of(c, 512, 2, "bf16", "none", sequence=sequence).device for c in (config, plain)
        )
        assert windowed - fused_ == 2 * 3 * (4 / sequence) * 512**2 * each


def test_a_step_takes_as_long_as_its_fullest_rank() -> None:
    """512 rows on 800 devices are as slow as on 512, and 801 as 1,600; the idle ones are told."""
    took = {}
    for samples in (512, 800, 801):
        config = page(SMALL, f"batch={{samples: {samples}, micro: 1}}")
        (stage,) = plan.plan(config, 800, "h800")["stages"]
        took[samples] = stage["step_s"], [line for line in stage["remarks"] if "no row" in line]
    assert took[512][0] == pytest.approx(took[800][0])
    assert took[801][0] == pytest.approx(2 * took[800][0])
    assert "288 of 800 ranks" in took[512][1][0] and not took[800][1] and not took[801][1]


def test_tensor_parallelism_divides_the_matrices() -> None:
    config = page(SMALL, "parallel.tensor=2")
    whole = plan.memory(page(), config.model, 1, 1)
    half = plan.memory(config, config.model, 1, 1)
    # what is replicated (positions, norms, output biases) is 1 % of the model
    assert half["weights"] == pytest.approx(whole["weights"] / 2, rel=0.02)


def test_batch_arithmetic_is_derived() -> None:
    found = plan.plan(
        page(SMALL, "batch.tokens=null", "batch.samples=100", "batch.micro=8"), 6, "a800"
    )
    batch = found["batch"]
    assert (batch["samples_per_rank"], batch["accumulation"]) == (17, 3)


def test_time_is_flops_over_peak() -> None:
    found = plan.plan(page(), 2, "h200", mfu=0.5)
    full, _ = plan.flops_per_token(page().model, 1024)
    assert found["stages"][0]["step_s"] == pytest.approx(524288 * full / (2 * 989e12 * 0.5))
    assert found["time"]["flops"] == pytest.approx(20000 * 524288 * full)


def test_steps_that_are_done_are_not_paid_again(tmp_path: Path) -> None:
    """`init: all`, from a checkpoint or the newest of a run; one that is not here is told."""
    stages = "stages=[{steps: 15000}, {steps: 5000, model: {layers: 24}}]"
    for name, step in (("stage-00-step-00009000", 9000), ("stage-01-step-00016000", 16000)):
        (tmp_path / "run/checkpoints" / name).mkdir(parents=True)
        state = tmp_path / "run/checkpoints" / name / "state.json"
        state.write_text(json.dumps({"step": step}), "utf-8")
    for origin, step in (
        ("run", 16000),
        ("run/checkpoints/stage-00-step-00009000", 9000),
        ("none", None),
    ):
        init = f"init={{from: {tmp_path / origin}, what: all}}"
        found = plan.plan(page(SMALL, "run.steps=null", stages, init), 1, "h200")
        (first, second), left = found["stages"], found["time"]["left"]
        assert left["step"] == step
        if step is None:
            assert "cannot be read here: its steps count too" in plan.text(found)
            continue
        shares = (max(0, 15000 - step) / 15000, min(1.0, (20000 - step) / 5000))
        want = sum(s * one["flops"] for s, one in zip(shares, (first, second), strict=True))
        assert left["flops"] == pytest.approx(want) and left["steps"] == 20000 - step
        assert f"left from step {step:,} on" in plan.text(found)


def test_a_run_that_grows_is_planned_stage_by_stage() -> None:
    found = plan.plan(
        page(
            SMALL, "run.steps=null", "stages=[{steps: 15000}, {steps: 5000, model: {layers: 24}}]"
        ),
        1,
        "h200",
    )
    first, second = found["stages"]
    assert first["parameters"] == 108_882_432 and second["parameters"] == 193_936_896
    assert found["parameters"]["total"] == second["parameters"]
    assert found["disk"]["checkpoint_bytes"] == 12 * second["parameters"]
    assert found["time"]["days"] == first["days"] + second["days"]


# ---- cards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("h200", "bf16", 989e12),
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H20", "bf16", 148e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "fp16", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H800", "bf16", 989.4e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-PCIE-32GB", "fp32", 14e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", "bf16", 147.1e12),
    ],
)
def test_peaks_are_dense_and_found_by_the_devices_name(
    name: str, precision: str, peak: float
) -> None:
    assert plan.peak_flops(name, precision) == peak


def test_every_card_has_a_source() -> None:
    cards = load(ROOT / "configs/gpus.yaml", plan.Cards).cards
    assert all(len(c.source) > 20 and c.memory_gib > 10 for c in cards.values())
    # a sparse figure slipped in would be twice as high as any card of these has
    assert all((c.bf16 or c.fp16 or 0) < 1000 for c in cards.values())


@pytest.mark.parametrize(
    ("gpu", "precision", "says"),
    [("h2000", "bf16", "did you mean 'h200'"), ("v100", "bf16", "use fp16 or fp32")],
)
def test_what_a_card_cannot_is_a_sentence(gpu: str, precision: str, says: str) -> None:
    with pytest.raises(plan.PlanError, match=says):
        plan.device_peak(gpu, precision)


# ---- the verb ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_shipped_run_plans_and_fits_the_card_it_is_for(path: Path) -> None:
    gpus = int(path.stem[-4]) if path.stem.endswith("gpu") else 2
    found = plan.plan(page(path), gpus, "h200")
    assert found["memory"]["advice"] is None
    assert json.loads(json.dumps(found)) == found
    assert "ASSUMED" in plan.text(found)


@pytest.mark.parametrize("path", SIZES, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_every_shipped_size_plans(path: Path) -> None:
    found = plan.plan(sized(path), 1, "h200")
    assert f"{found['parameters']['total']:,}" in plan.text(found)


def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    large = str(ROOT / "configs/runs/cpm-large-8gpu.yaml")
    assert cli.main(["plan", large, "--gpus", "8", "--gpu", "4090"]) == 0
    said = capsys.readouterr().out
    assert "does not fit; it would with: parallel.zero=2" in said
    assert cli.main(["plan", large, "parallel.zero=2", "--gpus", "8", "--gpu", "4090"]) == 0
    assert "does not fit" not in capsys.readouterr().out
    assert cli.main(["plan", large, "--gpus", "1", "--gpu", "4090"]) == 0
    assert "more or larger devices" in capsys.readouterr().out


def test_the_table_is_aligned_where_chinese_stands(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["甲乙", "1"], ["ab", "22"], ["one sentence that is long"]]
    assert plan.table("t", rows).splitlines() == [
        "t",
        "  甲乙   1",
        "  ab    22",
        "  one sentence that is long",
    ]
    assert cli.main(["plan", str(SMALL)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


def test_the_mixture_is_shown_with_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    manifest = {
        "tokenizer": {"vocab_size": 30000},
        "splits": {"train": {"tokens": 1_000_000, "documents": 10}},
    }
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest), "utf-8")
    mixture = (
        f"data.train=[{{corpus: {tmp_path}/a, weight: 3}}, {{corpus: {tmp_path}/b, weight: 1}}]"
    )
    found = plan.plan(page(SMALL, mixture, "run.steps=8000"), 1, "h200")
    built, missing = found["data"]
    assert built["weight"] == 0.75 and missing["tokens"] is None
    assert built["epochs"] == pytest.approx(0.75 * 8000 * 524288 / 1e6)
    said = plan.text(found)
    assert f"├─ {tmp_path}/a" in said and f"└─ {tmp_path}/b" in said and "not built" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "3", "parallel.tensor=2"], "cannot be divided"),
        (["--devices", "3", "parallel.tensor=2"], "cannot be divided"),
        (["--gpus", "0"], "must be >= 1"),
        (["--mfu", "40"], "in (0, 1]"),
        (["--gpu", "tpu"], "configs/gpus.yaml"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(SMALL), *words]) == 2
    assert says in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from launch.cli import main; "
        f"assert main(['plan', {str(SMALL)!r}, '--json']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["total"] == 108_882_432
