"""A training run on one page: what `deepspeed pretrain/train.py CONFIG` reads.

    model, objective, data, batch, optimizer, schedule, parallel, precision, recompute, run,
    stages, init, faults, monitor

The whole page is opened once, in train(); every other room gets its own section. A run is a list of
stages; a file that names none has one. Progress is not here: it lives in the run folder.

Long because what no single section can see is said here, beside the sections.
"""

import dataclasses
import fnmatch
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_type_hints

from configs.batch import Batch
from configs.extended import Extend, extended
from configs.faults import Faults
from configs.grown import EXACT, MATRICES, Growing, completed, refusal
from configs.load import ConfigError, from_dict, to_dict
from configs.model import ModelConfig, longest_row, tensors
from configs.monitoring import Monitoring
from configs.objectives import Causal, Objective, data_problems, head_problems
from configs.optimizers import Optimizer, Schedule, moments, problems_with_model, read_by_schedule
from configs.parallel import (
    Parallel,
    layout_problems,
    overlap_problems,
    problems_on,
    row_problems,
)
from configs.recompute import Recompute


@dataclass(frozen=True)
class CorpusShare:
    """One corpus of the mixture."""

    corpus: str
    """The folder that `python -m launch corpus` made (its data.out)."""
    weight: float = 1.0
    """Share of the samples, relative to the other weights."""

    def problems(self) -> list[str]:
        """A weight that means nothing."""
        return [] if self.weight > 0 else [f"weight: is {self.weight}, must be above 0"]


@dataclass(frozen=True)
class Data:
    """Which tokens, in rows of what length."""

    train: tuple[CorpusShare, ...]
    """The mixture; its valid splits are the validation data."""
    seq_len: int
    """Tokens of a row (a sample); of an encoder's row where there is one."""
    target_len: int | None = None
    """Tokens of a decoder's row, where there is an encoder."""
    packing: Literal["windows", "documents", "best_fit"] | None = None
    """windows: the stream cut every seq_len tokens; documents: a piece of one document, or one
    pair, a row, with padding; best_fit: several, packed by a plan. null: windows, and best_fit for
    pseudo_summary and pairs (排布)."""
    skips: tuple[tuple[int, int], ...] = ()
    """Ranges [first, end) of the sample stream that are passed over; `skips` in state.json names
    those that a run has rewound for, and given here a replay does the same (跳过的样本)."""

    def problems(self) -> list[str]:
        """A mixture without corpora, a row without tokens."""
        found = (
            []
            if self.train
            else ["train: names no corpus; give a list of {corpus: FOLDER} (须有语料)"]
        )
        for key in ("seq_len", "target_len"):
            if (value := getattr(self, key)) is not None and value < 1:
                found.append(f"{key}: is {value}, must be above 0")
        found += [
            f"skips: [{first}, {end}] is no range of samples, must be 0 <= first < end (区间不合法)"
            for first, end in self.skips
            if not 0 <= first < end
        ]
        return found


