"""Forward and backward of RoFormer and T5 PEGASUS against `transformers` on the same sizes.

    python -m benchmarks.families [--rounds 3] [--dropout 0.1] [--threads 1]

Both sides compute a masked-LM or a sequence-to-sequence loss of one micro-batch in bf16, in turns;
the table gives the median of the rounds' ratios, which a busy machine moves less than seconds. Ours
reads packed rows with document ids, transformers one document a row; ours runs the masked-LM head
on the masked positions only, transformers on all of them. No optimizer, no engine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from configs.model import RoFormerConfig, T5PegasusConfig
from pretrain.models import build
from pretrain.objectives.losses import token_losses_plain

VOCAB, ROWS, HIDDEN, LAYERS = 50_000, 2, 512, 4
MASKED, DTYPE = 0.15, torch.bfloat16

Step = Callable[[], None]


def ready(model: nn.Module) -> nn.Module:
    """The model in bf16, with small random matrices and neutral norms, training."""
    for name, p in model.named_parameters():
        nn.init.ones_(p) if p.ndim == 1 and "norm" in name.lower() else nn.init.normal_(p, 0, 0.02)
    return model.to(DTYPE).train()


def packed(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, positions, document ids) of rows of two documents."""
    tokens = torch.randint(1, VOCAB, (ROWS, length))
    places = torch.arange(length).expand(ROWS, length)
    second = places >= length * 3 // 5
    return tokens, torch.where(second, places - length * 3 // 5, places), second.long()


def roformer(version: int, dropout: float) -> tuple[Step, Step, int]:
    """(our step, theirs, tokens of one)."""
    T, heads = 512, HIDDEN // 64
    drop = {"dropout": dropout, "attention_dropout": dropout}
    config = RoFormerConfig(
        "roformer", version, VOCAB, HIDDEN, LAYERS, heads, 64, 4 * HIDDEN, **drop
    )
    ours: Any = ready(build(config))
    theirs = ready(
        transformers.RoFormerForMaskedLM(
            transformers.RoFormerConfig(
                vocab_size=VOCAB, hidden_size=HIDDEN, embedding_size=HIDDEN,
                num_hidden_layers=LAYERS, num_attention_heads=heads, intermediate_size=4 * HIDDEN,
                hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0,
            )
        )
    )  # fmt: skip
    row = packed(T)
    targets = torch.randint(1, VOCAB, (ROWS, T))
    masked = torch.rand(ROWS, T) < MASKED
    at = masked.flatten().nonzero().flatten()

    def our_step() -> None:
        hidden = ours(*row).flatten(0, 1)[at]
        token_losses_plain(ours.logits, hidden, targets.flatten()[at]).mean().backward()

    def their_step() -> None:
        labels = torch.where(masked, targets, -100)
        seen = torch.ones_like(row[0])
        theirs(input_ids=row[0], attention_mask=seen, labels=labels).loss.backward()

    return our_step, their_step, ROWS * T


def t5_pegasus(dropout: float) -> tuple[Step, Step, int]:
    """(our step, theirs, tokens of one)."""
    S, T = 384, 128
    drop = {"dropout": dropout, "attention_dropout": dropout}
    ours: Any = ready(
        build(T5PegasusConfig("t5_pegasus", VOCAB, HIDDEN, LAYERS, 6, 64, 1024, **drop))
    )
    config = transformers.MT5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=64, d_ff=1024, num_layers=LAYERS,
        num_decoder_layers=LAYERS, num_heads=6, dropout_rate=dropout,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    config.tie_word_embeddings = False
    theirs = ready(transformers.MT5ForConditionalGeneration(config))
    encoder, decoder = packed(S), packed(T)
    targets = torch.randint(1, VOCAB, (ROWS, T))

    def our_step() -> None:
        hidden = ours(*decoder, *encoder).flatten(0, 1)
        token_losses_plain(ours.logits, hidden, targets.flatten()).mean().backward()

    def their_step() -> None:
        seen = torch.ones_like(encoder[0])
        given = {"input_ids": encoder[0], "decoder_input_ids": decoder[0], "labels": targets}
        theirs(**given, attention_mask=seen).loss.backward()

    return our_step, their_step, ROWS * (S + T)


def seconds(step: Step) -> float:
    """Time of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="training speed of the families")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    print(f"{LAYERS} layers x {HIDDEN}, vocabulary {VOCAB:,}, bf16, dropout {words.dropout}")
    print(f"{'family':<14}{'ours tokens/s':>16}{'transformers':>16}{'ratio':>8}")
    families: dict[str, Callable[[], tuple[Step, Step, int]]] = {
        "roformer v1": lambda: roformer(1, words.dropout),
        "t5_pegasus": lambda: t5_pegasus(words.dropout),
    }
    for name, make in families.items():
        ours, theirs, tokens = make()
        ours(), theirs()
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(words.rounds)]
        ratio = statistics.median(other / mine for mine, other in pairs)
        mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:<14}{tokens / mine:>16,.0f}{tokens / other:>16,.0f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
