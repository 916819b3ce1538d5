"""A checkpoint's averaged weights in place of its last ones: `RUN@ema` wherever a checkpoint goes.

launch evaluate RUN@ema --task bits --data CORPUS        generate, convert, inspect: alike
"""

from pathlib import Path, PosixPath

from pretrain.state import State

MARK = "@ema"
"""Behind the name of a run or checkpoint: its average (optimizer.ema) is meant."""


class Averaged(PosixPath):
    """A checkpoint's folder, its averaged weights meant; its other files are found as ever."""


def unmarked(path: str | Path) -> tuple[Path, bool]:
    """(path without the mark, whether it had it)."""
    return Path(str(path).removesuffix(MARK)), str(path).endswith(MARK)


def called(folder: Path) -> str:
    """The name of a checkpoint's folder, with the mark where its average is meant."""
    return f"{folder}{MARK if isinstance(folder, Averaged) else ''}"


def averaged(state: State) -> State:
    """The same model with the average as its weights, without moments.

    Raises ValueError if the state keeps no average.
    """
    names = state.names("optim/ema")
    if not names:
        raise ValueError(
            f"{MARK}: this checkpoint keeps no average of the weights; train with optimizer.ema "
            "above 0, or leave the mark out (没有滑动平均权重)"
        )
    buffers = {key: entry for key, entry in state.entries.items() if key.startswith("buffers/")}
    weights = {f"weights/{name}": state.entries[f"optim/ema/{name}"] for name in names}
    return State({**weights, **buffers}, state.record)
