"""python -m launch demo: from Chinese text to a pretrained, resumed and grown language model.

    the shipped sample --corpus--> tokens --train on 2 processes--> killed in the middle
    --train again--> resumed exactly --> grown deeper and wider --> trained on --> a table of it all

Everything goes through the commands that a user types; each is printed before it runs. The kill is
a real SIGKILL of every process of the job. The verdict on the resume compares the steps that ran
twice, before the kill and after it, to the last digit.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from configs.load import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CORPUS_CONFIG = "configs/corpora/sample.yaml"
RUN_CONFIG = "configs/runs/demo.yaml"
PROMPT = "如果你想安装软件包，"


@dataclass(frozen=True)
class Demo:
    """What the chapters share."""

    out: Path
    devices: int
    gpu: bool

    @property
    def corpus(self) -> Path:
        """The corpus folder."""
        return self.out / "corpus"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.out / "run"


def main(argv: Sequence[str]) -> int:
    """The command; 0 when every verdict holds."""
    parser = argparse.ArgumentParser(prog="python -m launch demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="demo", help="folder to work in; made anew")
    parser.add_argument("--devices", type=int, default=2, help="processes (or GPUs) to train on")
    parser.add_argument("--gpu", action="store_true", help="train on GPUs")
    words = parser.parse_args(argv)
    gpu = words.gpu or os.environ.get("BAJIE_GPU") == "1"
    demo = Demo(Path(words.out).resolve(), words.devices, gpu)
    if demo.out.exists() and not (demo.out / ".bajie-demo").exists():
        raise ConfigError(
            f"{demo.out}: exists and no demo made it; name another with --out (已存在，请换名)"
        )
    shutil.rmtree(demo.out, ignore_errors=True)
    demo.out.mkdir(parents=True)
    (demo.out / ".bajie-demo").touch()
    began = time.monotonic()
    _title("1/6  corpus: clean, deduplicate, split, train a tokenizer, encode (语料)")
    _launch("corpus", CORPUS_CONFIG, f"data.out={demo.corpus}")
    _title("2/6  pretraining, killed in the middle on purpose (预训练，中途强杀)")
    before, saved = _train_and_kill(demo)
    _title("3/6  the same command again: it resumes, and grows at its stage border (续训与生长)")
    _train(demo)
    _title("4/6  measured beside counts (评测)")
    measured = _measure(demo)
    _title("5/6  let it write (生成)")
    _launch("generate", str(demo.run), "--prompt", PROMPT, "--max-new-tokens", "80", "--seed", "1")
    _title("6/6  what came of it (结果)")
    good = _report(demo, before, saved, measured, time.monotonic() - began)
    return 0 if good else 1


def _title(text: str) -> None:
    print(f"\n\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def _launch(*words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a verb as a user would, from the project's root; a failure ends the demo."""
    print(f"$ python -m launch {shlex.join(words)}", flush=True)
    line = [sys.executable, "-m", "launch", *words]
    done = subprocess.run(line, cwd=ROOT, check=False, text=True, **options)
    if done.returncode:
        raise ConfigError(
            f"`launch {words[0]}` ended with exit code {done.returncode}; see above (见上文)"
        )
    return done


def _train_words(demo: Demo) -> list[str]:
    words = ["train", RUN_CONFIG, "--devices", str(demo.devices), *(["--gpu"] * demo.gpu)]
    return [*words, f"run.out={demo.run}", f"data.train.0.corpus={demo.corpus}"]


def _train(demo: Demo) -> None:
    _launch(*_train_words(demo))


def _train_and_kill(demo: Demo) -> tuple[list[dict[str, Any]], int]:
    """Train until some steps past the second checkpoint, then SIGKILL every process of the job.

    Returns the metrics as they stood at the kill, and the step of the newest checkpoint.
    """
    words = _train_words(demo)
    print(f"$ python -m launch {shlex.join(words)}", flush=True)
    job = subprocess.Popen([sys.executable, "-m", "launch", *words], cwd=ROOT)
    killed = threading.Event()

    def watch() -> None:
        while job.poll() is None:
            steps = [line["step"] for line in _metrics(demo.run)]
            saved = [step for step in _checkpoints(demo.run) if step > 50]
            if saved and steps and steps[-1] >= saved[0] + 20:
                for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                killed.set()
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    job.wait()
    watcher.join()
    if not killed.is_set():
        raise ConfigError(
            f"the training ended by itself with exit code {job.returncode}; see above (见上文)"
        )
    metrics, saved = _metrics(demo.run), _checkpoints(demo.run)
    print(f"\nkill -9 after step {metrics[-1]['step']}; checkpoints of steps {saved}")
    return metrics, saved[-1]


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break  # the last line, being written
    return lines


