"""python -m launch export SRC --out DIR [--average N] [--dtype bfloat16]: weights to give away.

    the newest N checkpoints of a run --mean in float64, a tensor at a time--+
    a checkpoint                      --no moments, bfloat16-----------------+--> DIR, a checkpoint
    DeepSpeed's own ZeRO folder       --partitions put together-----------------> model.safetensors

What comes out is read by `generate`, `evaluate`, `convert` and init.from like any checkpoint. An
average of the last checkpoints of a run at a constant rate is often as good as its decay (Izmailov
et al. 2018, SWA; Sanyal et al. 2023, LAWA); measure it before it is used.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from launch.cli import UserError
from pretrain import checkpoint
from pretrain.state import Entry, State


def main(argv: list[str]) -> int:
    """The verb."""
    parser = argparse.ArgumentParser("python -m launch export", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a run, a checkpoint, or a ZeRO folder of DeepSpeed's")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--average", type=int, default=1, help="mean of the newest N of a run")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    source, out = Path(args.source), Path(args.out)
    if out.exists():
        raise UserError(f"--out: {out} is there already; name a new folder (输出目录已存在)")
    if args.average < 1:
        raise UserError(f"--average: is {args.average}, must be at least 1 (平均数至少为 1)")
    from pretrain.convert import deepspeed, files

    if (found := deepspeed.folder_of(source)) is not None:
        if args.average > 1:
            raise UserError(
                "--average: is for runs of ours, not for DeepSpeed's folders (仅用于本项目的运行)"
            )
        tensors = deepspeed.read(found)
        names = [name for name in tensors if name.startswith("weights/")]
        out.mkdir(parents=True)
        dtype = getattr(torch, args.dtype)
        files.write(out, ((name[8:], tensors[name]()) for name in names), dtype)
        print(f"{out}: {len(names)} tensors out of {found} ({args.dtype}, 已导出)")
        return 0
    paths = newest_good(source, args.average)
    state = exported([checkpoint.read(path) for path in paths], args.dtype)
    words = paths[0] / "tokenizer"
    checkpoint.write_state(out, state, words if words.is_dir() else None)
    steps = [str(step) for step in state.record["averaged"]]
    which = f"the mean of steps {', '.join(steps)}" if len(steps) > 1 else f"step {steps[0]}"
    print(f"{out}: {len(state.entries)} tensors, {which} ({args.dtype}, 已导出)")
    return 0


def newest_good(source: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a run that verify, newest first; or the one that is named.

    Raises UserError if there are fewer, CheckpointError for one that is damaged.
    """
    if count == 1:
        return [checkpoint.resolve(source)]
    good = [path for path in checkpoint.found_in(source) if not checkpoint.damage(path)]
    if len(good) < count:
        raise UserError(
            f"--average: is {count}, {source} has {len(good)} good checkpoints; take fewer, or "
            "raise run.keep_checkpoints (检查点不足)"
        )
    return good[:count]


def exported(states: Sequence[State], dtype: str) -> State:
    """The mean weights of states of one model, without moments; buffers are the newest's.

    Raises UserError if they are of different models.
    """
    first = states[0]
    if any(state.record["model"] != first.record["model"] for state in states):
        raise UserError(
            "--average: the newest checkpoints are of different models (the run grew between "
            "them); take fewer (模型尺寸不同)"
        )
    entries = {}
    for key, entry in first.weights_only().entries.items():
        if key.startswith("weights/"):
            entries[key] = Entry(entry.shape, dtype, _mean(states, key, getattr(torch, dtype)))
        else:
            entries[key] = entry
    gone = ("scaler", "born", "scales", "border", "ephemeral")
    record = {key: value for key, value in first.record.items() if key not in gone}
    steps = [state.record.get("step", 0) for state in states]
    return State(entries, {**record, "averaged": steps})


def _mean(states: Sequence[State], key: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        total = states[0].read(key).double()
        for state in states[1:]:
            total += state.read(key)
        return (total / len(states)).to(dtype)

    return read
