"""The story of a run: `deepspeed pretrain/train.py CONFIG [key=value ...]`.

    mesh -> corpora -> state (newest good checkpoint | init.from | fresh weights)
    for each stage: grow the state if the stage has a larger model
                    model on the meta device -> recompute -> shard -> engine -> load
                    for each step: batches -> train_step -> metrics; at times validate, save
                    checkpoint at the border

Run again, it goes on where the newest checkpoint that verifies stands, on whatever number of
devices. The only state of the data is the number of samples consumed.
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":  # the launcher put pretrain/ first: the root takes its place
    sys.path[0] = ROOT

import fnmatch  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see launch/__main__.py
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from dataclasses import dataclass, replace  # noqa: E402
from itertools import accumulate  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from configs.load import ConfigError, load, to_dict  # noqa: E402
from configs.model import tensors  # noqa: E402
from configs.run import (  # noqa: E402
    RunConfig,
    at_stage,
    first_sample,
    schedule_span,
    stage_model,
    stages,
    step_samples,
    total_steps,
    with_threads,
    world_problems,
)

if TYPE_CHECKING:
    from pretrain.batches import Batch
    from pretrain.corpora import Corpora
    from pretrain.engine import Engine
    from pretrain.faults import Fault, Spikes
    from pretrain.monitor import Monitor, Terminal
    from pretrain.parallel import Mesh
    from pretrain.state import State

SAMPLING = {"max_new_tokens": 48, "min_new_tokens": 48, "top_p": 0.9, "temperature": 0.8, "seed": 1}
"""How the passage of a validation is drawn; its length is fixed, so that no rank stops alone."""


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
    spikes: "Spikes"
    interrupted: Callable[[], bool]


def train(
    config: RunConfig,
    out: "Terminal | None" = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, or resume, the run that `config` describes; every process of the job calls this.

    `interrupted` is asked at each step border: once any process says yes, all save and return.
    Returns {"step", "stage", "loss" (of the last step), "checkpoint", "stopped"}. Raises
    ConfigError, CheckpointError and NotFinite with a sentence for the user.
    """
    import torch

    from pretrain import checkpoint, faults, parallel, plan, start
    from pretrain.corpora import Reading, open_stages
    from pretrain.monitor import Monitor, Terminal, speed
    from pretrain.state import State

    mesh = parallel.make_mesh(config.parallel.tensor)
    if problems := world_problems(config, mesh.world):
        raise ConfigError("\n".join(problems))
    config = with_threads(config, config.run.threads or parallel.cpu_threads())
    torch.set_num_threads(config.run.threads)
    run = Path(config.run.out)
    out = out or Terminal(enabled=mesh.rank == 0)
    pages = [at_stage(config, number) for number in range(len(stages(config)))]
    readers = open_stages(
        [Reading(p.data, p.objective, first_sample(config, n)) for n, p in enumerate(pages)],
        config.run.seed,
        config.model.vocab,
    )
    start.check_ahead(config, readers[0])
    for sentence in dict.fromkeys(said for corpora in readers for said in corpora.said()):
        out.say(sentence)
    summary: dict[str, Any] = {}
    with start.held(run):
        monitor = Monitor(
            run,
            out,
            writes=mesh.rank == 0,
            total_steps=total_steps(config),
            speed=speed(mesh.device, mesh.world, config.precision),
            may_skip=config.precision == "fp16",
        )
        state, begin = start.state(config, run, readers[0], out), True
        while summary.get("stopped") is None:
            if begin:
                monitor.begin(step := int(state.record["step"]))
                spikes = faults.Spikes(config.faults, run, step)
                skipping = [faults.skipping(corpora, state.record) for corpora in readers]
                job = Job(
                    config, skipping, pages[0], skipping[0], run, mesh, monitor, spikes, interrupted
                )
            state = _enter_stage(job, state)
            stage = int(state.record["stage"])
            job = replace(job, config=pages[stage], corpora=job.readers[stage])
            engine = _engine(job, state)
            monitor.watch(engine.config, plan.row_of(job.config))
            try:
                engine.load(state)
                # Only the record from here on: a mapped file keeps its disk when rotated away.
                state = State({}, state.record)
                summary = _run_stage(job, engine, state)
            finally:
                engine.destroy()
            if begin := summary["fault"] is not None:
                kept = _passed_over(job, state.record, summary["fault"])
                state = start.state(config, run, readers[0], out)
                state = State(state.entries, state.record | kept)
            elif summary["stopped"] is None:
                state = checkpoint.read(summary["checkpoint"])
        monitor.close()
    return summary


def _enter_stage(job: Job, state: "State") -> "State":
    """Move on to the next stage if this one is done; grow the state if the stage says so."""
    ends = list(accumulate(stage.steps for stage in stages(job.config)))
    number, step = int(state.record["stage"]), int(state.record["step"])
    if step < ends[number] or number + 1 == len(ends):
        return state
    from pretrain.growth import model_config
    from pretrain.state import State

    target = stage_model(job.config, number + 1)
    if target == model_config(state):
        return State(state.entries, state.record | {"stage": number + 1})
    return _grow(job, state, number + 1)


