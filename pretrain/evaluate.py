"""How well a checkpoint predicts text, beside counts that need no network; and what it can do.

    python -m launch evaluate CHECKPOINT --task bits --data CORPUS
    python -m launch evaluate CHECKPOINT --task mlm|csl|ape210k|lcqmc|labels --data CORPUS_OR_FILE
    python -m launch evaluate CHECKPOINT --task tnews|iflytek|ocnli|chid --data FILE --candidates 4
    python -m launch evaluate CHECKPOINT --task length --data CORPUS --lengths 128,512 --plot FILE
    python -m launch evaluate CHECKPOINT --task passkey --lengths 128,512
    python -m launch evaluate --task ape210k --data FILE --cleaned OUT

The tasks are in tasks.py, classify.py and prompts.py, their scores in scores.py. `bits` measures
bits per character on rows of a corpus' valid split: the checkpoint's, a unigram's and an
interpolated bigram's, the two counted on the train split and asked about the same targets. Bits per
character compare across tokenizers: the loss in nats / ln 2 / characters of the targets. --cleaned
needs no checkpoint: it writes the problems as they were published, to train on (`pairs`).
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.load import from_dict
from configs.objectives import Causal
from pretrain.averaged import called
from pretrain.checkpoint import read, resolve
from pretrain.corpora import Corpora, check_learnt, open_measured, trained_objective
from pretrain.device import check_gpu
from pretrain.flags import check_read
from pretrain.prompts import TASKS as PROMPTED

TASKS = ("bits", "mlm", "csl", "ape210k", "lcqmc", "labels", "length", "passkey", *PROMPTED)
READ_BY: dict[str, tuple[str, ...]] = {
    "data": tuple(task for task in TASKS if task != "passkey"),
    "seq_len": ("bits", "mlm", "labels"),
    "masking": ("mlm",),
    "beams": ("csl", "ape210k"),
    "outputs": ("csl", "ape210k"),
    "candidates": PROMPTED,
    "shots": PROMPTED,
    "examples": PROMPTED,
    "lengths": ("length", "passkey"),
    "plot": ("length", "passkey"),
    "cleaned": ("ape210k",),
}
"""Flags that only some tasks read."""
Ints = NDArray[np.int64]
STRETCH = 1 << 20
"""Tokens of one place that are counted together."""
AT_ONCE = 16
"""Stretches whose pairs are sorted in one go."""
COUNTED = 1 << 27
"""Most tokens of a corpus that are counted: those of a larger one give minutes and gigabytes more,
and the baseline little."""
MOST_OF_BIGRAM = 1 - 1e-4
"""Its largest weight: a pair that was never seen has a probability all the same."""
BUCKETS = 24
"""Contexts share an interpolation weight by the power of two of their count."""


@dataclass(frozen=True)
class Counts:
    """What a stretch of tokens says about single tokens and pairs."""

    single_V: Ints
    pairs: Ints
    """Sorted codes previous * vocab + next."""
    times: Ints
    """How often each pair stands there."""


def stretches(stop: int) -> list[tuple[int, int]]:
    """[begin, end) of what is counted of tokens [0, stop): all, or COUNTED evenly spread."""
    number = math.ceil(min(stop, COUNTED) / STRETCH)
    pace = STRETCH if stop <= COUNTED else stop // number
    return [(n * pace, min(n * pace + STRETCH, stop)) for n in range(number)]


def count(tokens: Any, stop: int, vocab: int) -> Counts:
    """Count the stretches of tokens [0, stop) of an index; memory grows with the distinct pairs."""
    single_V = np.zeros(vocab, np.int64)
    pairs, times = np.empty(0, np.int64), np.empty(0, np.int64)
    spans = stretches(stop)
    for first in range(0, len(spans), AT_ONCE):
        codes = []
        for begin, end in spans[first : first + AT_ONCE]:
            # a pair belongs to the stretch of its first token
            part = tokens.slice(begin, min(end + 1, stop)).astype(np.int64)
            single_V += np.bincount(part[: end - begin], minlength=vocab)
            codes.append(part[:-1] * vocab + part[1:])
        found, often = np.unique(np.concatenate(codes), return_counts=True)
        pairs, where = np.unique(np.concatenate([pairs, found]), return_inverse=True)
        merged = np.zeros(len(pairs), np.int64)
        np.add.at(merged, where, np.concatenate([times, often]))
        times = merged
    return Counts(single_V, pairs, times)


def unigram(counts: Counts, targets_N: Ints) -> NDArray[np.float64]:
    """Probability [N] of each target alone, every token counted once more than it was seen."""
    single_V = counts.single_V + 1
    return single_V[targets_N] / single_V.sum()


def bigram(counts: Counts, context_N: Ints, targets_N: Ints) -> NDArray[np.float64]:
    """Relative frequency [N] of each target behind its context; 0 where the pair was never seen."""
    vocab = len(counts.single_V)
    codes = context_N * vocab + targets_N
    at = np.minimum(np.searchsorted(counts.pairs, codes), len(counts.pairs) - 1)
    seen = np.where(counts.pairs[at] == codes, counts.times[at], 0)
    return seen / np.maximum(counts.single_V[context_N], 1)


def fit_weights(counts: Counts, context_N: Ints, targets_N: Ints) -> NDArray[np.float64]:
    """Interpolation weight of the bigram for each bucket of context counts, by EM on held-out text.

    Jelinek and Mercer 1980: the share of the bigram in explaining text that was not counted.
    """
    bucket_N = _bucket(counts, context_N)
    both = bigram(counts, context_N, targets_N)
    alone = unigram(counts, targets_N)
    weights = np.full(BUCKETS, 0.5)
    for _ in range(30):
        mine = weights[bucket_N]
        share = mine * both / (mine * both + (1 - mine) * alone)
        sums = np.bincount(bucket_N, share, BUCKETS)
        number = np.bincount(bucket_N, minlength=BUCKETS)
        weights = np.where(number > 0, sums / np.maximum(number, 1), weights)
    return np.minimum(weights, MOST_OF_BIGRAM)


def _bucket(counts: Counts, context_N: Ints) -> Ints:
    often = counts.single_V[context_N]
    return np.minimum(np.log2(often + 1).astype(np.int64), BUCKETS - 1)


def baselines(corpora: Corpora, samples: int) -> dict[str, float]:
    """Nats of the measured targets under the unigram and the interpolated bigram.

    Counted on the train split of the first corpus (of more than COUNTED tokens, on that many); the
    bigram's weights are fitted on its last twentieth with counts of the rest, and used with counts
    of all of it.
    """
    tokens = corpora.train[0].index
    vocab = corpora.tokenizer.vocab_size
    total = int(tokens.tokens)
    cut = total - max(total // 20, 2)
    held = tokens.slice(cut, min(total, cut + AT_ONCE * STRETCH)).astype(np.int64)
    weights = fit_weights(count(tokens, cut, vocab), held[:-1], held[1:])
    counts = count(tokens, total, vocab)
    dataset, rows = corpora.measured(samples)
    nats = {"unigram": 0.0, "bigram": 0.0}
    for number, row in zip(dataset.tolist(), rows.tolist(), strict=True):
        batch = corpora.valid[number].batch(np.asarray([row], np.int64))
        mask = batch.loss_mask_BT
        context, targets = batch.tokens_BT[mask].numpy(), batch.targets_BT[mask].numpy()
        alone, both = unigram(counts, targets), bigram(counts, context, targets)
        weight = weights[_bucket(counts, context)]
        nats["unigram"] -= float(np.log(alone).sum())
        nats["bigram"] -= float(np.log(weight * both + (1 - weight) * alone).sum())
    return nats


def bits(
    checkpoint: str | Path,
    corpus: str | Path,
    samples: int = 256,
    seq_len: int | None = None,
    gpu: bool = False,
) -> dict[str, Any]:
    """Bits per character of a checkpoint, a unigram and a bigram on a corpus' valid split."""
    import torch

    from pretrain import objectives
    from pretrain.device import place
    from pretrain.generate import load_model
    from pretrain.objectives.losses import token_losses_plain
    from pretrain.tasks import TaskError, row_length

    folder = resolve(checkpoint)
    state = read(folder)
    sizes = state.record["model"]
    if sizes["family"] != "cpm":
        raise TaskError(
            f"--task bits: needs a CPM, the checkpoint is a {sizes['family']}; take mlm for an "
            "encoder, csl or length for T5 PEGASUS (仅限 CPM)"
        )
    if samples < 1:
        raise TaskError(f"--samples: is {samples}, must be at least 1 (至少一行)")
    length = row_length(state.record, seq_len, sizes["positions"])
    trained = trained_objective(state.record)
    section = from_dict(Causal, trained if trained.get("name") == "causal" else {"name": "causal"})
    corpora = open_measured(corpus, length, section, sizes.get("words_said") or sizes["vocab"])
    check_learnt(state.record, corpus, corpora.tokenizer.fingerprint)
    model, task = load_model(state, *place(gpu)), objectives.build(section)
    device = next(model.parameters()).device
    nats, predicted = 0.0, 0
    with torch.no_grad():
        for batch in corpora.validation(samples, 0, 1, 4):
            loss_sum, number = task.loss(model, batch.to(device), token_losses_plain)
            nats, predicted = nats + float(loss_sum), predicted + int(number)
    characters = corpora.measured_characters(samples)
    scale = math.log(2) * max(characters, 1)
    table = {"model": nats} | baselines(corpora, samples)
    total = int(corpora.train[0].index.tokens)
    return {
        "checkpoint": called(folder),
        "corpus": str(corpus),
        "rows": len(corpora.measured(samples)[0]),
        "tokens": predicted,
        "characters": characters,
        "counted": {"tokens": min(total, COUNTED), "of": total},
        "bits_per_character": {name: value / scale for name, value in table.items()},
        "nats_per_token": {name: value / max(predicted, 1) for name, value in table.items()},
    }