@dataclass(frozen=True)
class Run:
    """Where a run lives, how long it is and what it writes."""

    out: str
    """The run folder, empty or a run's own; a run that finds a checkpoint there resumes."""
    steps: int | None = None
    """Optimizer steps; leave it out where stages say theirs."""
    seed: int = 1
    """Decides the fresh weights, the order of the data and the dropout."""
    log_every_steps: int = 10
    """Steps between progress lines (metrics.jsonl has every step)."""
    validate_every_steps: int = 0
    """Steps between validations; 0 validates at the end only."""
    validate_samples: int = 64
    """Rows of the validation data that are measured, always the same ones."""
    save_every_steps: int = 0
    """Steps between checkpoints; 0 saves at stage borders and at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; those at stage borders stay."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this stay as well; 0: none."""
    keep_best: int = 0
    """So many with the lowest validation loss stay as well (saved where a validation was made)."""
    ephemeral_every_steps: int = 0
    """Steps between checkpoints of which only the newest is kept, to lose little when something
    fails; 0: none (临时检查点)."""
    prompt: str = ""
    """A text that the model continues at each validation; empty: the valid split's first words."""
    stop_at_step: int = 0
    """Save and end in good order after this step, as at a time limit; 0 runs to the end."""
    threads: int = 0
    """CPU threads of a process; 0: the cores divided by the processes (recorded with the run)."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        counts = ("log_every_steps", "keep_checkpoints", "validate_samples")
        found = [
            f"{n}: is {getattr(self, n)}, must be at least 1"
            for n in counts
            if getattr(self, n) < 1
        ]
        rhythm = ("validate_every_steps", "save_every_steps", "stop_at_step", "threads")
        for name in (*rhythm, "keep_every_steps", "keep_best", "ephemeral_every_steps"):
            if getattr(self, name) < 0:
                found.append(f"{name}: is {getattr(self, name)}, must not be negative")
        if self.steps is not None and self.steps < 1:
            found.append(f"steps: is {self.steps}, must be at least 1")
        return found


@dataclass(frozen=True)
class Stage:
    """A stretch of the run; what it changes is applied to the one logical state at its border."""

    steps: int
    """Optimizer steps of this stage."""
    model: dict[str, Any] = field(default_factory=dict)
    """Sizes that differ from the stage before, e.g. {layers: 24}: the model is grown to them."""
    data: dict[str, Any] = field(default_factory=dict)
    """Keys of `data` that differ from here on, e.g. {seq_len: 1024}; a mixture is given whole."""
    batch: dict[str, Any] = field(default_factory=dict)
    """Keys of `batch` that differ from here on."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Keys of `objective` that differ from here on; with another name, the whole of it."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Keys of `optimizer` that differ from here on, e.g. {lr: 1.0e-4}."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Keys of `schedule` that differ; it begins anew here and spans what follows."""
    frozen: tuple[str, ...] = ()
    """Tensors that stay as they are in this stage: names, with * for anything (冻结的张量)."""
    grow: Growing = field(default_factory=Growing)
    """How it is grown: method, noise, split ... (docs/growth.md)."""
    extend: Extend | None = None
    """How the model is taken to the stage's data.seq_len, e.g. {method: hierarchical}
    (docs/extension.md); null: it reads rows of that length already."""

    def problems(self) -> list[str]:
        """A stage without steps, or with two changes of the model."""
        found = [] if self.steps > 0 else [f"steps: is {self.steps}, must be at least 1"]
        if self.extend is not None and "seq_len" not in self.data:
            found.append(
                "extend: needs data.seq_len of the same stage, the length to reach (须给出新长度)"
            )
        if "skips" in self.data:
            found.append("data.skips: is of the whole run; say it in the page's `data` (写在页首)")
        if self.extend is not None and self.model:
            found.append("extend, model: one stage extends or grows; make two of it (分为两阶段)")
        return found


@dataclass(frozen=True)
class Init:
    """What a new run starts from."""

    from_: str
    """A checkpoint or run folder (grown, extended, converted ...)."""
    what: Literal["weights", "all"] = "weights"
    """weights: a new optimizer and step 0; all: moments and progress too."""


