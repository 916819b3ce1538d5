"""The loop of one stage: steps, looks, validations, checkpoints.

batches (a thread, ahead) -> engine.train_step -> monitor.record (tensors, no waiting)
  every log_every_steps: read, judge (pretrain/faults.py); a fault ends the stage, to go back
  validate_every_steps:  loss, bits a character, a passage the model writes
  save_every_steps, border, signal: a checkpoint of all ranks
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.load import to_dict
from configs.run import RunConfig, batch_begin, schedule_span, stages, total_steps

if TYPE_CHECKING:
    from pretrain.batches import Batch
    from pretrain.checkpoint import Saver
    from pretrain.corpora import Corpora
    from pretrain.engine import Engine
    from pretrain.faults import Fault, Spikes
    from pretrain.monitor import Monitor
    from pretrain.parallel import Mesh
    from pretrain.profiling import Profiler
    from pretrain.state import State
    from pretrain.step import StepResult
    from pretrain.stopping import Stopping
    from pretrain.watch import Watch

SAMPLING: dict[str, Any] = {
    "max_new_tokens": 48,
    "min_new_tokens": 48,
    "top_p": 0.9,
    "temperature": 0.8,
    "seed": 1,
}
"""How the passage of a validation is drawn; its length is fixed, so that no rank stops alone."""

SIGNAL = "signal"
"""Why a run stopped that was told to, from outside."""


@dataclass(frozen=True)
class Job:
    """What all chapters of a run share."""

    whole: RunConfig
    """The page as it was given."""
    readers: "list[Corpora]"
    """What each stage reads."""
    config: RunConfig
    """The page as it is in the stage at hand."""
    corpora: "Corpora"
    run: Path
    mesh: "Mesh"
    monitor: "Monitor"
    profiler: "Profiler"
    spikes: "Spikes"
    watch: "Watch"
    saver: "Saver"
    stopping: "Stopping"


def run_stage(job: Job, engine: "Engine", state: "State") -> dict[str, Any]:
    """The loop: steps of one stage, from where the state stands to the stage's border."""
    from pretrain.batches import Prefetcher
    from pretrain.schedules import schedule

    config, run = job.config, job.config.run
    stage = int(state.record["stage"])
    last = list(accumulate(s.steps for s in stages(config)))[stage]
    step, samples = int(state.record["step"]), int(state.record["samples"])
    begin, span = schedule_span(config, stage)
    trained = int(state.record["tokens"]) - samples * config.data.seq_len
    path, loss, stopped, fault = checkpoint_path(job, stage, step), None, None, None
    begun = step
    if step == 0 and run.validate_every_steps:
        with job.monitor.aside():
            _validate(job, engine, step)
    with Prefetcher(_steps(job, stage, step, last, samples), depth=2) as prefetched:
        for count, prepared in prefetched:
            lr = schedule(step - begin, config.schedule, config.optimizer.lr, span)
            every = job.config.monitor.parts_every_steps
            measure = _due(step + 1, every) or (every > 0 and step == begun)  # has it the memory?
            result = _step(job, engine, prepared, lr, step, measure)
            job.watch.beat(step + 1)
            step, samples = step + 1, samples + count
            progress = {
                "step": step,
                "stage": stage,
                "samples": samples,
                "tokens": trained + samples * config.data.seq_len,
            }
            extra = {"lr": lr, "step_tokens": count * config.data.seq_len}
            extra["loader_wait_s"] = prefetched.waited_s
            job.monitor.record(progress | extra, result)
            border, measured = step == last, {}
            stopped = _stop(job, step, border)
            # A signal means a kill in a minute: what it leaves is for the checkpoint.
            measures = border or (stopped and stopped != SIGNAL)
            if measures or _due(step, run.validate_every_steps):
                with job.monitor.aside():
                    measured = {"valid_loss": _validate(job, engine, step)}
            saves = border or stopped or _due(step, run.save_every_steps)
            passing = not saves and _due(step, run.ephemeral_every_steps)
            looks = saves or passing or _due(step, run.log_every_steps) or _sick(job, result)
            # A checkpoint's steps are on record, and found sound, before it is.
            if looks and (fault := _look(job, engine, state, progress, begun)):
                break
            if saves or passing:
                with job.monitor.aside():
                    kinds = {"border": border and step < total_steps(config), "ephemeral": passing}
                    path = _save(job, engine, state, progress | measured, kinds)
            job.watch.beat(step)  # a validation and a checkpoint take their time
            loss = result
            if stopped:
                break
    with job.monitor.aside():
        job.saver.wait()
    finished = step == total_steps(config)
    return {
        "step": step,
        "stage": stage,
        "loss": float(loss.loss_sum) / max(int(loss.count), 1) if loss is not None else None,
        "checkpoint": str(path),
        "stopped": None if fault else "finished" if finished else stopped,
        "fault": fault,
    }


