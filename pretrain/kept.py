"""What a model keeps of a forward pass, and which parts of it are best computed again. No torch.

    table of sizes --> bytes and FLOPs of each sub-layer --+--> none, sublayer, full: as they are
                                                           +--> budget: as little again as fits
    what each block computes again --> bytes on the device, bytes on the host, FLOPs done twice

Blocks that compute again are the first ones of their stack (as Megatron's `block` method has it):
when the backward pass comes to them, what the later blocks kept is free, and the bytes that are
made again find room there. Source of the counts: Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations

from configs.load import ConfigError
from configs.model import CPMConfig, ModelConfig, RoFormerConfig, T5PegasusConfig
from configs.recompute import Recompute
from pretrain.costs import WIDTH, Row

WHOLE = ("forward",)
"""A block that computes all of itself again."""
Again = tuple[str, ...]
"""What a block computes again: nothing, some of its sub-layers, or WHOLE."""


@dataclass(frozen=True)
class Unit:
    """A sub-layer, for one row."""

    name: str
    """The block's method."""
    bytes: float
    """Kept for the backward pass."""
    flops: float
    """Of its forward pass."""
    last: float
    """Of them its last product's, where nothing behind that keeps anything: it is not run again."""


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, for one row."""

    name: str
    """Its blocks are called NAME.layers.0 ..."""
    layers: int
    units: tuple[Unit, ...]
    stream: float
    """Bytes of a block's input."""

    def ways(self) -> list[Again]:
        """Every choice of a block."""
        names = [unit.name for unit in self.units]
        some = chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))
        return [*some, WHOLE]

    def held(self, again: Again, offload: bool) -> float:
        """Bytes that a block keeps on the device from the forward to the backward pass."""
        stream = 0.0 if offload else self.stream
        if again == WHOLE:
            return stream
        return sum(stream if u.name in again else u.bytes for u in self.units)

    def inputs(self, again: Again) -> float:
        """Bytes of the inputs that a block computes again from."""
        return self.stream * len(again)

    def made_again(self, again: Again, offload: bool) -> float:
        """Bytes that are on the device while a block is computed again."""
        if not again:
            return 0.0
        sizes = [u.bytes for u in self.units if again == WHOLE or u.name in again]
        # an input that comes back from the host, and the next one, on its way
        fetched = 2 * self.stream if offload else 0.0
        return fetched + (sum(sizes) if again == WHOLE else max(sizes))

    def flops(self, again: Again) -> float:
        """FLOPs that a block does a second time."""
        if again == WHOLE:
            return sum(u.flops for u in self.units) - self.units[-1].last
        return sum(u.flops - u.last for u in self.units if u.name in again)


@dataclass(frozen=True)
class Kept:
    """What a micro-batch keeps, logits left out."""

    stacks: tuple[Stack, ...]
    """In the order of the forward pass."""
    outside: float
    """Bytes of a row that no block keeps."""
    rows: int
    again: tuple[tuple[Again, ...], ...]
    """For each stack, for each of its blocks."""
    offload: bool = False

    def blocks(self) -> Iterator[tuple[Stack, int, Again]]:
        """(stack, number of the block, what it computes again), in the order of the forward."""
        for stack, of_stack in zip(self.stacks, self.again, strict=True):
            yield from ((stack, number, again) for number, again in enumerate(of_stack))

    @property
    def forward(self) -> float:
        """Bytes on the device at the end of the forward pass."""
        held = sum(stack.held(again, self.offload) for stack, _, again in self.blocks())
        return self.rows * (held + self.outside)

    @property
    def device(self) -> float:
        """The most bytes on the device at any time."""
        held, most = self.outside, 0.0
        for stack, _, again in self.blocks():
            held += stack.held(again, self.offload)
            most = max(most, held + stack.made_again(again, self.offload))
        return self.rows * max(most, held)

    @property
    def host(self) -> float:
        """Bytes in host memory."""
        sizes = sum(stack.inputs(again) for stack, _, again in self.blocks())
        return self.rows * sizes if self.offload else 0.0

    @property
    def flops(self) -> float:
        """FLOPs of a row that are done twice."""
        return sum(stack.flops(again) for stack, _, again in self.blocks())

    def by_block(self) -> Mapping[str, Again]:
        """Name of a block -> what it computes again, for recompute.apply()."""
        return {f"{stack.name}.layers.{number}": again for stack, number, again in self.blocks()}

    def words(self) -> str:
        """The choice for people: "decoder: 3 blocks whole, 2 self, 2 ffn of 12"."""
        said = []
        for stack, of_stack in zip(self.stacks, self.again, strict=True):
            counts = {"blocks whole": of_stack.count(WHOLE)}
            for unit in stack.units:
                count = sum(unit.name in again for again in of_stack)
                counts[unit.name.removesuffix("_sublayer")] = count
            found = ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "nothing"
            said.append(f"{stack.name}: {found} of {stack.layers}")
        return "; ".join(said)


