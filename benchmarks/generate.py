"""Tokens per second of our generation beside `transformers.generate`, same weights, in one run.

    python benchmarks/generate.py [--layers 8] [--hidden 512] [--threads 2] [--device cpu] ...
    python benchmarks/generate.py --family t5_pegasus ...     mT5's form, which transformers has

Greedy, no end token, so that both write exactly the asked number of tokens; the two take turns, the
best of `--repeats` counts (the machine may be shared). The tokens written are compared as well.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from configs.model import CPMConfig, T5PegasusConfig
from pretrain.answer import answer
from pretrain.generate import Decoding, load_model, write
from pretrain.state import fresh
from tests.test_cpm_equals_gpt2 import gpt2_of
from tests.test_t5_pegasus_equals_mt5 import mt5_of


def best(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Fewest seconds of each function; they take turns, after one turn to warm up."""
    seconds = {name: float("inf") for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print one JSON line a batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="cpm", choices=["cpm", "t5_pegasus"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=30000)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--ragged", action="store_true", help="prompts of different lengths")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    transformers.logging.set_verbosity_error()
    hidden = words.hidden
    sizes = (words.vocab, hidden, words.layers, hidden // 64, 64)
    config: CPMConfig | T5PegasusConfig = CPMConfig("cpm", *sizes, 4 * hidden, 1024)
    if words.family == "t5_pegasus":
        deviations = {"cross_position_bias": False, "logit_scale": 1.0}
        config = T5PegasusConfig("t5_pegasus", *sizes, 4 * hidden, **deviations)
    ours = load_model(fresh(config, 0), words.device, getattr(torch, words.dtype))
    theirs = gpt2_of(ours, attention="sdpa") if words.family == "cpm" else mt5_of(ours)
    for batch in words.batches:
        print(json.dumps(compare(ours, theirs, batch, words)), flush=True)


def compare(ours: Any, theirs: Any, batch: int, words: argparse.Namespace) -> dict[str, Any]:
    """Both on the same prompts: tokens/s, their ratio, and how many tokens agree."""
    length, new, never = words.prompt_tokens, words.new_tokens, words.vocab - 1
    ids = torch.randint(8, words.vocab, (batch, length), generator=torch.Generator().manual_seed(0))
    pads = [row % 4 * 3 if words.ragged else 0 for row in range(batch)]
    mask = torch.stack([torch.arange(length) >= pad for pad in pads]).long()
    prompts = [row[pad:] for row, pad in zip(ids.tolist(), pads, strict=True)]
    ids, mask = ids.to(words.device), mask.to(words.device)

    decoding, writes = Decoding(new, new, True), words.family == "t5_pegasus"

    def mine() -> list[list[int]]:
        if writes:
            return [w.ids for w in answer(ours, prompts, decoding, 0, never, 0)]
        return [w.ids for w in write(ours, prompts, decoding, never, 0)]

    def their() -> list[list[int]]:
        with torch.no_grad():
            out = theirs.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=never,
                pad_token_id=0,
                **({"decoder_start_token_id": 0} if writes else {}),
            )
        return out[:, 1 if writes else length :].tolist()

    same = sum(
        a == b for p, q in zip(mine(), their(), strict=True) for a, b in zip(p, q, strict=True)
    )
    seconds = best({"ours": mine, "transformers": their}, words.repeats)
    return {
        "batch": batch,
        "new_tokens": new,
        "tokens_per_s": {name: round(batch * new / s, 1) for name, s in seconds.items()},
        "ratio": round(seconds["transformers"] / seconds["ours"], 2),
        "same_tokens": f"{same} of {batch * new}",
        "setting": f"{words.family} {words.layers} x {words.hidden}, {words.dtype}, "
        f"{words.device}, {words.threads} threads" + (", ragged" if words.ragged else ""),
    }


if __name__ == "__main__":
    main()