def _steps(
    job: Job, stage: int, step: int, last: int, samples: int
) -> Iterator[tuple[int, tuple[list["Batch"], list[int]]]]:
    """Rows and batches of each step to come, made ahead in the prefetcher's thread."""
    mesh, micro = job.mesh, job.config.batch.micro
    for at in range(step, last):
        count = _samples(job, stage, at, at + 1)
        yield count, job.corpora.step(samples, count, mesh.reader, mesh.readers, micro)
        samples += count


def _samples(job: Job, stage: int, first: int, end: int) -> int:
    """Samples that steps [first, end) of a stage take."""
    begin = batch_begin(job.whole, stage)
    ends = (job.config.batch.taken(at - begin, job.config.data.seq_len) for at in (first, end))
    before, after = ends
    return after - before


def _step(
    job: Job,
    engine: "Engine",
    prepared: tuple[list["Batch"], list[int]],
    lr: float,
    step: int,
    measure: bool,
) -> "StepResult":
    """One update, measured by part and profiled where that is asked for."""
    batches, firsts = prepared
    with job.profiler.step(step + 1):
        return engine.train_step(batches, lr=lr, step=step, first_samples=firsts, measure=measure)


def _sick(job: Job, result: Any) -> bool:
    """Whether a step is known to have made no update, without waiting for the device."""
    return result.skipped is True and not job.monitor.may_skip


def _look(
    job: Job, engine: "Engine", state: "State", progress: dict[str, Any], begun: int
) -> "Fault | None":
    """Read and judge the last steps; the fault that makes the run go back, if there is one.

    Where a step was not finite, the state before it is saved first: the engine holds it still.
    """
    from pretrain import faults
    from pretrain.monitor import NotFinite

    section = job.config.faults
    job.profiler.look(progress["step"])
    try:
        fault = job.spikes.judge(job.monitor.flush())
    except NotFinite as wrong:
        before, samples = wrong.step - 1, _samples_before(job, state.record, wrong.step)
        lost = (progress["samples"] - samples) * job.config.data.seq_len
        told = {"step": before, "samples": samples, "tokens": progress["tokens"] - lost}
        if before > begun and engine.updates == state.record["updates"] + before - begun:
            _save(job, engine, state, progress | told, {"border": False, "ephemeral": False})
        fault = faults.Fault(wrong.step, wrong.what)
        _dump(job, state.record, fault)
        if not section.spike_z or section.do != "rewind":
            raise
        return fault
    if fault is None:
        return None
    _dump(job, state.record, fault)
    return fault if section.do == "rewind" else None


def _samples_before(job: Job, record: dict[str, Any], step: int) -> int:
    """Samples consumed before a step of the stage at hand, whose record this is."""
    done = _samples(job, int(record["stage"]), int(record["step"]), step - 1)
    return int(record["samples"]) + done


def _samples_at(job: Job, record: dict[str, Any], step: int) -> tuple[int, int]:
    """(first sample, samples) of a step of the stage at hand."""
    first = _samples_before(job, record, step)
    return first, _samples(job, int(record["stage"]), step - 1, step)


def _dump(job: Job, record: dict[str, Any], fault: "Fault") -> None:
    """Put a fault's samples on file and say so."""
    from pretrain import faults

    if job.mesh.rank == 0:
        path = faults.dump(job.run, job.corpora, fault, *_samples_at(job, record, fault.step))
        job.monitor.event("fault", fault.step, what=fault.what, samples=str(path))
        job.monitor.out.say(f"step {fault.step}: {fault.what}; its samples: {path} (异常样本)")


