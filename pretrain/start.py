"""What a run starts from: whose folder it is, which state it goes on from, and what forbids it.

    run.out --held()--> this job's alone --state()--> newest good checkpoint | init.from | fresh

What would fail only hours from now (a prompt that does not fit) is said here as well, before the
first step.
"""

import contextlib
import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.extended import Extend
from configs.grown import FREE, MATRICES, Growing, said
from configs.load import ConfigError, dump, from_dict, to_dict
from configs.model import ModelConfig, longest_row
from configs.optimizers import problems_with_model
from configs.run import (
    RunConfig,
    at_stage,
    batch_begin,
    first_sample,
    first_step,
    stage_model,
    stages,
    total_steps,
)
from pretrain import checkpoint, heads
from pretrain.corpora import Corpora, changes
from pretrain.faults import with_skips
from pretrain.folder import LOCK, strangers
from pretrain.growth import model_config, told
from pretrain.owner import BEAT_S, owned, path_in
from pretrain.state import State, fresh

if TYPE_CHECKING:
    from pretrain.monitor import Terminal

PATIENCE_S = 30.0
"""A job that was just stopped may still be saving: so long is its lock waited for."""
LATELY_S = 600.0
"""Without a real lock, what was written to so lately may be another job's: it stays."""


@contextlib.contextmanager
def held(run: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """The run folder, for this job alone until it ends or dies; every rank calls this.

    Raises CheckpointError if another job is at work in it, it cannot be written or it holds what no
    run wrote. What a killed job left aside is cleared away.
    """
    lock, owner, busy = None, None, False
    wrong = "\n".join(strangers(run)) if checkpoint.first_rank() else ""
    if checkpoint.first_rank() and not wrong:
        try:
            run.mkdir(parents=True, exist_ok=True)
            lock = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            free = _locked(lock, patience_s)
            if free is None or (free and path_in(run).exists()):  # of a machine without locks
                owner = owned(run, patience_s)
                free = owner is not None
            if free:
                _clear(run / "checkpoints", time.time() - LATELY_S if owner else math.inf)
            else:
                busy = True
                wrong = (
                    f"run.out: another job is at work in {run}; wait for it, stop it, or choose "
                    "another run.out (该目录正被另一任务使用)"
                )
        except OSError as error:
            wrong = f"run.out: {run} cannot be written: {error.strerror} (无法写入运行目录)"
    try:
        wrong, busy = checkpoint.gather((wrong, busy))[0]
        if wrong:
            raise (checkpoint.StorageError if busy else checkpoint.CheckpointError)(wrong)
        yield
    finally:
        if owner is not None:
            owner.leaves()
        if lock is not None:
            os.close(lock)


def _locked(lock: int, patience_s: float) -> bool | None:
    """Whether the lock is this job's; None where there are no locks."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError:
            return None


def _clear(checkpoints: Path, before: float) -> None:
    """Half-written and half-removed ones go that nobody has written to since `before`; one that was
    about to be replaced comes back."""
    for left in checkpoints.glob(".*stage-*"):
        whole = left.with_name(left.stem[1:])
        if left.suffix == ".replaced" and not whole.exists():
            os.rename(left, whole)
        elif left.suffix == ".growing" and (left / "proof.json").exists():
            continue  # its proof failed
        elif _written(left) <= before:
            shutil.rmtree(left, ignore_errors=True)


def _written(folder: Path) -> float:
    """When something in a folder was written last."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except FileNotFoundError:
        return math.inf  # somebody is at work in it


def check_ahead(config: RunConfig, corpora: Corpora) -> None:
    """ConfigError for what would end the run at a later stage or at its first validation."""
    model = stage_model(config, 0)
    found = heads.problems(model, corpora.labels)
    if corpora.segments > (has := getattr(model, "segments", corpora.segments)):
        found.append(
            f"model.segments: is {has}, a document of the corpus has {corpora.segments} fields; "
            "set it to that, or name one of them in objective.fields (段类型数不足)"
        )
    if config.run.prompt:
        tokens = len(corpora.tokenizer.encode(config.run.prompt))
        room = longest_row(model) or tokens
        if not 0 < tokens <= room:
            found.append(
                f"run.prompt: is {tokens} tokens long, must be 1 to {room} "
                "(model.positions) (提示过长或为空)"
            )
    if found:
        raise ConfigError("\n".join(found))


def state(config: RunConfig, run: Path, corpora: Corpora, out: "Terminal") -> State:
    """The state to go on from; RUN/config.yaml is written. Every rank calls this.

    Raises CheckpointError if every checkpoint of the run is damaged, ConfigError where the page
    does not fit the state.
    """
    if (owner := path_in(run)).exists():
        out.say(
            f"run.out: the file system of {run} has no locks; {owner.name} stands for one, renewed "
            f"every {BEAT_S:.0f} s (文件系统不支持文件锁)"
        )
    path, damaged = checkpoint.newest(run)
    for sentence in damaged:
        out.say(f"damaged, passed over: {sentence}")
    if path is None and damaged:
        raise checkpoint.CheckpointError(
            f"{run}: no checkpoint is whole; restore one or choose another run.out "
            "(没有完好的检查点)"
        )
    begin = {"step": 0, "stage": 0, "samples": 0, "tokens": 0, "updates": 0, "born": {}}
    begin |= {"seed": config.run.seed, "data": corpora.whole_record, "scaler": None, "growth": []}
    if path is not None:
        found = checkpoint.read(path)
        _check(config, found, path, corpora, resumes=True)
        out.say(f"resuming from {path} (step {found.record['step']}, 从检查点继续)")
    elif config.init is not None:
        source = checkpoint.resolve(config.init.from_)
        found = checkpoint.read(source)
        if config.init.what == "weights":
            kept = {key: found.record.get(key) for key in ("model", "tokenizer")}
            found = State(found.weights_only().entries, begin | kept)
            found = heads.with_head(found, stage_model(config, 0), config.run.seed)
        else:
            if not found.names("optim") or "step" not in found.record:
                raise ConfigError(
                    f"init.what: is all, {config.init.from_} holds weights alone, no moments; set "
                    "it to weights (只有权重)"
                )
            stage = _stage(config, found)
            # Grown onto more words (launch/grow.py): its corpora are encoded anew.
            data = found.record["data"] or corpora.whole_record
            placed = found.record | {"stage": stage, "data": data}
            wider = [told(line) for line in found.record.get("growth", []) if _wider(line)]
            rule, model = at_stage(config, stage).optimizer, model_config(found)
            if wrong := problems_with_model(rule, model, wider[-1] if wider else None):
                raise ConfigError("\n".join(f"optimizer.{sentence}" for sentence in wrong))
            found = State(found.entries, placed, found.verify)
        found = _saying(found, stage_model(config, found.record["stage"]))
        _check(config, found, source, corpora, resumes=False)
        out.say(f"starting from {source} ({config.init.what})")
    else:
        first = fresh(stage_model(config, 0), config.run.seed)
        found = State(first.entries, begin | first.record)
    found = State(found.entries, with_skips(found.record, config.data.skips), found.verify)
    if checkpoint.first_rank():
        (run / "config.yaml").write_text(dump(config), "utf-8")
    return found


def _wider(line: dict[str, Any]) -> bool:
    """Whether matrices became larger in a growth, by its line in the record."""
    return any(line["to"][size] != line["from"][size] for size in MATRICES)


def _stage(config: RunConfig, state: State) -> int:
    """Where in the page a checkpoint of another run stands: by its step, and at a border behind it
    if it has that model, else before it, so that the stage grows (or extends) it."""
    step, ends = state.record["step"], accumulate(stage.steps for stage in stages(config))
    stage = next((n for n, end in enumerate(ends) if step < end), len(stages(config)) - 1)
    border = stage and step == first_step(config, stage)
    if border and unlike(config, state, stage) and not unlike(config, state, stage - 1):
        return stage - 1
    return stage


def unlike(config: RunConfig, state: State, stage: int) -> list[tuple[str, Any, Any]]:
    """(key, as the page has it, as the checkpoint has it) of what differs in their models."""
    # A checkpoint from before an option existed has the option's default.
    models = model_config(state), stage_model(config, stage)
    have, want = (to_dict(model) | {"words_said": said(model)} for model in models)
    free = set(FREE) if want.get("positions") is None else {*FREE, "rope_base"}  # nothing turns
    return [
        (key, want.get(key), have.get(key))
        for key in sorted(have | want)
        if have.get(key) != want.get(key) and key not in free
    ]


def _otherwise(config: RunConfig, state: State) -> list[str]:
    """Where the page tells a change of the model that lies behind the checkpoint unlike it was."""
    # By step the last: a model that was grown by command may have begun at a stage's border.
    done: dict[tuple[str, int], Growing | Extend]
    done = {("grow", line["step"]): told(line) for line in state.record.get("growth", [])}
    lines = state.record.get("extensions", [])
    done |= {("extend", line["step"]): from_dict(Extend, line["how"]) for line in lines}
    found = []
    for number in range(1, state.record["stage"] + 1):
        border, stage = first_step(config, number), stages(config)[number]
        told_here = {"grow": stage.grow if stage.model else None, "extend": stage.extend}
        for kind, here in told_here.items():
            if (was := done.get((kind, border))) is None:
                continue
            have, want = to_dict(was), to_dict(here or was)
            left_open = (None,) if kind == "grow" else (None, 0)  # set by what was there
            found += [
                f"stages.{number}.{kind}.{key}: is {want[key]}, the checkpoint was made with "
                f"{have[key]} at step {border} (模型已按原设置改变)"
                for key in have
                if want[key] not in (have[key], *left_open)
            ]
    return found


def _other_batches(
    config: RunConfig, record: dict[str, Any], path: Path, corpora: Corpora
) -> list[str]:
    """Where steps of other batches lie behind the checkpoint, so that the rows of later stages
    would begin too early or too late."""
    read, implied = record["samples"], _samples_after(config, record["stage"], record["step"])
    later = [entry for entry in corpora.whole_record if entry.get("first", 0) > min(read, implied)]
    if read == implied or not later:
        return []
    sentence = (
        f"batch: {path} has read {read} samples at step {record['step']}, this page says "
        f"{implied}, and a later stage reads other rows; restore the batch, and change it in a "
        "stage of its own (批大小只能在新阶段改变)"
    )
    return [sentence]


def _samples_after(config: RunConfig, number: int, step: int) -> int:
    """Samples consumed after `step` steps, the last of them in stage `number`."""
    page, begin = at_stage(config, number), batch_begin(config, number)
    updates = (first_step(config, number) - begin, step - begin)
    before, after = (page.batch.taken(n, page.data.seq_len) for n in updates)
    return first_sample(config, number) + after - before


def _saying(state: State, model: ModelConfig) -> State:
    """The state with as many words said as the page names, of those that wait in its model."""
    now = model_config(state)
    if model.words_said is None or model.vocab != now.vocab or said(model) <= said(now):
        return state
    more = {**state.record["model"], "words_said": model.words_said}
    return State(state.entries, {**state.record, "model": more}, state.verify)


def _check(config: RunConfig, state: State, path: Path, corpora: Corpora, *, resumes: bool) -> None:
    """A checkpoint of another model, other data or a later step ends here, every difference named.

    A run that `resumes` may be at its end already; one that starts from elsewhere may not.
    """
    record, found = state.record, []
    total = total_steps(config)
    if record["step"] >= total + resumes:
        found.append(
            f"run.steps: the run ends at step {total}, the checkpoint {path} stands at step "
            f"{record['step']}; give more steps (步数已超过)"
        )
    if record["stage"] >= len(stages(config)):
        found.append(f"stages: {path} stands in stage {record['stage']}, the config has fewer")
    else:
        found += [
            f"model.{key}: is {want}, the checkpoint {path} has {have}"
            for key, want, have in unlike(config, state, record["stage"])
        ]
        found += _otherwise(config, state)
        found += _other_batches(config, record, path, corpora)
    found += changes(record["data"], corpora.whole_record, int(record["samples"]))
    tokenizer = record.get("tokenizer") or corpora.tokenizer.fingerprint
    if tokenizer != corpora.tokenizer.fingerprint:
        found.append(
            f"data.train: was encoded by the tokenizer {corpora.tokenizer.fingerprint}, the "
            f"checkpoint {path} learnt that of {tokenizer}; encode the corpus by the checkpoint's "
            "tokenizer (分词器不一致)"
        )
    if record["seed"] != config.run.seed:
        found.append(f"run.seed: is {config.run.seed}, the run was started with {record['seed']}")
    if found:
        raise ConfigError("\n".join([*found, _instead(found, resumes)]))


def _instead(found: list[str], resumes: bool) -> str:
    """What to do about a checkpoint that does not fit."""
    if resumes:
        return "choose another run.out, or restore these keys (请换目录，或改回这些键)"
    if all(sentence.startswith("model.") for sentence in found):
        return "write these numbers under `model:`, or name another init.from (把这些数写进 model:)"
    return "change these keys to fit it, or name another init.from (按检查点修改)"
