"""The story of a run: `deepspeed pretrain/train.py CONFIG [key=value ...] [--gpu]`.

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

import argparse  # noqa: E402
import contextlib  # noqa: E402
import fnmatch  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import time  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see launch/__main__.py
from collections.abc import Callable, Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from itertools import accumulate  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from configs.grown import said  # noqa: E402
from configs.load import ConfigError, dump, load, to_dict  # noqa: E402
from configs.model import parameter_count, tensors  # noqa: E402
from configs.run import (  # noqa: E402
    RunConfig,
    at_stage,
    first_sample,
    stage_model,
    stages,
    total_steps,
    with_threads,
    world_problems,
)
from pretrain.device import ON_CPU, check_gpu, many_files  # noqa: E402
from pretrain.folder import strangers  # noqa: E402
from pretrain.loop import Job, checkpoint_path, passed_over, run_stage  # noqa: E402

if TYPE_CHECKING:
    from configs.extended import Extend
    from pretrain.engine import Engine
    from pretrain.monitor import Terminal
    from pretrain.state import State

IO_FAILED = 74
"""Exit code where a file system failed (EX_IOERR): nobody's mistake, a restart may mend it."""
MISTAKES = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""What a path in the page brings about."""


def train(
    config: RunConfig,
    out: "Terminal | None" = None,
    interrupted: Callable[[], bool] = lambda: False,
    begins: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Train, or resume, the run that `config` describes; every process of the job calls this.

    `interrupted` is asked at each step border: once any process says yes, all save and return.
    `begins` is called when the run folder is this job's alone.
    Returns {"step", "stage", "loss" (of the last step), "checkpoint", "stopped"}. Raises
    ConfigError, CheckpointError and NotFinite with a sentence for the user.
    """
    import torch

    from pretrain import checkpoint, disk, faults, flight, parallel, plan, replay, start
    from pretrain.corpora import Reading, open_stages
    from pretrain.monitor import Monitor, Terminal, speed
    from pretrain.profiling import Profiler
    from pretrain.state import State
    from pretrain.stopping import Stopping
    from pretrain.watch import Watch

    waits = parallel.patience(config.faults.stall_s)
    mesh = parallel.make_mesh(config.parallel.tensor, config.parallel.sequence, waits)
    if problems := world_problems(config, mesh.world):
        raise ConfigError("\n".join(problems))
    fewest = min(checkpoint.gather(parallel.cpu_threads()))  # the page is the same on all ranks
    config = with_threads(config, config.run.threads or fewest)
    torch.set_num_threads(config.run.threads)
    run = Path(config.run.out)
    out = out or Terminal(enabled=mesh.rank == 0)
    pages = [at_stage(config, number) for number in range(len(stages(config)))]
    readers = open_stages(
        [Reading(p.data, p.objective, first_sample(config, n)) for n, p in enumerate(pages)],
        config.run.seed,
        said(config.model),
    )
    start.check_ahead(config, readers[0])
    for sentence in dict.fromkeys(text for corpora in readers for text in corpora.said()):
        out.say(sentence)
    summary: dict[str, Any] = {}
    watch = Watch(run, mesh.rank, mesh.world, config.faults.stall_s, out.complain)
    damaged: set[Path] = set()
    kept = (config.run.keep_checkpoints, config.run.keep_every_steps, config.run.keep_best)

    def tidy(written: Path) -> None:
        damaged.discard(written)  # it is whole now
        try:
            checkpoint.rotate(run, *kept, but=damaged)
        except OSError as error:
            out.say(f"{error.filename}: cannot be removed: {error.strerror} (旧检查点未能删除)")

    def failed(folder: Path, error: BaseException) -> None:
        out.say(
            f"{error}; it is tried once more at the next save, or the end (保存失败，将再试一次)"
        )
        with contextlib.suppress(OSError):  # the same disk
            monitor.event("checkpoint failed", int(folder.name[-8:]), name=folder.name)

    with (
        start.held(run),
        watch(),
        checkpoint.Saver.open(tidy, failed, waits) as saver,
    ):
        begins()
        models = [stage_model(config, number) for number in range(len(pages))]
        most = max(int(disk.checkpoint_bytes(config, model)) for model in models)
        for sentence in flight.check(run, most, dump(config), mesh.device):
            out.say(sentence)
        monitor = Monitor(
            run,
            out,
            writes=mesh.rank == 0,
            total_steps=total_steps(config),
            speed=speed(mesh.device, mesh.world, config.precision),
            may_skip=config.precision == "fp16",
            device=mesh.device,
        )
        asked = config.monitor.profile_steps
        profiler = Profiler(run, mesh.rank, mesh.device, out.say, asked)
        stopping = Stopping(mesh, interrupted)
        state, begin = start.state(config, run, readers[0], out), True
        while summary.get("stopped") is None:
            if begin:
                damaged |= checkpoint.passed_over(run, state.record)
                monitor.begin(step := int(state.record["step"]))
                about: dict[str, Any] = {"processes": mesh.world, "precision": config.precision}
                about |= {"zero": config.parallel.zero, "tensor": config.parallel.tensor}
                about |= {"sequence": config.parallel.sequence}
                about |= {"peak": monitor.speed.peak_note}
                monitor.event("rewind" if summary else "start", step, **about)
                spikes = faults.Spikes(config.faults, run, step)
                skipping = [faults.skipping(corpora, state.record) for corpora in readers]
                at = int(state.record["stage"])
                job = Job(
                    config,
                    skipping,
                    pages[at],
                    skipping[at],
                    run,
                    mesh,
                    monitor,
                    profiler,
                    spikes,
                    watch,
                    saver,
                    stopping,
                )
            with monitor.aside():
                state = _enter_stage(job, state)
            stage = int(state.record["stage"])
            job = replace(job, config=pages[stage], corpora=job.readers[stage])
            engine = _engine(job, state)
            monitor.watch(engine.config, plan.row_of(job.config), job.corpora.sources)
            try:
                watch.beat(int(state.record["step"]))
                engine.load(state)
                watch.beat(step := int(state.record["step"]))
                about = {"stage": stage, "parameters": parameter_count(engine.config)}
                monitor.event("stage", step, **about, seq_len=job.config.data.seq_len)
                if state.verify:
                    told = replay.check(engine, state, job.corpora, mesh)
                    out.say(f"resuming: {told} (校验通过)")
                # Only the record from here on: a mapped file keeps its disk when rotated away.
                state = State({}, state.record)
                summary = run_stage(job, engine, state)
            finally:
                engine.destroy()
            if begin := summary["fault"] is not None:
                passed = passed_over(job, state.record, summary["fault"])
                state = start.state(config, run, readers[0], out)
                state = State(state.entries, state.record | passed, state.verify)
            elif summary["stopped"] is None:
                state = checkpoint.read(summary["checkpoint"])
        profiler.close()
        monitor.close()
        monitor.event("end", int(summary["step"]), why=summary["stopped"])
    return summary