def passed_over(job: Job, record: dict[str, Any], fault: "Fault") -> dict[str, Any]:
    """What a record gains when the run goes back before a fault and passes over its samples."""
    from pretrain import faults

    first, count = _samples_at(job, record, fault.step)
    most = job.config.faults.most_rewinds
    record = faults.passed_over(record, fault, first, count, most)
    job.monitor.out.say(
        f"going back; samples {first} to {first + count - 1} are passed "
        "over from here on (回退并跳过该批样本)"
    )
    return {key: record[key] for key in ("skips", "rewinds")}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _stop(job: Job, step: int, border: bool) -> str | None:
    """Why all processes end after this step."""
    if step == job.config.run.stop_at_step:
        return "run.stop_at_step"
    return SIGNAL if job.stopping.asked(now=border) else None


def checkpoint_path(job: Job, stage: int, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    from pretrain.checkpoint import checkpoint_name

    return job.run / "checkpoints" / checkpoint_name(stage, step)


def _save(
    job: Job, engine: "Engine", state: "State", progress: dict[str, Any], kinds: dict[str, bool]
) -> Path:
    """Begin to write a checkpoint of the engine's state with all ranks (checkpoint/saver.py)."""
    from pretrain import replay

    known = {key: value for key, value in state.record.items() if key != "valid_loss"}
    record = known | progress | engine.progress()
    record |= kinds | {
        "data": job.corpora.whole_record,
        "tokenizer": job.corpora.tokenizer.fingerprint,
        "config": to_dict(job.whole),
        "processes": job.mesh.world,
    }
    path = checkpoint_path(job, progress["stage"], progress["step"])
    proof = None if kinds["ephemeral"] else replay.recorded(engine, job.corpora, job.mesh)
    words = job.corpora.tokenizer_folder

    def written(held_up_s: float) -> None:
        told = {"name": path.name, "held_up_s": round(held_up_s, 3), **kinds}
        job.monitor.event("checkpoint", progress["step"], **told)

    return job.saver.save(path, engine.entries(), engine.pieces(), record, words, proof, written)


def _validate(job: Job, engine: "Engine", step: int) -> float:
    """Loss and bits per character on the measured rows, and a passage the model writes; returns
    the loss."""
    import math

    mesh, run = job.mesh, job.config.run
    rows = job.corpora.validation(
        run.validate_samples, mesh.reader, mesh.readers, job.config.batch.micro
    )
    if job.corpora.labels:
        return _validate_labels(job, engine, step, [batch.to(mesh.device) for batch in rows])
    loss_sum, count, sums = engine.evaluate_by_source(list(rows))
    characters = job.corpora.measured_characters(run.validate_samples)
    bits = float(loss_sum) / math.log(2) / max(characters, 1)
    loss = float(loss_sum) / max(int(count), 1)
    sample = _sample(job, engine)
    told = {"valid_loss": loss, "valid_bits_per_character": round(bits, 6), "sample": sample}
    if by_source := job.monitor.by_source(sums):
        told["valid_loss_by_source"] = by_source
    job.monitor.note(step, **told)
    job.monitor.out.say(
        f"step {step}  valid loss {loss:.4f} ({bits:.4f} bits/character, 比特/字)  {sample!r}"
    )
    return loss


def _validate_labels(job: Job, engine: "Engine", step: int, rows: list[Any]) -> float:
    """Loss and the share of documents that get their own label; returns the loss."""
    from pretrain.checkpoint import gather
    from pretrain.objectives.labels import right

    loss_sum, count = engine.evaluate(rows)
    loss, number = float(loss_sum) / max(int(count), 1), max(int(count), 1)
    with engine.inference() as module:
        model: Any = module
        mine = sum(right(model, batch) for batch in rows)
    share = sum(gather(mine)) / (job.mesh.world // job.mesh.readers) / number
    job.monitor.note(step, valid_loss=loss, valid_accuracy=round(share, 6))
    job.monitor.out.say(f"step {step}  valid loss {loss:.4f}  accuracy {share:.2%} (准确率)")
    return loss


def _sample(job: Job, engine: "Engine") -> str:
    """The prompt and what the model continues it with; drawn alike on every rank."""
    from pretrain import parallel
    from pretrain.generate import generate

    tokenizer = job.corpora.tokenizer
    prompt = job.config.run.prompt
    if not prompt:
        first = job.corpora.valid[0]
        prompt = tokenizer.decode(first.index.slice(0, 8))
    with engine.inference() as local, parallel.whole_logits(local, job.mesh) as model:
        text = generate(model, tokenizer, [prompt], **SAMPLING)[0]
    shown = {"cpm": prompt + text, "t5_pegasus": f"{prompt} -> {text}", "roformer": text}
    return shown[job.config.model.family]