def kept_of(
    config: ModelConfig,
    row: Row | int,
    rows: int,
    precision: str,
    recompute: Recompute | str,
    tensor: int = 1,
    masked: bool = True,
    sequence: int = 1,
) -> Kept:
    """What a micro-batch of `rows` rows keeps on a GPU for its backward pass, without logits.

    A block keeps, a token: the stream twice, both norms' outputs and statistics, q, k, v, the
    attention's output and its log-sums, the feed-forward layer before and after its activation (a
    gated one: gate, its activation, up and their product), and a byte for each value that dropout
    may have cut (Korthikanti et al. 2022: 34 s b h). With document boundaries (`masked`) there is
    one mask of [T, T] a row for all layers; T5's position bias is one tensor for a stack, and has a
    gradient of its size; ReRoPE keeps the scores of every head. Of the `sequence` devices that
    share a row each keeps its tokens, in attention its heads (and their bias), and the whole of the
    mask. ConfigError for a budget that nothing fits.
    """
    row = Row(row) if isinstance(row, int) else row
    how = Recompute(recompute) if isinstance(recompute, str) else recompute  # type: ignore[arg-type]
    sizes = _Sizes(config, WIDTH[precision], tensor, sequence)
    stacks, outside = sizes.two_stacks(row) if sizes.gated else sizes.one_stack(row, masked)
    if masked and not sizes.gated and how.how != "none":
        outside += row.seq_len**2  # the Boolean that the mask was made of
    ways = {"none": lambda s: (), "full": lambda s: WHOLE, "budget": lambda s: ()}
    ways["sublayer"] = lambda s: tuple(unit.name for unit in s.units)
    again = tuple((ways[how.how](stack),) * stack.layers for stack in stacks)
    kept = Kept(stacks, outside, rows, again, how.offload)
    return _within(kept, (how.budget_gib or 0.0) * 2**30) if how.how == "budget" else kept


# ---------------------------------------------------------------- a budget


def _within(nothing: Kept, budget: float) -> Kept:
    """The choice of the fewest FLOPs, to within a block, whose bytes are within the budget.

    Blocks of a stack are alike, so the best choice takes the steps of most bytes saved for a FLOP
    first, block by block; then whatever turned out not to be needed is taken back.
    """
    found = []
    for whole in (True, False):
        steps = sorted(
            (
                (-saved / flops, at, number, way)
                for at, stack in enumerate(nothing.stacks)
                for number, (saved, flops, way) in enumerate(_steps(stack, nothing, whole))
            ),
        )
        found.append(_taken(nothing, [(at, way) for _, at, _, way in steps], budget))
    fitting = [kept for kept in found if kept.device <= budget]
    if not fitting:
        least = min(kept.device for kept in found)
        raise ConfigError(
            f"recompute.budget_gib: is {budget / 2**30:.4g}, the least that is kept is "
            f"{least / 2**30:.4g} GiB with all blocks computed again; raise it, or lower "
            "batch.micro, or set recompute.offload (预算小于最少的激活)"
        )
    return min((_taken_back(kept, budget) for kept in fitting), key=lambda kept: kept.flops)


def _steps(stack: Stack, kept: Kept, whole: bool) -> list[tuple[float, float, Again]]:
    """The corners of bytes over FLOPs of a block: (bytes saved, FLOPs added, then again)."""
    ways = [way for way in stack.ways() if whole or way != WHOLE]
    here: Again = ()
    steps: list[tuple[float, float, Again]] = []
    while True:
        flops, held = stack.flops(here), stack.held(here, kept.offload)
        onward = [
            ((held - stack.held(way, kept.offload)) / (stack.flops(way) - flops), way)
            for way in ways
            if stack.flops(way) > flops and stack.held(way, kept.offload) < held
        ]
        if not onward:
            return steps
        way = max(onward)[1]
        steps.append((held - stack.held(way, kept.offload), stack.flops(way) - flops, way))
        here = way


def _taken(kept: Kept, steps: list[tuple[int, Again]], budget: float) -> Kept:
    for at, way in steps:
        for number in range(kept.stacks[at].layers):
            if kept.device <= budget:
                return kept
            kept = _with(kept, at, number, way)
    return kept


def _taken_back(kept: Kept, budget: float) -> Kept:
    for at, stack in enumerate(kept.stacks):
        for number in reversed(range(stack.layers)):
            now = stack.flops(kept.again[at][number])
            for way in sorted(stack.ways(), key=stack.flops):
                if stack.flops(way) >= now:
                    break
                if (trial := _with(kept, at, number, way)).device <= budget:
                    kept = trial
                    break
    return kept


def _with(kept: Kept, at: int, number: int, way: Again) -> Kept:
    """The same with another choice for one block."""
    again = [list(of_stack) for of_stack in kept.again]
    again[at][number] = way
    return Kept(kept.stacks, kept.outside, kept.rows, tuple(map(tuple, again)), kept.offload)


# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class _Sizes:
    """Bytes that sub-layers keep a token."""

    config: ModelConfig
    width: int
    tensor: int
    sequence: int

    @property
    def gated(self) -> bool:
        return isinstance(self.config, T5PegasusConfig)

    @property
    def stream(self) -> int:
        return self.width * self.config.hidden

    @property
    def norm(self) -> int:
        return 2 * self.stream + 8

    @property
    def cut(self) -> int:
        """Dropout's mask on the stream."""
        return self.config.hidden if self.config.dropout else 0

    @property
    def inner(self) -> int:
        return self.width * self.config.heads // self.tensor * self.config.head_dim

    @property
    def attention(self) -> int:
        """q, k, v, output and log-sums; the output in both orders where rows are shared."""
        inner = (4 if self.sequence == 1 else 5) * self.inner
        return self.norm + inner + 4 * self.config.heads // self.tensor + self.cut

    @property
    def feed_forward(self) -> int:
        ffn = self.config.ffn // self.tensor
        if self.gated:
            ffn_cut = ffn if self.config.dropout else 0
            return self.norm + self.width * 4 * ffn + ffn_cut + self.cut
        # ReLU needs its output only, which the next matrix keeps
        relu = isinstance(self.config, RoFormerConfig) and self.config.version == 2
        return self.norm + self.width * (1 if relu else 2) * ffn + self.cut

    def attending(self, queries: int, keys: int, mixed: bool) -> Unit:
        """A sub-layer of attention, by this device's tokens; `mixed`: over an encoder's."""
        matrix = 2.0 * self.config.hidden * self.config.heads // self.tensor * self.config.head_dim
        inner = self.config.heads // self.tensor * self.config.head_dim
        products = matrix * 2 * (queries + keys) + 4.0 * queries * keys * self.sequence * inner
        kept: float = queries * self.attention + self.scores(queries, keys)
        if mixed:  # a decoder's token keeps its query and the output, an encoder's key and value
            kept += 2 * self.inner * (keys - queries)
        name = "cross_sublayer" if mixed else "self_sublayer"
        return Unit(name, kept, products, queries * matrix * self._idle_end)

    def scores(self, queries: int, keys: int) -> float:
        """ReRoPE's probabilities, which no fused kernel computes: before dropout, behind it, and
        the mask between; of the whole row, for this device's heads."""
        rope = getattr(self.config, "rope", None)
        if rope is None or not rope.windowed:
            return 0.0
        heads = self.config.heads // self.tensor / self.sequence
        each = 2 * self.width + 1 if self.config.attention_dropout else self.width
        return heads * queries * keys * self.sequence**2 * each

    def feeding(self, tokens: int) -> Unit:
        """The feed-forward sub-layer."""
        matrix = 2.0 * self.config.hidden * self.config.ffn // self.tensor * tokens
        flops = matrix * (3 if self.gated else 2)
        return Unit("ffn_sublayer", tokens * self.feed_forward, flops, matrix * self._idle_end)

    @property
    def _idle_end(self) -> bool:
        """Dropout, or a norm behind the sum, needs what the last product gives."""
        return not self.config.dropout and not isinstance(self.config, RoFormerConfig)

    def one_stack(self, row: Row, masked: bool) -> tuple[tuple[Stack, ...], float]:
        T = row.seq_len // self.sequence
        units = (self.attending(T, T, False), self.feeding(T))
        name = "decoder" if isinstance(self.config, CPMConfig) else "encoder"
        # final (or first) norm, embeddings' dropout, mask
        outside = T * (self.norm + self.cut) + (self.width * row.seq_len**2 if masked else 0)
        return (Stack(name, self.config.layers, units, T * self.stream),), float(outside)

    def two_stacks(self, row: Row) -> tuple[tuple[Stack, ...], float]:
        T, U, config = row.seq_len // self.sequence, row.targets // self.sequence, self.config
        assert isinstance(config, T5PegasusConfig)
        of_encoder = (self.attending(T, T, False), self.feeding(T))
        of_decoder = (self.attending(U, U, False), self.attending(U, T, True), self.feeding(U))
        heads = config.heads // (self.tensor * self.sequence)
        own, across = row.seq_len**2 + row.targets**2, row.targets * row.seq_len
        biased = own + (across if config.cross_position_bias else 0)
        # a bias keeps its buckets (int64) and what was hidden in it; without one there is a mask
        masks = 9 * biased + self.width * (own + across - biased)
        # final norms; dropout behind them, on embeddings
        outside = (T + U) * (self.norm + 2 * self.cut)
        outside += 2 * self.width * heads * biased + masks
        encoder = Stack("encoder", config.layers, of_encoder, T * self.stream)
        decoder = Stack("decoder", config.layers, of_decoder, U * self.stream)
        return (encoder, decoder), float(outside)
