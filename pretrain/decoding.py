"""How an output is chosen, and what comes out: the settings of `generate`, read by every way of
decoding (sampling in generate.py, beams in beam.py).
"""

import math
from dataclasses import dataclass, field


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
