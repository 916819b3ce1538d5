"""Training on a CPU: this project's train() against the Trainer of `transformers` with DeepSpeed.

    pip install accelerate
    python -m benchmarks.training [--families cpm roformer t5_pegasus] [--dropout 0.0] [--rounds 5]

    ours   (2 processes, train())   --+   they take turns of some steps, told by a file, so that a
    theirs (2 processes, Trainer)   --+   busy machine slows both; the table has the turns' median

Both: 8 layers x 512, rows of 512 tokens (T5: 384 and 128), micro-batches of 4 rows, bf16 with
float32 masters, ZeRO 1, one thread a process, clipping at 1, logging and evaluation off. Ours
keeps documents of a row apart and accumulates in float32, theirs does not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, MICRO, STEPS, WARM = 8, 512, 4, 3, 2
VOCAB = {"cpm": 30_000, "roformer": 50_000, "t5_pegasus": 50_000}
LENGTHS = {"cpm": (512, 0), "roformer": (512, 0), "t5_pegasus": (384, 128)}
"""Tokens of a row: of the only stack or of the encoder, and of the decoder."""
WAIT_S = 900.0
SAMPLE = Path(__file__).parent.parent / "data_pipeline" / "sample" / "sample.jsonl"


class Turns:
    """A call at each step border that holds its process until it is its arm's turn."""

    def __init__(self, folder: Path, arm: str) -> None:
        self.folder, self.arm, self.steps, self.begin = folder, arm, 0, 0.0

    def __call__(self) -> bool:
        if self.steps >= WARM and (self.steps - WARM) % STEPS == 0:
            turn = (self.steps - WARM) // STEPS
            done = self.folder / f"{self.arm}.{turn}"
            if os.environ["RANK"] == "0":
                done.with_suffix(".tmp").write_text(str(time.perf_counter() - self.begin))
                done.with_suffix(".tmp").rename(done)
            while not (self.folder / f"go.{self.arm}.{turn + 1}").exists():
                time.sleep(0.02)
            self.begin = time.perf_counter()
        self.steps += 1
        return False


def ours(family: str, dropout: float, folder: Path) -> None:
    """Train as `launch train` would, until killed."""
    from configs.load import from_dict
    from configs.run import RunConfig
    from pretrain.train import train

    off = {"dropout": dropout, "attention_dropout": dropout}
    sizes = {"vocab": VOCAB[family], "hidden": HIDDEN, "layers": LAYERS, "head_dim": 64}
    model = {
        "cpm": {"heads": 8, "ffn": 4 * HIDDEN, "positions": 512},
        "roformer": {"heads": 8, "ffn": 4 * HIDDEN, "version": 1},
        "t5_pegasus": {"heads": 6, "ffn": 1024},
    }[family]
    objective = {
        "cpm": {"name": "causal"},
        "roformer": {"name": "masked", "masking": "token"},
        "t5_pegasus": {"name": "pseudo_summary", "source_tokens": 384, "target_tokens": 128},
    }[family]
    source, target = LENGTHS[family]
    data = {"train": [{"corpus": str(folder.parent / "corpus")}], "seq_len": source}
    page = {
        "model": {"family": family} | sizes | model | off,
        "objective": objective,
        "data": data | ({"target_len": target} if target else {}),
        "batch": {"samples": 2 * MICRO, "micro": MICRO},
        "optimizer": {"lr": 1e-4},
        "schedule": {"warmup_steps": 1},
        "precision": "bf16",
        "run": {"out": str(folder / "run"), "steps": 10**6, "threads": 1}
        | {"log_every_steps": 10**5, "validate_every_steps": 0, "save_every_steps": 0},
    }
    train(from_dict(RunConfig, page), interrupted=Turns(folder, "ours"))


def theirs(family: str, dropout: float, folder: Path) -> None:
    """The same model and batch in transformers' Trainer with DeepSpeed's ZeRO 1, until killed."""
    import torch
    import transformers

    class Hold(transformers.TrainerCallback):
        turns = Turns(folder, "theirs")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.turns()

    class Random(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, number: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(number)
            source, target = LENGTHS[family]
            row = torch.randint(1, VOCAB[family], (source,), generator=generator)
            if family == "cpm":
                return {"input_ids": row, "labels": row}
            if family == "roformer":
                hidden = torch.rand(source, generator=generator) < 0.15
                return {"input_ids": row, "labels": torch.where(hidden, row, -100)}
            labels = torch.randint(1, VOCAB[family], (target,), generator=generator)
            return {"input_ids": row, "labels": labels}

    torch.set_num_threads(1)
    config = {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_clipping": 1.0,
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "theirs"), per_device_train_batch_size=MICRO, max_steps=10**6,
        learning_rate=1e-4, bf16=True, use_cpu=True, deepspeed=config, logging_strategy="no",
        save_strategy="no", report_to=[], disable_tqdm=True, ddp_backend="gloo",
    )  # fmt: skip
    transformers.Trainer(
        their_model(family, dropout), arguments, train_dataset=Random(), callbacks=[Hold()]
    ).train()


