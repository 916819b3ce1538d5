"""Which part of a model a tensor belongs to, and numbers by part.

    decoder.layers.3.self.q.weight  \
    decoder.layers.3.self_norm.bias  > decoder.layers.3.self      embed.tokens.weight -> embed
    decoder.layers.3.self.o.weight  /                             head.dense.bias     -> head

A part is what one looks at when a run misbehaves: the embeddings, each sub-layer of each block with
its own norm, the last norm of a stack, its table of position biases, the head. A table that is tied
to the head counts once, with the embeddings. The table of tensors decides; no family is named here.
"""

from collections.abc import Sequence

from configs.model import ModelConfig, tensors


def part_of(name: str) -> str:
    """The part of a tensor, by its logical name."""
    at, *rest = name.split(".")
    if "layers" in rest:
        return ".".join([at, *rest[:2], rest[2].removesuffix("_norm")])
    return at if at in ("embed", "head") else f"{at}.{rest[0]}"


class Parts:
    """The parts of a model, in the table's order, and which tensors each one has."""

    def __init__(self, config: ModelConfig) -> None:
        found = [part_of(tensor.name) for tensor in tensors(config)]
        self.names = list(dict.fromkeys(found))
        number = {name: i for i, name in enumerate(self.names)}
        self._of = [number[name] for name in found]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Numbers by tensor, in the table's order, added up by part."""
        total = [0.0] * len(self.names)
        for part, value in zip(self._of, values, strict=True):
            total[part] += value
        return total

    def norms(self, squares: Sequence[float]) -> dict[str, float]:
        """Squares by tensor -> the norm of each part."""
        return dict(zip(self.names, (x**0.5 for x in self.sums(squares)), strict=True))

    def ratios(self, squares: Sequence[float], of: Sequence[float]) -> dict[str, float]:
        """Squares by tensor -> the norm of each part beside that of another; a part that is all
        zeros there has none."""
        pairs = zip(self.names, self.sums(squares), self.sums(of), strict=True)
        return {name: (x / y) ** 0.5 for name, x, y in pairs if y > 0}
