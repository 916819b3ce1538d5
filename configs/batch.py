"""How much is learnt from at a step: the `batch` section of a run's page, its ramp with it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """How much is learnt from at a step; devices and accumulation are derived, never asked for."""

    micro: int
    """Rows that a device holds in one forward pass."""
    samples: int | None = None
    """Rows of a step, over all devices; any number, it need not divide."""
    tokens: int | None = None
    """The same in tokens: samples = tokens / data.seq_len, rounded down."""
    ramp: tuple[tuple[int, int], ...] = ()
    """Smaller batches first: [[updates, rows], ...] one after another, in tokens where the batch
    is; then the batch itself (批次爬坡)."""

    def problems(self) -> list[str]:
        """Exactly one of samples and tokens, a micro-batch, a ramp of updates and rows."""
        found = [] if self.micro > 0 else [f"micro: is {self.micro}, must be at least 1"]
        if (self.samples is None) == (self.tokens is None):
            found.append("samples, tokens: give exactly one of them (二者择一)")
        for name in ("samples", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name}: is {value}, must be at least 1")
        found += [
            f"ramp: {updates} updates of {size} mean nothing; both must be at least 1, as in "
            "[[updates, rows], ...] (爬坡的更新数与批次)"
            for updates, size in self.ramp
            if updates < 1 or size < 1
        ]
        return found

    @property
    def ramp_steps(self) -> int:
        """Updates until the batch is whole."""
        return sum(updates for updates, _ in self.ramp)

    def rows(self, size: int, seq_len: int) -> int:
        """Rows of a batch of `size`, which is in tokens where the page gives tokens."""
        return size if self.tokens is None else size // seq_len

    def whole(self, seq_len: int) -> int:
        """Rows of a step once the ramp is over."""
        return self.rows((self.tokens if self.samples is None else self.samples) or 0, seq_len)

    def taken(self, updates: int, seq_len: int) -> int:
        """Rows of the first `updates` updates, from where the ramp begins."""
        found, left = 0, updates
        for many, size in self.ramp:
            here = min(left, many)
            found, left = found + here * self.rows(size, seq_len), left - here
        return found + left * self.whole(seq_len)
