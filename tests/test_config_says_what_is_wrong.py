"""A config becomes frozen, typed pages; every problem is said at once, with the nearest key."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs.load import ConfigError, dump, from_dict, load, read_yaml, to_dict
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig, parameter_count
from configs.run import (
    RunConfig,
    at_stage,
    stage_model,
    stages,
    step_samples,
    total_steps,
    with_threads,
    world_problems,
)

ROOT = Path(__file__).resolve().parent.parent
RUNS = sorted(ROOT.glob("configs/runs/*.yaml"))
SIZES = sorted(ROOT.glob("configs/sizes/*/*.yaml"))
SMALL = ROOT / "configs/runs/cpm-small-1gpu.yaml"


def said(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, RunConfig, overrides)
    lines = str(caught.value).splitlines()
    assert all(re.search("[\u4e00-\u9fff]", line) for line in lines), lines  # in Chinese as well
    return lines


# ---- what is shipped -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_every_shipped_run_loads_and_comes_back(path: Path) -> None:
    config = load(path, RunConfig)
    assert from_dict(RunConfig, to_dict(config)) == config
    assert config.problems() == []


PUBLISHED = {
    "cpm/tiny": 11_101_696,
    "cpm/small": 108_882_432,
    "cpm/medium": 334_080_000,
    "cpm/large": 2_597_073_920,
    "t5_pegasus/tiny": 10_393_344,
    "t5_pegasus/small": 95_262_080,
    "t5_pegasus/base": 275_029_248,
    "t5_pegasus/large": 819_751_936,
    "roformer/tiny": 5_282_368,
    "roformer/small": 30_046_928,
    "roformer/base": 124_099_664,
    "roformer/large": 354_615_120,
    "bert/tiny": 5_413_440,
    "bert/base": 102_290_312,
    "bert/large": 325_545_608,
    "wobert/base": 124_492_880,
    "roformer_v2/tiny": 5_194_240,
    "roformer_v2/small": 15_225_600,
    "roformer_v2/base": 94_152_192,
    "roformer_v2/large": 314_279_936,
}


@pytest.mark.parametrize("path", SIZES, ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_every_shipped_size_is_the_published_one(path: Path) -> None:
    @dataclass(frozen=True)
    class Size:
        model: ModelConfig

    published = PUBLISHED[f"{path.parent.stem}/{path.stem}"]
    model = from_dict(Size, read_yaml(path)).model
    assert model.problems() == [] and parameter_count(model) == published
    first_line = path.read_text("utf-8").splitlines()[0]
    if path.stem != "tiny":
        assert f"{published:,}" in first_line


def test_the_page_needs_no_torch() -> None:
    code = (
        "import sys, configs.load, configs.model, configs.run; "
        f"configs.load.load({str(SMALL)!r}, configs.run.RunConfig); "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---- reading -------------------------------------------------------------------------------------


def test_the_dump_is_the_page(tmp_path: Path) -> None:
    config = load(SMALL, RunConfig, ["stages=[{steps: 20000, model: {layers: 14}}]"])
    (tmp_path / "config.yaml").write_text(dump(config), "utf-8")
    assert load(tmp_path / "config.yaml", RunConfig) == config


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {layers: 3, ffn: 5}\nrun: {steps: 7}\n", "utf-8")
    (tmp_path / "b.yaml").write_text("model: {ffn: 6}\n", "utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/c.yaml").write_text(
        "base: [../a.yaml, ../b.yaml]\nmodel: {layers: 4}\nstages: [{base: ../b.yaml}]\n",
        "utf-8",
    )
    data = read_yaml(tmp_path / "sub/c.yaml")
    assert data["model"] == {"layers": 4, "ffn": 6} and data["run"] == {"steps": 7}
    assert data["stages"] == [{"model": {"ffn": 6}}]  # a stage may take its model from a size
    config = load(SMALL, RunConfig, ["optimizer.lr=1e-4", "run.steps=1e5", "model.dropout=0"])
    assert config.optimizer.lr == 1e-4 and config.run.steps == 100_000
    assert config.model.dropout == 0.0 and isinstance(config.model.dropout, float)


def test_a_list_is_reached_by_number() -> None:
    config = load(SMALL, RunConfig, ["data.train.0.weight=2.5"])
    assert config.data.train[0].weight == 2.5
    assert "below 1" in said(SMALL, "data.train.3.weight=1")[0]


def test_pages_are_frozen() -> None:
    config = load(SMALL, RunConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3  # type: ignore[misc]
    assert with_threads(config, 3).run.threads == 3 and config.run.threads == 0


# ---- what is wrong -------------------------------------------------------------------------------


def test_all_problems_are_said_at_once_each_with_its_key() -> None:
    lines = said(
        SMALL,
        "model.layrs=3",
        "optimizer.learning_rate=1",
        "precision=bf61",
        "batch.micro=many",
        "data.seq_len=null",
        "recompute=sub-layer",
    )
    text = "\n".join(lines)
    for words in (
        "model.layrs: unknown key",
        "did you mean 'layers'",
        "optimizer.learning_rate: unknown key",
        "precision: is 'bf61'",
        "did you mean 'bf16'",
        "batch.micro: must be a whole number, is text 'many'",
        "data.seq_len: must be a whole number",
        "recompute.how: is 'sub-layer'",
        "did you mean 'sublayer'",
    ):
        assert words in text
    assert len(lines) == 6


def test_what_sections_say_of_themselves_is_gathered_too() -> None:
    text = "\n".join(
        said(
            SMALL,
            "optimizer.lr=-1",
            "optimizer.beta2=1",
            "model.dropout=1.5",
            "batch.samples=4",
            "run.keep_checkpoints=0",
            "schedule.warmup_steps=50000",
            "data.train.0.weight=0",
        )
    )
    for words in (
        "optimizer.lr: is -1.0, must be above 0",
        "optimizer.beta2: is 1.0, must lie in [0, 1)",
        "model.dropout: is 1.5",
        "batch.samples, tokens: give exactly one",
        "run.keep_checkpoints: is 0",
        "schedule: warm-up and decay take 54000 steps, it spans 20000",
        "data.train.0.weight: is 0.0",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.family=gpt"], "model.family: is 'gpt', must be one of cpm, t5_pegasus, roformer"),
        (["model.vocab=null"], "model.vocab"),
        (["run.steps=null"], "run.steps: must be given"),
        (["stages=[{steps: 3}]"], "run.steps: is 20000, the stages add up to 3"),
        (["run.steps=null", "stages=[{steps: 0}]"], "stages.0.steps: is 0"),
        (
            ["run.steps=null", "stages=[{steps: 9000}, {steps: 1, model: {layrs: 9}}]"],
            "stages.1.model.layrs: unknown key",
        ),
        (["run.steps=null", "stages=[{steps: 9000, model: {family: roformer}}]"], "cannot become"),
        (["data.seq_len=2048"], "data.seq_len: is 2048, model.positions has 1024 rows"),
        (["batch.tokens=1000"], "batch.tokens: is 1000, less than one row of 1024"),
        (["parallel.tensor=5"], "model.heads: is 12, not divisible by parallel.tensor=5"),
        (["optimizer.lr=.nan"], "optimizer.lr: is nan, must be a finite number"),
        (["optimizer.clip_norm=.inf"], "optimizer.clip_norm: is inf, must be a finite number"),
        (["parallel.zero=4"], "parallel.zero: is '4', must be one of 0, 1, 2, 3"),
        (["parallel=3"], "parallel: must be a mapping"),
        (["run.out.x=3"], "'out' is a text, it has no keys of its own"),
        (["steps"], "an override is written key=value"),
        (["run.steps=[3"], "run.steps: not valid YAML"),
        (["data.train=[]"], "names no corpus"),
        (["data.train=3"], "data.train: must be a list, is a number (须为列表)"),
        (["data.skips=[[1]]"], "data.skips.0: must hold 2 values, holds 1 (个数不符)"),
        (["data.skips=[[3, 2]]"], "skips: [3, 2] is no range of samples"),
        (["batch.micro=abc"], "batch.micro: must be a whole number, is text 'abc' (须为整数)"),
        (["batch=3"], "batch: must be a mapping of keys, is a number (须为键值映射)"),
        (["batch.micro=0"], "batch.micro: is 0, must be at least 1 (超出取值范围)"),
        (["optimizer.name=adam"], "name: is 'adam', must be one of"),
        (["model.family=gpt2"], "model.family: is 'gpt2', must be one of"),
        (["model.frozen=1"], "model.frozen: unknown key (未知的键)"),
        (["data.train.7.weight=1"], "'7' must be a number below 1"),
        (["optimizer.lazy_rows=true", "optimizer.name=lamb"], "lazy_rows: is built for adamw"),
        (["schedule.warmup_steps=50000"], "warm-up and decay take"),
        (["run.steps=null", "stages=[{steps: 9000, extend: {}}]"], "extend: needs data.seq_len"),
        (
            ["run.steps=null", "stages=[{steps: 9000, data: {skips: [[1, 2]]}}]"],
            "stages.0.data.skips: is of the whole run",
        ),
        (["schedule.name=constant"], "schedule.decay_steps: is 4000, which constant does not read"),
        (["schedule.name=cosine", "schedule.decay_steps=0", "schedule.decay=sqrt"], "only wsd"),
        (["optimizer.eps=1e-60"], "optimizer.eps: is 1e-60, must be at least 1e-30"),
        (["optimizer.lookahead_share=0.3"], "lookahead_every is 0, so that nothing looks ahead"),
        (["parallel.overlap=true"], "parallel.overlap: is true, and ZeRO 1 in bf16 sends"),
        (["parallel.overlap=true", "parallel.zero=0", "precision=fp32"], "take parallel.zero=2"),
        (["model.logit_scale=0"], "model.logit_scale: is 0"),
    ],
)
def test_each_mistake_is_a_sentence_with_its_key(overrides: list[str], says: str) -> None:
    assert says in "\n".join(said(SMALL, *overrides))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (T5PegasusConfig("t5_pegasus", 96, 32, 1, 3, 8, 48, buckets=1), "buckets: is 1, must be"),
        (T5PegasusConfig("t5_pegasus", 96, 32, 1, 3, 8, 48, max_distance=16), "must be above 16"),
        (T5PegasusConfig("t5_pegasus", 96, 32, 1, 3, 8, 48, bucket_spans=-1), "spans: is -1"),
        (T5PegasusConfig("t5_pegasus", 96, 32, 1, 3, 8, 48, max_distance=0), "max_distance: is 0"),
        (T5PegasusConfig("t5_pegasus", 96, 32, 1, 3, 8, 48, softmax_scale=-1.0), "above 0"),
        (RoFormerConfig("roformer", 1, 96, 32, 1, 4, 8, 64, rope_base=0.0), "rope_base: is 0"),
        (RoFormerConfig("roformer", 1, 96, 32, 1, 4, 8, 64, rope_base=-5.0), "must be above 1"),
    ],
)
def test_numbers_that_make_no_function_are_refused(model: Any, says: str) -> None:
    """An infinite angle, the logarithm of 0, an index of nowhere: on a GPU they are heard of far
    from their cause."""
    assert says in "\n".join(model.problems())


def test_stages_over_a_base_with_steps_say_how_to_leave_them_out(tmp_path: Path) -> None:
    """What is inherited cannot be deleted from the page; null can be written there."""
    page = tmp_path / "page.yaml"
    text = f"base: {SMALL}\nstages: [{{steps: 9000}}, {{steps: 50}}]\n"
    page.write_text(text, "utf-8")
    [told] = said(page)
    assert "the stages add up to 9050; leave one out (write `run.steps: null` if a base" in told
    page.write_text(text + "run: {steps: null}\n", "utf-8")
    assert total_steps(load(page, RunConfig)) == 9050


def test_a_stage_with_another_schedule_leaves_the_old_ones_keys_behind() -> None:
    stages = "stages=[{steps: 9000}, {steps: 9000, schedule: {name: constant}}]"
    config = load(SMALL, RunConfig, ["run.steps=null", stages])
    assert (config.schedule.name, config.schedule.decay_steps) == ("wsd", 4000)
    later = at_stage(config, 1).schedule
    assert (later.name, later.decay_steps, later.warmup_steps) == ("constant", 0, 1000)
    there_and_back = (
        "stages=[{steps: 6000}, {steps: 7000, schedule: {name: constant}}, "
        "{steps: 7000, schedule: {name: wsd}}]"
    )
    given = ["run.steps=null", "schedule.min_ratio=0.01", there_and_back]
    last = at_stage(load(SMALL, RunConfig, given), 2).schedule
    assert (last.name, last.decay_steps, last.min_ratio) == ("wsd", 4000, 0.01)


def test_a_stage_with_another_optimizer_keeps_what_it_reads() -> None:
    """`decay` is a key of both sections."""
    stages = "stages=[{steps: 9000}, {steps: 9000, optimizer: {name: rms_adamw, lr: 0.01}}]"
    config = load(SMALL, RunConfig, ["run.steps=null", "optimizer.decay=all", stages])
    assert at_stage(config, 1).optimizer.decay == "all"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: nowhere.yaml\n", "nowhere.yaml: no such config file"),
        ("base: page.yaml\n", "in a circle"),
        ("base: 5\n", "base: must name a file or list files, is 5"),
        ("base: [null]\n", "base: must name a file or list files"),
        ("? [a]\n: 1\n", "line 1: a key is a word, this one is a list"),
        ("run: {steps: 1}\nrun: {steps: 2}\n", "the key 'run' stands twice"),
        ("run: [1, 2\n", "not valid YAML"),
        ("- 1\n- 2\n", "is a list"),
        ("", "model: must be given"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "page.yaml").write_text(text, "utf-8")
    lines = said(tmp_path / "page.yaml")
    assert "page.yaml" in lines[0] or "nowhere.yaml" in lines[0]
    assert says in "\n".join(lines)


def test_not_even_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_bytes(b"\xff\xfe\x00run")
    assert "page.yaml: cannot be read" in said(tmp_path / "page.yaml")[0]
    assert "cannot be read" in said(tmp_path)[0]


def test_nothing_can_be_run_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text("run: !!python/object/apply:os.system [true]\n", "utf-8")
    assert "not valid YAML" in said(tmp_path / "page.yaml")[0]


# ---- stages and batch arithmetic -----------------------------------------------------------------


def test_a_run_is_a_list_of_stages() -> None:
    config = load(
        SMALL,
        RunConfig,
        ["run.steps=null", "stages=[{steps: 9000}, {steps: 50, model: {layers: 14}}, {steps: 5}]"],
    )
    assert total_steps(config) == 9055 and len(stages(config)) == 3
    models = [stage_model(config, number) for number in range(3)]
    assert [m.layers for m in models] == [12, 14, 14]
    assert all(isinstance(m, CPMConfig) and m.hidden == 768 for m in models)
    one = load(SMALL, RunConfig)
    assert [s.steps for s in stages(one)] == [20000]


def test_samples_are_derived() -> None:
    assert step_samples(load(SMALL, RunConfig)) == 512
    assert step_samples(load(SMALL, RunConfig, ["batch.tokens=5000"])) == 4
    assert step_samples(load(SMALL, RunConfig, ["batch.tokens=null", "batch.samples=7"])) == 7


def test_a_world_must_hold_whole_tensor_groups() -> None:
    config = load(SMALL, RunConfig, ["parallel.tensor=2"])
    assert world_problems(config, 4) == []
    assert "3 processes cannot be divided" in world_problems(config, 3)[0]
