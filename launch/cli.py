"""The roof: a dict verb -> function, and the manners that all verbs share.

    python -m launch VERB ... --> VERBS[verb] --imported now--> f(argv) -> exit code
                                                    |
      a mistake of the user: one sentence on stderr, exit code 2 (BAJIE_TRACEBACK=1: a traceback)

A verb is imported when it is asked for, so that `check` and `plan` never pay for torch. Only verbs
whose module is there are shown.
"""

import difflib
import importlib
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OURS = ("configs", "data_pipeline", "pretrain", "launch")


class UserError(ValueError):
    """What a user asked for cannot be done; one sentence that says what to change."""


@dataclass(frozen=True)
class Verb:
    """A row of the table that a bare `python -m launch` prints."""

    function: str
    """module:function, of f(argv: list[str]) -> int."""
    english: str
    """What it does, in a line."""
    chinese: str
    """The same in Chinese."""


VERBS = {
    "demo": Verb(
        "launch.demo:main", "from text to a grown, talking model, here and now", "演示全程"
    ),
    "corpus": Verb("launch.corpus:main", "build a corpus from text, or go on building", "构建语料"),
    "check": Verb(
        "launch.check:main", "is this config right? and what may stand in one", "检查配置"
    ),
    "plan": Verb("pretrain.plan:main", "parameters, memory, days and disk of a run", "训练预算"),
    "train": Verb("launch.train:main", "train, or resume, on the devices of this machine", "训练"),
    "cluster": Verb("launch.cluster:main", "job files: Slurm, Kubernetes, a hostfile", "集群作业"),
    "report": Verb("launch.report:main", "a run's curves and events on one page", "训练报告"),
    "evaluate": Verb("pretrain.evaluate:main", "loss and scores of a checkpoint", "评测"),
    "generate": Verb("pretrain.generate:main", "let a checkpoint write", "生成文本"),
    "grow": Verb("launch.grow:main", "a larger model of the same function, proven", "模型增长"),
    "extend": Verb("launch.extend:main", "a checkpoint that reads longer rows, proven", "加长文本"),
    "convert": Verb("launch.convert:main", "checkpoints of other formats, in and out", "格式转换"),
    "export": Verb("launch.export:main", "weights to give away: bf16, the mean of N", "导出权重"),
    "revocab": Verb("launch.revocab:main", "a checkpoint taken to another vocabulary", "更换词表"),
    "inspect": Verb("launch.inspect:main", "what a corpus or a checkpoint holds", "查看"),
}


def main(argv: Sequence[str]) -> int:
    """Run one verb; the exit code is its own, 2 for a user's mistake, 130 for Ctrl-C."""
    verbs = built()
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(table(verbs))
            return 0
        if argv[0] not in verbs:
            near = difflib.get_close_matches(argv[0], verbs, 1)
            hint = f"did you mean '{near[0]}'?" if near else "there are " + ", ".join(verbs)
            raise UserError(f"'{argv[0]}' is no verb; {hint} (没有这个命令)")
        module, _, function = verbs[argv[0]].function.partition(":")
        return int(getattr(importlib.import_module(module), function)(list(argv[1:])) or 0)
    except BrokenPipeError:
        # The reader of our output has left (| head): not a mistake, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("\nbajie: stopped (已中断)", file=sys.stderr)
        return 130
    except Exception as error:
        said = sentence(error)
        if said is None or os.environ.get("BAJIE_TRACEBACK") == "1":
            raise
        sys.stdout.flush()
        print(f"bajie: {said}", file=sys.stderr)
        return 2


def built() -> dict[str, Verb]:
    """The verbs whose module is there."""
    return {
        name: verb
        for name, verb in VERBS.items()
        if importlib.util.find_spec(verb.function.partition(":")[0]) is not None
    }


def table(verbs: dict[str, Verb]) -> str:
    """What a bare `python -m launch` prints."""
    width = max(len(verb.english) for verb in verbs.values())
    rows = [f"  {name:<10}{verb.english:<{width}}   {verb.chinese}" for name, verb in verbs.items()]
    head = "bajie: pretraining for large Chinese models (中文大模型预训练)"
    usage = "  python -m launch VERB --help    says more of each"
    return "\n".join([head, "", *rows, "", usage])


def sentence(error: BaseException) -> str | None:
    """What to tell the user of this error; None where it is our own fault and wants a traceback.

    Ours to tell: what the system refused (OSError), a package that is not installed, and a
    ValueError that one of our own rooms raised. One that comes out of a library is a bug of ours.
    """
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(OURS):
        return (
            f"the package '{error.name}' is not installed; ./launch/setup.sh installs what is "
            "needed, with `hf`, `ray` or `web` as its argument those extras too (缺少依赖包)"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror} (文件或系统错误)"
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _raised_by_us(error)):
        return str(error) or type(error).__name__
    return None


def _raised_by_us(error: BaseException) -> bool:
    if type(error).__module__.startswith(OURS):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).resolve().parent.parent
    last = Path(frames[-1].filename).resolve() if frames else root
    return type(error) is ValueError and any(last.is_relative_to(root / room) for room in OURS)
