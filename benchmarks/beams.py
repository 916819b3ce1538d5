"""Tokens per second of our beam search beside transformers', same weights, in one run.

    python benchmarks/beams.py [--beams 4] [--layers 8] [--hidden 512] [--threads 2]

No end token may come before the last, so that both write exactly the asked number of tokens; the
two take turns, the best of `--repeats` counts. CPM against GPT-2, length penalty 1, and beside them
the search as published, which transformers has not. The tokens written are compared as well.
"""

import argparse
import json
from typing import Any

import torch
import transformers

from benchmarks.generate import best
from configs.model import CPMConfig
from pretrain.decoding import Decoding
from pretrain.generate import load_model, write
from pretrain.state import fresh
from tests.test_cpm_equals_gpt2 import gpt2_of


def main() -> None:
    """Print one JSON line a batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=30000)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    transformers.logging.set_verbosity_error()
    hidden = words.hidden
    config = CPMConfig("cpm", words.vocab, hidden, words.layers, hidden // 64, 64, 4 * hidden, 1024)
    ours = load_model(fresh(config, 0))
    theirs = gpt2_of(ours, attention="sdpa")
    for batch in words.batches:
        print(json.dumps(compare(ours, theirs, batch, words)), flush=True)


def compare(ours: Any, theirs: Any, batch: int, words: argparse.Namespace) -> dict[str, Any]:
    """Both on the same prompts: tokens/s of the output, their ratio, and how many rows agree."""
    new, never = words.new_tokens, words.vocab - 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, words.vocab, (batch, words.prompt_tokens), generator=generator)
    prompts = ids.tolist()
    penalised = Decoding(new, new, beams=words.beams, length_penalty=1.0)
    published = Decoding(new, new, beams=words.beams)

    def mine(decoding: Decoding = penalised) -> list[list[int]]:
        return [w.ids for w in write(ours, prompts, decoding, never, 0)]

    def their() -> list[list[int]]:
        with torch.no_grad():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                num_beams=words.beams,
                length_penalty=1.0,
                do_sample=False,
                eos_token_id=never,
                pad_token_id=0,
            )
        return out[:, words.prompt_tokens :].tolist()

    same = sum(a == b for a, b in zip(mine(), their(), strict=True))
    ways = {"ours": mine, "published": lambda: mine(published), "transformers": their}
    seconds = best(ways, words.repeats)
    return {
        "batch": batch,
        "beams": words.beams,
        "new_tokens": new,
        "tokens_per_s": {name: round(batch * new / s, 1) for name, s in seconds.items()},
        "ratio": round(seconds["transformers"] / seconds["ours"], 2),
        "same_outputs": f"{same} of {batch}",
        "setting": f"{words.layers} x {words.hidden}, float32, cpu, {words.threads} threads",
    }


if __name__ == "__main__":
    main()
