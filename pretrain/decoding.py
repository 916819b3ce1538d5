"""How an output is chosen, and what comes out: the settings of `generate` and its flags, read by
every way of decoding (sampling in generate.py, beams in beam.py).
"""

import argparse
import math
from dataclasses import dataclass, field, fields

from pretrain.flags import check_read

READ_BY = dict.fromkeys(("temperature", "top_k", "top_p", "seed"), ("sampling",))
"""Flags that only some ways of choosing read; those of beams Decoding itself refuses elsewhere."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    """Tokens written at most, the end included; the model's last position ends it as well."""
    min_new_tokens: int = 0
    """Tokens written before the end may come; not above max_new_tokens."""
    greedy: bool = False
    """The most probable token; the rest of sampling does not matter."""
    temperature: float = 1.0
    """Logits are divided by this."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens that together reach p (the one that crosses it included)."""
    seed: int = 0
    """Of the random numbers."""
    beams: int = 0
    """Outputs that are kept beside each other; 0: no beam search. Nothing is drawn at random."""
    length_penalty: float | None = None
    """Of a beam search: log-probabilities are divided by length ** this, ended outputs are kept and
    the best is given, as transformers does; None: as bert4keras, by the log-probability alone."""
    patient: bool = False
    """With a length penalty: go on while a longer output could win, however unlikely it is."""
    min_ends: int = 1
    """Of a beam search: end tokens after which an output is over."""

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be 1 up"),
            ("min_new_tokens", self.min_new_tokens >= 0, "must be 0 up"),
            (
                "min_new_tokens",
                self.min_new_tokens <= max(self.max_new_tokens, 0),
                f"must be at most max_new_tokens, {self.max_new_tokens}",
            ),
            ("temperature", self.temperature > 0, "must be above 0"),
            ("top_k", self.top_k >= 0, "must be 0 (keep all) or more"),
            ("top_p", 0 < self.top_p <= 1, "must be in (0, 1]"),
            ("beams", self.beams >= 0, "must be 0 (no beam search) or more"),
            ("min_ends", self.min_ends >= 1, "must be 1 up"),
            ("length_penalty", math.isfinite(self.length_penalty or 0), "must be a number"),
        )
        wrong = [
            f"{name}: is {getattr(self, name)}, {must}" for name, fine, must in checks if not fine
        ]
        if not self.beams:
            given = {
                "length_penalty": self.length_penalty is not None,
                "patient": self.patient,
                "min_ends": self.min_ends > 1,
            }
            wrong += [f"{name}: needs beams, 1 up" for name, is_set in given.items() if is_set]
        elif self.patient and self.length_penalty is None:
            wrong.append("patient: needs a length_penalty")
        if wrong:
            raise ValueError("; ".join(wrong) + " (解码参数不合法)")


@dataclass(frozen=True)
class Written:
    """What a model wrote behind one prompt."""

    ids: list[int]
    """New tokens, without the end of document."""
    ended: bool
    """Whether the end of document came."""
    score: float | None = field(default=None, compare=False)
    """Of a beam search: the log-probability (nats), divided by the length penalty if there is
    one."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a Decoding."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="at most; positions end a text as well"
    )
    parser.add_argument("--min-new-tokens", type=int, default=0, help="before the end may come")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--greedy", action="store_true", help="the most probable token each time")
    way.add_argument("--beams", type=int, default=0, help="beam search, as bert4keras (束搜索)")
    parser.add_argument("--temperature", type=float, default=0.9, help="of sampling")
    parser.add_argument("--top-k", type=int, default=0, help="of sampling: 0 keeps all tokens")
    parser.add_argument("--top-p", type=float, default=0.95, help="of sampling: 1 keeps all tokens")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument(
        "--length-penalty", type=float, help="of beams: divide by length ** this, as transformers"
    )
    parser.add_argument("--patient", action="store_true", help="of beams: while a longer could win")
    parser.add_argument("--min-ends", type=int, default=1, help="of beams: ends of an output")


def from_flags(given: argparse.Namespace, parser: argparse.ArgumentParser) -> Decoding:
    """What the flags say; ValueError for what cannot be, or would not be read."""
    found = Decoding(**{part.name: getattr(given, part.name) for part in fields(Decoding)})
    way = "--beams" if found.beams else "--greedy" if found.greedy else "sampling"
    check_read(given, parser, READ_BY, way)
    return found


def check_fills(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """ValueError for a flag of decoding given for an encoder: it fills masks by the likeliest."""
    flags = (*(part.name for part in fields(Decoding)), "allowed")
    check_read(given, parser, dict.fromkeys(flags, ("models that write",)), "an encoder")