def _grow(job: Job, state: "State", number: int) -> "State":
    """The state enlarged to the model of stage `number`, proven and kept as a second checkpoint."""
    from pretrain import checkpoint, objectives, proof
    from pretrain.growth import grow
    from pretrain.state import State

    target = stage_model(job.config, number)
    grown = grow(state, target, job.config.run.seed, stages(job.config)[number].grow)
    grown = State(grown.entries, grown.record | {"stage": number, "border": True})
    path = _checkpoint_path(job, number, int(state.record["step"]))
    aside = path.with_name(f".{path.name}.growing")  # no checkpoint until it is proven
    checkpoint.write_state(aside, grown, job.corpora.tokenizer_folder)
    verdict: dict[str, Any] = {}
    if job.mesh.rank == 0:
        probes = proof.probes(job.corpora.tokenizer_folder, target)
        objective = objectives.build(job.config.objective)
        batch = proof.recorded(job.corpora, objective, job.config.batch.micro)
        precision = job.config.precision
        after = checkpoint.read(aside)
        verdict = proof.prove(state, after, probes, batch=batch, precision=precision)
        proof.write_proof(aside, verdict)
        if proof.holds(verdict):
            shutil.rmtree(path, ignore_errors=True)  # a damaged one may stand there
            os.rename(aside, path)
    verdict = checkpoint.gather(verdict)[0]
    job.monitor.out.say(proof.sentence(verdict))
    if not proof.holds(verdict):
        raise checkpoint.CheckpointError(
            f"{aside}: the growth does not keep the function, see proof.json; the checkpoint "
            "before it is whole (生长未保持函数)"
        )
    return checkpoint.read(path)


def _engine(job: Job, state: "State") -> "Engine":
    """A model of this stage, cut and laid out over the devices, with room for the state."""
    import torch

    from pretrain import models, objectives, parallel, recompute
    from pretrain.engine import Engine

    config = job.config
    model_config = stage_model(config, int(state.record["stage"]))
    with torch.device("meta"):
        model = models.build(model_config)
    recompute.apply(model, config.recompute)
    parallel.shard(model, model_config, job.mesh)
    return Engine(
        model,
        model_config,
        job.mesh,
        objective=objectives.build(config.objective),
        optimizer=config.optimizer,
        precision=config.precision,
        zero=config.parallel.zero,
        micro_rows=config.batch.micro,
        seed=config.run.seed,
        born=state.record["born"],
        scales=_scales(job, state, [tensor.name for tensor in tensors(model_config)]),
        hold=config.precision != "fp16",
        rewarm=state.record.get("rewarm"),
    )


def _scales(job: Job, state: "State", names: list[str]) -> dict[str, Any]:
    """Each tensor's own factors: those of growth, and nothing at all for what the stage freezes."""
    patterns = stages(job.config)[int(state.record["stage"])].frozen
    frozen = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    still = {"lr": 0.0, "wd": 0.0, "eps": 1.0, "clip": 0.0}
    return {**(state.record.get("scales") or {}), **dict.fromkeys(frozen, still)}


def _run_stage(job: Job, engine: "Engine", state: "State") -> dict[str, Any]:
    """The loop: steps of one stage, from where the state stands to the stage's border."""
    from pretrain.batches import Prefetcher
    from pretrain.schedules import schedule

    config, run = job.config, job.config.run
    stage = int(state.record["stage"])
    last = list(accumulate(s.steps for s in stages(config)))[stage]
    step, samples = int(state.record["step"]), int(state.record["samples"])
    count = step_samples(config)
    begin, span = schedule_span(config, stage)
    trained = int(state.record["tokens"]) - samples * config.data.seq_len
    path, loss, stopped, fault = _checkpoint_path(job, stage, step), None, None, None
    begun = step
    if step == 0 and run.validate_every_steps:
        with job.monitor.aside():
            _validate(job, engine, step)
    with Prefetcher(_steps(job, samples, count, last - step), depth=2) as prefetched:
        for batches, firsts in prefetched:
            lr = schedule(step - begin, config.schedule, config.optimizer.lr, span)
            batches = [batch.to(job.mesh.device) for batch in batches]
            result = engine.train_step(batches, lr=lr, step=step, first_samples=firsts)
            step, samples = step + 1, samples + count
            progress = {
                "step": step,
                "stage": stage,
                "samples": samples,
                "tokens": trained + samples * config.data.seq_len,
            }
            extra = {"lr": lr, "step_tokens": count * config.data.seq_len}
            job.monitor.record(progress | extra, result)
            stopped = _stop(job, step)
            border, measured = step == last, {}
            if border or stopped or _due(step, run.validate_every_steps):
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
            loss = result
            if stopped:
                break
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
    job: Job, samples: int, count: int, steps: int
) -> Iterator[tuple[list["Batch"], list[int]]]:
    """The batches of each step to come, made ahead in the prefetcher's thread."""
    mesh, micro = job.mesh, job.config.batch.micro
    for number in range(steps):
        first = samples + number * count
        yield job.corpora.step(first, count, mesh.data_rank, mesh.data, micro)


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
    steps = step - 1 - int(record["step"])
    return int(record["samples"]) + steps * step_samples(job.config)