def _checkpoints(run: Path) -> list[int]:
    names = [p.name for p in (run / "checkpoints").glob("stage-*")]
    return sorted(int(name.rsplit("-", 1)[1]) for name in names)


def _measure(demo: Demo) -> dict[str, Any]:
    words = ["evaluate", str(demo.run), "--task", "bits", "--data", str(demo.corpus), "--json"]
    done = _launch(*words, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout))


def _report(
    demo: Demo,
    before: list[dict[str, Any]],
    saved: int,
    measured: dict[str, Any],
    elapsed: float,
) -> bool:
    """The table; True when the resume was exact, the growth kept the function and it learnt."""
    after = {line["step"]: line for line in _metrics(demo.run)}
    twice = [line for line in before if line["step"] > saved and "loss" in line]
    same = all(after[line["step"]]["loss"] == line["loss"] for line in twice)
    proof_path = next(iter(sorted((demo.run / "checkpoints").glob("stage-01-*/proof.json"))))
    proof = json.loads(proof_path.read_text("utf-8"))
    manifest = json.loads((demo.corpus / "manifest.json").read_text("utf-8"))
    train = manifest["splits"]["train"]
    bits = measured["bits_per_character"]
    course = [line for line in after.values() if "valid_bits_per_character" in line]
    start, middle, end = (
        line["valid_bits_per_character"]
        for line in (course[0], course[len(course) // 2], course[-1])
    )
    learnt = bits["model"] < bits["bigram"] or bits["model"] <= 0.88 * bits["unigram"]
    rows = [
        ("documents, tokens", f"{train['documents']:,} documents, {train['tokens']:,} tokens"),
        (
            "vocabulary",
            f"{manifest['tokenizer']['vocab_size']:,} ({manifest['tokenizer']['kind']})",
        ),
        ("characters per token", f"{train['characters'] / train['tokens']:.3f}"),
        (
            "validation, bits/character",
            f"start {start:.3f} -> middle {middle:.3f} -> end {end:.3f}",
        ),
        (
            "  the counts' bits/character",
            f"unigram {bits['unigram']:.3f}, bigram {bits['bigram']:.3f}",
        ),
        ("  the model on the same text", f"{bits['model']:.3f}  {_word(learnt)}"),
        ("resume after kill -9", f"{len(twice)} steps ran twice, losses equal: {_word(same)}"),
        *_grown(proof),
        ("corpus", str(demo.corpus)),
        ("checkpoints", str(demo.run / "checkpoints")),
        ("time", f"{elapsed / 60:.1f} minutes"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    print(f"\nlook at it:  python -m launch report {shlex.quote(str(demo.run))}")
    print(f"             tensorboard --logdir {shlex.quote(str(demo.run / 'tensorboard'))}")
    return learnt and same and bool(twice) and bool(proof["kept"])


def _grown(proof: dict[str, Any]) -> list[tuple[str, str]]:
    """What growth did, and its proof."""
    sizes = ("layers", "hidden", "ffn")
    changed = ", ".join(f"{key} {proof['from'][key]} -> {proof['to'][key]}" for key in sizes)
    loss, far = proof["batch"]["float64"], proof["float64"]

    def apart(part: dict[str, Any]) -> str:
        return f"{part['max_difference']:.1e} (allowed {part['tolerance']:.1e})"

    return [
        ("growth, copies with noise", changed),
        ("  logits apart, float64", f"{apart(far)}, of deviation {far['std']:.2f}"),
        ("  logits apart, float32", apart(proof["float32"])),
        ("  loss of a batch of data", f"{loss['before']:.9f} -> {loss['after']:.9f}"),
        ("  the function is kept", f"{_word(proof['kept'])}  (proof.json)"),
    ]


def _word(good: bool) -> str:
    return "yes (是)" if good else "NO (否)"
