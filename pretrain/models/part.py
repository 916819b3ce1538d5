"""Which part of its rows a model works on: all of them, or what one of several devices holds.

A model asks its `part` in two places: where a token's embedding, position and turn are taken (the
tokens held here), and where a number for each head is (the heads that attention computes here).
What attention must know of a whole row (positions, documents, who sees whom) comes whole.
pretrain/sequence.py hands in a part that is one; models know nothing of devices.
"""

from torch import Tensor


class Part:
    """Whole rows, all heads."""

    def tokens(self, x_BT: Tensor) -> Tensor:
        """Of values [B, T, ...] those of the tokens held here."""
        return x_BT

    def heads(self, count: int) -> slice:
        """Of `count` heads those whose attention is computed here."""
        return slice(0, count)


WHOLE = Part()
"""What a model works on unless it is told otherwise."""