def _enter_stage(job: Job, state: "State") -> "State":
    """Move on to the next stage if this one is done; grow the state if the stage says so."""
    ends = list(accumulate(stage.steps for stage in stages(job.config)))
    number, step = int(state.record["stage"]), int(state.record["step"])
    if step < ends[number] or number + 1 == len(ends):
        return state
    from pretrain import start
    from pretrain.state import State

    target = stage_model(job.config, number + 1)
    if not start.unlike(job.whole, state, number + 1):
        there = {"stage": number + 1, "model": to_dict(target)}  # another dropout is no growth
        return State(state.entries, state.record | there, state.verify)
    if (how := stages(job.config)[number + 1].extend) is not None:
        return _extend(job, state, number + 1, how)
    return _grow(job, state, number + 1)


def _extend(job: Job, state: "State", number: int, how: "Extend") -> "State":
    """The state that reads the rows of stage `number`, proven and kept like a growth."""
    from pretrain import proof_of_length, proven
    from pretrain.growth.positions import extend

    state = proven.heard(state, job.watch.alive)
    length = int(stages(job.config)[number].data["seq_len"])
    longer = extend(state, stage_model(job.config, number), how, length, job.config.run.seed)
    words = job.corpora.tokenizer_folder
    return _kept(
        job,
        longer,
        number,
        lambda after: proof_of_length.prove(state, after, words),
        lambda found: (bool(found["kept"]), proof_of_length.sentence(found)),
    )


