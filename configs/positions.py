"""How a model reads rows longer than those that it learnt on: sections of a model's config.

    position_table   learned positions (CPM, BERT): more positions than the table has rows
    rope             rotary positions (RoFormer): frequencies or distances that depend on the length

Both are numbers, no tensors: the model computes by them, every checkpoint keeps them. Who chooses
them is configs/extended.py; the arithmetic is in pretrain/models/longer.py. Sources: Su,
kexue.fm/archives/7947 (hierarchical decomposition), 9675 (NTK and what is mixed of it), 9706,
9708 (ReRoPE, leaky ReRoPE); Chen et al. 2023 (position interpolation); bloc97 2023 (NTK-aware,
NTK-by-parts); Peng et al. 2023 (YaRN).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PositionTable:
    """More positions than the table has rows: each is made of one or more of them."""

    method: Literal["hierarchical", "interpolated"]
    """hierarchical: position i n + j is p_j + r (p_i - p_0), r = alpha / (1 - alpha), up to n x n;
    interpolated: L tokens, if more than n, read the table in steps of (n - 1) / (L - 1)."""
    rows: int
    """n, the rows of the table: the positions that the model learnt."""
    alpha: float = 0.4
    """Of hierarchical: between 0 and 1, not 1/2 (there (i, j) and (j, i) would be one position)."""
    dynamic: bool = True
    """Of interpolated: L is the length of a token's own document, so that short ones stay as they
    were. A model that reads from left to right must not know it: false, L is `positions`."""

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = []
        if self.rows < 2:
            found.append(f"rows: is {self.rows}, must be at least 2")
        if not 0 < self.alpha < 1 or self.alpha == 0.5:
            found.append(f"alpha: is {self.alpha}, must lie in (0, 1) and not be 0.5 (不能取 0.5)")
        return found

    @property
    def ratio(self) -> float:
        """r = alpha / (1 - alpha), the weight of the block in a position."""
        return self.alpha / (1 - self.alpha)

    def written_out(self, table_ND: Any, positions: int) -> Any:
        """The first `positions` rows of a table (any kind of array) decomposed."""
        inner = [at % self.rows for at in range(positions)]
        block = [at // self.rows for at in range(positions)]
        return table_ND[inner] + self.ratio * (table_ND[block] - table_ND[0])


RopeMethod = Literal[
    "linear", "ntk", "ntk_fixed", "ntk_mixed", "by_parts", "yarn", "rerope", "leaky_rerope"
]


@dataclass(frozen=True)
class Rope:
    """Rotary positions beyond the length that a model learnt."""

    method: RopeMethod
    """linear: all angles / s (position interpolation); ntk: base x s ** (h / (h - 2)); ntk_fixed,
    ntk_mixed: pair m by exp(-a m ** b), b = 1 and 0.625; by_parts: between linear and as it was, by
    how often a pair turns; yarn: by_parts, and scores x (0.1 ln s + 1) ** 2; rerope: a distance of
    w or more is w; leaky_rerope: beyond w it grows by 1 / leak a token."""
    known: int
    """L0, the length of the rows that the model learnt."""
    factor: float = 1.0
    """s, by how much rows are longer; of a dynamic method, the growth of s by the length."""
    dynamic: bool = False
    """s follows a document's length L: max(1, factor x L / L0 - (factor - 1)); up to L0 tokens
    nothing changes."""
    window: int = 0
    """w of the two ReRoPEs."""
    leak: float = 16.0
    """Of leaky_rerope: tokens beyond the window that count as one."""
    beta_fast: float = 32.0
    """Of by_parts and yarn: a pair that turns so often within L0 stays as it was."""
    beta_slow: float = 1.0
    """Of by_parts and yarn: a pair that turns so rarely is divided by s."""

    @property
    def windowed(self) -> bool:
        """Whether distances are changed, not frequencies."""
        return self.method in ("rerope", "leaky_rerope")

    @property
    def slope(self) -> float:
        """By how much a distance beyond the window grows with each token."""
        return 0.0 if self.method == "rerope" else 1.0 / self.leak

    @property
    def exact(self) -> bool:
        """Whether rows of at most `known` tokens are computed as before."""
        return self.window >= self.known if self.windowed else self.dynamic or self.factor == 1.0

    def pairs(self, head_dim: int, base: float) -> list[tuple[float, float, float]]:
        """(radians a token, e, share that stays) of each pair; with s it turns by
        radians x (share + (1 - share) s ** -e)."""
        half, found = head_dim // 2, []
        for pair in range(half):
            exponent, kept = 1.0, 0.0
            if self.windowed:
                kept = 1.0
            elif self.method == "ntk":
                exponent = 2 * pair / max(head_dim - 2, 1)
            elif self.method in ("ntk_fixed", "ntk_mixed"):
                bend = 1.0 if self.method == "ntk_fixed" else 0.625
                exponent = ((pair + 1) / half) ** bend
            elif self.method in ("by_parts", "yarn"):
                kept = self._kept(pair, head_dim, base)
            found.append((base ** (-2 * pair / head_dim), exponent, kept))
        return found

    def _kept(self, pair: int, head_dim: int, base: float) -> float:
        """1 for a pair that turns often within `known`, 0 for one that hardly does, as YaRN."""

        def turning(times: float) -> float:
            wide = self.known / (times * 2 * math.pi)
            return head_dim * math.log(wide) / (2 * math.log(base))

        low = max(math.floor(turning(self.beta_fast)), 0)
        high = float(min(math.ceil(turning(self.beta_slow)), head_dim - 1))
        high = high if high != low else low + 0.001
        return 1 - min(max((pair - low) / (high - low), 0.0), 1.0)

    def problems(self) -> list[str]:
        """Numbers outside their range."""
        found = [] if self.known > 1 else [f"known: is {self.known}, must be at least 2"]
        if self.factor < 1:
            found.append(f"factor: is {self.factor}, must be at least 1")
        if self.leak < 1:
            found.append(f"leak: is {self.leak}, must be at least 1")
        if self.windowed and self.window < 1:
            found.append(f"window: is {self.window}, {self.method} needs at least 1 (窗口必须为正)")
        if self.windowed and self.dynamic:
            found.append(
                f"dynamic: {self.method} has no dynamic form, set it to false (没有动态形式)"
            )
        if not self.beta_fast > self.beta_slow > 0:
            found.append(
                f"beta_fast, beta_slow: are {self.beta_fast} and {self.beta_slow}; beta_fast must "
                "be the larger one, both above 0 (须前者较大且为正)"
            )
        return found


def table_problems(
    table: PositionTable | None, positions: int | None, causal: bool = False
) -> list[str]:
    """Why a table does not serve `positions` (None: they are rotary)."""
    if table is None:
        return []
    if causal and table.method == "interpolated" and table.dynamic:
        why = "tells every token how long its document will be, which is the future"
        return [f"position_table.dynamic: is true, this {why}; set it to false (会泄漏未来)"]
    if positions is None:
        return ["position_table: positions are rotary, there is no table; leave it out (无位置表)"]
    if positions < table.rows:
        return [f"positions: is {positions}, the table alone has {table.rows} rows (位置数不符)"]
    if table.method == "hierarchical" and positions > table.rows**2:
        return [
            f"positions: is {positions}, {table.rows} rows reach {table.rows**2} at most (过长)"
        ]
    return []


def bucket_problems(buckets: int, spans: int, max_distance: int) -> list[str]:
    """Why T5's buckets cannot be so many spans: one exact part and `spans` logarithmic ones, each
    of two sides in the encoder; and why they cannot reach so far."""
    if spans < 1:
        return []  # is said of its own
    if buckets < 2 * (1 + spans):
        return [f"buckets: is {buckets}, must be at least {2 * (1 + spans)} (桶数过少)"]
    if max_distance <= (exact := buckets // (1 + spans)):
        why = f"must be above {exact}, up to which the decoder has a bucket for each distance"
        return [f"max_distance: is {max_distance}, {why} (最大距离过小)"]
    if spans > 1 and buckets % (2 * (1 + spans)):
        unit = 2 * (1 + spans)
        return [
            f"buckets: is {buckets}, bucket_spans={spans} needs a multiple of {unit} (桶数不符)"
        ]
    return []