@dataclass(frozen=True)
class RunConfig:
    """The page."""

    model: ModelConfig
    """The architecture and its sizes, often by `base: ../sizes/cpm/small.yaml`."""
    data: Data
    """Corpora and row length."""
    batch: Batch
    """Rows of a step and of a pass."""
    optimizer: Optimizer
    """The update rule."""
    run: Run
    """Folder, length, rhythm."""
    objective: Objective = field(default_factory=Causal)
    """What is predicted."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate."""
    parallel: Parallel = field(default_factory=Parallel)
    """ZeRO stage, tensor and sequence parallelism."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of forward and backward; masters, moments and gradient sums are fp32."""
    recompute: Recompute = field(default_factory=Recompute)
    """What is kept for the backward pass; full, sublayer and none are a word alone."""
    stages: tuple[Stage, ...] = ()
    """The stages; none means one of run.steps steps."""
    init: Init | None = None
    """Where to start from; null draws fresh weights."""
    faults: Faults = field(default_factory=Faults)
    """Spikes, ranks that stall, restarts."""
    monitor: Monitoring = field(default_factory=Monitoring)
    """What is looked at more closely, and when."""

    def problems(self) -> list[str]:
        """What no single section can see."""
        found: list[str] = []
        if not self.stages and self.run.steps is None:
            found.append("run.steps: must be given (or stages, each with its steps) (须给出步数)")
        total = sum(stage.steps for stage in self.stages)
        if self.stages and self.run.steps not in (None, total):
            found.append(
                f"run.steps: is {self.run.steps}, the stages add up to {total}; leave one out "
                "(write `run.steps: null` if a base page gives it) (步数不一致，继承来的请写 null)"
            )
        found += overlap_problems(self.parallel, self.precision)
        for number in range(len(stages(self))):
            try:
                page = at_stage(self, number)
                found += page._problems_of_stage(number)
                found += page._problems_of_model(number, stage_model(self, number))
                found += self._problems_of_rule(number, page.optimizer)
                found += self._problems_of_growth(number)
            except ConfigError as error:
                found.append(str(error))
        return list(dict.fromkeys(found))

    def _key(self, number: int, section: str) -> str:
        """The key of a section as it is in a stage."""
        own = number and getattr(stages(self)[number], section)
        return f"stages.{number}.{section}" if own else section

    def _problems_of_stage(self, number: int) -> list[str]:
        """The same of the page as it is in a stage."""
        found = []
        spent = self.schedule.warmup_steps + (
            self.schedule.decay_steps if self.schedule.name == "wsd" else 0
        )
        _, span = schedule_span(self, number)
        if span and spent > span:
            found.append(
                f"{self._key(number, 'schedule')}: warm-up and decay take {spent} steps, it spans "
                f"{span} steps (预热与衰减过长)"
            )
        key, batch = self._key(number, "batch"), self.batch
        sizes = {"tokens": batch.tokens, **{f"ramp.{n}": s for n, (_, s) in enumerate(batch.ramp)}}
        found += [
            f"{key}.{name}: is {size}, less than one row of {self.data.seq_len} tokens "
            "(data.seq_len) (不足一行)"
            for name, size in sizes.items()
            if size is not None and batch.tokens is not None and size < self.data.seq_len
        ]
        if batch.ramp_steps > (left := total_steps(self) - batch_begin(self, number)):
            found.append(
                f"{key}.ramp: takes {batch.ramp_steps} updates, the run has {left} from there on; "
                "shorten it (爬坡过长)"
            )
        lengths = (self.data.seq_len, self.data.target_len)
        shared = row_problems(self.parallel, *lengths)
        found += [f"{self._key(number, 'data')}.{sentence}" for sentence in shared]
        return found + data_problems(self.objective, self.data.packing, *lengths)

    def _problems_of_growth(self, number: int) -> list[str]:
        """Why the model of a stage cannot be reached from that of the stage before."""
        stage = stages(self)[number]
        if stage.grow != EXACT and not (number and stage.model):
            why = "says how a model grows, and the stage has no larger `model:` than before"
            return [f"stages.{number}.grow: {why} (没有可放大的模型)"]
        if number == 0 or stage.extend is not None:  # stage_model() has asked what extends
            return []
        sentence = refusal(stage_model(self, number - 1), stage_model(self, number), stage.grow)
        return [f"stages.{number}.{sentence}"] if sentence else []

    def _problems_of_rule(self, number: int, rule: Optimizer) -> list[str]:
        """What the update rule of a stage cannot do there."""
        model, smaller = stage_model(self, number), stage_model(self, max(0, number - 1))
        grows = any(getattr(model, size) != getattr(smaller, size) for size in MATRICES)
        found = problems_with_model(rule, model, stages(self)[number].grow if grows else None)
        before = at_stage(self, max(0, number - 1)).optimizer
        if moments(before) != moments(rule):
            found.append(
                f"name: cannot go from {before.name} to {rule.name}, which remembers something "
                "else; begin a new run with init.what: weights (阶段之间不能换成动量不同的优化器)"
            )
        return [f"{self._key(number, 'optimizer')}.{s}" for s in found]

    def _problems_of_model(self, number: int, model: ModelConfig) -> list[str]:
        """The same of the model as it is in a stage."""
        where = f"stages.{number}.model" if number else "model"
        found = [f"{where}.{s}" for s in layout_problems(self.parallel, model)]
        known = [tensor.name for tensor in tensors(model)]
        found += [
            f"stages.{number}.frozen: '{pattern}' names no tensor of the model, e.g. {known[0]} "
            "(没有这样的张量)"
            for pattern in stages(self)[number].frozen
            if not fnmatch.filter(known, pattern)
        ]
        if model.family not in self.objective.families:
            found.append(
                f"objective.name: is {self.objective.name}, which trains "
                f"{', '.join(self.objective.families)}; {where}.family is {model.family} "
                "(目标与模型族不符)"
            )
        head = head_problems(self.objective, getattr(model, "labels", 0))
        found += [f"{where}.{s}" for s in head]
        room = longest_row(model)
        if room is not None and self.data.seq_len > room:
            found.append(
                f"{self._key(number, 'data')}.seq_len: is {self.data.seq_len}, {where}.positions "
                f"has {room} rows; shorten the rows or extend the model (行超出位置数)"
            )
        return found


def stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run; one of run.steps steps where the page names none."""
    return config.stages or (Stage(steps=config.run.steps or 0),)


def stage_model(config: RunConfig, number: int) -> ModelConfig:
    """The model as it is in stage `number`; ConfigError for sizes that make none.

    Numbers that must follow a larger size are set, where the stage does not set them (grown.py).
    """
    data = to_dict(config.model)
    for index, stage in enumerate(_with_known(config).stages[: number + 1]):
        if stage.extend is not None:
            model = _changed(data, {}, "model")
            try:
                length = int(stage.data.get("seq_len", config.data.seq_len))
                data = to_dict(extended(model, length, stage.extend))
            except ConfigError as error:
                raise ConfigError(f"stages.{index}.extend: {error}") from None
        if stage.model:
            named = dict(stage.model)
            if named.get("words_said", 0) is None:  # all of them; left out, it stays as it was
                named["words_said"] = named.get("vocab", data["vocab"])
            larger = _changed(data, named, f"stages.{index}.model")
            data = to_dict(completed(_changed(data, {}, "model"), larger, stage.grow))
    return _changed(data, {}, "model")


def _with_known(config: RunConfig) -> RunConfig:
    """The page with the length that each extension starts from, where it is left open.

    Idempotent, and to be done before a stage's data takes the place of the page's.
    """
    length, found = config.data.seq_len, []
    for stage in config.stages:
        if stage.extend is not None and stage.extend.known is None:
            how = dataclasses.replace(stage.extend, known=length)
            stage = dataclasses.replace(stage, extend=how)
        found.append(stage)
        length = stage.data.get("seq_len", length)
    return dataclasses.replace(config, stages=tuple(found))


def _changed(data: dict[str, Any], changes: dict[str, Any], where: str) -> ModelConfig:
    if changes.get("family", data["family"]) != data["family"]:
        raise ConfigError(
            f"{where}.family: a {data['family']} cannot become a {changes['family']} (不能换模型族)"
        )
    return cast(ModelConfig, from_dict(cast(Any, ModelConfig), {**data, **changes}, where))


SECTIONS = ("data", "batch", "objective", "optimizer", "schedule")
"""What a stage may change beside the model."""


def at_stage(config: RunConfig, number: int) -> RunConfig:
    """The page with the sections that hold in stage `number`; its model is stage_model().

    ConfigError, with the stage's own keys, for changes that make no section.
    """
    kinds, config = get_type_hints(RunConfig), _with_known(config)
    unread: dict[str, Any] = {}
    for index, stage in enumerate(stages(config)[: number + 1]):
        for key in SECTIONS:
            changes, before = getattr(stage, key), to_dict(getattr(config, key))
            if not changes:
                continue
            if key == "objective" and changes.get("name", before["name"]) != before["name"]:
                before = {}
            if key == "schedule":
                before = read_by_schedule(before, changes.get("name", before["name"]), unread)
            if key == "batch" and changes.keys() & {"samples", "tokens"}:
                before = {"micro": before["micro"]}  # one of them, and the stage names it
            section = from_dict(kinds[key], {**before, **changes}, f"stages.{index}.{key}")
            config = dataclasses.replace(config, **{key: section})
    return config


def first_step(config: RunConfig, number: int) -> int:
    """Updates made before stage `number`."""
    return sum(stage.steps for stage in stages(config)[:number])


def first_sample(config: RunConfig, number: int) -> int:
    """Samples consumed before stage `number`."""
    return sum(stage_samples(config, at) for at in range(number))


def stage_samples(config: RunConfig, number: int) -> int:
    """Samples that stage `number` consumes."""
    first, page = first_step(config, number), at_stage(config, number)
    begin = batch_begin(config, number)
    ends = (first - begin, first - begin + stages(config)[number].steps)
    before, after = (page.batch.taken(updates, page.data.seq_len) for updates in ends)
    return after - before


def batch_begin(config: RunConfig, number: int) -> int:
    """The step at which the batch that holds in stage `number` began, and its ramp with it."""
    own = [
        at
        for at, stage in enumerate(stages(config)[: number + 1])
        if at and stage.batch.keys() & {"samples", "tokens", "ramp"}
    ]
    return first_step(config, own[-1]) if own else 0


def schedule_span(config: RunConfig, number: int) -> tuple[int, int]:
    """(first step, steps) of the schedule that holds in stage `number`: a stage that changes it
    begins it anew; it lasts until the next that does, or schedule.steps long."""
    own = [at for at, stage in enumerate(stages(config)) if stage.schedule and at]
    begins = [0, *(first_step(config, at) for at in own), total_steps(config)]
    at = sum(stage <= number for stage in own)
    steps = at_stage(config, number).schedule.steps
    return begins[at], steps or begins[at + 1] - begins[at]


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run."""
    return sum(stage.steps for stage in stages(config))


def step_samples(config: RunConfig) -> int:
    """Rows of one optimizer step, over all devices, when the ramp is over."""
    return config.batch.whole(config.data.seq_len)


def with_threads(config: RunConfig, threads: int) -> RunConfig:
    """The same page with the number of threads that was really used."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, threads=threads))


def world_problems(config: RunConfig, world: int) -> list[str]:
    """Why this run cannot live on `world` processes."""
    return problems_on(config.parallel, world)
