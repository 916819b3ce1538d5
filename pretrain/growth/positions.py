"""Longer rows: a trained state in, a state that reads more positions out, the old ones unchanged.

    state --extend--> the same tensors, another config          (hierarchical, interpolated, RoPE)
                      a table with more rows, and its moments   (added rows, T5's buckets)

Entries are computed when they are read, as in growth. A table that was served by decomposition can
be written out, when another method follows: its rows are then those that the decomposition made.

    new rows of a table     hierarchical_rows  p_j + r (p_i - p_0), each to be learnt on its own
                            random             as a fresh one is drawn
                            last, repeat       copies of the last row, of all rows in turn
    new buckets of T5       copies of the last bucket of their side
    their moments           exp_avg 0; exp_avg_sq the mean over the old rows (growth/moments.py
                            says why not 0)
    averages of weights     as the weights, each from its own old rows: Lookahead would halve new
                            rows at its next step if it had zeros for them

Sources: Su, kexue.fm/archives/7947; T5's buckets: the project's own derivation (extend beyond the
last distance, so that no old distance changes its bucket).
"""

from collections.abc import Callable

import torch

from configs.extended import ROWS, Extend, resolved
from configs.load import to_dict
from configs.model import ModelConfig, T5PegasusConfig, axis_size, init_std, tensors
from configs.positions import PositionTable
from pretrain.growth import model_config
from pretrain.growth.moments import factored, power, slots, unfactored
from pretrain.state import Entry, State, draw

TABLE = "embed.positions.weight"


def extend(
    state: State, to: ModelConfig, how: Extend, seq_len: int, seed: int, *, rounded: bool = True
) -> State:
    """The state with the config `to` (configs/extended.py), its tables longer where that needs it.

    Old rows keep their values, moments and `born`. The record gets the new config and a line in
    `extensions`. `seed` decides random rows; `rounded` as in grow().
    """
    now, given, asked = model_config(state), state, how
    how = resolved(now, how)
    entries = dict((state := unfactored(given, weighed=False)).entries)
    for kind in ("weights", *slots(state)):
        for name, axis, rounds, make in _changes(state, now, to, how, seed, kind):
            old = entries[f"{kind}/{name}"]
            size = (axis_size(to, axis), *old.shape[1:])
            dtype = "float64" if rounds and not rounded else old.dtype
            entries[f"{kind}/{name}"] = _entry(size, dtype, make)
    line = {
        "step": state.record.get("step", 0),
        "updates": state.record.get("updates", 0),
        "seq_len": seq_len,
        "method": how.method,
        "how": to_dict(asked),
        "from": to_dict(now),
        "to": to_dict(to),
        "seed": seed,
    }
    history = [*state.record.get("extensions", []), line]
    longer = State(entries, {**state.record, "model": to_dict(to), "extensions": history})
    return longer if state is given else factored(longer, weighed=False)


def unbound(state: State) -> State:
    """The state, to be trained on in another run: its data's rows are of another length there."""
    data = [{**one, "rows": None} for one in state.record.get("data") or []]
    for one in data:
        if "objective" in one:
            one["objective"] = {k: v for k, v in one["objective"].items() if k != "target_len"}
    return State(state.entries, {**state.record, "data": data} if data else state.record)


def _entry(size: tuple[int, ...], dtype: str, make: Callable[[], torch.Tensor]) -> Entry:
    return Entry(size, dtype, lambda: make().to(getattr(torch, dtype)))


Change = tuple[str, str, bool, Callable[[], torch.Tensor]]
"""Tensor, its axis that gets longer, whether its values need rounding, how it is made."""


def _changes(
    state: State, now: ModelConfig, to: ModelConfig, how: Extend, seed: int, kind: str
) -> list[Change]:
    """What becomes of each tensor that changes."""
    if isinstance(now, T5PegasusConfig):
        if now.buckets == to.buckets:  # type: ignore[union-attr]
            return []
        return [
            (name, "buckets", False, _bucket_maker(state, kind, name, now, to))
            for name in ("encoder.position_bias.weight", "decoder.position_bias.weight")
        ]
    if now.positions is None or axis_size(now, "positions") == axis_size(to, "positions"):
        return []
    rounds = now.position_table is not None or how.method == "hierarchical_rows"
    return [(TABLE, "positions", rounds, _table_maker(state, kind, now, to, how, seed))]


def _table_maker(
    state: State, kind: str, now: ModelConfig, to: ModelConfig, how: Extend, seed: int
) -> Callable[[], torch.Tensor]:
    reach, rows = int(now.positions or 0), axis_size(to, "positions")  # type: ignore[union-attr]
    old_table = now.position_table  # type: ignore[union-attr]

    def make() -> torch.Tensor:
        old = state.read(f"{kind}/{TABLE}")
        if power(kind):
            fill = old.mean(0) if kind.endswith("exp_avg_sq") else torch.zeros(old.shape[1])
            return torch.cat([old, fill.expand(rows - len(old), -1)])
        written = old if old_table is None else decomposed(old, old_table, reach)
        more = rows - reach
        if more == 0 or how.method not in ROWS:
            return written
        if how.method == "hierarchical_rows":
            table = PositionTable("hierarchical", reach, how.alpha)
            return decomposed(written, table, rows)
        if how.method == "random":
            tensor = next(t for t in tensors(to) if t.name == TABLE)
            label = f"{TABLE}.extension.{reach}-{rows}"
            new = draw(label, seed, (more, old.shape[1]), init_std(to, tensor))
        elif how.method == "last":
            new = written[-1:].expand(more, -1)
        else:
            new = written[torch.arange(reach, rows) % reach]
        return torch.cat([written, new.to(written.dtype)])

    return make


def decomposed(table_ND: torch.Tensor, how: PositionTable, positions: int) -> torch.Tensor:
    """Rows [positions, D], float64, of a table of n rows by hierarchical decomposition."""
    written_ND: torch.Tensor = how.written_out(table_ND.double(), positions)
    return written_ND


def _bucket_maker(
    state: State, kind: str, name: str, now: ModelConfig, to: ModelConfig
) -> Callable[[], torch.Tensor]:
    sides = 2 if name.startswith("encoder") else 1
    new = axis_size(to, "buckets") // sides

    def make() -> torch.Tensor:
        old = state.read(f"{kind}/{name}")
        parts = []
        for side in old.chunk(sides):
            fill = side[-1:]
            if power(kind):
                fill = old.mean(0, keepdim=True) * kind.endswith("exp_avg_sq")
            parts += [side, fill.expand(new - len(side), -1)]
        return torch.cat(parts)

    return make