def their_model(family: str, dropout: float) -> Any:
    """The model of transformers of the same size."""
    import transformers

    if family == "cpm":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB[family], n_positions=512, n_embd=HIDDEN, n_layer=LAYERS, n_head=8,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False,
            )
        )  # fmt: skip
    if family == "roformer":
        return transformers.RoFormerForMaskedLM(
            transformers.RoFormerConfig(
                vocab_size=VOCAB[family], hidden_size=HIDDEN, embedding_size=HIDDEN,
                num_hidden_layers=LAYERS, num_attention_heads=8, intermediate_size=4 * HIDDEN,
                hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0,
            )
        )  # fmt: skip
    config = transformers.MT5Config(
        vocab_size=VOCAB[family], d_model=HIDDEN, d_kv=64, d_ff=1024, num_layers=LAYERS,
        num_decoder_layers=LAYERS, num_heads=6, dropout_rate=dropout,
        feed_forward_proj="gated-gelu", use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    config.tie_word_embeddings = False
    return transformers.MT5ForConditionalGeneration(config)


def corpus(folder: Path) -> None:
    """The shipped sample as a corpus of words with gap sentences."""
    page = {
        "data": {"out": str(folder), "workers": 1}
        | {"sources": [{"kind": "jsonl", "name": "sample", "path": str(SAMPLE)}]},
        "tokenizer": {"kind": "wordpiece", "vocab_size": 5000},
        "split": {"valid_fraction": 0.1},
        "encode": {"pseudo_summary": True},
    }
    from configs.corpus import CorpusConfig
    from configs.load import from_dict
    from data_pipeline.build import build

    build(from_dict(CorpusConfig, page))


def start(arm: str, family: str, dropout: float, folder: Path, port: int) -> list[Any]:
    """Two processes of one arm."""
    words = ["-m", "benchmarks.training", "--arm", arm, "--families", family]
    words += ["--dropout", str(dropout), "--folder", str(folder)]
    fixed = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    fixed |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    made = []
    for rank in ("0", "1"):
        log = (folder / f"{arm}.{rank}.log").open("w")
        environment = os.environ | fixed | {"RANK": rank, "LOCAL_RANK": rank}
        made.append(
            subprocess.Popen([sys.executable, *words], env=environment, stdout=log, stderr=log)
        )
    return made


def turn(folder: Path, arm: str, number: int, processes: list[Any]) -> float:
    """Seconds of one turn; the first (0) is the warm-up."""
    done, end = folder / f"{arm}.{number}", time.monotonic() + WAIT_S
    while not done.exists():
        if any(p.poll() is not None for p in processes) or time.monotonic() > end:
            said = (folder / f"{arm}.0.log").read_text(errors="replace")[-2000:]
            raise SystemExit(f"{arm} ended or hangs:\n{said}")
        time.sleep(0.02)
    return float(done.read_text())


def compare(family: str, dropout: float, rounds: int, folder: Path) -> dict[str, Any]:
    """Tokens a second of both, and the median of the turns' ratios."""
    folder.mkdir()
    arms = {
        arm: start(arm, family, dropout, folder, 29_700 + os.getpid() % 200 + 300 * at)
        for at, arm in enumerate(("ours", "theirs"))
    }
    try:
        for arm, processes in arms.items():
            turn(folder, arm, 0, processes)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(1, rounds + 1):
            for arm, processes in arms.items():
                (folder / f"go.{arm}.{number}").touch()
                seconds[arm].append(turn(folder, arm, number, processes))
    finally:
        for process in arms["ours"] + arms["theirs"]:
            process.kill()
    tokens = STEPS * 2 * MICRO * sum(LENGTHS[family])
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "family": family,
        "dropout": dropout,
        **{arm: tokens / statistics.median(times) for arm, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(VOCAB), choices=list(VOCAB))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=["ours", "theirs"], help="(a process of this script)")
    parser.add_argument("--folder", type=Path, help="(likewise)")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    if words.arm:
        job: Callable[..., None] = {"ours": ours, "theirs": theirs}[words.arm]
        return job(words.families[0], words.dropout, words.folder)
    with tempfile.TemporaryDirectory() as name:
        corpus(Path(name) / "corpus")
        rows = [
            compare(family, words.dropout, words.rounds, Path(name) / family)
            for family in words.families
        ]
    if words.json:
        print(json.dumps(rows))
        return None
    print(
        f"{'family':<12}{'dropout':>8}{'ours tok/s':>12}{'theirs':>10}{'ratio':>7}   turns from to"
    )
    for row in rows:
        print(
            f"{row['family']:<12}{row['dropout']:>8}{row['ours']:>12,.0f}{row['theirs']:>10,.0f}"
            f"{row['ratio']:>7.2f}   {row['lowest']:.2f} {row['highest']:.2f}"
        )
    return None


if __name__ == "__main__":
    main()