def _dump(job: Job, record: dict[str, Any], fault: "Fault") -> None:
    """Put a fault's samples on file and say so."""
    from pretrain import faults

    if job.mesh.rank == 0:
        first = _samples_before(job, record, fault.step)
        path = faults.dump(job.run, job.corpora, fault, first, step_samples(job.config))
        job.monitor.out.say(f"step {fault.step}: {fault.what}; its samples: {path} (异常样本)")


def _passed_over(job: Job, record: dict[str, Any], fault: "Fault") -> dict[str, Any]:
    """What a record gains when the run goes back before a fault and passes over its samples."""
    from pretrain import faults

    first, count = _samples_before(job, record, fault.step), step_samples(job.config)
    most = job.config.faults.most_rewinds
    record = faults.passed_over(record, fault, first, count, most)
    job.monitor.out.say(
        f"going back; samples {first} to {first + count - 1} are passed "
        "over from here on (回退并跳过该批样本)"
    )
    return {key: record[key] for key in ("skips", "rewinds")}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _stop(job: Job, step: int) -> str | None:
    """Why all processes end after this step; a signal that reached one of them counts for all."""
    if step == job.config.run.stop_at_step:
        return "run.stop_at_step"
    if job.mesh.device.type != "cpu" and step % job.config.run.log_every_steps:
        return None  # asking waits for the device
    if job.mesh.world == 1:
        return "signal" if job.interrupted() else None
    import torch
    import torch.distributed as dist

    flag = torch.tensor(int(job.interrupted()), device=job.mesh.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return "signal" if int(flag) else None


def _checkpoint_path(job: Job, stage: int, step: int) -> Path:
    from pretrain.checkpoint import checkpoint_name

    return job.run / "checkpoints" / checkpoint_name(stage, step)


def _save(
    job: Job, engine: "Engine", state: "State", progress: dict[str, Any], kinds: dict[str, bool]
) -> Path:
    """Write a checkpoint of the engine's state with all ranks; drop the ones that are too old."""
    from pretrain import checkpoint

    known = {key: value for key, value in state.record.items() if key != "valid_loss"}
    record = known | progress | engine.progress()
    record |= kinds | {
        "data": job.corpora.whole_record,
        "tokenizer": job.corpora.tokenizer.fingerprint,
        "config": to_dict(job.whole),
        "processes": job.mesh.world,
    }
    path = _checkpoint_path(job, progress["stage"], progress["step"])
    checkpoint.save(path, engine.entries(), engine.pieces(), record, job.corpora.tokenizer_folder)
    if job.mesh.rank == 0:
        run = job.config.run
        checkpoint.rotate(job.run, run.keep_checkpoints, run.keep_every_steps, run.keep_best)
    return path


def _validate(job: Job, engine: "Engine", step: int) -> float:
    """Loss and bits per character on the measured rows, and a passage the model writes; returns
    the loss."""
    import math

    mesh, run = job.mesh, job.config.run
    rows = job.corpora.validation(
        run.validate_samples, mesh.data_rank, mesh.data, job.config.batch.micro
    )
    loss_sum, count = engine.evaluate([batch.to(mesh.device) for batch in rows])
    characters = job.corpora.measured_characters(run.validate_samples)
    bits = float(loss_sum) / math.log(2) / max(characters, 1)
    loss = float(loss_sum) / max(int(count), 1)
    sample = _sample(job, engine)
    job.monitor.note(step, valid_loss=loss, valid_bits_per_character=round(bits, 6), sample=sample)
    job.monitor.out.say(
        f"step {step}  valid loss {loss:.4f} ({bits:.4f} bits/character, 比特/字)  {sample!r}"
    )
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


def main(argv: Sequence[str]) -> int:
    """The command; the exit code is 0, or 2 where a sentence says what to change."""
    import signal

    words = [word for word in argv if not word.startswith("--local_rank")]
    rank = int(os.environ.get("RANK", "0"))
    flag = {"raised": False}

    def raise_flag(number: int, frame: object) -> None:
        flag["raised"] = True

    try:
        if not words:
            raise ConfigError("usage: deepspeed pretrain/train.py CONFIG [key=value ...]")
        config = load(words[0], RunConfig, words[1:])
    except ConfigError as error:
        if rank == 0:
            print(f"bajie: {error}", file=sys.stderr)
        return 2
    from pretrain.monitor import first_to_speak, terminal

    try:
        out = terminal(Path(config.run.out), rank)
    except OSError as error:
        if rank == 0:
            print(f"bajie: run.out: {error} (无法写入运行目录)", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, raise_flag)
    try:
        train(config, out, lambda: flag["raised"])
    except (ValueError, OSError) as error:
        if os.environ.get("BAJIE_TRACEBACK") == "1":
            raise
        import traceback

        traceback.print_exc()  # to RUN/logs
        if first_to_speak(Path(config.run.out)):
            out.complain(f"bajie: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