def _grow(job: Job, state: "State", number: int) -> "State":
    """The state enlarged to the model of stage `number`, proven and kept as a second checkpoint."""
    from pretrain import objectives, proof, proven
    from pretrain.growth import grow, remarks

    state = proven.heard(state, job.watch.alive)
    target = stage_model(job.config, number)
    how = stages(job.config)[number].grow
    grown = grow(state, target, job.config.run.seed, how)
    left = total_steps(job.config) - int(state.record["step"])
    for sentence in remarks(state, grown, how, left):
        job.monitor.out.say(f"stages.{number}.grow.{sentence}")

    def prove(after: "State") -> dict[str, Any]:
        probes = proof.probes(job.corpora.tokenizer_folder, target)
        objective = objectives.build(job.config.objective)
        batch = proof.recorded(job.corpora, objective, job.config.batch.micro)
        return proof.prove(state, after, probes, batch=batch, precision=job.config.precision)

    return _kept(
        job, grown, number, prove, lambda found: (proof.holds(found), proof.sentence(found))
    )


def _kept(
    job: Job,
    changed: "State",
    number: int,
    prove: Callable[["State"], dict[str, Any]],
    judge: Callable[[dict[str, Any]], tuple[bool, str]],
) -> "State":
    """A changed state as the first checkpoint of stage `number`, if what was written is proven."""
    from pretrain import checkpoint, proven
    from pretrain.state import State

    changed = State(changed.entries, changed.record | {"stage": number, "border": True})
    path = checkpoint_path(job, number, int(changed.record["step"]))
    if checkpoint.first_rank():
        shutil.rmtree(path, ignore_errors=True)  # a damaged one may stand there
    words = job.corpora.tokenizer_folder
    watch, holds = job.watch, lambda found: judge(found)[0]
    verdict = proven.written(path, changed, words, prove, holds, watch.alive, watch.busy)
    kept, sentence = judge(verdict)
    job.monitor.out.say(sentence)
    kind = "growth" if stages(job.config)[number].extend is None else "extension"
    job.monitor.event(kind, int(changed.record["step"]), says=sentence, proven=kept)
    if not kept:
        raise checkpoint.CheckpointError(
            f"{proven.aside_of(path)}: the changed model is not what was proven, see proof.json; "
            "the checkpoint before it is whole (未通过证明)"
        )
    return checkpoint.read(path)


def _engine(job: Job, state: "State") -> "Engine":
    """A model of this stage, cut and laid out over the devices, with room for the state."""
    import torch

    from pretrain import models, objectives, parallel, plan, recompute, sequence
    from pretrain.engine import Engine

    config = job.config
    model_config = stage_model(config, int(state.record["stage"]))
    with torch.device("meta"):
        model = models.build(model_config)
    kept = plan.kept(config, model_config)
    recompute.apply(model, kept.by_block(), kept.offload)
    parallel.shard(model, model_config, job.mesh)
    sequence.share(model, job.mesh)
    return Engine(
        model,
        model_config,
        job.mesh,
        objective=objectives.build(config.objective),
        optimizer=config.optimizer,
        precision=config.precision,
        zero=config.parallel.zero,
        overlap=config.parallel.overlap,
        micro_rows=config.batch.micro,
        seed=config.run.seed,
        born=state.record["born"],
        scales=_scales(job, state, [tensor.name for tensor in tensors(model_config)]),
        hold=config.precision != "fp16",
        rewarm=state.record.get("rewarm"),
        sources=len(job.corpora.train),
    )