def main(argv: Sequence[str]) -> int:
    """The command `python -m launch evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m launch evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint or a run folder (its newest)")
    parser.add_argument("--task", choices=TASKS, default="bits", help="what is measured")
    parser.add_argument("--data", help="a corpus folder (bits, mlm, labels, length) or a file")
    parser.add_argument("--samples", type=int, help="rows (256), or lines of a file (all)")
    parser.add_argument("--seq-len", type=int, help="of bits, mlm, labels; default: as trained")
    parser.add_argument("--masking", choices=["token", "word", "word_token"], help="of mlm")
    parser.add_argument("--beams", type=int, default=1, help="of csl and ape210k, as published")
    parser.add_argument("--candidates", type=int, default=0, help=f"of {', '.join(PROMPTED)} (all)")
    parser.add_argument("--shots", type=int, default=0, help="solved examples before each question")
    parser.add_argument("--examples", metavar="FILE", help="what --shots are drawn from")
    parser.add_argument("--outputs", metavar="FILE", help="write what the model wrote, a line each")
    parser.add_argument("--lengths", default="512", help="of length and passkey: 128,256 (长度)")
    parser.add_argument("--plot", metavar="FILE", help="of length, passkey: the curves, SVG")
    parser.add_argument("--cleaned", metavar="FILE", help="of ape210k: write the set and end")
    parser.add_argument("--gpu", action="store_true", help="on an NVIDIA GPU, in bf16")
    parser.add_argument("--json", action="store_true", help="print JSON")
    words = parser.parse_args(argv)
    check_read(words, parser, READ_BY, words.task, "--task")
    if words.checkpoint is None and words.cleaned is None:
        parser.error("a checkpoint must be given (须给出检查点)")
    if words.data is None and words.task != "passkey":
        raise ValueError(f"--data: must be given for --task {words.task} (须给出数据)")
    if words.gpu:
        check_gpu()
    if words.task in ("length", "passkey"):
        result = reach(words)
    elif words.task == "bits":
        samples = 256 if words.samples is None else words.samples
        result = bits(words.checkpoint, words.data, samples, words.seq_len, words.gpu)
    else:
        result = measured(words)
    if words.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    if "checkpoint" in result:
        print(f"checkpoint {result['checkpoint']}")
    if words.task == "bits":
        _show(result)
    elif words.task in ("length", "passkey"):
        from pretrain import lengths

        print("\n".join(lengths.table(result)))
    else:
        from pretrain import tasks as rooms

        print("\n".join(rooms.table(result)))
    return 0


def reach(words: argparse.Namespace) -> dict[str, Any]:
    """What the tasks of long rows find (lengths.py), as plain data; the plot is written."""
    from pretrain import lengths

    try:
        wanted = [int(word) for word in words.lengths.split(",")]
    except ValueError:
        raise lengths.LengthError(
            f"--lengths: is {words.lengths!r}, must be whole numbers with commas, "
            "e.g. 128,512 (须为整数)"
        ) from None
    if words.samples is not None and words.samples < 1:
        raise lengths.LengthError(f"--samples: is {words.samples}, must be at least 1 (至少一个)")
    head = {"task": words.task, "checkpoint": ""}  # the place of what was found there
    if words.task == "length":
        count = words.samples or 64
        found = lengths.lengths(words.checkpoint, words.data, wanted, count, gpu=words.gpu)
        head["data"] = str(words.data)
    else:
        count = words.samples or 10
        found = lengths.passkeys(words.checkpoint, wanted, samples=count, gpu=words.gpu)
    if words.plot is not None:
        Path(words.plot).write_text(lengths.drawn(found), "utf-8")
    return head | found


def measured(words: argparse.Namespace) -> dict[str, Any]:
    """What a task finds, as plain data."""
    from pretrain import classify, tasks

    if words.samples is not None and words.samples < 1:
        raise tasks.TaskError(f"--samples: is {words.samples}, must be at least 1 (至少一行)")
    if words.beams < 1:
        raise tasks.TaskError(f"--beams: is {words.beams}, must be at least 1 (至少一束)")
    if words.cleaned is not None:
        return tasks.write_problems(words.data, words.cleaned, words.samples)
    head = {"task": words.task, "checkpoint": "", "data": str(words.data)}
    if words.task == "mlm":
        chosen = words.masking, words.samples or 256, words.seq_len, words.gpu
        return head | tasks.masked(words.checkpoint, words.data, *chosen)
    asked = words.data, words.samples, words.seq_len, words.gpu
    if words.task == "labels":
        return head | classify.labels(words.checkpoint, *asked)
    if words.task in PROMPTED:
        return head | prompted(words)
    folder = resolve(words.checkpoint)
    head["checkpoint"] = called(folder)
    model, tokenizer = tasks.loaded(folder, words.gpu)
    if words.task == "lcqmc":
        found = tasks.similarity(model, tokenizer, words.data, words.samples)
        if getattr(model.config, "labels", 0):
            found["accuracy"] = classify.labels(called(folder), *asked)["accuracy"]
        return head | found

    def writes(sources: Sequence[str]) -> list[str]:
        return tasks.written(model, tokenizer, sources, words.beams, words.task)

    task = tasks.titles if words.task == "csl" else tasks.problems
    found = task(words.data, words.samples, writes)
    outputs = found.pop("outputs")
    if words.outputs is not None:
        lines = (" ".join(output.split()) + "\n" for output in outputs)
        Path(words.outputs).write_text("".join(lines), "utf-8")
    return head | {"beams": words.beams} | found


def prompted(words: argparse.Namespace) -> dict[str, Any]:
    """What CPM's tasks find (prompts.py)."""
    from pretrain import prompts, tasks

    if words.candidates < 0 or words.candidates == 1 or words.shots < 0:
        raise tasks.TaskError(
            f"--candidates, --shots: are {words.candidates} and {words.shots}, must be 0 (all) or "
            "at least 2, and not negative (选项数不合法)"
        )
    if bool(words.shots) != bool(words.examples):
        raise tasks.TaskError("--shots, --examples: give both or neither (须同时给出)")
    asked = prompts.questions(words.task, words.data, words.samples, words.candidates)
    solved = prompts.questions(words.task, words.examples) if words.shots else []
    folder = resolve(words.checkpoint)
    model, tokenizer = tasks.loaded(folder, words.gpu)
    found = prompts.chosen(model, tokenizer, asked, words.shots, solved)
    return {"checkpoint": called(folder), **found}


def _show(result: dict[str, Any]) -> None:
    print(
        f"{result['rows']} rows, {result['tokens']:,} tokens, {result['characters']:,} characters"
    )
    print(f"{'':10}{'bits/character':>16}{'nats/token':>12}")
    for name, value in result["bits_per_character"].items():
        print(f"{name:10}{value:16.4f}{result['nats_per_token'][name]:12.4f}")
    counted = result["counted"]
    if counted["tokens"] < counted["of"]:
        print(
            f"unigram and bigram are counts of {counted['tokens']:,} of {counted['of']:,} tokens, "
            "evenly spread (n 元统计取均匀的一部分)"
        )