def _scales(job: Job, state: "State", names: list[str]) -> dict[str, Any]:
    """Each tensor's own factors: those of growth, and nothing at all for what the stage freezes."""
    patterns = stages(job.config)[int(state.record["stage"])].frozen
    frozen = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    still = {"lr": 0.0, "wd": 0.0, "eps": 1.0, "clip": 0.0}
    return {**(state.record.get("scales") or {}), **dict.fromkeys(frozen, still)}


def _words(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "deepspeed pretrain/train.py", description="train, or resume, the run of a page (训练)"
    )
    parser.add_argument("config", help="a page like configs/runs/cpm-small-1gpu.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. run.steps=100"
    )
    parser.add_argument("--gpu", action="store_true", help="on NVIDIA GPUs or not at all")
    # By `launch train`. Words reach the machines of a hostfile, the environment does not.
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's; RANK says it too
    return parser.parse_intermixed_args(argv)


def _heard() -> list[int]:
    """The signals that tell this rank to stop, as they come."""
    import signal

    numbers: list[int] = []

    def note(number: int, frame: object) -> None:
        numbers.append(number)

    signal.signal(signal.SIGTERM, note)  # in any case: it is the launcher's word
    for number in (signal.SIGINT, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    return numbers


def main(argv: Sequence[str]) -> int:
    """The command; the exit code is 0, 2 where a sentence says what to change, or IO_FAILED."""
    heard = _heard()  # first of all: a stop while the rest is imported counts at the first border
    words = _words(argv)
    many_files()
    if words.launched and not words.gpu:
        os.environ.update(ON_CPU)
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = load(words.config, RunConfig, words.overrides)
        if wrong := strangers(Path(config.run.out)):
            raise ConfigError(*wrong)
    except ConfigError as error:
        if rank == 0:
            print(f"bajie: {error}", file=sys.stderr)
        return 2
    from pretrain.monitor import first_to_speak, terminal

    try:
        out = terminal(Path(config.run.out), rank, words.launched)
    except OSError as error:
        if rank == 0:
            print(f"bajie: run.out: {error} (无法写入运行目录)", file=sys.stderr)
        return 2
    from pretrain.checkpoint import StorageError
    from pretrain.loop import SIGNAL
    from pretrain.stopping import StopFile, at_work
    from pretrain.watch import STOPPED, enlist, told

    run = Path(config.run.out)
    busy = at_work(run)  # the roll and a stop file are that job's, until the folder is ours
    entries = [] if busy else [enlist(run, rank)]
    # Else the launcher took away an old one.
    asking = StopFile(run, left_counts=words.launched and not busy)

    def begins() -> None:
        if busy:
            entries.append(enlist(run, rank))
        told(entries[0], begun=True)

    try:
        if words.gpu:
            check_gpu()
        summary = train(
            config,
            out,
            lambda: bool(heard) or (rank == 0 and asking.asked()),
            begins,
        )
        told(entries[0], state=STOPPED if summary["stopped"] == SIGNAL else "ended")
    except BaseException as error:
        traced = os.environ.get("BAJIE_TRACEBACK") == "1"
        traced = traced or not isinstance(error, ValueError | OSError)
        mistaken = isinstance(error, (ValueError, *MISTAKES))
        code = 2 if mistaken and not isinstance(error, StorageError) else IO_FAILED
        how = {"code": 1 if traced else code, "left": time.time()}
        for entry in entries:
            told(entry, state=f"{type(error).__name__}: {error}"[:300], **how)
        if traced:
            raise
        import traceback

        with contextlib.suppress(OSError):
            traceback.print_exc()  # to RUN/logs
        if first_to_speak(Path(config.run.out)):
            out.complain(f"bajie: {error}")
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
